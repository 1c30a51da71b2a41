"""Models from random weights and the training step that surrogate and victim share."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ccu_fast.losses.functional import info_nce
from ccu_fast.models.dual_encoder import DualEncoder

ModelFactory = Callable[[], DualEncoder]


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, purpose)."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{purpose}".encode()))


def fresh(factory: ModelFactory, seed: int, purpose: str, device: torch.device | str = "cpu") -> DualEncoder:
    """A model with random weights that depend on (seed, purpose) alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, purpose).initial_seed())
        model = factory()
    cast(nn.Module, model).to(device)
    return model


def optimizer_for(model: DualEncoder, lr: float, weight_decay: float, beta2: float = 0.98) -> torch.optim.AdamW:
    """AdamW; no decay on biases, norms and the logit scale."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # One pass over each weight and its moments, without temporaries; torch's other ways make about ten passes.
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=fused or None)


def train_step(
    model: DualEncoder,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    tokens: Tensor,
    average: Callable[[Iterable[nn.Parameter]], None] | None = None,
    *,
    same_captions: bool = False,
) -> Tensor:
    """One step of symmetric InfoNCE on pixels in [0, 1] and token ids; the loss before it, detached.

    ``average`` is called with the parameters between backward and step: where processes average their gradients. With
    ``same_captions`` pairs of the batch with equal rows of tokens are no negatives of each other.
    """
    optimizer.zero_grad(set_to_none=True)
    ids = tokens.unique(dim=0, return_inverse=True)[1] if same_captions else None
    options: dict[str, Any] = {} if ids is None else {"ids": ids, "positives": "own"}
    loss = info_nce(model.encode_image(images), model.encode_text(tokens), scale=model.scale, **options)
    loss.backward()
    if average is not None:
        average(model.parameters())
    optimizer.step()
    # A pass over noise or triggers, and a checkpoint, need the room of the gradients.
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def batches(n: int, size: int, rng: torch.Generator) -> list[Tensor]:
    """A random order of 0..n−1 cut into batches; a last batch of one joins its neighbour (InfoNCE needs two)."""
    parts = list(torch.randperm(n, generator=rng).split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        last = parts.pop()
        parts[-1] = torch.cat([parts[-1], last])
    return parts


def batch_count(n: int, size: int) -> int:
    """How many :func:`batches` there are."""
    whole, rest = divmod(n, size)
    return whole + (rest > 1 or (rest == 1 and not whole))


def pixels(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 → floating point in [0, 1]."""
    return images.to(dtype) / 255


@contextmanager
def frozen(model: DualEncoder) -> Iterator[None]:
    """Attack steps differentiate inputs only, on the function that is evaluated.

    No weight gradients, and evaluation mode; whatever required gradients or was training before does again.
    """
    changed: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in cast(nn.Module, model).modules() if m.training]
    try:
        for p in changed:
            p.requires_grad_(False)
        model.train(False)
        yield
    finally:
        for p in changed:
            p.requires_grad_(True)
        for module in training:
            module.training = True
