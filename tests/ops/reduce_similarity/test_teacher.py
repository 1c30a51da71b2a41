"""A teacher of reduce_similarity: its probabilities, and the logits that they expect, in values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ccu_fast import ALL, OTHER, SAME, SELF, reduce_similarity
from ccu_fast.ops.reduce_similarity.api import build_problem
from ccu_fast.ops.reduce_similarity.native import chunks
from ccu_fast.ops.reduce_similarity.operator import specialised
from tests.support.multiplications import Multiplications
from tests.support.oracle import SETS, Case, assert_same_bits, by_us, check, unit

pytestmark = pytest.mark.usefixtures("one_thread")

Engine = tuple[str, torch.dtype]

MIX = (("lse", ALL), ("expected", OTHER), ("mass", SELF | OTHER), ("expected", ALL), ("softplus", OTHER))
LOSS = (("lse", SAME | OTHER), ("sum", SELF), ("expected", SAME | OTHER), ("mass", SAME | OTHER))


def ints(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape)


KEYS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "paired": lambda n, m: {},
    "unrelated": lambda n, m: {"paired": False},
    "labels": lambda n, m: {"row_labels": ints(3, n, low=-1), "col_labels": ints(3, m, low=-1)},
    "ids": lambda n, m: {"row_ids": ints(9, n), "col_ids": ints(9, m)},
    "labels and ids": lambda n, m: {**KEYS["labels"](n, m), **KEYS["ids"](n, m)},
}


def taught(n: int, m: int, keys: str = "paired", *, d: int = 24, of: int = 11, **fields: Any) -> Case:
    """Student and teacher, of different widths and scales."""
    case = Case(unit(n, d), unit(m, d), 6.0, None, KEYS[keys](n, m), MIX, LOSS)
    return replace(case, teacher=(unit(n, of), unit(m, of)), teacher_scale=9.0, **fields)


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("sides", ["rows", "cols", "both"])
def test_every_relation(sides: str, keys: str, engine: Engine) -> None:
    n, m = (37, 37) if keys == "paired" else (29, 41)
    half = [tuple((kind, r) for r in part) for kind in ("expected", "mass") for part in (SETS[:4], SETS[4:])]
    for first, second in ((half[0], half[3]), (half[1], half[2])):
        spec = first + second
        both = {"rows": spec if sides != "cols" else (("expected", ALL),), "cols": spec if sides != "rows" else ()}
        both |= {"rows": ()} if sides == "cols" else {}
        check(taught(n, m, keys, bias=-0.5, **both), *engine)


@pytest.mark.parametrize("keys", ["paired", "labels and ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_teacher_has_a_dtype_of_its_own(dtype: torch.dtype, keys: str, engine: Engine) -> None:
    check(taught(37, 37, keys, teacher_dtype=dtype), *engine)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", ["paired", "unrelated", "labels"])
def test_half_types(keys: str, dtype: torch.dtype, backend: str) -> None:
    check(taught(33, 33, keys), backend, dtype)


SHAPES = [(1, 1, 1), (2, 2, 5), (16, 300, 7), (300, 17, 40), (65, 130, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=["x".join(map(str, s)) for s in SHAPES])
def test_shapes(shape: tuple[int, int, int], engine: Engine) -> None:
    n, m, d = shape
    check(taught(n, m, "paired", d=d), *engine)


def test_nothing_to_reduce(backend: str) -> None:
    for n, m in ((0, 3), (3, 0), (0, 0)):
        rows, cols = reduce_similarity(
            torch.randn(n, 4),
            torch.randn(m, 4),
            teacher=(torch.randn(n, 2), torch.randn(m, 2)),
            backend=backend,
            rows=[("expected", ALL), ("mass", OTHER), ("count", ALL)],
            cols=[("expected", OTHER)],
        )
        assert rows[0].eq(0).all() and rows[0].shape == (n,)
        assert rows[1].eq(0).all()
        assert cols[0].eq(0).all() and cols[0].shape == (m,)


BANKS: dict[str, tuple[tuple[int, ...], ...]] = {
    "y shared": ((3, 19, 8), (23, 8), (3, 19), (23,), (19, 5), (3, 23, 5)),
    "x shared": ((19, 8), (3, 23, 8), (19,), (3, 23), (3, 19, 5), (23, 5)),
    "both": ((3, 19, 8), (3, 23, 8), (3, 19), (23,), (3, 19, 5), (3, 23, 5)),
    "teacher shared": ((3, 19, 8), (3, 23, 8), (3, 19), (3, 23), (19, 5), (23, 5)),
    "two leading dimensions": ((2, 1, 19, 8), (3, 19, 8), (3, 19), (2, 1, 19), (2, 1, 19, 5), (3, 19, 5)),
}


@pytest.mark.parametrize("workspace", [None, 0])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("name", BANKS)
def test_banks(name: str, labelled: bool, workspace: int | None, engine: Engine) -> None:
    x, y, row_shape, col_shape, u, v = BANKS[name]
    given = {"row_labels": ints(4, *row_shape, low=-1), "col_labels": ints(4, *col_shape, low=-1)} if labelled else {}
    # To torch the gradient of scale is exact; to G in fp16, which makes it, it is not.
    frozen = ("scale",) if engine[1] == torch.float16 else ()
    whole = [ints(3, *shape, low=-2).double() for shape in (x, y, u, v)]
    case = Case(*whole[:2], 0.25, 0.25, given, MIX, LOSS, frozen, teacher=(whole[2], whole[3]), teacher_scale=0.5)
    check(case, *engine, workspace=workspace)


WORKSPACES = [0, 1 << 12, 100_001, 1 << 20, 1 << 28]


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_workspace_changes_memory_not_values(workspace: int, engine: Engine) -> None:
    check(taught(150, 150), *engine, workspace=workspace)


def test_probabilities_add_up(engine: Engine) -> None:
    """The mass of everything is 1, and that of nothing 0."""
    backend, dtype = engine
    x, y = (unit(20, 8).to(dtype) for _ in "xy")
    labels = torch.arange(20) % 5 - 1
    teacher = unit(20, 6).to(dtype), unit(20, 6).to(dtype)
    options: dict[str, Any] = {"teacher": teacher, "teacher_scale": torch.tensor([70.0]), "backend": backend}
    spec = [("mass", ALL), ("mass", SELF), ("mass", SAME), ("mass", OTHER)]
    for side in reduce_similarity(x, y, rows=spec, cols=spec, row_labels=labels, **options):
        every, *parts = side
        torch.testing.assert_close(every, (labels >= 0).to(every.dtype), rtol=3e-5, atol=0)
        torch.testing.assert_close(sum(parts), every)
        assert not every.requires_grad


def test_mass_has_no_gradient(backend: str) -> None:
    x, y = (unit(6, 4).float().requires_grad_() for _ in "xy")
    (mass, expected), _ = reduce_similarity(
        x, y, teacher=(x, y), rows=[("mass", OTHER), ("expected", ALL)], backend=backend
    )
    assert not mass.requires_grad and expected.requires_grad
    (mass,), _ = reduce_similarity(x, y, teacher=(x, y), rows=[("mass", OTHER)], backend=backend)
    assert not mass.requires_grad


def test_no_gradient_flows_to_the_teacher(backend: str) -> None:
    x, y = (unit(12, 6).float().requires_grad_() for _ in "xy")
    u, v = (unit(12, 4).float().requires_grad_() for _ in "uv")
    scale = torch.tensor(5.0, requires_grad=True)
    options: dict[str, Any] = {"teacher": (u, v), "teacher_scale": scale, "rows": LOSS, "backend": backend}
    rows, _ = reduce_similarity(x, y, **options)
    assert all(g is None for g in torch.autograd.grad(rows[2].sum(), (u, v, scale), allow_unused=True))
    rows, _ = reduce_similarity(x.detach(), y.detach(), **options)
    assert not any(row.requires_grad for row in rows)


def test_an_ignored_item_may_hold_nan(backend: str) -> None:
    """In the student's features and in the teacher's."""
    x, y, u, v = (unit(9, 5).float() for _ in "xyuv")
    labels = ints(3, 9)
    labels[3] = -1

    def run() -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        rows, cols = reduce_similarity(
            *leaves, row_labels=labels, teacher=(u, v), teacher_scale=4.0, rows=LOSS, cols=LOSS, backend=backend
        )
        finite = [t[torch.arange(9) != 3] for t in (*rows, *cols)]
        return [*rows[1:], *cols[1:], *torch.autograd.grad(sum(t.sum() for t in finite), leaves)]

    clean = run()
    for t in (x, y, u, v):
        t[3] = torch.nan
    for got, want in zip(run(), clean, strict=True):
        assert torch.equal(got, want)
        assert not got.isnan().any()


def test_nan_is_seen_where_it_counts(backend: str) -> None:
    x, y, u, v = (unit(9, 5).float() for _ in "xyuv")
    u[2] = torch.nan
    (expected, mass), _ = reduce_similarity(
        x, y, teacher=(u, v), rows=[("expected", ALL), ("mass", OTHER)], backend=backend
    )
    assert expected.isnan().tolist() == mass.isnan().tolist() == [i == 2 for i in range(9)]


def test_normalize_does_not_concern_the_teacher(backend: str) -> None:
    x, y, u, v = (torch.randn(12, 6) for _ in "xyuv")
    a, b = (torch.nn.functional.normalize(t, dim=-1) for t in (x, y))
    options: dict[str, Any] = {"teacher": (u, v), "rows": [("expected", ALL)], "backend": backend}
    torch.testing.assert_close(
        reduce_similarity(x, y, normalize=True, **options)[0], reduce_similarity(a, b, **options)[0]
    )


def test_second_derivatives(native: str) -> None:
    case = taught(9, 9)

    def penalty(backend: str, dtype: torch.dtype) -> Tensor:
        x, y = case.x.to(dtype).requires_grad_(), case.y.to(dtype).requires_grad_()
        u, v = case.taught(dtype)
        rows, cols = reduce_similarity(
            x, y, scale=3.0, teacher=(u, v), teacher_scale=4.0, rows=LOSS, cols=LOSS, backend=backend
        )
        loss = sum(((lse - own) * expected + mass).sum() for lse, own, expected, mass in (rows, cols))
        first = torch.autograd.grad(loss, (x, y), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, y))
        return torch.cat([*first, *second]).detach().double()

    exact = penalty("reference", torch.float64)
    torch.testing.assert_close(penalty(native, torch.float32), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("workspace", [0, 1 << 18, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_same_inputs_same_bits(dtype: torch.dtype, workspace: int | None, backend: str) -> None:
    case = taught(150, 150, d=33)
    assert_same_bits(*(by_us(case, dtype, backend, workspace=workspace) for _ in range(2)))


def test_one_thread_or_two_same_bits(native: str) -> None:
    case = taught(300, 300, d=64)
    runs = []
    for count in (1, 2, 3):  # the fixture puts the number back
        torch.set_num_threads(count)
        runs.append(by_us(case, torch.float32, native, workspace=0))
    assert_same_bits(*runs)


def test_autocast_casts_the_teacher_too(backend: str) -> None:
    x, y, u, v = (torch.randn(30, 16) for _ in range(4))
    spec: dict[str, Any] = {"rows": LOSS, "cols": LOSS, "backend": backend}
    with torch.autocast("cpu", torch.bfloat16):
        ours = reduce_similarity(x, y, teacher=(u, v), **spec)
    half = [t.bfloat16() for t in (x, y, u, v)]
    cast = reduce_similarity(*half[:2], teacher=(half[2], half[3]), **spec)
    assert all(map(torch.equal, (*ours[0], *ours[1]), (*cast[0], *cast[1])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_in_bf16_still_add_up(dtype: torch.dtype, native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the dtype or the setting asks for them: probabilities are of the very products that the tile sees."""
    monkeypatch.setattr("ccu_fast.ops.backend.has_bf16", lambda: True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    x, y = (unit(40, 16).to(dtype).requires_grad_() for _ in "xy")
    u = unit(40, 16).float()
    try:
        for workspace in (0, None):
            rows, _ = reduce_similarity(
                x,
                y,
                teacher=(u, u),
                teacher_scale=100.0,
                rows=[("mass", ALL), ("expected", ALL)],
                backend=native,
                workspace=workspace,
            )
            torch.testing.assert_close(rows[0], torch.ones(40), rtol=1e-3, atol=0)
            torch.set_float32_matmul_precision("highest")  # what was kept says how it was made
            torch.autograd.grad(rows[1].sum(), x)
            torch.set_float32_matmul_precision("medium")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("taught", [True, False])
def test_a_guide_s_products_are_made_once_where_they_fit(taught: bool) -> None:
    """Those of x and y, of the guide, and two in the backward pass; with little room both are made again."""
    n, dim = 256, 16
    x, y, u, v = (torch.randn(n, dim) for _ in range(4))
    more: dict[str, Any] = {"teacher": (u, v)} if taught else {"guide": (u, v), "row_limits": torch.zeros(n)}
    spec = [("lse", ALL)] if not taught else [("lse", ALL), ("expected", ALL)]
    p, *_ = build_problem(x, y, 2.0, None, *[None] * 5, spec, (), "propagate", **more)
    p = replace(p, row_limits=torch.zeros(1, n))
    for workspace, products in ((1 << 24, 4), (4 * n * n, 6)):
        with Multiplications() as mode:
            row_out, col_out, kept = chunks.forward(p, workspace, True)
            chunks.backward(p, (torch.ones_like(row_out), col_out, row_out, col_out), kept, [True] * 4, workspace)
        assert mode.total <= products * n * n * dim
        assert mode.total > (products - 1) * n * n * dim


def test_many_frozen_keys_have_no_way_of_their_own(native: str) -> None:
    case = taught(24, 4200, d=16, frozen=("y",), rows=(("lse", ALL), ("expected", ALL)), cols=())
    p = build_problem(
        case.x.float().requires_grad_(),
        case.y.float(),
        5.0,
        None,
        None,
        None,
        None,
        None,
        None,
        case.rows,
        (),
        "propagate",
        None,
        None,
        None,
        case.taught(torch.float32),
        3.0,
    )[0]
    assert specialised(p, native, True) == native
    check(case, native, torch.float32)


def test_no_bank_of_keys_beside_a_shared_teacher(backend: str) -> None:
    x, y, ids = torch.randn(0, 5, 8), torch.randn(3, 8), torch.zeros(0, 3, dtype=torch.int64)
    keys = {"row_ids": torch.arange(5), "col_ids": ids, "backend": backend}
    wanted, teacher = [("mass", OTHER)], (torch.randn(5, 2), torch.randn(3, 2))
    rows, cols = reduce_similarity(x, y, rows=wanted, cols=wanted, teacher=teacher, **keys)
    assert rows[0].shape == (0, 5) and cols[0].shape == (0, 3)
