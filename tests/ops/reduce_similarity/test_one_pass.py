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


@pytest.mark.parametrize("gap", [50.0, 92.0, 100.0, 104.5, 200.0])
def test_columns_keep_their_digits_over_large_shifts(gap: float) -> None:
    """A running sum far below its shift, and a total far above its own, when the shift moves by about e^100."""
    s = torch.full((48, 64), -50.0)
    s[0, 1] = 0
    s[:16, 0] = -500
    s[3, 0] = -59.5
    s[16:32] = -gap - 3
    s[16, 5] = s[32:48] = -gap
    s[32:, 0] = 39 - gap
    for order in (torch.arange(48), torch.arange(47, -1, -1)):
        spec = (("lse", OTHER),)
        check(
            Case(s[order].double(), torch.eye(64).double(), 1.0, None, {"paired": False}, spec, spec),
            "native",
            torch.float32,
        )


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("peak", [95.0, 200.0])
def test_nan_hides_no_peak(peak: float, labelled: bool) -> None:
    """One pair is NaN; the largest S of another row stands in the same lane of a vector."""
    s = torch.randn(64, 64)
    s[32:, 15] = peak
    x, y = torch.cat([s, torch.zeros(64, 1)], 1), torch.cat([torch.eye(64), torch.zeros(64, 1)], 1)
    x[:, -1] = 1
    y[63, -1] = torch.nan
    given: dict[str, Any] = {"paired": False}
    if labelled:
        labels = torch.arange(64)
        labels[63] = 99
        given |= {"row_labels": torch.full((64,), 99), "col_labels": labels}
    cols = () if labelled else [("lse", OTHER)]
    ours = reduce_similarity(x, y, rows=[("lse", OTHER)], cols=cols, **given)
    exact = reduce_similarity(x, y, rows=[("lse", OTHER)], cols=cols, backend="reference", **given)
    for got, wanted in zip([*ours[0], *ours[1]], [*exact[0], *exact[1]], strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)


def test_the_gradient_of_scale_may_be_inf() -> None:
    x, scale = torch.tensor([[1e19]]), torch.tensor(1.0, requires_grad=True)
    (total,), _ = reduce_similarity(-x, x, scale=scale, rows=[("lse", ALL)], paired=False)
    total.sum().backward(torch.tensor(10.0))
    assert scale.grad is not None
    assert scale.grad == -torch.inf
