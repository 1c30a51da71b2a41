"""Noise: PGD steps that make the surrogate's loss smaller (or larger), and random noise as a control."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ccu_fast.losses.functional import info_nce
from ccu_fast.mem.surrogate import frozen
from ccu_fast.mem.views import Views
from ccu_fast.models.dual_encoder import DualEncoder
from ccu_fast.models.within import within
from ccu_fast.ops.pgd_step.api import pgd_step_


def random_noise(shape: Sequence[int], eps: int, rng: torch.Generator) -> Tensor:
    """Uniform in {−eps, …, eps}: int16, the control for error-minimising noise."""
    return torch.randint(-eps, eps + 1, tuple(shape), generator=rng, dtype=torch.int16)


def within_pixels(images: Tensor, noise: Tensor) -> Tensor:
    """Noise cut so that uint8 images with it stay in 0..255: int8."""
    return ((images.short() + noise).clamp(0, 255) - images.short()).to(torch.int8)


def pgd(
    model: DualEncoder,
    images: Tensor | Views,
    noise: Tensor,
    text: Tensor,
    *,
    eps: int,
    step: int,
    steps: int,
    maximise: bool = False,
    encode: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``steps`` times ``noise ← clip(noise − step·sign(∂L/∂noise))``, L = symmetric InfoNCE of one batch.

    The clip keeps |noise| ≤ eps and images + noise within 0..255: what is optimised is what can be stored. All
    quantities are integers in 1/255, so rounding to uint8 loses nothing. Where the gradient is NaN no step is made.

    Args:
        model: the surrogate; its weights get no gradient.
        images: uint8 ``[N, C, H, W]``; or views of pictures that keep their size: the steps go through the windows in
            turn, and the clip at 0..255 is part of L.
        noise: int8 ``[N, C, H, W]``, or ``[1, C, H, W]`` for one noise that all images share: its gradient is that of
            the whole batch, and the clip at 0..255 is part of L. With views H×W is the grid.
        text: ``[N, D]`` text embeddings, or ``[steps, N, D]`` when each step has its own; no gradient.
        eps, step: in 1/255.
        steps: 0 or more.
        maximise: step the other way.
        encode: takes the place of ``model.encode_image`` (compiled, say).

    Returns:
        The new noise, int8; the image features ``[N, D]`` that the last step started from, None without a step.
    """
    encode = model.encode_image if encode is None else encode
    dtype = model.embedding_matrix.dtype
    # Half precision cannot hold 0..255 in steps of one.
    wide = torch.promote_types(dtype, torch.float32)
    delta = noise.to(wide)
    base = torch.empty(0) if isinstance(images, Views) else images.to(wide)
    free = isinstance(images, Views) or len(noise) != len(images)
    anchor = torch.zeros_like(delta) if free else base
    lower, upper = (-255.0, 255.0) if free else (0.0, 255.0)
    text, image = text.detach(), None
    with frozen(model):
        scale = model.scale.detach()
        for i in range(steps):
            delta.requires_grad_(True)
            if isinstance(images, Views):
                shown = images.shown(delta, i % len(images))
            else:
                shown = within(base + delta, 0, 255) if free else base + delta
            image = encode((shown / 255).to(dtype))
            loss = info_nce(image, text[i] if text.ndim == 3 else text, scale=scale)
            (grad,) = torch.autograd.grad(-loss if maximise else loss, delta)
            delta, image = delta.detach(), image.detach()
            # "zero": looking for NaN would wait for the device at every step; the round's loss shows it.
            pgd_step_(
                delta, grad, anchor, step=float(step), eps=float(eps), lower=lower, upper=upper, nan_policy="zero"
            )
    return delta.to(torch.int8), image
