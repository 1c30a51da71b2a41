"""Models from random weights and the training step that surrogate and victim share."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ccu_fast.losses import info_nce
from ccu_fast.models.dual_encoder import DualEncoder

ModelFactory = Callable[[], DualEncoder]


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, purpose)."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{purpose}".encode()))


def fresh(factory: ModelFactory, seed: int, purpose: str) -> DualEncoder:
    """A model with random weights that depend on (seed, purpose) alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed}/{purpose}".encode()))
        return factory()


def optimizer_for(model: DualEncoder, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW; no decay on biases, norms and the logit scale."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), foreach=True)


def train_step(model: DualEncoder, optimizer: torch.optim.Optimizer, images: Tensor, tokens: Tensor) -> Tensor:
    """One step of symmetric InfoNCE on pixels in [0, 1] and token ids; the loss before it, detached."""
    optimizer.zero_grad(set_to_none=True)
    loss = info_nce(model.encode_image(images), model.encode_text(tokens), scale=model.scale)
    loss.backward()
    optimizer.step()
    return loss.detach()


def batches(n: int, size: int, rng: torch.Generator) -> list[Tensor]:
    """A random order of 0..n−1 cut into batches; a last batch of one joins its neighbour (InfoNCE needs two)."""
    parts = list(torch.randperm(n, generator=rng).split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        last = parts.pop()
        parts[-1] = torch.cat([parts[-1], last])
    return parts


def pixels(images: Tensor) -> Tensor:
    """uint8 → fp32 in [0, 1]."""
    return images.float() / 255


@contextmanager
def frozen(model: DualEncoder) -> Iterator[None]:
    """Attack steps differentiate inputs only: no weight gradients, and whatever required them before does again."""
    changed: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in changed:
            p.requires_grad_(False)
        yield
    finally:
        for p in changed:
            p.requires_grad_(True)
