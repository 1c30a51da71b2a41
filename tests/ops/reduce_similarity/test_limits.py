"""Limits and guides of reduce_similarity: which OTHER pairs they leave out, in values, counts and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ccu_fast import ALL, OTHER, SAME, SELF, info_nce, reduce_similarity
from ccu_fast.ops.reduce_similarity.api import build_problem
from ccu_fast.ops.reduce_similarity.operator import specialised
from ccu_fast.ops.reduce_similarity.problem import KINDS
from tests.support.oracle import (
    SETS,
    Case,
    assert_same_bits,
    by_us,
    check,
    gap,
    in_reach,
    relations,
    similarities,
    unit,
)
from tests.support.tolerance import assert_three_way

pytestmark = pytest.mark.usefixtures("one_thread")

Engine = tuple[str, torch.dtype]

MIX = (("lse", ALL), ("sum", OTHER), ("softplus", SAME | OTHER), ("lse", OTHER), ("logsigmoid", SELF | OTHER))
CLIP = (("lse", OTHER), ("sum", SELF))


def ints(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape)


KEYS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "paired": lambda n, m: {},
    "unrelated": lambda n, m: {"paired": False},
    "labels": lambda n, m: {"row_labels": ints(3, n, low=-1), "col_labels": ints(3, m, low=-1)},
    "ids": lambda n, m: {"row_ids": ints(9, n), "col_ids": ints(9, m)},
    "labels and ids": lambda n, m: {**KEYS["labels"](n, m), **KEYS["ids"](n, m)},
}


def limited(case: Case, sides: str = "both", guide: tuple[Tensor, Tensor] | None = None) -> Case:
    """The case with limits that leave out about half of what is at hand, for both sides or one of "rows", "cols"."""
    case = replace(case, limits={} if guide is None else {"guide": guide})
    similar = similarities(case)
    limits = dict(case.limits)
    if sides in ("rows", "both"):
        limits["row_limits"] = gap(similar, -1).float()
    if sides in ("cols", "both"):
        limits["col_limits"] = gap(similar, -2).float()
    case = replace(case, limits=limits)
    some = relations(case) == int(OTHER)
    for dim, side in ((-1, "rows"), (-2, "cols")):
        if side in (sides, "both") and sides in (side, "both"):
            share = float((in_reach(case, dim)[some] == 0).double().mean())
            assert 0.2 < share < 0.8, f"limits leave out {share} of the pairs"
    return case


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("sides", ["rows", "cols", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_over_every_relation(kind: str, sides: str, keys: str, engine: Engine) -> None:
    n, m = (37, 37) if keys == "paired" else (29, 41)
    given = KEYS[keys](n, m)
    refused = () if "row_labels" in given else (("lse", SAME),)
    spec = tuple((kind, r) for r in SETS if (kind, r) not in refused)
    check(limited(Case(unit(n, 24), unit(m, 24), 6.0, -0.5, given, spec, spec), sides), *engine)


@pytest.mark.parametrize("keys", ["paired", "labels and ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_guide_decides(dtype: torch.dtype, keys: str, engine: Engine) -> None:
    """Of another width and of another dtype than the features."""
    guide = unit(37, 11).to(dtype), unit(37, 11).to(dtype)
    case = limited(Case(unit(37, 24), unit(37, 24), 6.0, None, KEYS[keys](37, 37), MIX, MIX), guide=guide)
    assert (in_reach(case, -1) != in_reach(limited(replace(case, limits={})), -1)).any()
    check(case, *engine)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", ["paired", "labels"])
def test_half_types(keys: str, dtype: torch.dtype, backend: str) -> None:
    check(limited(Case(unit(33, 40), unit(33, 40), 10.0, None, KEYS[keys](33, 33), MIX, MIX)), backend, dtype)


SHAPES = [(1, 1, 1), (2, 2, 5), (16, 300, 7), (300, 17, 40), (65, 130, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=["x".join(map(str, s)) for s in SHAPES])
def test_shapes(shape: tuple[int, int, int], engine: Engine) -> None:
    n, m, d = shape
    case = Case(unit(n, d), unit(m, d), 4.0, 0.5, {}, MIX, MIX[::-1])
    similar = similarities(case)
    limits = {"row_limits": similar.mean(-1).float() + 1e-3, "col_limits": similar.mean(-2).float() + 1e-3}
    check(replace(case, limits=limits), *engine)


def test_nothing_to_reduce(backend: str) -> None:
    none = torch.zeros(0)
    for n, m in ((0, 3), (3, 0), (0, 0)):
        rows, cols = reduce_similarity(
            torch.randn(n, 4), torch.randn(m, 4), row_limits=none.new_zeros(n), col_limits=none.new_zeros(m),
            guide=(torch.randn(n, 2), torch.randn(m, 2)), rows=[("lse", OTHER), ("count", OTHER)], cols=[("sum", ALL)],
            backend=backend,
        )  # fmt: skip
        assert rows[0].eq(-torch.inf).all()
        assert rows[1].eq(0).all()
        assert cols[0].eq(0).all()


BANKS: dict[str, tuple[tuple[int, ...], ...]] = {
    "y shared": ((3, 19, 8), (23, 8), (3, 19), (23,), (19, 5), (3, 23, 5)),
    "x shared": ((19, 8), (3, 23, 8), (19,), (3, 23), (3, 19, 5), (23, 5)),
    "both": ((3, 19, 8), (3, 23, 8), (3, 19), (3, 23), (3, 19, 5), (3, 23, 5)),
    "two leading dimensions": ((2, 1, 19, 8), (3, 19, 8), (3, 19), (2, 1, 19), (2, 1, 19, 5), (3, 19, 5)),
}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("workspace", [None, 0])
@pytest.mark.parametrize("name", BANKS)
def test_banks(name: str, workspace: int | None, guided: bool, engine: Engine) -> None:
    """Whole numbers and limits between them, which any number of banks may share."""
    x, y, row_shape, col_shape, u, v = BANKS[name]
    given = {"row_labels": ints(4, x[-2]), "col_labels": ints(4, y[-2])}
    limits: dict[str, Any] = {"row_limits": ints(3, *row_shape) - 0.5, "col_limits": ints(3, *col_shape) - 0.5}
    if guided:
        limits["guide"] = ints(3, *u, low=-2).float(), ints(3, *v, low=-2).float()
    # To torch these are exact; to G in fp16, which makes that gradient, they are not.
    frozen = ("scale",) if engine[1] == torch.float16 else ()
    whole = ints(3, *x, low=-2).double(), ints(3, *y, low=-2).double()
    case = Case(*whole, 0.25, 0.25, given, MIX, MIX, frozen, limits)
    check(case, *engine, workspace=workspace)


WORKSPACES = [0, 1 << 12, 100_001, 1 << 20, 1 << 28]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_workspace_changes_memory_not_values(workspace: int, guided: bool, engine: Engine) -> None:
    guide = (unit(150, 16), unit(150, 16)) if guided else None
    check(
        limited(Case(unit(150, 24), unit(150, 24), 12.0, -1.0, {}, MIX, MIX), guide=guide), *engine, workspace=workspace
    )


def test_counts(engine: Engine) -> None:
    backend, dtype = engine
    case = limited(Case(unit(31, 8), unit(23, 8), keys=KEYS["labels and ids"](31, 23)))
    spec = [("count", r) for r in SETS] + [("lse", OTHER)]
    x, y = case.x.to(dtype).requires_grad_(), case.y.to(dtype).requires_grad_()
    rows, cols = reduce_similarity(x, y, **case.keys, **case.limits, rows=spec, cols=spec, backend=backend)
    for results, dim in ((rows, -1), (cols, -2)):
        for (_, r), result in zip(spec[:-1], results, strict=False):
            assert result.dtype == torch.int64
            assert not result.requires_grad
            assert torch.equal(result, ((in_reach(case, dim) & int(r)) != 0).sum(dim))
    both = [rows[-1], cols[-1]]
    chosen = [both[0][both[0].isfinite()].sum(), both[1][both[1].isfinite()].sum()]
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(chosen), (x, y)))
    # Alone, without anything that has a gradient.
    (alone,), _ = reduce_similarity(x, y, **case.keys, **case.limits, rows=[("count", OTHER)], backend=backend)
    assert torch.equal(alone, rows[SETS.index(int(OTHER))])


def test_what_is_as_similar_as_the_limit_stays(engine: Engine) -> None:
    """Small whole numbers, whose products are exact in every dtype."""
    backend, dtype = engine
    x, y = ints(3, 24, 6, low=-2).double(), ints(3, 40, 6, low=-2).double()
    case = Case(x, y, 0.25, keys={"paired": False}, rows=MIX, cols=MIX)
    similar = similarities(case)
    case.limits = {"row_limits": similar.median(-1).values.float(), "col_limits": similar.median(-2).values.float()}
    assert (similar == case.limits["row_limits"][:, None]).any(-1).all()
    check(case, backend, dtype)


@pytest.mark.parametrize("keys", ["paired", "labels and ids"])
def test_no_limit_all_limits_and_nan(keys: str, engine: Engine) -> None:
    backend, dtype = engine
    plain = Case(unit(18, 9), unit(18, 9), 5.0, None, KEYS[keys](18, 18), MIX, MIX)
    without = by_us(plain, dtype, backend)
    for value in (torch.inf, torch.nan):
        limits = dict.fromkeys(("row_limits", "col_limits"), torch.full((18,), value))
        for name, result in by_us(replace(plain, limits=limits), dtype, backend).items():
            torch.testing.assert_close(result, without[name])
    # SELF and SAME pairs are left.
    case = replace(plain, limits=dict.fromkeys(("row_limits", "col_limits"), torch.full((18,), -torch.inf)))
    results = check(case, backend, dtype)
    for side in ("rows", "cols"):
        assert results[f"{side} lse OTHER"].eq(-torch.inf).all()
        assert results[f"{side} sum OTHER"].eq(0).all()


def test_one_sides_limits_do_not_concern_the_other(backend: str) -> None:
    x, y, limits = torch.randn(20, 5), torch.randn(20, 5), torch.zeros(20)
    rows, cols = reduce_similarity(x, y, rows=MIX, cols=MIX, backend=backend)
    for options, same in (({"row_limits": limits}, cols), ({"col_limits": limits}, rows)):
        ours = reduce_similarity(x, y, **options, rows=MIX, cols=MIX, backend=backend)
        for result, expected, other in zip(ours[same is cols], same, ours[same is rows], strict=True):
            torch.testing.assert_close(result, expected)
            assert not torch.equal(result, other)


def test_a_far_false_negative_does_not_cost_the_others_their_digits(engine: Engine) -> None:
    """Near copies at a scale of 100: left out, they must not set the shift of an exponential of what stays."""
    x = unit(60, 24)
    y = torch.nn.functional.normalize(x + 0.02 * torch.randn_like(x), dim=-1)
    x[1::2] = torch.nn.functional.normalize(x[::2] + 0.02 * torch.randn_like(x[::2]), dim=-1)
    y[1::2] = torch.nn.functional.normalize(x[::2] + 0.02 * torch.randn_like(x[::2]), dim=-1)
    limits = {"row_limits": torch.full((60,), 0.9), "col_limits": torch.full((60,), 0.9)}
    case = Case(x, y, 100.0, rows=CLIP, cols=CLIP, limits=limits)
    assert (in_reach(case, -1) == 0).any(-1).all()
    check(case, *engine, ulps=64)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_not_left_out(value: float, backend: str) -> None:
    """A pair of unknown similarity stays, and is seen in the result; the guide of an ignored item does not matter."""
    x, y, limits = torch.randn(8, 5), torch.randn(9, 5), torch.zeros(8)
    clean, _ = reduce_similarity(x, y, row_limits=limits, rows=[("sum", OTHER)], backend=backend)
    x[3, 2] = torch.nan
    (total,), _ = reduce_similarity(x, y, row_limits=limits, rows=[("sum", OTHER)], backend=backend)
    assert total[3].isnan()
    others = torch.arange(8) != 3
    torch.testing.assert_close(total[others], clean[0][others])
    u, v, labels = torch.randn(8, 4), torch.randn(9, 4), ints(3, 8)
    x[3, 2], labels[3] = 1.0, -1
    options: dict[str, Any] = {"row_labels": labels, "col_labels": ints(3, 9), "row_limits": limits, "backend": backend}
    (finite,), _ = reduce_similarity(x, y, **options, guide=(u, v), rows=[("sum", OTHER)])
    u[3] = value
    (hidden,), _ = reduce_similarity(x, y, **options, guide=(u, v), rows=[("sum", OTHER)])
    assert torch.equal(finite, hidden)
    assert hidden[3] == 0


def test_no_gradient_flows_to_limits_and_guide(backend: str) -> None:
    x, y = (unit(12, 6).float().requires_grad_() for _ in "xy")
    u, v = (unit(12, 4).float().requires_grad_() for _ in "uv")
    limits = (u * v).sum(-1) - 0.1
    assert limits.requires_grad
    rows, _ = reduce_similarity(x, y, row_limits=limits, guide=(u, v), rows=CLIP, backend=backend)
    assert all(g is None for g in torch.autograd.grad(rows[0][rows[0].isfinite()].sum(), (u, v), allow_unused=True))
    frozen = x.detach(), y.detach()
    rows, _ = reduce_similarity(*frozen, row_limits=limits, guide=(u, v), rows=CLIP, backend=backend)
    assert not rows[0].requires_grad


def test_normalize_comes_before_limits(backend: str) -> None:
    """So limits look at cosines; the guide is taken as it is."""
    x, y = 3 * torch.randn(20, 6), torch.randn(20, 6)
    a, b = (torch.nn.functional.normalize(t, dim=-1) for t in (x, y))
    guide, limits = (2 * a, b), gap(a @ b.T, -1)
    options: dict[str, Any] = {"rows": MIX, "backend": backend, "normalize": True}
    expected, _ = reduce_similarity(a, b, row_limits=limits, rows=MIX, backend=backend)
    for ours in (
        reduce_similarity(x, y, row_limits=limits, **options)[0],
        reduce_similarity(x, y, row_limits=2 * limits, guide=guide, **options)[0],
    ):
        for result, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(result, other)


def test_second_derivatives_honour_limits(native: str) -> None:
    case = limited(Case(unit(9, 4), unit(9, 4), rows=CLIP, cols=CLIP))

    def penalty(backend: str, dtype: torch.dtype, **limits: Tensor) -> Tensor:
        x, y = case.x.to(dtype).requires_grad_(), case.y.to(dtype).requires_grad_()
        rows, cols = reduce_similarity(
            x, y, scale=3.0, rows=[*CLIP, ("count", OTHER)], cols=CLIP, backend=backend, **limits
        )
        loss = sum((lse - own).sigmoid().sum() for lse, own in (rows[:2], cols))
        first = torch.autograd.grad(loss, (x, y), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, y))
        return torch.cat([*first, *second]).detach().double()

    exact = penalty("reference", torch.float64, **case.limits)
    torch.testing.assert_close(penalty(native, torch.float32, **case.limits), exact, rtol=1e-4, atol=1e-5)
    assert (penalty("reference", torch.float64) - exact).abs().max() > 1e-2


@pytest.mark.parametrize("workspace", [0, 1 << 18, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_same_inputs_same_bits(dtype: torch.dtype, workspace: int | None, backend: str) -> None:
    guide = unit(150, 9).float(), unit(150, 9).float()
    case = limited(Case(unit(150, 33), unit(150, 33), 20.0, 0.5, {}, MIX, MIX), guide=guide)
    assert_same_bits(*(by_us(case, dtype, backend, workspace=workspace) for _ in range(2)))


def test_one_thread_or_two_same_bits(native: str) -> None:
    case = limited(Case(unit(300, 64), unit(300, 64), 20.0, None, {}, MIX, MIX))
    runs = []
    for count in (1, 2, 3):  # the fixture puts the number back
        torch.set_num_threads(count)
        runs.append(by_us(case, torch.float32, native, workspace=0))
    assert_same_bits(*runs)


def test_autocast_casts_the_guide_too(backend: str) -> None:
    x, y, u, v = (torch.randn(30, 16) for _ in range(4))
    limits = torch.zeros(30)
    with torch.autocast("cpu", torch.bfloat16):
        (ours,), _ = reduce_similarity(x, y, row_limits=limits, guide=(u, v), rows=[("lse", ALL)], backend=backend)
    half = [t.bfloat16() for t in (x, y, u, v)]
    (cast,), _ = reduce_similarity(
        *half[:2], row_limits=limits, guide=(half[2], half[3]), rows=[("lse", ALL)], backend=backend
    )
    assert torch.equal(ours, cast)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_frozen_keys_with_limits(precision: str, native: str) -> None:
    """Many keys without a gradient have a way of their own, which knows no limits."""
    case = limited(Case(unit(24, 16), unit(4200, 16), 5.0, rows=(("lse", OTHER),), frozen=("y",)), "rows")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        p = build_problem(
            case.x.float().requires_grad_(), case.y.float(), 5.0, None, None, None, None, None, None, case.rows, (),
            "propagate", case.limits["row_limits"],
        )[0]  # fmt: skip
        assert p.limited
        assert specialised(p, native, True) == native
        assert specialised(replace(p, row_limits=None), native, True) == "native.frozen_keys"
        if precision == "highest":
            check(case, native, torch.float32)
        else:  # bf16 products, if the CPU has them
            ours = by_us(case, torch.float32, native)["rows lse OTHER"]
            assert (ours - by_us(replace(case, limits={}), torch.float32, native)["rows lse OTHER"]).abs().max() > 0.1
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("n", [8, 300])
def test_losses_pass_limits_on(n: int, backend: str) -> None:
    """No shortcut of a loss leaves them out, of small batches least of all; a constant threshold for both sides."""
    x, y = unit(n, 16), unit(n, 16)
    limit = 0.2 if n == 8 else 0.3001
    limits = {"row_limits": torch.full((n,), limit), "col_limits": torch.full((n,), limit)}

    def masked(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        a, b = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
        dots = a @ b.T
        out = (x @ y.T > limit) & ~torch.eye(n, dtype=torch.bool)
        s, target = (7.0 * dots).masked_fill(out, -torch.inf), torch.arange(n)
        cross_entropy = torch.nn.functional.cross_entropy
        loss = (cross_entropy(s, target) + cross_entropy(s.T, target)) / 2
        return loss.detach(), *torch.autograd.grad(loss, (a, b))

    a, b = x.float().requires_grad_(), y.float().requires_grad_()
    loss = info_nce(a, b, scale=7.0, backend=backend, **limits)
    ours = loss.detach(), *torch.autograd.grad(loss, (a, b))
    for name, got, same, exact in zip(
        ("loss", "dx", "dy"), ours, masked(torch.float32), masked(torch.float64), strict=True
    ):
        assert_three_way(name, got, same, exact)
    assert (loss - info_nce(a, b, scale=7.0, backend=backend)).abs() > 0.01


def test_limits_that_concern_nothing_are_dropped() -> None:
    """So they cost nothing either."""
    x, limits = torch.randn(5, 3), torch.zeros(5)

    def built(rows: Any, cols: Any, **given: Any) -> Any:
        return build_problem(x, x, 1.0, None, None, None, None, None, None, rows, cols, "propagate", **given)[0]

    every = {"row_limits": limits, "col_limits": limits, "guide": (x, x)}
    p = built([("sum", SELF)], [("lse", OTHER)], **every)
    assert p.row_limits is None
    assert p.col_limits is not None
    assert p.guide_x is not None
    p = built([("sum", SELF)], [], **every)
    assert not p.limited
    assert p.guide_x is None


@pytest.mark.parametrize("workspace", [None, 0])
@pytest.mark.parametrize("shared", ["x", "y"])
def test_a_guide_may_be_one_for_all_banks(shared: str, workspace: int | None, backend: str) -> None:
    """Both of its sides too, which those of the features cannot be."""
    x, y = unit(3, 5, 4), unit(3, 6, 4)
    x, y = (x[0], y) if shared == "x" else (x, y[0])
    guide, limits = (torch.randn(5, 2), torch.randn(6, 2)), torch.zeros(5)

    def run(name: str, guide: tuple[Tensor, Tensor]) -> list[Tensor]:
        leaves = [t.float().requires_grad_() for t in (x, y)]
        (lse,), _ = reduce_similarity(
            *leaves, rows=[("lse", OTHER)], row_limits=limits, guide=guide, backend=name, workspace=workspace
        )
        return [lse, *torch.autograd.grad(torch.where(lse.isinf(), 0, lse).sum(), leaves)]

    want = run("reference", tuple(t.expand(3, *t.shape) for t in guide))
    torch.testing.assert_close(run(backend, guide), want)
