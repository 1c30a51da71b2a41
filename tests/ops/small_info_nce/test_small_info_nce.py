"""InfoNCE of small batches by one operator: the numbers of the general path, and which calls take which path."""

from __future__ import annotations

from typing import Any

import numpy as np
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


PRODUCTS = ("ours", "the library's", "the library's in bf16")


def products_by(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who multiplies, whatever the size and the CPU."""
    from ccu_fast.ops.small_info_nce import native

    monkeypatch.setattr(native, "LIBRARY_PAIRS", 1 << 40 if which == "ours" else 0)
    monkeypatch.setattr(native, "has_bf16", lambda: which == "the library's in bf16")


@pytest.fixture(
    params=[
        ("ours", torch.float32),
        ("ours", torch.bfloat16),
        ("ours", torch.float16),
        ("the library's", torch.float32),
        ("the library's", torch.bfloat16),
        ("the library's in bf16", torch.bfloat16),
    ],
    ids=lambda p: f"{p[0]}-{str(p[1])[6:]}",
)
def way(native: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Way:
    """A backend and a dtype that it serves. (Triton's: ops/triton/interpreted/test_interpreted_small_batch.py)"""
    only(monkeypatch)
    which, dtype = request.param
    products_by(which, monkeypatch)
    return native, dtype


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


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_features_that_are_made_unit_vectors(way: Way, symmetric: bool, autocast: bool) -> None:
    backend, dtype = way
    x, y = (3 * torch.randn(37, 20).to(dtype) for _ in range(2))
    x[3] = 0 if dtype != torch.float16 else x[3]  # whose gradient it cannot hold

    def run(compute: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, y)]
        loss = compute(*leaves)
        return [loss, *torch.autograd.grad(loss, leaves)]

    def ours(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype if dtype != torch.float32 else torch.bfloat16, enabled=autocast):
            return ccu_fast.info_nce(x, y, scale=10.0, symmetric=symmetric, normalize=True, backend=backend)

    rounded = torch.bfloat16 if autocast and dtype == torch.float32 else dtype

    def by_hand(x: Tensor, y: Tensor) -> Tensor:
        units = (F.normalize(t.float(), dim=-1).to(rounded).float() for t in (x, y))
        return by_torch(*units, torch.tensor(10.0), symmetric, "mean")

    def exactly(x: Tensor, y: Tensor) -> Tensor:
        return by_torch(*(F.normalize(t, dim=-1) for t in (x, y)), torch.tensor(10.0).double(), symmetric, "mean")

    results = run(ours, dtype), run(by_hand, dtype), run(exactly, torch.float64)
    for name, *values in zip(("loss", "dx", "dy"), *results, strict=True):
        scale = 4 if rounded == dtype else torch.finfo(rounded).eps / torch.finfo(dtype).eps
        assert_three_way(name, *values, ulps=8 * scale, magnitude=10.0 if name == "loss" else None)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [None, (0.5, 0.0, 2.0)])
def test_prefixes(native: str, monkeypatch: pytest.MonkeyPatch, weights: Any, normalize: bool) -> None:
    """One operator for each of them, and the sum that the general way has."""
    x, y = (torch.randn(37, 20).requires_grad_() for _ in range(2))
    scale = torch.tensor(3.0, requires_grad=True)
    given = {"scale": scale, "prefixes": (4, 9, 20), "prefix_weights": weights, "normalize": normalize}
    results = []
    for options in ({"workspace": 1 << 24}, {}):
        if not options:
            only(monkeypatch)
        for reduction in ("mean", "sum"):
            loss = ccu_fast.info_nce(x, y, reduction=reduction, **given, **options)
            results.append([loss, *torch.autograd.grad(loss, [x, y, scale], retain_graph=True)])
    for general, few in zip(results[:2], results[2:], strict=True):
        for a, b in zip(general, few, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6 * float(a.detach().abs().max()))
    many = torch.autograd.grad(loss, x, torch.tensor([1.0, 2.0]), is_grads_batched=True)[0]
    one = results[-1][1]
    torch.testing.assert_close(many, torch.stack([one, 2 * one]), rtol=1e-4, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("items", [8, 300, 1200])
def test_what_is_wrong_is_named_at_every_size(native: str, items: int) -> None:
    x = torch.randn(items, 20)
    ascending, weights = "prefixes: expected ascending numbers", "prefix_weights: expected a number for each of the 2"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"prefixes": 4}, ascending),
        ({"prefixes": (4, 21)}, "prefixes: expected at most 20 dimensions"),
        ({"prefixes": torch.tensor([4, 8])}, ascending),
        ({"prefixes": np.array([4, 8])}, ascending),
        ({"prefixes": (4, 8), "prefix_weights": (1.0,)}, weights),
        ({"prefixes": (4, 8), "prefix_weights": np.ones(2)}, weights),
        ({"prefix_weights": (1.0,)}, "prefixes: expected numbers of dimensions because prefix_weights is given"),
        ({"normalize": None}, "normalize: expected True or False, got NoneType"),
        ({"prefixes": (4,), "normalize": None}, "normalize: expected True or False, got NoneType"),
    ]
    for options, says in wrong:
        with pytest.raises((TypeError, ValueError), match=says):
            ccu_fast.info_nce(x, x, scale=1.0, **options)


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
        return torch.autograd.grad(value + 0.01 * sum(g.double().square().sum() for g in firsts), leaves)

    exact = penalty_gradients(plain, [t.double() for t in values])
    for got, want in zip(penalty_gradients(ours, values), exact, strict=True):
        tolerance = (1e-4 if dtype == torch.float32 else 5e-2) * float(want.abs().max())
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"normalize": True}, {"normalize": True, "workspace": 1 << 20}], ids=str)
def test_many_gradients_at_once(native: str, options: dict[str, Any]) -> None:
    x, y = (torch.randn(6, 8).requires_grad_() for _ in range(2))
    for dtype in (torch.float32, torch.bfloat16):
        loss = ccu_fast.info_nce(x.to(dtype), y.to(dtype), scale=2.0, **options)
        many = torch.autograd.grad(loss, [x, y], torch.tensor([1.0, 2.0]), is_grads_batched=True, retain_graph=True)
        for got, one in zip(many, torch.autograd.grad(loss, [x, y]), strict=True):
            torch.testing.assert_close(got, torch.stack([one, 2 * one]), rtol=0, atol=8 * torch.finfo(dtype).eps)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("items", [64, 130, 300])
def test_the_number_of_threads_changes_no_bit(native: str, items: int, dtype: torch.dtype) -> None:
    x, y = (torch.randn(items, 300).to(dtype).requires_grad_() for _ in range(2))
    scale = torch.tensor(0.3, requires_grad=True)
    before, results = torch.get_num_threads(), []
    with pytest.MonkeyPatch.context() as patch:
        products_by("ours", patch)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            try:
                loss = ccu_fast.info_nce(x, y, scale=scale)
                results.append([loss, *torch.autograd.grad(loss, [x, y, scale])])
            finally:
                torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", PRODUCTS)
def test_autocast_rounds_the_features_and_nothing_else(
    native: str, monkeypatch: pytest.MonkeyPatch, which: str, cast: torch.dtype
) -> None:
    only(monkeypatch)
    products_by(which, monkeypatch)
    x, y = (F.normalize(torch.randn(40, 100), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(1e-2, requires_grad=True)  # whose gradients are denormal numbers in fp16
    with torch.autocast("cpu", cast):
        loss = ccu_fast.info_nce(x, y, scale=scale)
        grads = torch.autograd.grad(loss, [x, y, scale], retain_graph=True)
    for a, b in zip(grads, torch.autograd.grad(loss, [x, y, scale]), strict=True):
        assert torch.equal(a, b)  # in a backward pass under autocast nothing else is rounded
    half = [t.detach().to(cast).requires_grad_() for t in (x, y)]
    same = ccu_fast.info_nce(*half, scale=scale)
    assert torch.equal(loss, same) and grads[0].dtype == torch.float32
    for ours, rounded in zip(grads, torch.autograd.grad(same, [*half, scale]), strict=True):
        assert torch.equal(ours.to(rounded.dtype), rounded)
    firsts = torch.autograd.grad(ccu_fast_autocast(x, y, scale, cast), [x, y], create_graph=True)
    exact = torch.autograd.grad(
        by_torch(*(t.to(cast).double() for t in (x, y)), scale.double(), True, "mean"), [x, y], create_graph=True
    )
    seconds, wanted = (
        torch.autograd.grad(sum(g.double().square().sum() for g in pair), scale)[0] for pair in (firsts, exact)
    )
    torch.testing.assert_close(seconds, wanted, rtol=2e-2, atol=0)


def ccu_fast_autocast(x: Tensor, y: Tensor, scale: Tensor, cast: torch.dtype) -> Tensor:
    with torch.autocast("cpu", cast):
        return ccu_fast.info_nce(x, y, scale=scale)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_whose_logits_are_far_from_those_of_others(native: str, symmetric: bool) -> None:
    """One exponential cannot serve all rows and columns, so that each gets its own."""
    x, y = (F.normalize(torch.randn(30, 16), dim=-1) for _ in range(2))
    x[:10] *= 0.01
    y[20:] *= 0.02

    def run(dtype: torch.dtype, loss: Any) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, y, torch.tensor(150.0))]
        value = loss(*leaves)
        return [value, *torch.autograd.grad(value, leaves)]

    ours = run(torch.float32, lambda x, y, s: ccu_fast.info_nce(x, y, scale=s, symmetric=symmetric))
    same, exact = (
        run(dtype, lambda x, y, s: by_torch(x, y, s, symmetric, "mean")) for dtype in (torch.float32, torch.float64)
    )
    for name, *values in zip(("loss", "dx", "dy", "dscale"), ours, same, exact, strict=True):
        assert_three_way(name, *values, ulps=8, magnitude=150.0 if name in ("loss", "dscale") else None)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_so_where_torch_has_it(native: str, value: float) -> None:
    for items in (2, 5, 40):
        x, y = torch.rand(items, 8), torch.rand(items, 8)
        x[items // 2, 3] = value
        found = []
        for loss in (lambda x, y: ccu_fast.info_nce(x, y, scale=2.0), lambda x, y: by_torch(x, y, 2.0, True, "mean")):
            leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
            result = loss(*leaves)
            found.append([result, *torch.autograd.grad(result, leaves)])
        ours, torchs = found
        assert bool(ours[0].isfinite()) == bool(torchs[0].isfinite())
        if value != -torch.inf:  # in which torch multiplies probabilities of 0 by -inf
            for a, b in zip(ours[1:], torchs[1:], strict=True):
                assert (a.isfinite() <= b.isfinite()).all()


def test_one_call_into_the_compiled_module_each_way(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no product of torch's."""
    from ccu_fast.ops.small_info_nce import native as kernels

    calls: list[str] = []
    for name in ("small_info_nce", "small_info_nce_backward"):
        call = getattr(kernels._C, name)
        monkeypatch.setattr(kernels._C, name, lambda *a, call=call, name=name: (calls.append(name), call(*a))[1])
    monkeypatch.setattr(torch, "mm", lambda *a, **k: pytest.fail("torch.mm"))
    x, y = (torch.randn(32, 20, requires_grad=True) for _ in range(2))
    ccu_fast.ClipLoss()(x, y, torch.tensor(2.0, requires_grad=True)).backward()
    assert calls == ["small_info_nce", "small_info_nce_backward"]


def test_who_goes_this_way(native: str) -> None:
    x = torch.randn(20, 8)
    assert served_by(x, x, {}) == served_by(x, x, {"backend": "native"}) == "native"
    assert served_by(x, x, {"backend": "reference"}) is None
    assert served_by(x.double(), x.double(), {}) is None
    for dtype in (torch.bfloat16, torch.float16):
        assert served_by(x.to(dtype), x.to(dtype), {}) == "native"
        with torch.autocast("cpu", dtype):
            assert served_by(x, x, {}) == served_by(x.to(dtype), x.to(dtype), {}) == "native"
    with torch.autocast("cpu", torch.bfloat16):
        assert served_by(x.half(), x.half(), {}) is None
    assert served_by(x, x[:10], {}) is None
    assert served_by(x[None], x[None], {}) is None
    assert served_by(x[:0], x[:0], {}) is None
    assert served_by(x, x, {"workspace": None, "normalize": False, "paired": None}) == "native"
    assert served_by(x, x, {"normalize": True}) == "native"
    assert served_by(x, x, {"prefixes": (2, 8), "prefix_weights": (1.0, 2.0), "normalize": True}) == "native"
    for option in ({"prefixes": ()}, {"prefix_weights": (1.0,)}, {"prefixes": (2, 8), "margin": 0.1}):
        assert served_by(x, x, option) is None
    assert served_by(x.bfloat16(), x.bfloat16(), {"prefixes": (2, 8)}) is None  # unit vectors would be rounded
    assert served_by(torch.empty(256, 8), torch.empty(256, 8), {"prefixes": (2, 8)}) is None
    for option in ({"workspace": 0}, {"normalize": 1}, {"paired": False}, {"paired": 1}, {"nan_policy": "raise"}):
        assert served_by(x, x, option) is None
    assert served_by(x, x, {"row_ids": torch.arange(20), "col_ids": torch.arange(20)}) is None
    assert served_by(torch.empty(1024, 1), torch.empty(1024, 1), {}) == "native"
    assert served_by(torch.empty(1025, 1), torch.empty(1025, 1), {}) is None
    assert served_by("x", x, {}) is None
    torch.set_float32_matmul_precision("medium")
    try:
        assert served_by(x, x, {}) is None
        assert served_by(x, x, {"prefixes": (2, 8)}) is None
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
