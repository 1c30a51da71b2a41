"""The Triton backend of reduce_similarity against brute force; tiles of 16×16×16, so small shapes walk every path."""

from __future__ import annotations

import dataclasses
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

import ccu_fast
from ccu_fast import ALL, OTHER, SAME, SELF, info_nce, reduce_similarity
from ccu_fast.ops.reduce_similarity import operator, reference
from ccu_fast.ops.reduce_similarity import triton as similarity
from ccu_fast.ops.reduce_similarity.problem import KINDS, SimilarityProblem, encode
from ccu_fast.ops.reduce_similarity.relations import count_relations
from ccu_fast.ops.reduce_similarity.triton import backward_pass, configs, plan
from ccu_fast.ops.reduce_similarity.triton.gradient_kernels import gradient_kernel
from tests.ops.reduce_similarity import test_reduce_similarity as on_a_cpu
from tests.support.oracle import SETS, Case, by_us, check, unit
from tests.support.tolerance import assert_three_way

FP32, FP16 = torch.float32, torch.float16
CLIP = (("lse", ALL), ("sum", SELF))
MIX = (("lse", ALL), ("sum", SAME), ("softplus", SELF | OTHER), ("lse", OTHER), ("logsigmoid", SELF))


def ints(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape)


def keys(kind: str, n: int, m: int, *banks: int) -> dict[str, Any]:
    labels = {"row_labels": ints(4, *banks, n, low=-1), "col_labels": ints(4, *banks, m, low=-1)}
    ids = {"row_ids": ints(30, *banks, n), "col_ids": ints(30, *banks, m)}
    huge = {name: value * 2**55 for name, value in labels.items()} | {name: -value << 40 for name, value in ids.items()}
    return {
        "unrelated": {"paired": False},
        "paired": {},
        "labels": labels,
        "ids": ids,
        "labels and ids": labels | ids,
        "huge keys": huge,
        "all ignored": {**labels, "row_labels": torch.full((*banks, n), -1)},
    }[kind]


@pytest.fixture
def backend() -> str:
    return "triton"


KEYS = ("unrelated", "labels", "ids", "huge keys", "all ignored")


@pytest.mark.parametrize(
    ("kind", "keyed"),
    [(kind, keyed) for kind in KINDS for keyed in ("paired", "labels and ids")] + [("lse", keyed) for keyed in KEYS],
)
def test_every_reduction_over_every_relation(kind: str, keyed: str) -> None:
    n, m = (37, 37) if keyed == "paired" else (37, 53)
    given = keys(keyed, n, m)
    refused = () if "row_labels" in given else (("lse", SAME),)
    spec = tuple((kind, relations) for relations in SETS if (kind, relations) not in refused)
    check(Case(unit(n, 40), unit(m, 40), 6.0, -1.5, given, spec, spec), "triton", FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_a_paired_problem(kind: str) -> None:
    """SELF by position, then by label, with labels that differ on the diagonal; near it and far from it."""
    spec = tuple((kind, relations) for relations in SETS)
    case = Case(unit(40, 24), unit(40, 24), 6.0, None, keys("labels", 40, 40), spec, spec)
    assert (case.keys["row_labels"] != case.keys["col_labels"]).any()
    check(case, "triton", FP32)


SHAPES = [(1, 1, 1), (1, 20, 7), (20, 1, 40), (16, 32, 16), (17, 33, 130), (48, 48, 7), (100, 18, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=["x".join(map(str, s)) for s in SHAPES])
def test_shapes(shape: tuple[int, int, int]) -> None:
    n, m, d = shape
    kind = "labels and ids" if n % 2 else "unrelated"
    check(Case(unit(n, d), unit(m, d), 4.0, 0.5, keys(kind, n, m), MIX, MIX[::-1]), "triton", FP32)


BANKS = {
    "y shared": ((3, 37, 20), (40, 20)),
    "x shared": ((37, 20), (3, 40, 20)),
    "neither": ((3, 37, 20), (3, 40, 20)),
}


@pytest.mark.parametrize(
    ("which", "workspace"),
    [("y shared", 0), ("y shared", 40 * 48 * 4), ("y shared", 1 << 24), ("x shared", 0), ("neither", 1 << 24)],
)
def test_banks(which: str, workspace: int) -> None:
    """Whatever is shared, and whether G comes in rows, in whole banks or at once."""
    x, y = BANKS[which]
    lead = torch.broadcast_shapes(x[:-2], y[:-2])
    case = Case(unit(*x), unit(*y), 5.0, None, keys("labels", 37, 40, *lead), MIX, CLIP)
    check(case, "triton", FP32, workspace=workspace)


def test_banks_in_two_dimensions() -> None:
    check(Case(unit(2, 1, 18, 8), unit(3, 20, 8), 5.0, None, {}, MIX, CLIP), "triton", FP32)


def problem(case: Case, dtype: torch.dtype = FP32) -> SimilarityProblem:
    """An unlabelled case of one bank, as the backends get it."""
    x, y = case.x[None].to(dtype), case.y[None].to(dtype)
    scale, bias = torch.tensor(case.scale), torch.tensor(case.bias or 0.0)
    rows, cols = (tuple(encode(k, int(r)) for k, r in spec) for spec in (case.rows, case.cols))
    keys = [None] * 4
    return SimilarityProblem(x, y, scale, bias, *keys, case.square, rows, cols)


@pytest.mark.parametrize("workspace", [0, 1 << 24])
def test_any_subset_of_gradients(workspace: int) -> None:
    """Unneeded gradients are not computed, and the others keep their bits (scale, bias: another sum)."""
    p = problem(Case(unit(37, 20), unit(37, 20), 5.0, 0.25, {}, MIX, CLIP))
    row_out, col_out, stash = similarity.forward(p, workspace, True)
    assert stash.shape == similarity.stash_shape(p, workspace, True)
    incoming = torch.randn_like(row_out), torch.randn_like(col_out)
    full = similarity.backward(p, (*incoming, row_out, col_out), stash, [True] * 4, workspace)
    subsets = [(i == j for i in range(4)) for j in range(5)] + [(True, True, False, False), (False, False, True, True)]
    for needs in map(tuple, subsets):
        some = similarity.backward(p, (*incoming, row_out, col_out), stash, list(needs), workspace)
        for value, whole, need, like in zip(some, full, needs, (p.x, p.y, p.scale, p.scale), strict=True):
            assert value.dtype == like.dtype
            if need and like.ndim == 0:
                torch.testing.assert_close(value, whole, rtol=1e-5, atol=1e-5)
            elif need:
                assert torch.equal(value, whole)
            else:
                assert value.shape == (() if like.ndim == 0 else (0,))


def test_one_side_only() -> None:
    for spec in ({"rows": CLIP}, {"cols": CLIP}):
        check(Case(unit(37, 20), unit(37, 20), 5.0, None, {}, **spec), "triton", FP32)


@pytest.mark.parametrize("kind", ["paired", "labels and ids"])
def test_fp16(kind: str) -> None:
    check(Case(unit(37, 40), unit(37, 40), 10.0, None, keys(kind, 37, 37), MIX, CLIP), "triton", FP16)


@pytest.mark.parametrize("factor", [65536.0, 1.0, 2.0**-40])
def test_fp16_gradients_keep_their_digits(factor: float) -> None:
    """GradScaler's 65536 must not overflow inside, and tiny gradients must not vanish before they meet their factor."""
    x, y = (unit(48, 24).to(FP16) for _ in range(2))
    grads = []
    for dtype, backend in ((torch.float64, "reference"), (FP16, "triton")):
        leaves = [t.to(dtype).requires_grad_() for t in (x, y)]
        loss = info_nce(
            *leaves, scale=torch.tensor(10.0, dtype=torch.float64 if dtype != FP16 else FP32), backend=backend
        )
        # The part of the factor that fp16 cannot hold is applied before the gradients are rounded to fp16.
        grads.append(torch.autograd.grad(loss * factor, leaves))
    for name, exact, ours in zip("xy", *grads, strict=True):
        if factor < 1:
            assert (ours.double() - exact).abs().max() <= 2.0**-24, name  # below fp16's smallest number: all zero
        else:
            error = (ours.double() - exact).abs().max() / exact.abs().max()
            assert error < 4e-3, f"d{name}: relative error {error:.2g}"


def test_fp16_matrix_of_gradients_has_a_common_exponent() -> None:
    """A power of two and its inverse, which bring the largest possible G below 2^14."""
    p = problem(Case(unit(37, 20), unit(53, 20), 5.0, None, {}, CLIP, CLIP), FP16)
    incoming = torch.randn(2, 1, 37), torch.randn(2, 1, 53)
    launch, out = backward_pass._norm(p, configs.device()), torch.empty(2)
    for factor in (2.0**-60, 1.0, 2.0**10):
        scaled = [g * factor for g in incoming]
        launch(*scaled, out)
        norm, undo = out.tolist()
        assert 2.0**13 <= norm * float(sum(g.abs().amax((1, 2)).sum() for g in scaled)) < 2.0**14
        assert norm * undo == 1.0
    for extreme in (0.0, torch.inf, torch.nan, 2.0**-140):
        launch(*(torch.full_like(g, extreme) for g in incoming), out)
        norm, undo = out.tolist()
        assert 0 < norm < torch.inf
        assert norm * undo == 1.0


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("kind", ["paired", "labels"])
def test_sharp_logits(kind: str, dtype: torch.dtype) -> None:
    """Scale 100 with perfect matches: SELF at 100 and OTHER far below, each lse with its own maximum."""
    x = unit(37, 40)
    y = torch.nn.functional.normalize(x + 0.05 * torch.randn_like(x), dim=-1)
    spec = (("lse", ALL), ("lse", OTHER), ("lse", SELF))
    case = Case(x, y, 100.0, None, keys(kind, 37, 37), spec, spec)
    # dscale is a difference of such logits: its terms are what the tolerance knows, their fp16 inputs are exact.
    check(case, "triton", dtype, ulps=64)


# Scale, length of the features, and how far apart pairs are: from logits that vanish to logits of 10^6.
EXTREMES = [(1.0, 0.1, "unrelated"), (200.0, 1.0, "equal"), (1000.0, 1.0, "opposite")]
EXTREMES += [(10.0, 5.0, "unrelated"), (1.0, 30.0, "opposite"), (1000.0, 30.0, "equal")]


def pairs(n: int, d: int, length: float, kind: str) -> tuple[Tensor, Tensor]:
    """Features of one length, with those they are paired with."""
    x = length * unit(n, d)
    return x, {"equal": x, "opposite": -x, "unrelated": length * unit(n, d)}[kind]


# E is kept if there is no softplus, and no row is checked again if there is no lse.
TOGETHER = (("softplus", "sum"), ("logsigmoid",), ("lse", "sum"), KINDS)


# Where rows may be checked again, all extremes; the others between them see each one, and all together the largest.
KINDS_AT = [
    *((TOGETHER[2], extreme) for extreme in EXTREMES),
    *((TOGETHER[i % 2], extreme) for i, extreme in enumerate(EXTREMES)),
    *((TOGETHER[3], extreme) for extreme in EXTREMES[-2:]),
]
# Bias, whether there are labels, workspace.
KEPT, RECOMPUTED, BIASED = (None, False, 1 << 24), (None, False, 0), (-10.0, True, 0)


def at_extreme_logits(kinds: tuple[str, ...], extreme: tuple[float, float, str], *ways: tuple) -> None:
    scale, length, apart = extreme
    x, y = pairs(20, 8, length, apart)
    spec = tuple((kind, relations) for kind in kinds for relations in (ALL, OTHER))
    ulps = max(64.0, 8 * scale * length**2 if "lse" in kinds else 0.0)
    for bias, labelled, workspace in ways:
        keyed = keys("labels", 20, 20) if labelled else {}
        check(Case(x, y, scale, bias, keyed, spec, spec[::-1]), "triton", FP32, ulps=ulps, workspace=workspace)


@pytest.mark.parametrize(("kinds", "extreme"), KINDS_AT, ids=lambda of: "-".join(map(str, of)))
def test_every_reduction_at_extreme_logits(kinds: tuple[str, ...], extreme: tuple[float, float, str]) -> None:
    """Rows and columns, E kept and recomputed, with a bias and labels; eps in S is |S| eps in exp(S)."""
    at_extreme_logits(kinds, extreme, KEPT, RECOMPUTED, BIASED)


def test_unnormalised_logits() -> None:
    """|S| of 500 and more: no overflow, no NaN; an error of eps·|S| in S is one of eps·|S| in exp(S)."""
    x, y = 4 * torch.randn(37, 40, dtype=torch.float64), 4 * torch.randn(53, 40, dtype=torch.float64)
    assert (x @ y.mT).abs().max() > 300
    spec = (("lse", ALL), ("softplus", ALL))
    check(Case(x, y, 2.0, None, {}, spec, spec), "triton", FP32, ulps=2048)


def flagged(case: Case) -> bool:
    """Whether the online maximum was needed."""
    return bool(similarity.forward(problem(case), 0, True)[2][1])


@pytest.mark.parametrize("where", ["row", "column"])
def test_a_far_row_or_column_is_reduced_again(where: str) -> None:
    """All at cosine 0.9 but one at −0.9: at scale 150 its terms would vanish beside the others'."""
    middle = unit(1, 24)
    x, y = (
        torch.nn.functional.normalize(middle + 0.05 * torch.randn(n, 24, dtype=torch.float64), dim=-1) for n in (37, 53)
    )
    assert not flagged(Case(x, y, 150.0, rows=CLIP, cols=CLIP))
    (x if where == "row" else y)[18] *= -1
    spec = (("lse", ALL), ("lse", OTHER), ("softplus", ALL))
    case = Case(x, y, 150.0, None, keys("labels", 37, 53), spec, spec)
    assert flagged(dataclasses.replace(case, keys={}))
    for workspace in (0, 1 << 24):
        check(case, "triton", FP32, ulps=256, workspace=workspace)


@pytest.mark.parametrize(("banks", "normalize"), [(1, True), (2, False)])
def test_what_an_ignored_item_holds_does_not_matter(banks: int, normalize: bool) -> None:
    """Unit vectors come from a kernel of its own."""
    shape = on_a_cpu.ONE_BANK if banks == 1 else on_a_cpu.TWO_BANKS
    ways = (on_a_cpu.WITH_BIAS, on_a_cpu.RECOMPUTED, on_a_cpu.KEPT)
    on_a_cpu.nothing_comes_of_ignored_items(shape, normalize, "triton", *ways)


def test_empty_sets_are_not_taken_for_small_ones() -> None:
    """Ignored rows and empty sets sum to 0, which must not start the online pass."""
    x, y = unit(37, 24), unit(53, 24)
    labels = torch.zeros(1, 37, dtype=torch.int64), torch.ones(1, 53, dtype=torch.int64)
    labels[0][0, :20] = -1
    p = dataclasses.replace(
        problem(Case(x, y, 14.0)), row_labels=labels[0], col_labels=labels[1], rows=(2, 7), cols=(2,)
    )
    row_out, _, stash = similarity.forward(p, 0, True)
    assert (row_out[0] == -torch.inf).all()
    assert not stash[1]


def test_a_graph_may_be_walked_twice() -> None:
    """The kept matrix is still what it was after a backward pass."""
    x, y = (unit(37, 24).float().requires_grad_() for _ in range(2))
    loss = info_nce(x, y, scale=10.0, backend="triton")
    first = torch.autograd.grad(loss, [x, y], retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, [x, y]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_tensor_descriptors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads by TMA on Hopper and Blackwell, with rows that are not whole 16 bytes, banks, and ragged edges."""
    device = dataclasses.replace(configs.device(), tma=True)
    monkeypatch.setattr(configs, "device", lambda: device)
    check(Case(unit(2, 37, 20), unit(40, 20), 5.0, 0.5, keys("labels", 37, 40), CLIP, CLIP), "triton", dtype)
    check(Case(unit(32, 18), unit(32, 18), 5.0, None, {}, CLIP, CLIP), "triton", dtype, workspace=0)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
def test_a_long_sum_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows, many columns: dX is a GEMM of few tiles, and is summed in parts."""
    taken = []
    rule = plan.parts_of_sum

    def spy(*args: Any) -> int:
        taken.append(rule(*args))
        return taken[-1]

    monkeypatch.setattr(operator, "SMALL_PAIRS", 0)
    monkeypatch.setattr(plan, "SHORTEST_PART", 16)
    monkeypatch.setattr(plan, "parts_of_sum", spy)
    for workspace in (0, 1 << 24) if dtype == FP32 else (0,):
        check(Case(unit(40, 18), unit(64, 18), 5.0, None, {}, CLIP[:1], CLIP[:1]), "triton", dtype, workspace=workspace)
    assert taken and set(taken) == {2}
    taken.clear()
    check(Case(unit(40, 18), unit(60, 18), 5.0, None, {}, CLIP[:1], CLIP[:1]), "triton", dtype, workspace=0)
    assert set(taken) == {1}  # no whole packs


def test_a_tile_of_the_gradient_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where G comes from E a tile may have fewer rows; tiles that hold SELF pairs are left out entirely."""
    parts = []
    monkeypatch.setattr(operator, "SMALL_PAIRS", 0)
    monkeypatch.setattr(plan, "parts_of_tile", lambda tile, warps: parts.append(tile.block_m) or 2)
    for n, m, keyed in ((40, 40, "paired"), (37, 70, "unrelated"), (37, 70, "labels"), (37, 70, "labels and ids")):
        parts.clear()
        case = Case(unit(n, 18), unit(m, 18), 5.0, None, keys(keyed, n, m), CLIP, CLIP)
        check(case, "triton", FP32, workspace=1 << 24)
        assert set(parts) == (set() if "ids" in keyed else {16})


def test_same_inputs_same_bits() -> None:
    case = Case(unit(50, 30), unit(61, 30), 20.0, -1.0, keys("labels and ids", 50, 61), MIX, MIX)
    first, second = (by_us(case, FP32, "triton", workspace=4096) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_nan_reaches_what_it_touches_and_nothing_else() -> None:
    x, y = unit(37, 20).float(), unit(40, 20).float()
    x[5, 3] = torch.nan
    rows, cols = reduce_similarity(x, y, rows=[("lse", ALL), ("sum", ALL)], cols=[("lse", ALL)], backend="triton")
    for row in rows:
        assert row.isnan().nonzero().flatten().tolist() == [5]
    assert cols[0].isnan().all()


def test_an_empty_set_is_minus_infinity_and_sends_nothing_back() -> None:
    x, y = (unit(20, 8).float().requires_grad_() for _ in range(2))
    labels = torch.zeros(20, dtype=torch.int64)
    rows, cols = reduce_similarity(
        x, y, row_labels=labels, rows=[("lse", OTHER)], cols=[("lse", OTHER), ("lse", SAME)], backend="triton"
    )
    assert (rows[0] == -torch.inf).all()
    assert (cols[0] == -torch.inf).all()
    assert cols[1].isfinite().all()
    for grad in torch.autograd.grad([*rows, cols[0]], [x, y], [torch.full((20,), torch.nan)] * 2):
        assert (grad == 0).all()


def test_frozen_inputs() -> None:
    x, y = unit(20, 8).float(), unit(20, 8).float().requires_grad_()
    scale = torch.tensor(3.0)
    info_nce(x, y, scale=scale, backend="triton").backward()
    want = y.grad.clone()
    y.grad = None
    info_nce(x, y, scale=scale, backend="reference").backward()
    assert_three_way("dy", want, y.grad, y.grad.double())


def losses(x: Tensor, y: Tensor, scale: Tensor, backend: str) -> dict[str, Tensor]:
    labels = torch.arange(len(x)) % 5 - (torch.arange(len(x)) == 7).long()
    options: dict[str, Any] = {"scale": scale, "backend": backend}
    return {
        "info_nce": info_nce(x, y, **options),
        "one way": info_nce(x, y, symmetric=False, **options),
        "bounded": ccu_fast.inverse_info_nce(x, y, row_labels=labels, **options),
        "contrastive": ccu_fast.inverse_info_nce(x, y, kind="contrastive", row_labels=labels, **options),
        "ascent": ccu_fast.inverse_info_nce(x, y, kind="ascent", **options),
        "sup_con": ccu_fast.sup_con(x, y, row_labels=labels, **options),
        "sigmoid": ccu_fast.sigmoid_loss(x, y, bias=-10.0, **options),
    }


def test_every_loss() -> None:
    x, y = unit(37, 24), unit(37, 24)
    results = []
    for dtype, backend in ((FP32, "triton"), (FP32, "reference"), (torch.float64, "reference")):
        leaves = [x.to(FP32).to(dtype).requires_grad_(), y.to(FP32).to(dtype).requires_grad_()]
        scale = torch.tensor(10.0, dtype=dtype, requires_grad=True)
        out = {}
        for name, loss in losses(*leaves, scale, backend).items():
            grads = torch.autograd.grad(loss, [*leaves, scale])
            out |= {name: loss} | {f"{name} d{of}": g for of, g in zip(("x", "y", "scale"), grads, strict=True)}
        results.append(out)
    for name, ours in results[0].items():
        assert_three_way(name, ours, results[1][name], results[2][name], ulps=32, magnitude=1.0)


def test_operator_is_well_formed() -> None:
    p = problem(Case(unit(20, 8), unit(24, 8), 3.0, 0.5, {}, CLIP, CLIP))
    forward = (*operator.flat(p), "triton", 1 << 20, True)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.ccu_fast.reduce_similarity.default, forward, test_utils=checks)
    row_out, col_out, stash = torch.ops.ccu_fast.reduce_similarity(*forward)
    for needs in ([True] * 4, [False, True, False, False]):
        backward = (row_out, col_out, *operator.flat(p), row_out, col_out, stash, needs, "triton", 1 << 20)
        torch.library.opcheck(torch.ops.ccu_fast.reduce_similarity_backward.default, backward, test_utils=checks)


def test_large_label_counts_agree_with_the_counter() -> None:
    """Softplus of S = 0 is log 2 for each pair: the kernels count, and must agree with count_relations."""
    n, m = 70, 45
    k = keys("labels and ids", n, m)
    out, _ = reduce_similarity(
        torch.zeros(n, 4), torch.zeros(m, 4), **k, rows=[("softplus", r) for r in (SELF, SAME, OTHER)], backend="triton"
    )
    x, y = torch.zeros(1, n, 4), torch.zeros(1, m, 4)
    ordered = (k[name][None] for name in ("row_labels", "col_labels", "row_ids", "col_ids"))
    p = SimilarityProblem(x, y, torch.ones(()), None, *ordered, diagonal=False, rows=(), cols=())
    counts = count_relations(p, along_rows=True)
    for value, relation in zip(out, (SELF, SAME, OTHER), strict=True):
        torch.testing.assert_close(value / torch.tensor(2.0).log(), counts[relation][0].float())


def test_offsets_beyond_32_bits() -> None:
    """One tile at the far end of x and of G: both lie above 2^31 elements, in memory that is only reserved."""
    n, d, m, tile = 1 << 20, 4096, 32, 16
    stride = 1 << 28

    def reserved(elements: int) -> Tensor:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        return torch.frombuffer(mmap.mmap(-1, elements * 2, flags=flags), dtype=FP16)

    x, g = reserved(n * d).view(n, d), reserved(tile * stride).view(tile, stride)
    x[-tile:] = unit(tile, d).to(FP16)
    y = unit(m, d).to(FP16)
    one = torch.ones(())
    out = torch.zeros(n)
    row_grad = torch.ones(n)
    first = n - tile
    spec, none = ((1, 7, 0),), ()
    totals = torch.zeros(2, 1)
    header = torch.zeros(16)
    config = configs.device().gradient["half"]
    tensors = (x, y, header, one, *[None] * 11, row_grad, row_grad, out, out, g, totals)
    numbers = (n, m, d, 1, 0, 1, first, tile, stride, m, 1, *[0] * 6, *[None] * 5)
    kinds = {"ROWS": spec, "ROWS_ALWAYS": spec, "ROWS_NEAR": none, "ROWS_FAR": none}
    kinds |= {"COLS": none, "COLS_ALWAYS": none, "COLS_NEAR": none, "COLS_FAR": none}
    off = ("DIAGONAL", "FIX", "AGAIN", "TMA", "MASK_N", "MASK_M")
    traits = dict.fromkeys(off, False) | {"TOTALS": True, "WHOLE": True, "PRECISION": "ieee"}
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    for store in (True, False):
        gradient_kernel[(1,)](*tensors, *numbers, STORE=store, **kinds, **traits, **blocks)
    assert (g[:, :m] == 1).all()
    want = (x[-tile:].double() @ y.double().mT).sum()
    assert totals[0].item() == pytest.approx(want.item(), rel=1e-4)
    assert totals[1].item() == tile * m


def test_reference_agrees_on_one_problem_given_directly() -> None:
    p = problem(Case(unit(37, 20), unit(53, 20), 5.0, 0.25, {}, MIX, MIX))
    for ours, truth in zip(similarity.forward(p, 0, False)[:2], reference.reduce(p), strict=True):
        torch.testing.assert_close(ours, torch.stack(truth), rtol=2e-6, atol=2e-6)
