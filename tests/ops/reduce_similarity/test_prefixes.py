"""reduce_prefixes: one pass over the products of all prefixes against one reduction after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ccu_fast
from ccu_fast import ALL, OTHER, SAME, SELF, reduce_prefixes, reduce_similarity
from ccu_fast.ops.backend import gemm_dtype
from ccu_fast.ops.reduce_similarity.api import build_problem
from ccu_fast.ops.reduce_similarity.native import prefixes as native
from tests.support.multiplications import Multiplications
from tests.support.oracle import unit
from tests.support.tolerance import assert_three_way

pytestmark = pytest.mark.usefixtures("one_thread")

Engine = tuple[str, torch.dtype]
CLIP = [("lse", OTHER), ("sum", SELF)]
MIX = [("lse", ALL), ("sum", OTHER), ("softplus", SAME | OTHER), ("count", OTHER), ("logsigmoid", SELF | OTHER)]
PREFIXES = (3, 8, 9, 24)


def loop(
    x: Tensor,
    y: Tensor,
    *,
    prefixes: tuple[int, ...],
    normalize: bool = False,
    backend: str = "reference",
    **options: Any,
) -> list[Tensor]:
    """The definition."""
    limits = {name: options.pop(name) for name in ("row_limits", "col_limits") if name in options}
    parts = []
    for k, d in enumerate(prefixes):
        pair = [F.normalize(t[..., :d], dim=-1) if normalize else t[..., :d] for t in (x, y)]
        of_k = {name: t[k] if t.ndim > 1 else t for name, t in limits.items()}
        rows, cols = reduce_similarity(*pair, backend=backend, **of_k, **options)
        parts.append([*rows, *cols])
    return [torch.stack(results) for results in zip(*parts, strict=True)]


def at_once(x: Tensor, y: Tensor, **options: Any) -> list[Tensor]:
    rows, cols = reduce_prefixes(x, y, **options)
    return [*rows, *cols]


def differentiate(
    call: Callable[..., list[Tensor]],
    x: Tensor,
    y: Tensor,
    dtype: torch.dtype,
    *,
    scale: float = 6.0,
    bias: float | None = -0.5,
    **options: Any,
) -> dict[str, Tensor]:
    """Results and gradients of x, y, scale and bias."""
    wide = torch.promote_types(dtype, torch.float32)
    numbers = [torch.tensor(number, dtype=wide) for number in (scale, bias) if number is not None]
    leaves = [t.clone().requires_grad_() for t in (x.to(dtype), y.to(dtype), *numbers)]
    results = call(*leaves[:2], scale=leaves[2], bias=None if bias is None else leaves[3], **options)
    named = {f"result {place}": t for place, t in enumerate(results)}
    real = [t for t in results if t.dtype.is_floating_point]
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t.dtype) for t in real]
    grads = torch.autograd.grad(real, leaves, weights)
    return named | dict(zip(("dx", "dy", "dscale", "dbias"), grads, strict=False))


def check(
    x: Tensor, y: Tensor, backend: str, dtype: torch.dtype, *, workspace: int | None = None, **given: Any
) -> None:
    """Values and gradients by the three-way rule, from inputs that are exact in ``dtype``."""
    x, y = x.to(dtype).double(), y.to(dtype).double()
    exact, same = (differentiate(loop, x, y, t, **given) for t in (torch.float64, dtype))
    ours = differentiate(at_once, x, y, dtype, backend=backend, workspace=workspace, **given)
    for name, truth in exact.items():
        if truth.dtype.is_floating_point:
            magnitude = float(x.shape[-2] * y.shape[-2]) if truth.ndim == 0 else None
            assert_three_way(name, ours[name], same[name], truth, ulps=32, magnitude=magnitude)
        else:
            assert torch.equal(ours[name], truth), name


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("keys", ["paired", "unrelated", "labels", "ids"])
def test_reductions_of_every_prefix(keys: str, normalize: bool, engine: Engine) -> None:
    n, m = (37, 37) if keys == "paired" else (29, 41)
    given: dict[str, Any] = {
        "paired": {},
        "unrelated": {"paired": False},
        "labels": {"row_labels": torch.arange(n) % 4 - 1, "col_labels": torch.arange(m) % 5 - 1},
        "ids": {"row_ids": torch.arange(n) % 9, "col_ids": torch.arange(m) % 7},
    }[keys]
    spec = MIX if keys == "labels" else [*MIX, ("lse", SELF)]
    for prefixes in ((24,), (5, 20), PREFIXES):
        options: dict[str, Any] = {"prefixes": prefixes, "normalize": normalize, "rows": spec, "cols": spec[::-1]}
        check(unit(n, 24), 3 * unit(m, 24), *engine, **options, **given)
        # Of rows alone C++ has another way.
        options |= {"rows": [("lse", ALL), ("sum", OTHER)], "cols": ()}
        check(unit(n, 24), 3 * unit(m, 24), *engine, **options, **given)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types(dtype: torch.dtype, normalize: bool) -> None:
    x, y = unit(33, 40), unit(33, 40)
    given: dict[str, Any] = {"prefixes": (7, 40), "normalize": normalize, "rows": CLIP, "cols": CLIP}
    if normalize or gemm_dtype(dtype) == torch.float32:
        check(x, y, "native", dtype, **given)
        return
    # A CPU that multiplies bf16 makes the products of each prefix by themselves, whose rounding the reference has not.
    pair = [differentiate(call, x, y, dtype, backend="native", **given) for call in (at_once, loop)]
    assert all(torch.equal(a, b) for a, b in zip(*(results.values() for results in pair), strict=True))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("workspace", [0, 100_001, 1 << 20, 1 << 28])
def test_whatever_the_workspace_holds(workspace: int, normalize: bool) -> None:
    """Several chunks of rows, of which none, some or all are kept."""
    x, y = unit(300, 20), unit(150, 20)
    given: dict[str, Any] = {"prefixes": (4, 9, 20), "normalize": normalize, "rows": MIX, "cols": MIX}
    check(x, y, "native", torch.float32, workspace=workspace, **given)
    runs = [differentiate(at_once, x, y, torch.float32, workspace=workspace, **given) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_limits_of_all_prefixes_and_of_each(normalize: bool, guided: bool, engine: Engine) -> None:
    """Half of the pairs are beyond them; a guide's similarities are those of no prefix."""
    x, y, prefixes = unit(29, 24), unit(41, 24), (5, 11, 24)
    guide = (unit(29, 6), unit(41, 6)) if guided else None
    pairs = (
        [guide] * 3 if guide else [[F.normalize(t[:, :d]) if normalize else t[:, :d] for t in (x, y)] for d in prefixes]
    )
    sims = torch.stack([u @ v.T for u, v in pairs])
    # In the middle of the widest gap, so that every dtype decides alike.
    ordered = sims.sort(-1).values[..., 10:31]
    at = ordered.diff(dim=-1).argmax(-1, keepdim=True)
    each = ((ordered.gather(-1, at) + ordered.gather(-1, at + 1)) / 2)[..., 0].float()
    for rows in (each, each[0]) if guided else (each,):
        given: dict[str, Any] = {"row_limits": rows, "guide": guide}
        check(x, y, *engine, prefixes=prefixes, normalize=normalize, rows=MIX, cols=CLIP, paired=False, **given)


def test_banks(engine: Engine) -> None:
    """One side shared by all banks, or neither; limits of each bank and prefix."""
    for x, y in ((unit(3, 19, 8), unit(23, 8)), (unit(19, 8), unit(3, 23, 8)), (unit(2, 1, 9, 8), unit(3, 9, 8))):
        for normalize in (False, True):
            check(x, y, *engine, prefixes=(2, 8), normalize=normalize, rows=MIX, cols=CLIP, workspace=40_000)
    x, y = (torch.randint(-2, 3, (3, n, 8)).double() for n in (19, 23))
    limits = torch.randint(0, 3, (2, 3, 19)) - 0.5
    rows, _ = reduce_prefixes(
        *(x.to(engine[1]), y.to(engine[1])), prefixes=(2, 8), row_limits=limits, rows=MIX, backend=engine[0]
    )
    for k, d in enumerate((2, 8)):
        wanted, _ = reduce_similarity(x[..., :d], y[..., :d], row_limits=limits[k], rows=MIX, backend="reference")
        for ours, exact in zip(rows, wanted, strict=True):
            torch.testing.assert_close(ours[k].double(), exact.double(), rtol=1e-6, atol=1e-6)


def test_nothing_to_reduce() -> None:
    for n, m in ((0, 3), (3, 0), (0, 0)):
        rows, cols = reduce_prefixes(torch.randn(n, 4), torch.randn(m, 4), prefixes=(2, 4), rows=MIX, cols=CLIP)
        assert [list(t.shape) for t in rows] == [[2, n]] * len(MIX)
        assert [list(t.shape) for t in cols] == [[2, m]] * 2
        assert rows[0].eq(-torch.inf).all()


def test_ignored_items_may_hold_nan() -> None:
    x, y, labels = torch.randn(9, 8), torch.randn(9, 8), torch.arange(9) - 1
    x[0], y[0] = torch.nan, torch.inf
    for normalize in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        rows, _ = reduce_prefixes(*leaves, prefixes=(3, 8), row_labels=labels, rows=CLIP, normalize=normalize)
        sum(t[..., 1:].sum() for t in rows).backward()
        assert all(t.grad is not None and t.grad[0].eq(0).all() and t.grad.isfinite().all() for t in leaves)


def test_dimensions_after_the_last_prefix_get_no_gradient() -> None:
    x, y = (torch.randn(9, 8, requires_grad=True) for _ in range(2))
    rows, _ = reduce_prefixes(x, y, prefixes=(3, 6), rows=CLIP, normalize=True)
    rows[0].sum().backward()
    assert x.grad is not None
    assert x.grad[:, :6].ne(0).all()
    assert x.grad[:, 6:].eq(0).all()


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e-13])
def test_the_gradient_of_what_is_too_short_to_be_normalized(value: float) -> None:
    """Rows and prefixes: that of ``x / 1e-12``, as with F.normalize."""
    x, y = torch.randn(6, 8), torch.randn(6, 8)
    x[1], x[2, :4] = value, value
    options: dict[str, Any] = {"prefixes": (4, 8), "normalize": True, "rows": CLIP, "cols": CLIP}
    check(x.double(), y.double(), "native", torch.float32, **options)


def test_half_types_are_not_rounded_as_unit_vectors() -> None:
    """A prefix that is small beside the whole keeps its digits."""
    x, y = torch.randn(40, 64), torch.randn(40, 64)
    for t in (x, y):
        t[:, :8] *= 1e-3
    check(x.double(), y.double(), "native", torch.float16, prefixes=(8, 64), normalize=True, rows=CLIP, cols=CLIP)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_devices_without_values(backend: str) -> None:
    x, y = torch.randn(5, 8, device="meta"), torch.randn(7, 8, device="meta")
    rows, cols = reduce_prefixes(x, y, prefixes=(2, 8), rows=CLIP, cols=CLIP, normalize=True, backend="reference")
    assert [list(t.shape) for t in (*rows, *cols)] == [[2, 5]] * 2 + [[2, 7]] * 2
    compiled = torch.compile(lambda x, y: at_once(x, y, prefixes=(2, 8), rows=CLIP, backend=backend), backend="eager")
    x, y = torch.randn(5, 8), torch.randn(7, 8)
    torch.testing.assert_close(compiled(x, y), at_once(x, y, prefixes=(2, 8), rows=CLIP, backend=backend))


def test_the_reference_serves_transforms() -> None:
    x, y = torch.randn(5, 8), torch.randn(5, 8)

    def loss(x: Tensor) -> Tensor:
        return ccu_fast.info_nce(x, y, scale=2.0, prefixes=(2, 8), normalize=True, backend="reference")

    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), leaf.grad)
    torch.testing.assert_close(torch.func.vmap(loss)(torch.stack([x, x])), loss(x).expand(2))


def test_chunks_fit_into_the_workspace() -> None:
    """With what the backward pass makes of them: the products of all prefixes, G, and the guide's."""
    for workspace, m, count in ((1 << 24, 20_000, 9), (1 << 20, 500, 3), (1 << 28, 5000, 4)):
        x, y = torch.zeros(256, count), torch.zeros(m, count)
        p, *_ = build_problem(
            *(x, y, 2.0, None), *[None] * 5, CLIP, CLIP, "propagate", prefixes=tuple(range(1, count + 1))
        )
        for guided in (False, True):
            q = replace(p, guide_x=x[None], guide_y=y[None]) if guided else p
            stash = native.stash_shape(q, workspace, True)[0]
            for chunk in native._chunks(q, workspace, stash):
                rows = chunk.rows.stop - chunk.rows.start
                held = (1 + guided + (count if chunk.place is None else 0)) * rows * m * 4
                assert held <= workspace // 4 or rows <= 16
            assert 4 * stash <= workspace * 3 // 4


def test_a_prefix_of_zeros_stays_zero() -> None:
    x = torch.cat([torch.zeros(5, 4), torch.randn(5, 4)], 1)
    rows, _ = reduce_prefixes(x, torch.randn(5, 8), prefixes=(4, 8), rows=[("sum", ALL)], normalize=True)
    assert rows[0][0].eq(0).all()
    assert rows[0][1].ne(0).all()


def test_the_second_derivative() -> None:
    x, y, scale = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64), torch.tensor(2.0)

    def penalty(dtype: torch.dtype, **options: Any) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, y, scale)]
        rows, _ = reduce_prefixes(*leaves[:2], scale=leaves[2], prefixes=(2, 6), rows=CLIP, normalize=True, **options)
        grads = torch.autograd.grad((rows[0] - rows[1]).sum(), leaves, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in grads), leaves))

    for ours, exact in zip(penalty(torch.float32), penalty(torch.float64, backend="reference"), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_one_graph_serves_all_sizes() -> None:
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def call(x: Tensor, y: Tensor) -> list[Tensor]:
        return at_once(x, y, prefixes=(3, 8), rows=MIX, normalize=True)

    compiled = torch.compile(call, backend=count, fullgraph=True, dynamic=True)
    for n in (40, 50, 60):
        x, y = (torch.randn(n, 8, requires_grad=True) for _ in range(2))
        for ours, eager in zip(compiled(x, y), call(x, y), strict=True):
            torch.testing.assert_close(ours, eager)
    assert graphs == 1


def test_one_product_for_all_prefixes() -> None:
    """Forward and backward have the multiplications of the longest prefix, where a loop has those of each."""
    x, y = torch.randn(256, 64), torch.randn(256, 64)
    p, *_ = build_problem(x, y, 2.0, None, *[None] * 5, CLIP, CLIP, "propagate", prefixes=(8, 16, 32, 64))
    for unit_vectors in (False, True):
        p = replace(p, unit=unit_vectors)
        with Multiplications() as mode:
            row_out, col_out, kept = native.forward(p, 1 << 24, True)
            incoming = torch.ones_like(row_out), torch.ones_like(col_out), row_out, col_out
            native.backward(p, incoming, kept, [True] * 4, 1 << 24)
        assert mode.total == 3 * 256 * 256 * 64
        assert kept.numel() == 4 * 256 * 256


def test_a_cpu_that_multiplies_bf16_takes_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.serves(torch.float32)
    monkeypatch.setattr("ccu_fast.ops.backend.has_bf16", lambda: True)
    assert not native.serves(torch.bfloat16)
    assert native.serves(torch.float32)


WRONG: list[tuple[Any, type[Exception], str]] = [
    ((), TypeError, r"prefixes: expected ascending numbers of dimensions such as \(64, 128, 256\), got \(\)"),
    (8, TypeError, "prefixes: expected ascending numbers of dimensions"),
    ((4, 4), ValueError, r"prefixes: expected ascending numbers, got \(4, 4\)"),
    ((8, 4), ValueError, r"prefixes: expected ascending numbers, got \(8, 4\)"),
    ((0, 4), ValueError, "prefixes: expected"),
    ((4, 9), ValueError, r"prefixes: expected at most 8 dimensions \(those of x\), got 9"),
    ((2.5,), TypeError, "prefixes: expected"),
]


@pytest.mark.parametrize(("prefixes", "error", "says"), WRONG, ids=[str(w[0]) for w in WRONG])
def test_bad_prefixes(prefixes: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        reduce_prefixes(torch.randn(3, 8), torch.randn(3, 8), prefixes=prefixes, rows=CLIP)
    if prefixes:  # without any, InfoNCE is of the whole
        with pytest.raises(error, match=says):
            ccu_fast.info_nce(torch.randn(3, 8), torch.randn(3, 8), scale=1.0, prefixes=prefixes)


def test_bad_limits() -> None:
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"row_limits: expected shape \[2, 3\], got \[4, 3\]"):
        reduce_prefixes(x, x, prefixes=(4, 8), rows=CLIP, row_limits=torch.zeros(4, 3))
