"""The settings of an unlearning run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ccu_fast import check
from ccu_fast.data.paired import PairedData

ROLES = ("class", "instances", "pairs")
KEEPS = ("exact", "trained")
FOR_A_CLASS = {"neighbours": 0.2, "dampen": 8.0}  # what None stands for


@dataclass(frozen=True)
class Budget:
    """What a method may spend; the same for every method that is compared.

    Attributes:
        steps: optimiser steps, at least 1.
        learning_rate: of Adam, > 0.
        batch: items of the forget set, and as many of the retain set, in a step (fewer where a set is smaller).
        retain_per_forget: steps, each with a fresh retain batch, before the forget batch changes.

    >>> ccu_fast.unlearn.Budget(steps=100).batch
    128
    """

    steps: int = check.field(40, "Optimiser steps.", low=1)
    learning_rate: float = check.field(2e-3, "Of Adam.", low=1e-12)
    batch: int = check.field(128, "Items of each set in a step.", low=1)
    retain_per_forget: int = check.field(1, low=1)

    def __post_init__(self) -> None:
        check.fields(self)


@dataclass(frozen=True)
class UnlearnConfig:
    """How CCU unlearns. The defaults were chosen on digits-halves and digit-views, seeds from 100 on.

    Attributes:
        forget: "class" when the forget set is everything the model knows of its classes, "instances" when the
            classes stay and only these items go, "pairs" for items without labels.
        forgetting, retention, separation, task: weights ≥ 0 of the losses (a), (b) and (c) and of the cross-entropy
            on the retain set; 0 leaves a loss out.
        keep: "exact" leaves every parameter as it is that the other modality's embeddings or head depend on, and with
            them that modality; (b) is then nothing to learn. "trained" trains them too, held by (b).
        anchor: weight ≥ 0 of a part of (b) that holds embeddings to the frozen ones: the visual ones of the retain set
            and, where they are trained, the other modality's of all items.
        neighbours: weight ≥ 0 of the pull of each forgotten item towards where the retained item lies that looks most
            like it (:func:`ccu_fast.unlearn.neighbour_loss`); 0 for none. None: 0.2 for a class, else 0.
        temperature: > 0, of the three losses.
        forgotten_weight: > 0, how much forgotten items count among the negatives of (c).
        ceiling: q in [0, 1], for instances and pairs: no item is to be told with more certainty than the q-quantile of
            unseen items is; what is below that is drawn up with a fifth of the weight (:mod:`ccu_fast.unlearn.unseen`).
            None: each item is brought to a level of its own.
        group: items with equal ``ids // group`` are views of one thing: in (a), where instances or pairs are forgotten,
            what they meant is the thing; at least 1.
        dampen: α of the dampening before the first step (:mod:`ccu_fast.unlearn.baselines.ssd`); 0 for none. None: 8
            for a class, else 0.
        dampen_items: of both sets together, that its importances are taken from; at least 2.
        bank: frozen keys drawn once, in (a) besides those of the batch, in (b) in their place; 0 for none.
        trainable: shell patterns of the names of parameters that may change.
        saliency: in (0, 1], the share of weights that may change: those the forget set depends on most; 1 for all.
        lora: rank ≥ 1 of what is added to the weights of the linear layers of the visual modality and its heads, of
            those that ``trainable`` matches; nothing else then changes (:mod:`ccu_fast.unlearn.lora`), and ``dampen``
            is 0. None: whole weights are trained.
        budget: steps, learning rate and batch.
        early_stop: with a held-out set, stop at the first check where the items to forget are treated as unseen
            and the rest is intact; see :class:`HeldOut`.
        seed: of the batches, the bank and the sample for dampening, at least 0.

    >>> ccu_fast.unlearn.UnlearnConfig(forget="instances").temperature
    0.2
    """

    forget: str = check.field("class", allowed=ROLES)
    forgetting: float = check.field(1.0, low=0)
    retention: float = check.field(1.0, low=0)
    separation: float = check.field(1.0, low=0)
    task: float = check.field(1.0, low=0)
    keep: str = check.field("exact", allowed=KEEPS)
    anchor: float = check.field(0.0, low=0)
    neighbours: float | None = check.field(
        None,
        "Weight of the pull to the retained item most alike; if not given as set, or 0.2 of a class, else 0.",
        low=0,
    )
    temperature: float = check.field(0.2, low=1e-6)
    forgotten_weight: float = check.field(0.1, low=1e-6)
    ceiling: float | None = check.field(
        None,
        "Not of a class: quantile of unseen items that no item is to exceed; if not given as set, or own levels.",
        low=0,
        high=1,
    )
    group: int = check.field(1, low=1)
    dampen: float | None = check.field(None, low=0)
    dampen_items: int = check.field(600, low=2)
    bank: int = check.field(0, low=0)
    trainable: tuple[str, ...] = check.field(
        ("*",), "Pattern of names of parameters that may change; may be repeated; if not given as set, or all."
    )
    saliency: float = check.field(1.0, low=1e-9, high=1)
    lora: int | None = check.field(
        None, "Rank of what is added to linear layers; if not given as set, or whole weights.", low=1
    )
    budget: Budget = field(default_factory=Budget)
    early_stop: bool = check.field(False, "Stop once the forget set is as unseen; needs unseen items.")
    seed: int = check.field(0, "Of the batches.", low=0)

    def __post_init__(self) -> None:
        check.fields(self)
        if not isinstance(self.trainable, (list, tuple)) or not all(isinstance(p, str) for p in self.trainable):
            raise TypeError(f"trainable: expected a sequence of patterns, got {self.trainable!r}")
        object.__setattr__(self, "trainable", tuple(self.trainable))
        if self.ceiling is not None and self.forget == "class":
            raise ValueError(f"ceiling: expected none for a class, whose items have no levels, got {self.ceiling:g}")
        if self.lora is not None and (self.dampen or self.saliency != 1):
            name, value, free = ("dampen", self.dampen, 0) if self.dampen else ("saliency", self.saliency, 1)
            raise ValueError(
                f"{name}: expected {free} with lora, which adds a matrix of low rank and no more, got {value}"
            )
        if not isinstance(self.budget, Budget):
            raise TypeError(f"budget: expected a Budget, got {type(self.budget).__name__}")

    def used(self, name: str) -> Any:
        """The value of a setting, or what None stands for."""
        value = getattr(self, name)
        if name == "dampen" and self.lora is not None:
            return 0.0
        if value is None and name in FOR_A_CLASS:
            return FOR_A_CLASS[name] if self.forget == "class" else 0.0
        return value


@dataclass(frozen=True)
class HeldOut:
    """When to stop: as soon as the forget set looks unseen and the rest is intact.

    That is at the first check where the visual accuracy on the forget set is at most ``level`` and each of the
    accuracies on ``retain`` is at most ``slack`` below the original's (:func:`ccu_fast.unlearn.loop.right_shares` of
    both).

    Attributes:
        retain: held-out items of the classes that stay.
        level: 0 for a class; for instances the original's visual accuracy on held-out items, which is how it treats
            what it has not seen.
        slack: ≥ 0.
        every: steps between two checks, at least 1.

    Raises:
        TypeError, ValueError: slack or every out of bounds.

    >>> data = ccu_fast.unlearn.PairedData(torch.rand(8, 3), torch.rand(8, 3), torch.arange(8) % 4)
    >>> ccu_fast.unlearn.HeldOut(retain=data, level=0.0).slack
    0.01
    """

    retain: PairedData
    level: float
    slack: float = check.field(0.01, low=0)
    every: int = check.field(5, low=1)

    def __post_init__(self) -> None:
        check.fields(self)
