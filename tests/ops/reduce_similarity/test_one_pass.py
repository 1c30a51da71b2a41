"""Blocks that are reduced in one pass, with the shift of the block above: where it fits, and where it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ccu_fast import ALL, OTHER, SAME, SELF, reduce_similarity
from tests.support.oracle import Case, check, unit

pytestmark = pytest.mark.usefixtures("one_thread")

N, M = 70, 600

SIZES: dict[str, Tensor] = {
    "alike": torch.ones(N),
    "falling": torch.linspace(8, 0.1, N),
    "rising": torch.linspace(0.1, 8, N),
    "in turns": torch.where(torch.arange(N) // 16 % 2 == 0, 8.0, 0.05),
    "one by one": torch.where(torch.arange(N) % 5 == 0, 9.0, 0.01),
}
SPECS: dict[str, tuple[tuple[str, int], ...]] = {
    "bounded": (("lse", SELF | SAME), ("lse", OTHER)),
    "unlearning": (("lse", SAME), ("sum", OTHER)),
    "supervised": (("lse", OTHER), ("lse", SAME), ("sum", SAME)),
    "all": (("lse", ALL), ("sum", ALL), ("lse", SAME | OTHER), ("sum", SELF)),
}


def keys(name: str) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(3)

    def ints(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=rng)

    ids = {"row_ids": ints(0, 300, N), "col_ids": ints(0, 300, M)}
    return {
        "few labels": {"row_labels": ints(-1, 3, N), "col_labels": ints(-1, 3, M)},
        "many labels": {"row_labels": ints(0, 200, N), "col_labels": ints(0, 200, M)},
        "ids": ids,
        "labels and ids": {"row_labels": ints(-1, 90, N), "col_labels": ints(-1, 90, M), **ids},
        "blocks of labels": {"row_labels": torch.arange(N) // 16, "col_labels": torch.arange(M) // 100},
    }[name]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", [OTHER, ALL])
def test_one_lse_a_side(kind: int, symmetric: bool, sizes: str) -> None:
    x, y = unit(N, 24) * SIZES[sizes][:, None].double(), unit(M, 24)
    spec = (("lse", kind), ("sum", SELF))
    for paired in (False, True):
        other = y[:N] if paired else y
        case = Case(x, other, 30.0, -0.5, {"paired": paired}, spec, spec[: 1 + paired] if symmetric else ())
        check(case, "native", torch.float32)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["few labels", "many labels", "labels and ids", "blocks of labels"])
def test_rows_by_their_relations(name: str, spec: str, sizes: str) -> None:
    given = keys(name)
    x, y = unit(N, 24) * SIZES[sizes][:, None].double(), unit(M, 24)
    check(Case(x, y, 30.0, 0.5, given, SPECS[spec]), "native", torch.float32)


@pytest.mark.parametrize("spec", ["bounded", "all"])  # without labels nothing is SAME
def test_rows_by_their_ids(spec: str) -> None:
    check(Case(unit(N, 24), unit(M, 24), 30.0, 0.5, keys("ids"), SPECS[spec]), "native", torch.float32)


def test_rows_by_their_relations_and_place() -> None:
    for labels in ({"row_labels": torch.arange(N) % 40 - 1}, {"row_labels": torch.arange(N) // 3}):
        for spec in SPECS.values():
            check(Case(unit(N, 24), unit(N, 24), 9.0, None, labels, spec), "native", torch.float32)


def test_banks_with_labels_of_their_own() -> None:
    given = {"row_labels": torch.randint(-1, 9, (3, N)), "col_labels": torch.randint(-1, 9, (3, M))}
    check(Case(unit(3, N, 12), unit(M, 12), 9.0, None, given, SPECS["supervised"]), "native", torch.float32)


@pytest.mark.parametrize("given", [{}, {"row_labels": torch.arange(N) % 9, "col_labels": torch.arange(M) % 9}], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(value: float, given: dict[str, Any]) -> None:
    x, y = unit(N, 8).float(), unit(M, 8).float()
    x[40, 0] = value
    (lse,), _ = reduce_similarity(x, y, scale=20.0, rows=[("lse", OTHER)], paired=False, **given)
    (exact,), _ = reduce_similarity(x, y, scale=20.0, rows=[("lse", OTHER)], paired=False, backend="reference", **given)
    assert not lse[40].isfinite()
    torch.testing.assert_close(lse, exact, equal_nan=True)
