"""reduce_similarity against brute force: every reduction, relation set, shape, dtype and gradient; its guarantees."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ccu_fast import ALL, OTHER, SAME, SELF, info_nce, reduce_similarity
from ccu_fast.ops.reduce_similarity.problem import KINDS, MAX_REDUCTIONS, SimilarityProblem, encode
from tests.support.oracle import SET_NAMES, SETS, Case, assert_same_bits, by_us, check, unit
from tests.support.peak import printed_bytes
from tests.support.tolerance import assert_three_way

pytestmark = pytest.mark.usefixtures("one_thread")

Engine = tuple[str, torch.dtype]

MIX = (("lse", ALL), ("sum", SELF), ("softplus", SAME | OTHER), ("lse", OTHER), ("logsigmoid", SELF))


def ints(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape)


def labelled(n: int, m: int) -> dict[str, Tensor]:
    return {"row_labels": ints(4, n), "col_labels": ints(4, m)}


KEYS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "paired": lambda n, m: {},
    "unrelated": lambda n, m: {"paired": False},
    "labels": labelled,
    "ids": lambda n, m: {"row_ids": ints(9, n), "col_ids": ints(9, m)},
    "labels and ids": lambda n, m: {**labelled(n, m), "row_ids": ints(9, n), "col_ids": ints(9, m)},
    "ignored": lambda n, m: {"row_labels": ints(3, n, low=-1), "col_labels": ints(3, m, low=-1)},
    "huge keys": lambda n, m: {
        "row_ids": ints(9, n) * 2**40,
        "col_ids": ints(9, m) * 2**40,
        "row_labels": ints(3, n, low=-1) * 2**60,
        "col_labels": ints(3, m, low=-1) * 2**60,
    },
    "all ignored": lambda n, m: {"row_labels": torch.full((n,), -1), "col_labels": ints(3, m)},
}


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("relations", SETS, ids=SET_NAMES.values())
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["rows", "cols"])
def test_each_reduction(side: str, kind: str, relations: int, keys: str, engine: Engine) -> None:
    n, m = (19, 19) if keys == "paired" else (13, 21)
    case = Case(unit(n, 9), unit(m, 9), scale=5.0, keys=KEYS[keys](n, m), **{side: ((kind, relations),)})
    if (kind, relations) == ("lse", SAME) and "row_labels" not in case.keys:
        with pytest.raises(ValueError, match=rf"^row_labels: expected a tensor for .* in {side}, got None"):
            check(case, *engine)
        return
    check(case, *engine)


@pytest.mark.parametrize("keys", KEYS)
def test_many_reductions_at_once(keys: str, engine: Engine) -> None:
    """Two lse of one row need one exponential with one shift; here there are several on both sides."""
    given = KEYS[keys](37, 37)
    alike = ("lse", SAME if "row_labels" in given else SELF | SAME)
    rows = (("lse", ALL), ("lse", OTHER), alike, ("sum", SAME), ("softplus", SELF), ("lse", SELF))
    cols = (("lse", SAME | OTHER), ("softplus", ALL), alike, ("sum", OTHER), ("lse", OTHER))
    check(Case(unit(37, 16), unit(37, 16), 8.0, -3.0, given, rows, cols), *engine)


def test_as_many_reductions_as_allowed(engine: Engine) -> None:
    spec = tuple((kind, relations) for kind in KINDS for relations in SETS)[-MAX_REDUCTIONS:]
    check(Case(unit(37, 16), unit(29, 16), 8.0, keys=KEYS["labels and ids"](37, 29), rows=spec, cols=spec), *engine)


SHAPES = [(1, 1, 1), (1, 5, 7), (5, 1, 40), (2, 2, 513), (33, 17, 513), (64, 64, 40), (129, 130, 7), (31, 300, 1)]
SHAPES += [(0, 5, 7), (5, 0, 7), (0, 0, 3), (700, 90, 33)]


@pytest.mark.parametrize("shape", SHAPES, ids=["x".join(map(str, s)) for s in SHAPES])
@pytest.mark.parametrize("keys", ["labels and ids", "unrelated"])
def test_shapes(shape: tuple[int, int, int], keys: str, engine: Engine) -> None:
    n, m, d = shape
    check(Case(unit(n, d), unit(m, d), 4.0, 0.5, KEYS[keys](n, m), MIX, MIX[::-1]), *engine)


BANKS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, tuple[int, ...]]]] = {
    "17 banks against one": ((17, 11, 8), (11, 8), {}),
    "one against 17": ((9, 8), (17, 12, 8), {"row_labels": (9,), "col_labels": (12,)}),
    "both": ((4, 6, 8), (4, 7, 8), {"row_labels": (4, 6), "col_labels": (7,), "row_ids": (4, 6), "col_ids": (4, 7)}),
    "two leading dimensions": ((2, 1, 6, 8), (3, 6, 8), {}),
    "keys of one leading dimension": ((2, 1, 6, 8), (3, 7, 8), {"row_labels": (3, 6), "col_labels": (2, 1, 7)}),
    "keys make the banks differ": ((1, 6, 8), (3, 7, 8), {"row_ids": (3, 6), "col_ids": (7,)}),
    "no bank": ((0, 6, 8), (7, 8), {}),
    "one bank of three dimensions": ((1, 1, 6, 8), (7, 8), {}),
}


@pytest.mark.parametrize("workspace", [None, 0])
@pytest.mark.parametrize("name", BANKS)
def test_leading_dimensions_broadcast(name: str, workspace: int | None, engine: Engine) -> None:
    x, y, keys = BANKS[name]
    case = Case(unit(*x), unit(*y), 3.0, 0.25, {k: ints(4, *shape) for k, shape in keys.items()}, MIX, MIX)
    results = check(case, *engine, workspace=workspace)
    lead = torch.broadcast_shapes(x[:-2], y[:-2])
    assert results["rows lse SELF+SAME+OTHER"].shape == (*lead, x[-2])
    assert results["dx"].shape == x


def test_a_bank_is_what_it_is_alone(backend: str) -> None:
    x, y = torch.randn(5, 70, 16), torch.randn(90, 16)
    together, _ = reduce_similarity(x, y, rows=MIX, backend=backend, workspace=1 << 14)
    for bank in range(5):
        alone, _ = reduce_similarity(x[bank], y, rows=MIX, backend=backend)
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[bank], b)


# Backends other than the reference compute half types; so does the reference, in fp32.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(65, 80, 40), (130, 130, 513), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("keys", ["labels and ids", "unrelated"])
def test_half_types(keys: str, shape: tuple[int, int, int], dtype: torch.dtype, backend: str) -> None:
    n, m, d = shape
    results = check(Case(unit(n, d), unit(m, d), 10.0, 0.5, KEYS[keys](n, m), MIX, MIX), backend, dtype)
    assert {k: v.dtype for k, v in results.items() if k in ("dx", "dy", "dscale", "dbias")} == {
        "dx": dtype,
        "dy": dtype,
        "dscale": torch.float32,
        "dbias": torch.float32,
    }
    assert all(v.dtype == torch.float32 for k, v in results.items() if not k.startswith("d"))


def two_sided(low: float, high: float) -> tuple[Tensor, Tensor]:
    """S_ij = a_i + b_j: rows and columns whose sizes lie hundreds apart."""
    a = torch.linspace(low, high, 40, dtype=torch.float64)
    b = torch.linspace(high, low, 50, dtype=torch.float64)
    return torch.stack([a, torch.ones_like(a)], -1), torch.stack([torch.ones_like(b), b], -1)


same_rows = unit(1, 24).expand(40, 24)
EXTREMES: dict[str, Callable[[], Case]] = {
    "scale 100": lambda: Case(unit(50, 24), unit(50, 24), 100.0),
    "scale 100, matched": lambda: (lambda z: Case(z, z.clone(), 100.0))(unit(50, 24)),
    "scale 100, opposite": lambda: (lambda z: Case(z, -z, 100.0))(unit(50, 24)),
    "negative scale": lambda: Case(unit(50, 24), unit(40, 24), -100.0),
    "scale 0": lambda: Case(unit(50, 24), unit(40, 24), 0.0),
    "S to 500": lambda: Case(22 * unit(50, 24), 22 * unit(60, 24)),
    "identical rows": lambda: Case(same_rows, same_rows, 50.0),
    "all zero": lambda: Case(torch.zeros(20, 5, dtype=torch.float64), torch.zeros(30, 5, dtype=torch.float64), 50.0),
    "far below": lambda: Case(unit(40, 24), unit(40, 24), 20.0, -1000.0),
    "far above": lambda: Case(unit(40, 24), unit(40, 24), 20.0, 1000.0),
    "rows and columns far apart": lambda: Case(*two_sided(-250, 250)),
    "one row dominates": lambda: Case(torch.cat([300 * unit(1, 24), 0.01 * unit(39, 24)]), unit(40, 24)),
}


@pytest.mark.parametrize("keys", ["labels", "unrelated"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_values(name: str, keys: str, engine: Engine) -> None:
    case = EXTREMES[name]()
    n, m = case.x.shape[0], case.y.shape[0]
    spec = (("lse", ALL), ("lse", OTHER), ("softplus", OTHER), ("logsigmoid", ALL))
    check(replace(case, keys=KEYS[keys](n, m), rows=spec, cols=spec), *engine)


def test_an_empty_set_is_minus_infinity_without_gradient(engine: Engine) -> None:
    backend, dtype = engine
    x, y = (torch.randn(6, 4, dtype=dtype, requires_grad=True) for _ in "xy")
    labels = torch.tensor([0, 0, 1, 1, -1, 2])
    rows, cols = reduce_similarity(
        x, y, row_labels=labels, backend=backend, rows=[("lse", SAME), ("sum", SAME)], cols=[("lse", SAME)]
    )
    empty = [4, 5]  # an ignored item, and one that is alone with its label
    for lse in (rows[0], cols[0]):
        assert lse[empty].eq(-torch.inf).all()
        assert lse[:4].isfinite().all()
    assert rows[1][empty].eq(0).all()
    torch.autograd.backward([rows[0], rows[1], cols[0]], [torch.ones(6, dtype=dtype)] * 3)
    for grad in (x.grad, y.grad):
        assert grad[:4].ne(0).all()
        assert grad[empty].eq(0).all()


@pytest.mark.parametrize("relations", SETS, ids=SET_NAMES.values())
def test_nothing_but_ignored_items(relations: int, engine: Engine) -> None:
    backend, dtype = engine
    x, y = (torch.randn(5, 4, dtype=dtype, requires_grad=True) for _ in "xy")
    spec = [(kind, relations) for kind in KINDS]
    rows, cols = reduce_similarity(
        x, y, row_labels=torch.full((5,), -1), rows=spec, cols=spec, scale=torch.ones(()), backend=backend
    )
    for lse, *totals in (rows, cols):
        assert lse.eq(-torch.inf).all()
        assert all(total.eq(0).all() for total in totals)
    torch.autograd.backward([*rows, *cols], [torch.ones(5, dtype=dtype)] * (2 * len(KINDS)))
    assert x.grad.eq(0).all()
    assert y.grad.eq(0).all()


def test_nan_stays_where_it_came_from(backend: str) -> None:
    x, y = torch.randn(70, 5), torch.randn(60, 5)
    clean, _ = reduce_similarity(x, y, rows=MIX, paired=False, backend=backend)
    x[3, 2] = torch.nan
    rows, cols = reduce_similarity(
        x, y, rows=MIX, cols=[("lse", ALL), ("softplus", ALL)], paired=False, backend=backend
    )
    others = torch.arange(70) != 3
    for (kind, relations), dirty, before in zip(MIX, rows, clean, strict=True):
        if relations & OTHER:
            assert dirty[3].isnan(), f"{kind} {relations}"
        torch.testing.assert_close(dirty[others], before[others])
    assert all(c.isnan().all() for c in cols)


def test_second_derivatives_of_a_sum(native: str) -> None:
    x, y, scale = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4), torch.tensor(2.0, requires_grad=True)
    (total,), _ = reduce_similarity(x, y, scale=scale, rows=[("sum", ALL)], backend=native)
    dx, dscale = torch.autograd.grad(total.sum(), (x, scale), create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(dx.sum() + dscale, scale)[0], 5 * y.sum())


def test_nan_reaches_the_gradient(backend: str) -> None:
    x, y = torch.randn(8, 5), torch.randn(8, 5, requires_grad=True)
    x[3, 2] = torch.nan
    (lse,), _ = reduce_similarity(x, y, rows=[("lse", ALL)], backend=backend)
    lse.sum().backward()
    assert y.grad.isnan().any()


ONE_BANK, TWO_BANKS = ((13, 9), (21, 9)), ((2, 13, 9), (21, 9))
WITH_BIAS, RECOMPUTED, KEPT = (0.5, 0), (None, 0), (None, 1 << 24)  # bias and workspace


@pytest.mark.parametrize("shape", [ONE_BANK, TWO_BANKS], ids=["one bank", "two banks"])
@pytest.mark.parametrize("normalize", [False, True])
def test_what_an_ignored_item_holds_does_not_matter(shape: tuple[Any, Any], normalize: bool, backend: str) -> None:
    """The result equals that of zeros in its place: values and all four gradients, with E kept and recomputed."""
    nothing_comes_of_ignored_items(shape, normalize, backend, WITH_BIAS, RECOMPUTED, KEPT)


def nothing_comes_of_ignored_items(shape: tuple[Any, Any], normalize: bool, backend: str, *ways: Any) -> None:
    x, y = unit(*shape[0]).float(), unit(*shape[1]).float()
    labels = {"row_labels": ints(3, 13), "col_labels": ints(3, 21)}
    labels["row_labels"][5] = labels["col_labels"][[0, 20]] = -1
    for bias, workspace in ways:
        results = []
        for hidden in (0.0, torch.nan, torch.inf):
            leaves = [x.clone(), y.clone(), torch.tensor(3.0), *([] if bias is None else [torch.tensor(bias)])]
            leaves[0][..., 5, :] = leaves[1][..., [0, 20], 3] = hidden
            for leaf in leaves:
                leaf.requires_grad_()
            named = dict(zip(("x", "y", "scale", "bias"), leaves, strict=False))
            options: dict[str, Any] = {"backend": backend, "workspace": workspace, "normalize": normalize}
            rows, cols = reduce_similarity(**named, **labels, rows=MIX, cols=MIX[:2], **options)
            outputs = [*rows, *cols]
            grads = torch.autograd.grad(outputs, leaves, [torch.linspace(-1, 1, o.numel()).view_as(o) for o in outputs])
            results.append([*outputs, *grads])
        for zero, *others in zip(*results, strict=True):
            for hidden in others:
                torch.testing.assert_close(hidden, zero, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinite_inputs_do_not_give_finite_results(value: float, backend: str) -> None:
    x, y = torch.rand(8, 5), torch.rand(8, 5)
    x[3, 2] = value
    (lse, total), _ = reduce_similarity(x, y, rows=[("lse", ALL), ("sum", ALL)], backend=backend)
    exact = x @ y.T
    assert torch.equal(lse[3], exact[3].logsumexp(0)) or (lse[3].isnan() and value > 0)
    assert not total[3].isfinite()
    assert lse[torch.arange(8) != 3].isfinite().all()


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4))[1:], ids=str)
def test_gradients_of_any_subset(needs: tuple[bool, ...], engine: Engine) -> None:
    backend, dtype = engine
    data = [torch.randn(9, 6), torch.randn(11, 6), torch.tensor(2.0), torch.tensor(-0.5)]

    def grads(wanted: tuple[bool, ...]) -> list[Tensor | None]:
        x, y, scale, bias = leaves = [t.to(dtype).requires_grad_(w) for t, w in zip(data, wanted, strict=True)]
        rows, cols = reduce_similarity(x, y, scale=scale, bias=bias, rows=MIX, cols=MIX, backend=backend)
        sum(r[r.isfinite()].sum() for r in (*rows, *cols)).backward()
        return [t.grad for t in leaves]

    for one, full, wanted in zip(grads(needs), grads((True,) * 4), needs, strict=True):
        assert (one is not None) == wanted
        if one is not None:
            torch.testing.assert_close(one, full)


def test_no_gradient_without_grad_mode(backend: str) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    with torch.no_grad():
        (lse,), _ = reduce_similarity(x, x, rows=[("lse", ALL)], backend=backend)
    assert not lse.requires_grad
    with torch.inference_mode():
        reduce_similarity(x, x, rows=[("lse", ALL)], backend=backend)


@pytest.mark.parametrize("used", range(4))
def test_a_result_may_stay_unused(used: int, backend: str) -> None:
    x, y = (torch.randn(12, 6, requires_grad=True) for _ in "xy")
    spec = [("lse", ALL), ("sum", OTHER)]
    rows, cols = reduce_similarity(x, y, rows=spec, cols=spec, backend=backend)
    [*rows, *cols][used].sum().backward()
    alone = [()] * 2
    alone[used // 2] = (spec[used % 2],)
    a, b = (t.detach().clone().requires_grad_() for t in (x, y))
    rows, cols = reduce_similarity(a, b, rows=alone[0], cols=alone[1], backend=backend)
    [*rows, *cols][0].sum().backward()
    torch.testing.assert_close(x.grad, a.grad)
    torch.testing.assert_close(y.grad, b.grad)


def test_one_tensor_on_both_sides(engine: Engine) -> None:
    """x is y: the gradients of both roles add up."""
    backend, dtype = engine
    z = torch.randn(15, 6, dtype=dtype, requires_grad=True)
    x, y = (z.detach().clone().requires_grad_() for _ in "xy")
    for a, b in ((z, z), (x, y)):
        rows, cols = reduce_similarity(a, b, rows=MIX[:2], cols=MIX[:1], backend=backend)
        sum(r.sum() for r in (*rows, *cols)).backward()
    torch.testing.assert_close(z.grad, x.grad + y.grad)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(6, 20).T,
    "every second row": lambda: torch.randn(40, 6)[::2],
    "every second column": lambda: torch.randn(20, 12)[:, ::2],
    "offset": lambda: torch.randn(22, 9)[2:, 3:],
    "reversed": lambda: torch.randn(20, 6).flip(0),
    "one row, expanded": lambda: torch.randn(1, 6).expand(20, 6),
    "one value, expanded": lambda: torch.randn(1, 1).expand(20, 6),
    "banks, expanded": lambda: torch.randn(20, 6).expand(3, 20, 6),
    "banks, permuted": lambda: torch.randn(20, 3, 6).transpose(0, 1),
}


@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, side: str, engine: Engine) -> None:
    backend, dtype = engine
    strange, plain = LAYOUTS[layout]().to(dtype), torch.randn(20, 6, dtype=dtype)
    labels = ints(4, 40)[::2]

    def run(t: Tensor, keys: Tensor) -> list[Tensor]:
        t, other = t.detach().requires_grad_(), plain.clone().requires_grad_()
        x, y = (t, other) if side == "x" else (other, t)
        rows, cols = reduce_similarity(x, y, row_labels=keys, rows=MIX[:3], cols=MIX[:3], backend=backend)
        results = [*rows, *cols]
        # The gradient of a sum is expanded: its strides are strange too.
        return results + list(torch.autograd.grad(sum(r.sum() for r in results), (t, other)))

    for ours, expected in zip(run(strange, labels), run(strange.contiguous(), labels.clone()), strict=True):
        assert torch.equal(ours, expected)


WORKSPACES = [0, 1 << 12, 100_001, 1 << 18, 1 << 20, 1 << 28]


@pytest.mark.parametrize("shape", [((300,), (211,)), ((5, 70), (80,)), ((3, 130), (3, 90))], ids=str)
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_workspace_changes_memory_not_values(
    workspace: int, shape: tuple[tuple[int, ...], tuple[int, ...]], engine: Engine
) -> None:
    """From every chunk recomputed to every chunk kept, partly kept in between."""
    (*lead, n), (*_, m) = shape
    case = Case(
        unit(*shape[0], 24),
        unit(*shape[1], 24),
        12.0,
        -1.0,
        {"row_labels": ints(5, *lead, n, low=-1), "col_labels": ints(5, m, low=-1)},
        MIX,
        MIX,
    )
    check(case, *engine, workspace=workspace)


@pytest.mark.parametrize("workspace", [0, 1 << 18, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_same_inputs_same_bits(dtype: torch.dtype, workspace: int | None, backend: str) -> None:
    case = Case(unit(150, 33), unit(260, 33), 20.0, 0.5, KEYS["labels"](150, 260), MIX, MIX)
    assert_same_bits(*(by_us(case, dtype, backend, workspace=workspace) for _ in range(2)))


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("workspace", [0, None])
def test_one_thread_or_two_same_bits(workspace: int | None, native: str, threads: Callable[[int], None]) -> None:
    case = Case(unit(300, 64), unit(410, 64), 20.0, 0.5, KEYS["labels"](300, 410), MIX, MIX)
    runs = []
    for count in (1, 2, 3):
        threads(count)
        runs.append(by_us(case, torch.float32, native, workspace=workspace))
    assert_same_bits(*runs)


@pytest.mark.parametrize("workspace", [0, 1 << 17, None])
def test_backward_twice(workspace: int | None, backend: str) -> None:
    """The first backward does not consume what forward kept."""
    x, y = (torch.randn(200, 16, requires_grad=True) for _ in "xy")
    loss = info_nce(x, y, scale=3.0, backend=backend, workspace=workspace)
    first = torch.autograd.grad(loss, (x, y), retain_graph=True)
    second = torch.autograd.grad(loss, (x, y), retain_graph=True)
    third = torch.autograd.grad(2 * loss, (x, y))
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(2 * a, c)


def test_inputs_are_not_written(backend: str) -> None:
    x, y = torch.randn(70, 8), torch.randn(90, 8)
    before = x.clone(), y.clone()
    rows, _ = reduce_similarity(x.requires_grad_(), y.requires_grad_(), rows=MIX, backend=backend, workspace=0)
    sum(r[r.isfinite()].sum() for r in rows).backward()
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_second_derivatives_are_those_of_the_formula(native: str) -> None:
    values = [torch.randn(2, 6, 4), torch.randn(2, 9, 4), torch.tensor(3.0), torch.tensor(-1.0)]
    labels = {"row_labels": torch.tensor([0, 1, 2, -1, 0, 1]), "col_labels": torch.arange(9) % 4}

    def penalty_gradients(backend: str, values: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in values]
        x, y, scale, bias = leaves
        z = torch.nn.functional.normalize(x, dim=-1)  # has a second derivative of its own, which must not hide ours
        rows, cols = reduce_similarity(
            z, y, scale=scale, bias=bias, rows=MIX, cols=MIX, paired=False, backend=backend, **labels
        )
        total = sum(r[r.isfinite()].square().sum() for r in (*rows, *cols))
        firsts = torch.autograd.grad(total, leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in firsts), leaves)

    exact = penalty_gradients("reference", [t.double() for t in values])
    for got, want in zip(penalty_gradients(native, values), exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_second_derivatives_of_a_bank_with_itself_and_of_frozen_keys(native: str) -> None:
    values = torch.randn(6, 4)
    keys = torch.randn(6, 4)
    for other in (lambda x: x, lambda x: 2 * x.tanh(), lambda x: keys.to(x.dtype)):

        def penalty_gradient(backend: str, x: torch.Tensor, other: Any = other) -> torch.Tensor:
            x = x.clone().requires_grad_()
            loss = info_nce(x, other(x), scale=1.5, bias=0.5, backend=backend)
            (first,) = torch.autograd.grad(loss, x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
            (third,) = torch.autograd.grad(second.square().sum(), x)
            return torch.stack([second.detach(), third])

        exact = penalty_gradient("reference", values.double())
        torch.testing.assert_close(penalty_gradient(native, values).double(), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["row_labels", "row_ids"])
def test_integers_that_int64_does_not_hold_are_refused(name: str) -> None:
    x, keys = torch.randn(3, 4), torch.tensor([2**63, 0, 1], dtype=torch.uint64)
    with pytest.raises(TypeError, match=rf"^{name}: expected dtype int64 .*, got torch.uint64$"):
        reduce_similarity(x, x, rows=[("lse", ALL)], **{name: keys})


def test_gradients_of_many_cotangents_at_once(native: str) -> None:
    x, y = (torch.randn(6, 4, requires_grad=True) for _ in "xy")
    (lse,), _ = reduce_similarity(x, y, rows=[("lse", ALL)], backend=native)
    cotangents = torch.randn(3, 6)
    together = torch.autograd.grad(lse, (x, y), cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        for all_of_them, one in zip(
            together, torch.autograd.grad(lse, (x, y), cotangent, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(all_of_them[i], one)


def test_a_gradient_that_may_be_differentiated_is_the_same_gradient(native: str) -> None:
    x, y = (torch.randn(6, 4, requires_grad=True) for _ in "xy")
    loss = info_nce(x, y, scale=3.0, bias=1.0, backend=native)
    (again,) = torch.autograd.grad(loss, x, create_graph=True)
    (once,) = torch.autograd.grad(loss, x)
    assert torch.equal(again, once)


def test_second_derivatives_of_the_reference() -> None:
    x, y = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in "xy")
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda *t: info_nce(*t[:2], scale=t[2], backend="reference"), (x, y, scale))


@pytest.mark.parametrize("workspace", [0, None])
def test_a_loss_scale_of_65536_in_fp16(workspace: int | None, backend: str) -> None:
    """The incoming gradient exceeds fp16's largest number; the outgoing ones do not."""
    scale = 0.05
    x, y = unit(300, 32).half(), unit(300, 32).half()

    def run(dtype: torch.dtype, ours: bool) -> tuple[Tensor, ...]:
        a, b = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
        if ours:
            loss = info_nce(a, b, scale=scale, backend=backend, symmetric=False, reduction="sum", workspace=workspace)
        else:
            s = (a @ b.T).to(torch.promote_types(dtype, torch.float32)) * scale
            loss = torch.nn.functional.cross_entropy(s, torch.arange(300), reduction="sum")
        return torch.autograd.grad(loss * 65536, (a, b))

    for ours, torchs, exact in zip(
        run(torch.float16, True), run(torch.float16, False), run(torch.float64, False), strict=True
    ):
        assert ours.dtype == torch.float16
        assert_three_way("gradient", ours, torchs, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_grad_scaler(dtype: torch.dtype, backend: str) -> None:
    data = torch.randn(256, 12)

    def step(half: bool) -> list[Tensor]:
        torch.manual_seed(3)
        towers = [torch.nn.Linear(12, 32) for _ in range(2)]
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, enabled=half)
        parameters = [p for tower in towers for p in tower.parameters()]
        optimiser = torch.optim.SGD(parameters, lr=0.0)
        with torch.autocast("cpu", dtype, enabled=half):
            x, y = (torch.nn.functional.normalize(tower(data), dim=-1) for tower in towers)
            loss = info_nce(x, y, scale=10.0, backend=backend)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        return [p.grad for p in parameters]

    for ours, expected in zip(step(half=True), step(half=False), strict=True):
        assert ours.dtype == torch.float32
        # Weights, activations and features were rounded to half precision, each with an error of eps/2.
        torch.testing.assert_close(
            ours, expected, rtol=0, atol=16 * torch.finfo(dtype).eps * float(expected.abs().max())
        )


def test_autocast_casts_as_matmul_does(backend: str) -> None:
    x, y = (torch.randn(40, 16, requires_grad=True) for _ in "xy")
    with torch.autocast("cpu", torch.bfloat16):
        (lse,), _ = reduce_similarity(x, y, rows=[("lse", ALL)], backend=backend)
        with torch.autocast("cpu", enabled=False):
            (full,), _ = reduce_similarity(x, y, rows=[("lse", ALL)], backend=backend)
    (cast,), _ = reduce_similarity(x.bfloat16(), y.bfloat16(), rows=[("lse", ALL)], backend=backend)
    assert torch.equal(lse, cast)
    assert not torch.equal(lse, full)
    assert [g.dtype for g in torch.autograd.grad(lse.sum(), (x, y))] == [torch.float32] * 2


def test_scale_and_bias_of_any_one_element(backend: str) -> None:
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    expected, _ = reduce_similarity(x, y, scale=2.0, bias=-1.0, rows=MIX[:3], backend=backend)
    for shape in ((), (1,), (1, 1)):
        for dtype in (torch.float32, torch.float64, torch.float16):
            scale, bias = (torch.full(shape, v, dtype=dtype, requires_grad=True) for v in (2.0, -1.0))
            rows, _ = reduce_similarity(x, y, scale=scale, bias=bias, rows=MIX[:3], backend=backend)
            for ours, other in zip(rows, expected, strict=True):
                assert torch.equal(ours, other)
            rows[0].sum().backward()
            assert scale.grad.shape == bias.grad.shape == shape
            assert scale.grad.dtype == dtype


def test_counts_alone_need_no_similarity(backend: str) -> None:
    (rows,), (cols,) = reduce_similarity(
        torch.randn(3, 2), torch.randn(4, 2), backend=backend, rows=[("count", ALL)], cols=[("count", SELF)]
    )
    assert (rows.tolist(), cols.tolist()) == ([4] * 3, [0] * 4)


def test_results_come_in_the_order_asked(backend: str) -> None:
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    specs = [("count", ALL), ("sum", SELF), ("count", SELF), ("lse", ALL), ("sum", OTHER)]
    rows, _ = reduce_similarity(x, y, rows=specs, backend=backend)
    for spec, value in zip(specs, rows, strict=True):
        assert torch.equal(value, reduce_similarity(x, y, rows=[spec], backend=backend)[0][0])


def test_memory_stays_within_the_workspace(native: str) -> None:
    """Forward and backward of 4096 x 4096 pairs, whose matrix alone is 64 MiB, in less than half of that."""
    script = """
        import torch
        from ccu_fast import info_nce
        torch.set_num_threads(1)
        def step(n):
            x, y = (torch.randn(n, 64, requires_grad=True) for _ in "xy")
            info_nce(x, y, scale=5.0, backend="native", workspace=8 << 20).backward()
        step(512)
        before = peak()
        step(4096)
        print(peak() - before)
    """
    assert 0 < printed_bytes(script) < 30 << 20


@pytest.mark.parametrize(("memory", "workspace"), [(80 << 30, 4 << 30), (139 << 30, 4 << 30), (24 << 30, 3 << 29)])
def test_the_workspace_of_a_gpu_goes_by_its_memory(
    memory: int, workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ccu_fast.ops.reduce_similarity import api as similarity

    similarity._gpu_workspace.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=memory))
    for device in ("cuda", "cuda:1"):
        assert similarity.workspace_bytes(None, torch.device(device)) == workspace
    assert similarity.workspace_bytes(7, torch.device("cuda")) == 7
    assert similarity.workspace_bytes(None, torch.device("cpu")) == 288 << 20
    similarity._gpu_workspace.cache_clear()


@pytest.mark.parametrize(
    ("rows", "columns", "parts"),
    [(4096, 131072, 2), (512, 262144, 8), (2048, 16384, 4), (32768, 32768, 1), (512, 262145, 1), (512, 4096, 1)],
)
def test_few_rows_of_gradients_are_summed_in_parts(rows: int, columns: int, parts: int) -> None:
    """So many that the GEMM's tiles of 128 x 256 fill an H100, and none shorter than 4096 columns."""
    plan = pytest.importorskip("ccu_fast.ops.reduce_similarity.triton.plan")
    x, y = (torch.empty(1, items, 512, dtype=torch.bfloat16, device="meta") for items in (rows, columns))
    p = SimilarityProblem(x, y, torch.ones(()), None, None, None, None, None, False, (encode("lse", 7),), ())
    assert plan.parts_of_sum(p, plan.Chunk(0, 1, 0, rows, 0, False), 132) == parts


@pytest.mark.parametrize(("pairs", "pieces"), [(8192, 1), (32768, 1), (131072, 32)])
def test_what_the_default_workspace_of_a_gpu_holds(pairs: int, pieces: int) -> None:
    """E and G of a batch of 32768 in one chunk: nothing is recomputed."""
    plan = pytest.importorskip("ccu_fast.ops.reduce_similarity.triton.plan")
    x = torch.empty(1, pairs, 512, dtype=torch.bfloat16, device="meta")
    p = SimilarityProblem(x, x, torch.ones(()), None, None, None, None, None, True, (encode("lse", 7),), ())
    (words,) = plan.stash_shape(p, 4 << 30, True)
    chunks = plan.chunks(p, 128, 4 << 30, int(words))
    assert len(chunks) == pieces
    assert all(chunk.kept for chunk in chunks) == (pairs <= 32768)


def test_gradients_inside_a_transform_are_refused_by_name(native: str) -> None:
    """Torch's own errors are about storages and items."""
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    for options, name in (({}, "info_nce"), ({"paired": True}, "reduce_similarity")):
        loss = info_nce(x, y, scale=2.0, **options)

        def gradient(v: Tensor, loss: Tensor = loss) -> Tensor:
            return torch.autograd.grad(loss, x, v, retain_graph=True)[0]

        with pytest.raises(RuntimeError, match=f"{name}: expected tensors from outside"):
            torch.func.vmap(gradient)(torch.tensor([1.0, 2.0]))
