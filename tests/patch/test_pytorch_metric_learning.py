"""pytorch-metric-learning's NTXentLoss and SupConLoss, patched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ccu_fast
from tests.support.drop_in import library, same_numbers, same_training, speed, train_towers, unit

KINDS = ("NTXentLoss", "SupConLoss")


def make(kind: str, **options: Any) -> Any:
    return getattr(library("pytorch_metric_learning.losses"), kind)(**options)


def labels(n: int, classes: int, *, lowest: int = 0) -> Tensor:
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(3)) + lowest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["several positives", "two views", "reference set", "negative labels", "dot product"])
def test_the_loss_has_the_same_numbers(kind: str, which: str) -> None:
    distances = library("pytorch_metric_learning.distances")
    options = {"distance": distances.DotProductSimilarity()} if which == "dot product" else {}
    n, m = 30, 21

    def problem(dtype: torch.dtype) -> Any:
        x = (1.3 * unit(n, 12, seed=1, dtype=dtype)).requires_grad_()
        loss = make(kind, **options)
        if which == "reference set":
            y = unit(m, 12, seed=2, dtype=dtype).requires_grad_()
            own, other = labels(n, 5), labels(m, 6)
            return lambda: loss(x, own, ref_emb=y, ref_labels=other), [x, y]
        own = torch.arange(n) % (n // 2) if which == "two views" else labels(n, 6)
        if which == "negative labels":
            own = own - 3
        return lambda: loss(x, own), [x]

    same_numbers("pytorch_metric_learning", problem)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["nothing alike", "all alike", "one anchor without negatives"])
def test_losses_with_nothing_to_compare(kind: str, case: str) -> None:
    x, y = unit(8, 6, seed=1), unit(5, 6, seed=2)
    own = {"nothing alike": torch.arange(8), "all alike": torch.zeros(8, dtype=torch.int64)}.get(case, labels(8, 2))
    other = {"nothing alike": torch.arange(5) + 100}.get(case, torch.zeros(5, dtype=torch.int64))

    def values() -> list[Tensor]:
        return [make(kind)(x, own), make(kind)(x, own, ref_emb=y, ref_labels=other)]

    before = values()
    with ccu_fast.patch.applied("pytorch_metric_learning"):
        for ours, theirs in zip(values(), before, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_mined_pairs_other_distances_and_reducers_stay_with_the_library() -> None:
    distances, reducers = (library(f"pytorch_metric_learning.{name}") for name in ("distances", "reducers"))
    x, own = unit(12, 6), labels(12, 3)
    pairs = tuple(torch.tensor(v) for v in ([0, 1], [2, 3], [4, 5], [6, 7]))
    calls = [
        lambda: make("NTXentLoss")(x, own, pairs),
        lambda: make("NTXentLoss", distance=distances.LpDistance())(x, own),
        lambda: make("NTXentLoss", reducer=reducers.AvgNonZeroReducer())(x, own),
    ]
    before = [call() for call in calls]
    with ccu_fast.patch.applied("pytorch_metric_learning"):
        assert all(torch.equal(call(), value) for call, value in zip(calls, before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same(kind: str) -> None:
    loss = make(kind, temperature=0.2)

    def train(steps: int) -> list[float]:
        own = torch.arange(24)  # the library compares every positive pair with every negative one
        return train_towers(lambda x, y, scale: loss(torch.cat([x[:24], y[:24]]), torch.cat([own, own])), steps)

    same_training("pytorch_metric_learning", train)


def test_speed() -> None:
    # The library compares every positive pair with every negative one: 2048 rows of 256 classes would take 60 GB.
    for kind, n, classes in (("NTXentLoss", 384, 192), ("SupConLoss", 2048, 256)):
        loss, x, own = make(kind), unit(n, 128).requires_grad_(), torch.arange(n) % classes
        speed(
            "pytorch_metric_learning",
            f"{kind} forward + backward, {n} rows of {classes} classes, D = 128",
            lambda: loss(x, own).backward(),  # noqa: B023
            rounds=3,
        )
