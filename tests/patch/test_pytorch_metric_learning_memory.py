"""What pytorch-metric-learning wraps around its losses, patched: a memory, a second view, other ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ccu_fast
from tests.patch.test_pytorch_metric_learning import KINDS, TARGET, labels, make
from tests.support.drop_in import counted, left_alone, library, record, same_numbers, speed, unit
from tests.support.forked import on_ranks
from tests.support.tolerance import assert_three_way

WIDTH = 12


def memory(kind: str, *, size: int = 50, miner: Any = None, **options: Any) -> Any:
    losses = library("pytorch_metric_learning.losses")
    return losses.CrossBatchMemory(make(kind, **options), WIDTH, memory_size=size, miner=miner)


def batch(step: int, dtype: torch.dtype = torch.float32, n: int = 12) -> tuple[Tensor, Tensor]:
    return unit(n, WIDTH, seed=step, dtype=dtype).requires_grad_(), labels(40, 5)[(7 * step + torch.arange(n)) % 40]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 2, 4, 9], ids=["empty", "half full", "over the end", "full"])
def test_a_memory_has_the_same_numbers(kind: str, steps: int) -> None:
    """Of each row its own copy in the memory is left out, wherever the memory holds it."""

    def problem(dtype: torch.dtype) -> Any:
        loss = memory(kind)
        for step in range(steps):
            loss(*batch(step, dtype))
        x, own = batch(steps, dtype)
        return lambda: loss(x, own), [x]

    same_numbers(TARGET, problem)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_go_into_the_memory(kind: str) -> None:
    """enqueue_mask: the others are compared with all of it."""
    mask = torch.arange(24) % 3 == 0

    def problem(dtype: torch.dtype) -> Any:
        loss = memory(kind)
        loss(*batch(1, dtype))
        x, own = batch(2, dtype, n=24)
        return lambda: loss(x, own, enqueue_mask=mask), [x]

    same_numbers(TARGET, problem)


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_is_filled_as_the_library_fills_it(kind: str) -> None:
    theirs, ours = memory(kind), memory(kind)
    for step in range(9):
        x, own = batch(step)
        options = {"enqueue_mask": torch.arange(12) < 6} if step % 3 == 2 else {}
        expected = theirs(x, own, **options)
        with counted(TARGET) as calls:
            found = ours(x, own, **options)
        assert calls.kernels > 0
        torch.testing.assert_close(found, expected)
        assert (ours.queue_idx, ours.has_been_filled) == (theirs.queue_idx, theirs.has_been_filled)
    assert torch.equal(ours.embedding_memory, theirs.embedding_memory)
    assert torch.equal(ours.label_memory, theirs.label_memory)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["nothing alike", "all alike", "no copies but its own"])
def test_a_memory_with_nothing_to_compare(kind: str, case: str) -> None:
    x, _ = batch(0)
    own = torch.zeros(12, dtype=torch.int64) if case == "all alike" else torch.arange(12)

    def values() -> list[Tensor]:
        loss = memory(kind)
        loss(x, own if case == "all alike" else own + 50)
        return [loss(x, own), loss(x, own if case == "no copies but its own" else own + 100)]

    before = values()
    with ccu_fast.patch.applied(TARGET):
        for ours, theirs in zip(values(), before, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_who_asks_a_memory_for_its_pairs_gets_them(kind: str) -> None:
    """Nobody but the loss in the memory's own forward is given something else."""
    loss = memory(kind)
    x, own = batch(0)
    loss(x, own)
    ask = functools.partial(loss.create_indices_tuple, x, own, loss.embedding_memory[:12], loss.label_memory[:12])
    theirs = ask(None, True)
    with counted(TARGET) as calls:
        ours = ask(None, True)
        loss(x, own)
        after = ask(None, True)
        with pytest.raises(TypeError, match=r"forward\(\) missing 1 required positional argument: 'labels'"):
            loss(x)
        assert isinstance(ask(None, False), tuple)
    assert calls.kernels > 0
    for found in (ours, after):
        assert isinstance(found, tuple)
        assert len(found) == 4
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def hooked(loss: Any) -> Any:
    """Somebody who looks at what the loss is called with."""
    loss.loss.register_forward_pre_hook(lambda module, given: None)
    return loss


def overridden(loss: Any, name: str) -> Any:
    own = getattr(type(loss), name)

    @functools.wraps(own)
    def users(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    loss.__class__ = type("Users", (type(loss),), {name: users})
    return loss


def mined() -> Any:
    return library("pytorch_metric_learning.miners").MultiSimilarityMiner()


PAIRS = tuple(torch.tensor(v) for v in ([0, 1], [2, 3], [4, 5], [6, 7]))
MEMORIES: dict[str, Callable[[str], Callable[[Tensor, Tensor], Any]]] = {
    "mined pairs": lambda kind: memory(kind, miner=mined()),
    "pairs of the user's": lambda kind: functools.partial(memory(kind), indices_tuple=PAIRS),
    "somebody looks on": lambda kind: hooked(memory(kind)),
    "its list of pairs is another": lambda kind: overridden(memory(kind), "create_indices_tuple"),
    "its order is another": lambda kind: overridden(memory(kind), "add_to_memory"),
    "another distance": lambda kind: memory(kind, distance=library("pytorch_metric_learning.distances").LpDistance()),
    "one row, which it compares with itself": lambda kind: lambda x, own: memory(kind)(x[:1], own[:1]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", MEMORIES)
def test_a_memory_that_is_not_understood_stays_with_the_library(kind: str, case: str) -> None:
    x, own = unit(12, WIDTH), labels(12, 3)
    left_alone(TARGET, lambda: MEMORIES[case](kind)(x, own))


def test_another_loss_in_a_memory_gets_its_list_of_pairs() -> None:
    losses = library("pytorch_metric_learning.losses")
    x, own = unit(12, WIDTH), labels(12, 3)
    for kind in ("ContrastiveLoss", "MultiSimilarityLoss", "CircleLoss"):
        left_alone(TARGET, lambda kind=kind: losses.CrossBatchMemory(getattr(losses, kind)(), WIDTH)(x, own))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["remove_self_comparisons", "not_self_comparisons"])
def test_a_user_s_own_rule_for_pairs_stays_with_the_library(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = library("pytorch_metric_learning.utils.loss_and_miner_utils")
    original = getattr(pairs, name)
    monkeypatch.setattr(pairs, name, lambda *args: original(*args))
    left_alone(TARGET, lambda: memory(kind)(unit(12, WIDTH), labels(12, 3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_two_views_without_labels(kind: str, symmetric: bool) -> None:
    loss = library("pytorch_metric_learning.losses").SelfSupervisedLoss(make(kind), symmetric=symmetric)

    def problem(dtype: torch.dtype) -> Any:
        views = [unit(15, WIDTH, seed=i, dtype=dtype).requires_grad_() for i in range(2)]
        return lambda: loss(*views), views

    same_numbers(TARGET, problem)


WORLD = 2


def of_rank(rank: int, kind: str, case: str, dtype: torch.dtype) -> list[Tensor]:
    """Loss and gradients of one rank's rows, as the library has them."""
    wrapper = library("pytorch_metric_learning.utils.distributed").DistributedLossWrapper
    x, y = (unit(9, WIDTH, seed=10 * rank + i, dtype=dtype).requires_grad_() for i in range(2))
    own = labels(WORLD * 9, 4)[9 * rank :][:9]
    if case == "memory":
        loss = wrapper(memory(kind))
        loss(x.detach(), own)
    else:
        loss = wrapper(make(kind), efficient=case != "all rows")
    # The labels of half of the second view are others: such a row is no positive of itself.
    second = {"ref_emb": y, "ref_labels": (own + torch.arange(9) % 2) % 4} if case == "second view" else {}
    value = loss(x, own, **second)
    return [value.detach(), *torch.autograd.grad(value, [x, *([y] if second else [])])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["efficient", "second view", "all rows", "memory"])
def test_the_rows_of_several_ranks(kind: str, case: str, tmp_path: Path) -> None:
    library("pytorch_metric_learning.utils.distributed")

    def work(rank: int) -> Any:
        theirs, exact = (of_rank(rank, kind, case, dtype) for dtype in (torch.float32, torch.float64))
        with counted(TARGET) as calls:
            ours = of_rank(rank, kind, case, torch.float32)
        return calls.kernels, ours, theirs, exact

    for kernels, *found in on_ranks(WORLD, tmp_path, work):
        assert kernels > 0
        for ours, theirs, exact in zip(*found, strict=True):
            assert_three_way(f"{kind} {case}", ours, theirs, exact)
    record(TARGET, check="numbers")


def test_ranks_whose_pairs_are_given_stay_with_the_library(tmp_path: Path) -> None:
    distributed = library("pytorch_metric_learning.utils.distributed")

    def work(rank: int) -> None:
        x, own = unit(9, WIDTH, seed=rank), labels(18, 4)[9 * rank :][:9]
        for kind in KINDS:
            loss = distributed.DistributedLossWrapper(make(kind), efficient=True)
            left_alone(TARGET, lambda loss=loss: loss(x, own, PAIRS))
            # Of one row on each rank the library does not leave out the row itself.
            left_alone(TARGET, lambda loss=loss: loss(x[:1], own[:1]))
        miner = distributed.DistributedMinerWrapper(mined(), efficient=True)
        left_alone(TARGET, lambda: loss(x, own, miner(x, own)))

    on_ranks(WORLD, tmp_path, work)


def test_speed() -> None:
    # The library compares every positive pair with every negative one.
    for kind, n, size, classes in (("NTXentLoss", 64, 1024, 256), ("SupConLoss", 256, 8192, 256)):
        loss = memory(kind, size=size)
        for step in range(size // n):
            loss.add_to_memory(unit(n, WIDTH, seed=step), torch.arange(n * step, n * step + n) % classes, n)
        x, own = unit(n, WIDTH, seed=99).requires_grad_(), torch.arange(n) % classes
        speed(
            TARGET,
            f"CrossBatchMemory of {size} rows around {kind}, forward + backward, batch of {n}, {classes} classes",
            lambda: loss(x, own).backward(),  # noqa: B023
            rounds=3,
        )
