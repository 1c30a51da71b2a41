"""What is forgotten: a class, or a random share of the training items."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ccu_fast import check
from ccu_fast.data.halves import Halves
from ccu_fast.data.paired import PairedData

SCENARIOS = ("class", "instances")


@dataclass(frozen=True)
class Scenario:
    """Forget and retain set with the unseen items each is judged by.

    Attributes:
        name: "class" or "instances".
        train: the original training set, forget and retain together.
        forget, retain: its two parts.
        retain_test, retain_held_out: unseen items of the classes that stay.
        forget_test: unseen items of the forgotten class; None when instances are forgotten.
    """

    name: str
    train: PairedData
    forget: PairedData
    retain: PairedData
    retain_test: PairedData
    retain_held_out: PairedData
    forget_test: PairedData | None


def make_scenario(
    halves: Halves, name: str, *, forget_class: int = 3, forget_share: float = 0.1, seed: int = 0, group: int = 1
) -> Scenario:
    """Split for forgetting ``forget_class``, or ``forget_share`` of the training items drawn at random.

    Items with equal ``ids // group`` are views of one thing: they are drawn together.

    Raises:
        ValueError: unknown name, a class that does not occur, a share that leaves one side empty.
    """
    check.one_of("scenario", name, SCENARIOS)
    train, test, held_out = halves.train, halves.test, halves.held_out
    if name == "class":
        known = train.labels.unique().tolist()
        if forget_class not in known:
            raise ValueError(f"forget_class: expected one of {known}, got {forget_class}")
        gone, gone_test, gone_held_out = (part.labels == forget_class for part in (train, test, held_out))
        return Scenario(
            name,
            train,
            train[gone],
            train[~gone],
            retain_test=test[~gone_test],
            retain_held_out=held_out[~gone_held_out],
            forget_test=test[gone_test],
        )
    things, thing_of = torch.unique(train.ids // group, return_inverse=True)
    count = round(check.number("forget_share", forget_share, low=0, high=1) * len(things))
    if not 0 < count < len(things):
        raise ValueError(f"forget_share: expected a share that leaves items on both sides, got {forget_share}")
    drawn = torch.zeros(len(things), dtype=torch.bool)
    drawn[torch.randperm(len(things), generator=torch.Generator().manual_seed(seed))[:count]] = True
    gone = drawn[thing_of]
    return Scenario(name, train, train[gone], train[~gone], test, held_out, None)
