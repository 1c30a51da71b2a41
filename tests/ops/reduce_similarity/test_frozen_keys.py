"""Large banks of frozen keys: the CPU's special path against the same brute force as the general one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ccu_fast import ALL, OTHER, SAME, SELF, reduce_similarity
from ccu_fast.ops.reduce_similarity import operator
from ccu_fast.ops.reduce_similarity.native import frozen_keys
from tests.ops.reduce_similarity.test_reduce_similarity import KEYS, ints
from tests.support.oracle import SET_NAMES, SETS, Case, check, unit

pytestmark = pytest.mark.usefixtures("native", "one_thread")

# In bf16 a gradient of scale needs the general path.
FROZEN = {torch.float32: ("y",), torch.bfloat16: ("y", "scale")}


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Treats any bank as large and records the calls, so that no test passes by the general path."""
    seen: list[Any] = []
    forward = frozen_keys.forward
    monkeypatch.setattr(operator, "MANY_KEYS", 0)
    monkeypatch.setattr(frozen_keys, "forward", lambda *a: seen.append(a) or forward(*a))
    return seen


def lse(*relations: int) -> tuple[tuple[str, int], ...]:
    return tuple(("lse", r) for r in relations)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("relations", SETS, ids=SET_NAMES.values())
def test_each_set(relations: int, keys: str, dtype: torch.dtype, calls: list[Any]) -> None:
    n, m = (19, 19) if keys == "paired" else (13, 21)
    case = Case(unit(n, 9), unit(m, 9), 5.0, 0.5, KEYS[keys](n, m), lse(relations), frozen=FROZEN[dtype])
    if relations == SAME and "row_labels" not in case.keys:  # it could only be empty
        with pytest.raises(ValueError, match="row_labels"):
            check(case, "native", dtype)
        return
    check(case, "native", dtype)
    assert calls


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize(
    "relations", [(ALL, OTHER), (ALL, OTHER, SAME, SELF, SAME | OTHER), (SELF, SAME), (ALL, SELF | SAME, ALL)]
)
def test_sets_share_their_parts(relations: tuple[int, ...], keys: str, calls: list[Any]) -> None:
    given = KEYS[keys](37, 37)
    if "row_labels" not in given:
        relations = tuple(r for r in relations if r != SAME)
    check(
        Case(unit(37, 16), unit(37, 16), 8.0, -3.0, given, lse(*relations), frozen=("y",)),
        "native",
        torch.float32,
    )
    assert calls


@pytest.mark.parametrize("shape", [(1, 1, 1), (0, 5, 7), (5, 0, 7), (1, 5000, 3), (300, 1025, 70), (257, 2100, 33)])
@pytest.mark.parametrize("keys", ["labels and ids", "unrelated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_across_blocks(shape: tuple[int, int, int], keys: str, dtype: torch.dtype, calls: list[Any]) -> None:
    n, m, d = shape
    case = Case(unit(n, d), unit(m, d), 12.0, 0.5, KEYS[keys](n, m), lse(ALL, OTHER), frozen=FROZEN[dtype])
    check(case, "native", dtype)
    assert calls or n * m == 0


def test_what_an_ignored_key_holds_does_not_matter(calls: list[Any]) -> None:
    x, y = unit(20, 16).float().requires_grad_(), unit(300, 16).float()
    labels = {"row_labels": ints(5, 20), "col_labels": ints(5, 300)}
    labels["col_labels"][[7, 299]] = -1
    grads = []
    for hidden in (0.0, torch.nan):
        y[[7, 299], 2] = hidden
        rows, _ = reduce_similarity(x, y, scale=5.0, **labels, rows=lse(ALL, OTHER), backend="native")
        grads.append(torch.autograd.grad(rows[0].sum() - 2 * rows[1].sum(), x)[0])
    assert torch.equal(*grads)
    assert grads[1].isfinite().all()
    assert calls


def test_the_difference_of_two_keeps_its_digits(calls: list[Any]) -> None:
    """-log(1 - p) of a bounded inverse loss at p near 0: both terms are large and nearly equal."""
    x, y = unit(40, 16), unit(3000, 16)
    labels = {"row_labels": ints(200, 40), "col_labels": ints(200, 3000)}

    def loss(dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
        leaf = x.to(dtype).requires_grad_()
        (everything, other), _ = reduce_similarity(
            leaf, y.to(dtype), scale=10.0, **labels, rows=lse(ALL, OTHER), backend=backend
        )
        value = (everything - other).mean()
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    for ours, exact in zip(loss(torch.float32, "native"), loss(torch.float64, "reference"), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-4, atol=2e-6)
    assert calls


@pytest.mark.parametrize("large", [1e4, -1e4])
def test_a_late_key_that_outweighs_all(large: float, calls: list[Any]) -> None:
    """The shift rises, or would have overflowed, in the last block."""
    y = torch.zeros(3000, 4)
    y[-1, 0] = large
    x = torch.eye(4).requires_grad_()
    (value,), _ = reduce_similarity(x, y, paired=False, rows=lse(ALL), backend="native")
    exact = (x.double() @ y.double().T).logsumexp(1)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)
    for got, expected in zip(torch.autograd.grad(value.sum(), x), torch.autograd.grad(exact.sum(), x), strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-4)
    assert calls


def test_the_same_bits_for_any_number_of_threads(calls: list[Any]) -> None:
    x, y = torch.randn(300, 40), torch.randn(2500, 40)
    labels = {"row_labels": ints(9, 300), "col_labels": ints(9, 2500)}
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        results, _ = reduce_similarity(leaf, y, **labels, rows=lse(ALL, OTHER), backend="native")
        found.append([*results, *torch.autograd.grad((results[0] - results[1]).sum(), leaf)])
    torch.set_num_threads(1)
    # The GEMMs may split their sums by threads; our own sums do not.
    for other, first in itertools.product(found[1:], found[:1]):
        for a, b in zip(other, first, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert calls


def test_what_is_kept_does_not_grow_with_the_keys(calls: list[Any]) -> None:
    kept: list[int] = []

    def size(m: int) -> int:
        kept.clear()
        x, y = torch.randn(50, 8, requires_grad=True), torch.randn(m, 8)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            reduce_similarity(x, y, paired=False, rows=lse(ALL), backend="native")
        return sum(kept) - y.numel()

    assert size(1000) == size(9000)
    assert calls


def test_one_graph(calls: list[Any]) -> None:
    y = torch.randn(70, 8)

    def f(x: Tensor) -> Tensor:
        (value,), _ = reduce_similarity(x, y, paired=False, rows=lse(ALL), backend="native")
        return value.sum()

    x = torch.randn(20, 8, requires_grad=True)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(f(x), x))
    assert calls


def test_only_where_it_serves(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    x, y = torch.randn(20, 8, requires_grad=True), torch.randn(70, 8)
    for arguments in (
        {"y": y.clone().requires_grad_()},
        {"y": y.expand(2, -1, -1)},
        {"cols": lse(ALL)},
        {"rows": (("sum", ALL),)},
    ):
        reduce_similarity(x, **{"y": y, "paired": False, "rows": lse(ALL), "backend": "native"} | arguments)
    half, scale = x.detach().bfloat16().requires_grad_(), torch.tensor(2.0, requires_grad=True)
    reduce_similarity(half, y.bfloat16(), scale=scale, paired=False, rows=lse(ALL), backend="native")
    reduce_similarity(x.detach(), y, paired=False, rows=lse(ALL), backend="native")
    monkeypatch.setattr(operator, "MANY_KEYS", 71)
    reduce_similarity(x, y, paired=False, rows=lse(ALL), backend="native")
    assert not calls
