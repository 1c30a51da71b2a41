"""InfoNCE of small batches by one operator: the numbers of the general path, and which calls take which path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ccu_fast
from ccu_fast.losses import functional
from ccu_fast.losses.functional import served_by
from tests.support.tolerance import assert_three_way

Way = tuple[str, torch.dtype]


def only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a call takes the general path."""
    monkeypatch.setattr(functional, "served_by", lambda *a: served_by(*a) or pytest.fail("not served"))


@pytest.fixture
def way(native: str, monkeypatch: pytest.MonkeyPatch) -> Way:
    """A backend and the dtype that it serves. (Triton's: ops/triton/interpreted/test_interpreted_small_batch.py)"""
    only(monkeypatch)
    return native, torch.float32


def by_torch(x: Tensor, y: Tensor, scale: Tensor, symmetric: bool, reduction: str) -> Tensor:
    logits = scale * (x @ y.mT)
    target = torch.arange(len(x))
    loss = F.cross_entropy(logits, target, reduction=reduction)
    return (loss + F.cross_entropy(logits.mT, target, reduction=reduction)) / 2 if symmetric else loss


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("items", "dim", "scale"), [(1, 3, 2.0), (37, 20, 10.0), (130, 64, 100.0)])
def test_loss_and_gradients(way: Way, items: int, dim: int, scale: float, symmetric: bool, reduction: str) -> None:
    backend, dtype = way
    x, y = (F.normalize(torch.randn(items, dim), dim=-1).to(dtype) for _ in range(2))

    def run(compute: Any, dtype: torch.dtype, scalar: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, y)]
        leaves.append(torch.tensor(scale, dtype=scalar, requires_grad=True))
        loss = compute(*leaves)
        return [loss, *torch.autograd.grad(loss * 3, leaves)]

    def torch_way(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return by_torch(x, y, scale, symmetric, reduction)

    ours = run(
        lambda x, y, s: ccu_fast.info_nce(x, y, scale=s, symmetric=symmetric, reduction=reduction, backend=backend),
        dtype,
        torch.float32,
    )
    same, exact = run(torch_way, dtype, torch.float32), run(torch_way, torch.float64, torch.float64)
    for name, *values in zip(("loss", "dx", "dy", "dscale"), ours, same, exact, strict=True):
        # The scalars are means and sums of logits that cancel.
        magnitude = scale * (items if reduction == "sum" else 1) if name in ("loss", "dscale") else None
        assert_three_way(name, *values, ulps=8, magnitude=magnitude)


def test_any_subset_of_gradients(way: Way) -> None:
    backend, dtype = way
    base = [torch.randn(20, 8).to(dtype), torch.randn(20, 8).to(dtype), torch.tensor(2.0)]
    everything = [t.clone().requires_grad_() for t in base]
    whole = torch.autograd.grad(ccu_fast.info_nce(*everything[:2], scale=everything[2], backend=backend), everything)
    for chosen in ([0], [1], [2], [0, 2], [1, 2]):
        leaves = [t.clone().requires_grad_(i in chosen) for i, t in enumerate(base)]
        loss = ccu_fast.info_nce(*leaves[:2], scale=leaves[2], backend=backend)
        grads = torch.autograd.grad(loss, [leaves[i] for i in chosen])
        for i, grad in zip(chosen, grads, strict=True):
            assert torch.equal(grad, whole[i])


def test_a_graph_may_be_walked_twice(way: Way) -> None:
    backend, dtype = way
    x, y = (torch.randn(20, 8).to(dtype).requires_grad_() for _ in range(2))
    loss = ccu_fast.info_nce(x, y, scale=2.0, backend=backend)
    first = torch.autograd.grad(loss, [x, y], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, [x, y], retain_graph=True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_second_derivatives_are_those_of_the_formula(way: Way, symmetric: bool, reduction: str) -> None:
    backend, dtype = way
    values = [torch.randn(20, 8).to(dtype), torch.randn(20, 8).to(dtype), torch.tensor(2.0)]

    def plain(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        logits, target = scale * x @ y.T, torch.arange(len(x))
        loss = F.cross_entropy(logits, target, reduction=reduction)
        return (loss + F.cross_entropy(logits.T, target, reduction=reduction)) / 2 if symmetric else loss

    def ours(x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return ccu_fast.info_nce(x, y, scale=scale, symmetric=symmetric, reduction=reduction, backend=backend)

    def penalty_gradients(loss: Any, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in leaves]
        x, y, scale = leaves
        value = 3 * loss(x, y, scale.exp())
        firsts = torch.autograd.grad(value, leaves, create_graph=True)
        return torch.autograd.grad(value + sum(g.double().square().sum() for g in firsts), leaves)

    exact = penalty_gradients(plain, [t.double() for t in values])
    for got, want in zip(penalty_gradients(ours, values), exact, strict=True):
        tolerance = (1e-4 if dtype == torch.float32 else 5e-2) * float(want.abs().max())
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)


def test_views_one_bank_for_both_and_no_gradient(way: Way) -> None:
    backend, dtype = way
    wide = torch.randn(24, 60).to(dtype)
    x, y = wide[::2, ::3], wide.T[:12, :20].contiguous().to(dtype)
    want = ccu_fast.info_nce(x.contiguous(), y, scale=2.0, backend=backend)
    assert torch.equal(ccu_fast.info_nce(x, y, scale=2.0, backend=backend), want)
    assert torch.equal(ccu_fast.info_nce(x, y.T.contiguous().T, scale=2.0, backend=backend), want)
    leaf = wide[:, :20].contiguous().requires_grad_()
    both = ccu_fast.info_nce(leaf, leaf, scale=2.0, backend=backend)
    (grad,) = torch.autograd.grad(both, leaf)
    apart = [leaf.detach().clone().requires_grad_() for _ in range(2)]
    parts = torch.autograd.grad(ccu_fast.info_nce(*apart, scale=2.0, backend=backend), apart)
    assert torch.equal(grad, parts[0] + parts[1])
    with torch.no_grad():
        assert not ccu_fast.info_nce(leaf, leaf, scale=2.0, backend=backend).requires_grad


def test_nan_goes_through(way: Way) -> None:
    backend, dtype = way
    x, y = (torch.randn(20, 8).to(dtype).requires_grad_() for _ in range(2))
    loss = ccu_fast.info_nce(x, y, scale=2.0, backend=backend)
    assert torch.autograd.grad(loss, [x], torch.tensor(torch.nan), retain_graph=True)[0].isnan().all()
    with torch.no_grad():
        x[3, 2] = torch.nan
    assert ccu_fast.info_nce(x, y, scale=2.0, backend=backend).isnan()


def test_the_number_of_threads_changes_no_bit(native: str) -> None:
    x, y = (torch.randn(300, 32).requires_grad_() for _ in range(2))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            loss = ccu_fast.info_nce(x, y, scale=2.0)
            results.append([loss, *torch.autograd.grad(loss, [x, y])])
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])


def test_who_goes_this_way(native: str) -> None:
    x = torch.randn(20, 8)
    assert served_by(x, x, {}) == served_by(x, x, {"backend": "native"}) == "native"
    assert served_by(x, x, {"backend": "reference"}) is None
    assert served_by(x.double(), x.double(), {}) is None
    assert served_by(x.bfloat16(), x.bfloat16(), {}) is None
    assert served_by(x, x[:10], {}) is None
    assert served_by(x[None], x[None], {}) is None
    assert served_by(x[:0], x[:0], {}) is None
    assert served_by(x, x, {"workspace": None, "normalize": False, "paired": None}) == "native"
    for option in ({"workspace": 0}, {"normalize": True}, {"paired": False}, {"paired": 1}, {"nan_policy": "raise"}):
        assert served_by(x, x, option) is None
    assert served_by(x, x, {"row_ids": torch.arange(20), "col_ids": torch.arange(20)}) is None
    assert served_by(torch.empty(1024, 1), torch.empty(1024, 1), {}) == "native"
    assert served_by(torch.empty(1025, 1), torch.empty(1025, 1), {}) is None
    assert served_by("x", x, {}) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert served_by(x, x, {}) is None
    torch.set_float32_matmul_precision("medium")
    try:
        assert served_by(x, x, {}) is None
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_general_way_gives_the_same(native: str) -> None:
    x, y = (F.normalize(torch.randn(130, 32), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(20.0, requires_grad=True)
    results = []
    for options in ({}, {"workspace": 1 << 24}):
        loss = ccu_fast.info_nce(x, y, scale=scale, **options)
        results.append([loss, *torch.autograd.grad(loss, [x, y, scale])])
    for ours, general in zip(*results, strict=True):
        torch.testing.assert_close(ours, general, rtol=2e-6, atol=1e-7)
