"""sentence-transformers' ranking losses that gather over devices, patched: on two processes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.patch.test_sentence_transformers import Towers, forward, losses, stays_with_the_library, variant
from tests.support.drop_in import counted, record, unit
from tests.support.forked import on_ranks
from tests.support.tolerance import assert_three_way

WORLD, N, WIDTH = 2, 7, 12
PLAIN = ("MultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss")
CACHED = tuple(f"Cached{kind}" for kind in PLAIN)


def columns_of(rank: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    """Columns of a rank, with the values of bf16."""
    made = (1.5 * unit(N, WIDTH, seed=10 * rank + i, dtype=torch.bfloat16) for i in range(columns))
    return [t.to(dtype).requires_grad_() for t in made]


def of_rank(loss: Any, rank: int, columns: int, dtype: torch.dtype, autocast: bool = False) -> list[Tensor]:
    """Loss of this rank's queries, and what all ranks' losses give this rank's embeddings as gradients."""
    leaves = columns_of(rank, columns, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if not hasattr(loss, "calculate_loss"):
            value = forward(loss, leaves)
            return [value.detach(), *torch.autograd.grad(value, leaves)]
        reps = [[t.detach().requires_grad_() for t in column.split(3)] for column in leaves]
        value = loss.calculate_loss(reps, with_backward=True)
        return [value, *(torch.cat([t.grad for t in column if t.grad is not None]) for column in reps)]


def same_on_ranks(loss: Any, columns: int, tmp_path: Path, dtype: torch.dtype, autocast: bool = False) -> None:
    def work(rank: int) -> Any:
        theirs = of_rank(loss, rank, columns, dtype, autocast)
        with counted("sentence_transformers") as calls:
            ours = of_rank(loss, rank, columns, dtype, autocast)
        return calls.kernels, ours, theirs, of_rank(loss, rank, columns, torch.float64)

    for kernels, *found in on_ranks(WORLD, tmp_path, work):
        assert kernels > 0
        for i, (ours, theirs, exact) in enumerate(zip(*found, strict=True)):
            assert ours.dtype == theirs.dtype
            assert_three_way(f"value {i}", ours, theirs, exact)


@pytest.mark.parametrize("columns", [2, 4], ids=["pairs", "two_hard_negatives"])
@pytest.mark.parametrize("kind", [*PLAIN, *CACHED])
def test_the_loss_has_the_same_numbers(kind: str, columns: int, tmp_path: Path) -> None:
    loss = variant("usual", kind, gather_across_devices=True, **({"mini_batch_size": 4} if kind in CACHED else {}))
    same_on_ranks(loss, columns, tmp_path, torch.float32)
    record("sentence_transformers", check="numbers")


@pytest.mark.parametrize("columns", [2, 4], ids=["pairs", "two_hard_negatives"])
@pytest.mark.parametrize("name", ["gte", "queries", "joint", "in_batch", "all", "per_direction, in_batch"])
def test_directions_and_penalties(name: str, columns: int, tmp_path: Path) -> None:
    same_on_ranks(variant(name, gather_across_devices=True), columns, tmp_path, torch.float32)
    record("sentence_transformers", check="numbers")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [*PLAIN, CACHED[0]])
def test_autocast(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    loss = variant("usual", kind, gather_across_devices=True)
    same_on_ranks(loss, 2, tmp_path, dtype, autocast=True)
    assert loss.gather_across_devices is True


@pytest.mark.parametrize("kind", PLAIN)
def test_one_process_is_all_there_is(kind: str) -> None:
    loss, given = variant("usual", kind, gather_across_devices=True), columns_of(0, 3, torch.float32)
    theirs = forward(loss, given)
    with counted("sentence_transformers") as calls:
        torch.testing.assert_close(forward(loss, given), theirs)
    assert calls.kernels > 0


def test_a_gather_of_a_user_s_own_stays_with_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = losses().MultipleNegativesRankingLoss(Towers(), gather_across_devices=True)
    module = inspect.getmodule(type(loss))
    monkeypatch.setattr(module, "all_gather_with_grad", lambda t: t)
    stays_with_the_library(lambda columns: forward(loss, columns))
