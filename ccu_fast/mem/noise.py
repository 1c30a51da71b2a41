"""Error-minimising noise: PGD steps that make the surrogate's loss smaller."""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.losses import info_nce
from ccu_fast.mem.surrogate import frozen
from ccu_fast.models.dual_encoder import DualEncoder
from ccu_fast.noise import pgd_step_


def random_noise(images: Tensor, eps: int, rng: torch.Generator) -> Tensor:
    """Uniform in {−eps, …, eps}, cut to valid pixels: int8, the control for error-minimising noise."""
    noise = torch.randint(-eps, eps + 1, images.shape, generator=rng, dtype=torch.int16)
    return ((images.short() + noise).clamp(0, 255) - images.short()).to(torch.int8)


def add_noise(images: Tensor, noise: Tensor) -> Tensor:
    """uint8 + int8 → uint8. The noise of this package never leaves 0..255, so nothing is cut.

    Raises:
        ValueError: a sum outside 0..255 (the noise belongs to other images).
    """
    check.tensor("images", images, dtypes=(torch.uint8,))
    check.tensor("noise", noise, dtypes=(torch.int8,))
    check.shape("noise", noise, images.shape)
    total = images.short() + noise.short()
    if total.numel() and (int(total.min()) < 0 or int(total.max()) > 255):
        raise ValueError("noise: expected images + noise within 0..255, got noise that leaves the range")
    return total.to(torch.uint8)


def minimise_error(
    model: DualEncoder,
    images: Tensor,
    noise: Tensor,
    text: Tensor,
    *,
    eps: int,
    step: int,
    steps: int,
) -> Tensor:
    """``steps`` times ``noise ← clip(noise − step·sign(∂L/∂noise))``, L = symmetric InfoNCE of one batch.

    The clip keeps |noise| ≤ eps and images + noise within 0..255: what is optimised is what can be stored. All
    quantities are integers in 1/255, so rounding to uint8 loses nothing.

    Args:
        model: the surrogate; its weights get no gradient.
        images: uint8 ``[N, C, H, W]``.
        noise: int8 ``[N, C, H, W]``, where to start.
        text: ``[N, D]`` text embeddings, or ``[steps, N, D]`` when each step has its own; no gradient.
        eps, step: in 1/255.
        steps: 0 or more.

    Returns:
        The new noise, int8.
    """
    base = images.float()
    delta = noise.float()
    text = text.detach()
    with frozen(model):
        scale = model.scale.detach()
        for i in range(steps):
            delta.requires_grad_(True)
            target = text[i] if text.ndim == 3 else text
            loss = info_nce(model.encode_image((base + delta) / 255), target, scale=scale)
            (grad,) = torch.autograd.grad(loss, delta)
            delta = delta.detach()
            pgd_step_(delta, grad, base, step=float(step), eps=float(eps), lower=0.0, upper=255.0)
    return delta.to(torch.int8)
