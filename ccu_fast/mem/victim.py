"""The victim: a model trained from scratch on published pairs, watched on clean test data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ccu_fast import check
from ccu_fast.mem.surrogate import ModelFactory, batches, fresh, generator, optimizer_for, pixels, train_step
from ccu_fast.mem.tokenizer import trim
from ccu_fast.models.dual_encoder import DualEncoder
from ccu_fast.runs.progress import Progress, silent


@dataclass(frozen=True)
class Recipe:
    """How a victim is trained: AdamW, linear warm-up of one epoch, then cosine to zero, no augmentation."""

    epochs: int = 15
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        check.integer("epochs", self.epochs, low=1)
        check.integer("batch", self.batch, low=2)
        check.number("lr", self.lr, low=0.0)
        check.number("weight_decay", self.weight_decay, low=0.0)


@dataclass(frozen=True)
class Victim:
    """A trained victim.

    Attributes:
        model: after the last epoch.
        train_loss: mean InfoNCE of each epoch.
        curve: what ``evaluate`` returned after each epoch.
    """

    model: DualEncoder
    train_loss: list[float]
    curve: list[dict[str, Any]]


def train_victim(
    images: Tensor,
    tokens: Tensor,
    factory: ModelFactory,
    evaluate: Callable[[DualEncoder], dict[str, Any]],
    *,
    eot: int,
    recipe: Recipe | None = None,
    seed: int = 0,
    stage: str = "victim",
    progress: Progress = silent,
    device: torch.device | str = "cpu",
) -> Victim:
    """Train a model with random weights on pairs as published, with symmetric InfoNCE.

    Weights and batches depend on the seed alone, so victims of different methods differ in their data only.

    Args:
        images: uint8 ``[N, C, H, W]``.
        tokens: int64 ``[N, L]``, the published captions.
        factory: makes the model.
        evaluate: called after each epoch without gradients.
        eot: id of the token that ends a caption.
        recipe: epochs, batch size, optimiser.
        seed: the same seed gives the same bits.
        stage: what progress calls it.
        progress: called as ``progress(stage, done, total, note)``.
        device: of the model; images and tokens stay where they are and go there batch by batch.
    """
    recipe = Recipe() if recipe is None else recipe
    check.tensor("images", images, dtypes=(torch.uint8,), ndim=4)
    check.tensor("tokens", tokens, dtypes=(torch.int64,), ndim=2)
    if len(tokens) != len(images) or len(images) < 2:
        raise ValueError(f"tokens: expected one row for each of at least 2 images, got {len(tokens)} and {len(images)}")
    device = torch.device(device)
    model = cast(DualEncoder, cast(nn.Module, fresh(factory, seed, "victim")).to(device))
    optimizer = optimizer_for(model, recipe.lr, recipe.weight_decay)
    rng = generator(seed, "victim batches")
    warm_up = math.ceil(len(images) / recipe.batch)
    total = warm_up * recipe.epochs
    step = 0
    train_loss: list[float] = []
    curve: list[dict[str, Any]] = []
    for epoch in range(recipe.epochs):
        progress(stage, epoch, recipe.epochs, f"train loss {train_loss[-1]:.3f}" if train_loss else "")
        losses = []
        for rows in batches(len(images), recipe.batch, rng):
            done = step / total
            rate = recipe.lr * min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * done)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            shown, read = pixels(images[rows].to(device)), trim(tokens[rows], eot).to(device)
            losses.append(train_step(model, optimizer, shown, read))
            step += 1
        train_loss.append(float(torch.stack(losses).mean()))
        with torch.no_grad():
            curve.append(evaluate(model))
    progress(stage, recipe.epochs, recipe.epochs, f"train loss {train_loss[-1]:.3f}")
    return Victim(model, train_loss, curve)
