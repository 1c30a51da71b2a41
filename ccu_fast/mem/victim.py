"""The victim: a model trained from scratch on published pairs, watched on clean test data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.mem.surrogate import ModelFactory, batches, fresh, generator, optimizer_for, pixels, train_step
from ccu_fast.mem.triggers import trim
from ccu_fast.models.dual_encoder import DualEncoder
from ccu_fast.runs.progress import Progress, silent


@dataclass(frozen=True)
class Recipe:
    """How a victim is trained: AdamW, linear warm-up of one epoch, then cosine to zero, no augmentation.

    Attributes:
        epochs: passes over the pairs, at least 1.
        batch: pairs in a batch, at least 2.
        lr: the highest learning rate, ≥ 0.
        weight_decay: of the matrices, ≥ 0.
        same_captions: pairs of a batch with equal captions are no negatives of each other.

    >>> ccu_fast.mem.Recipe(epochs=3).batch
    128
    """

    epochs: int = check.field(15, "Of each victim.", low=1)
    batch: int = check.field(128, "Pairs in a batch.", low=2)
    lr: float = check.field(1e-3, "Learning rate.", low=0.0)
    weight_decay: float = check.field(0.1, low=0.0)
    same_captions: bool = check.field(False, "Pairs with equal captions are no negatives of each other in training.")

    def __post_init__(self) -> None:
        check.fields(self)


@dataclass(frozen=True)
class Victim:
    """A trained victim.

    Attributes:
        model: after the last epoch.
        train_loss: mean InfoNCE of each epoch.
        curve: what ``evaluate`` returned after each epoch.

    >>> victim = ccu_fast.mem.Victim(torch.nn.Identity(), [2.0, 1.5], [{"i2t_r1": 0.1}, {"i2t_r1": 0.4}])
    >>> max(epoch["i2t_r1"] for epoch in victim.curve)
    0.4
    """

    model: DualEncoder
    train_loss: list[float]
    curve: list[dict[str, Any]]

    def last_and_best(self) -> dict[str, dict[str, Any]]:
        """The last epoch and that with the highest R@1 (mean of both directions), each with its number "epoch"."""
        best = max(range(len(self.curve)), key=lambda i: self.curve[i]["i2t_r1"] + self.curve[i]["t2i_r1"])
        return {
            "last": {"epoch": len(self.curve), **self.curve[-1]},
            "best": {"epoch": best + 1, **self.curve[best]},
        }


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

    Returns:
        :class:`Victim`.

    Raises:
        TypeError, ValueError: images of another dtype, fewer than two of them, or tokens that do not fit them.

    Source: the training of CLIP, Radford et al. 2021 (arXiv 2103.00020), fig. 3.

    >>> from ccu_fast.models.dual_encoder import SmallDualEncoder
    >>> images, tokens = torch.zeros(2, 1, 16, 64, dtype=torch.uint8), torch.tensor([[1, 3, 2], [1, 4, 2]])
    >>> new, recipe = lambda: SmallDualEncoder(5, eot=2, width=32), ccu_fast.mem.Recipe(epochs=2)
    >>> len(ccu_fast.mem.train_victim(images, tokens, new, lambda model: {}, eot=2, recipe=recipe).curve)
    2
    """
    recipe = Recipe() if recipe is None else recipe
    check.tensor("images", images, dtypes=(torch.uint8,), ndim=4)
    check.tensor("tokens", tokens, dtypes=(torch.int64,), ndim=2)
    if len(tokens) != len(images) or len(images) < 2:
        raise ValueError(f"tokens: expected one row for each of at least 2 images, got {len(tokens)} and {len(images)}")
    device = torch.device(device)
    model = fresh(factory, seed, "victim", device)
    optimizer = optimizer_for(model, recipe.lr, recipe.weight_decay)
    rng = generator(seed, "victim batches")
    warm_up = math.ceil(len(images) / recipe.batch)
    total = warm_up * recipe.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * (step / total))))
    )
    train_loss: list[float] = []
    curve: list[dict[str, Any]] = []
    for epoch in range(recipe.epochs):
        progress(stage, epoch, recipe.epochs, f"train loss {train_loss[-1]:.3f}" if train_loss else "")
        losses = []
        for rows in batches(len(images), recipe.batch, rng):
            shown, read = pixels(images[rows].to(device)), trim(tokens[rows], eot).to(device)
            losses.append(train_step(model, optimizer, shown, read, same_captions=recipe.same_captions))
            schedule.step()
        train_loss.append(float(torch.stack(losses).mean()))
        with torch.no_grad():
            curve.append(evaluate(model))
    progress(stage, recipe.epochs, recipe.epochs, f"train loss {train_loss[-1]:.3f}")
    return Victim(model, train_loss, curve)
