"""What a user can set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ccu_fast import check

ROLES = ("class", "instances", "pairs")

Progress = Callable[[str, int, int, str], None]
"""Called as progress(stage, done, total, note); may be None wherever it is taken."""


@dataclass(frozen=True)
class Budget:
    """What a method may spend; the same for every method that is compared.

    Attributes:
        steps: optimiser steps, at least 1.
        learning_rate: of Adam, > 0.
        batch: items of the forget set, and as many of the retain set, in a step (fewer where a set is smaller).
        retain_per_forget: steps, each with a fresh retain batch, before the forget batch changes.
    """

    steps: int = 60
    learning_rate: float = 1e-3
    batch: int = 128
    retain_per_forget: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "retain_per_forget"):
            check.integer(name, getattr(self, name), low=1)
        check.number("learning_rate", self.learning_rate, low=1e-12)


@dataclass(frozen=True)
class UnlearnConfig:
    """How CCU unlearns. The defaults were chosen on the held-out part of digits-halves.

    Attributes:
        forget: "class" when the forget set is everything the model knows of its classes, "instances" when the
            classes stay and only these items go.
        forgetting, retention, separation, task: weights ≥ 0 of the losses (a), (b) and (c) and of the cross-entropy
            on the retain set; 0 leaves a loss out.
        temperature: > 0, of the three losses.
        forgotten_weight: > 0, how much forgotten items count among the negatives of (c).
        budget: steps, learning rate and batch.
        early_stop: with a held-out set, stop at the first check where the items to forget are treated as unseen
            and the rest is intact; see :class:`ccu_fast.unlearn.loop.HeldOut`.
        seed: of the batches, at least 0.
    """

    forget: str = "class"
    forgetting: float = 3.0
    retention: float = 1.0
    separation: float = 1.0
    task: float = 1.0
    temperature: float = 0.2
    forgotten_weight: float = 0.1
    budget: Budget = field(default_factory=Budget)
    early_stop: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check.one_of("forget", self.forget, ROLES)
        for name in ("forgetting", "retention", "separation", "task"):
            check.number(name, getattr(self, name), low=0)
        for name in ("temperature", "forgotten_weight"):
            check.number(name, getattr(self, name), low=1e-6)
        check.integer("seed", self.seed, low=0)
        if not isinstance(self.budget, Budget):
            raise TypeError(f"budget: expected a Budget, got {type(self.budget).__name__}")
