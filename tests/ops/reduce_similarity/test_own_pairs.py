"""The sum over the pairs (i, i) alone: N dot products, not N² of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ccu_fast
from ccu_fast import SELF, reduce_similarity
from tests.support.oracle import Case, check, unit

SUM = (("sum", SELF),)
KEYS: dict[str, dict[str, Any]] = {
    "": {},
    "labels": {"row_labels": torch.tensor([0, -1, 0, 2, 1]), "col_labels": torch.tensor([0, 1, -1, 2, 1])},
    "limits": {"row_limits": torch.full((5,), -2.0)},
}


@pytest.mark.parametrize("keys", KEYS)
def test_is_the_diagonal(keys: str, engine: tuple[str, torch.dtype]) -> None:
    backend, dtype = engine
    case = Case(unit(5, 7), unit(5, 7), scale=3.0, bias=0.5, keys=KEYS[keys], rows=SUM, cols=SUM + SUM)
    check(case, backend, dtype)


@pytest.mark.parametrize("lead", [((3,), ()), ((), (3,)), ((2, 1), (3,))])
def test_of_banks(lead: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    x, y = unit(*lead[0], 5, 7), unit(*lead[1], 5, 7)
    (got,), (of_columns,) = reduce_similarity(x, y, scale=2.0, rows=SUM, cols=SUM)
    torch.testing.assert_close(got, 2.0 * (x * y).sum(-1))
    assert torch.equal(got, of_columns)
    got.zero_()
    assert of_columns.any(), "results share no memory"


def test_what_is_ignored_has_no_gradient_whatever_it_holds() -> None:
    x, y = unit(4, 3).float(), unit(4, 3).float()
    x[1] = torch.nan
    leaves = [x.requires_grad_(), y.requires_grad_()]
    (own,), _ = reduce_similarity(*leaves, row_labels=torch.tensor([0, -1, 0, 0]), rows=SUM)
    dx, dy = torch.autograd.grad(own.sum(), leaves)
    assert own[1] == 0 and not dx[1].any() and not dy[1].any()
    assert dx.isfinite().all() and dy.isfinite().all()


def test_no_other_similarity_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a queue or hard negatives take the place of a batch's other pairs."""
    from ccu_fast.ops.reduce_similarity import api

    asked: list[tuple[int, int]] = []
    original = api.SimilarityReduction.apply

    def counted(*args: Any) -> Any:
        asked.append((args[0].shape[1], args[1].shape[1]))
        return original(*args)

    monkeypatch.setattr(api.SimilarityReduction, "apply", counted)
    x, keys = unit(6, 4).float(), unit(9, 4).float()

    def loss(**options: Any) -> Tensor:
        return ccu_fast.info_nce(x, x, scale=2.0, **options)

    loss(in_batch=False, negatives=keys)
    assert asked == [(6, 9)]
    loss(in_batch=False, hard_negatives=unit(6, 2, 4).float())
    loss(margin=0.1)
    assert asked == [(6, 9), (6, 6)]
    loss(hardness=0.5)
    assert asked == [(6, 9), (6, 6), (6, 6), (6, 6)]
