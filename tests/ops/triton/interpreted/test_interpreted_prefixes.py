"""All prefixes in one pass on the Triton backend, in tiles of 16×32 and chunks of a few rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import ccu_fast
from ccu_fast import ALL, OTHER, SAME, SELF, reduce_prefixes
from ccu_fast.ops.reduce_similarity.api import build_problem
from ccu_fast.ops.reduce_similarity.triton import prefixes as fused
from ccu_fast.ops.reduce_similarity.triton.prefix_kernels import more_products
from tests.ops.reduce_similarity.test_prefixes import CLIP, at_once, check, differentiate
from tests.support.oracle import unit

FP32 = torch.float32
SPEC = [("lse", ALL), ("lse", OTHER), ("sum", SELF), ("sum", OTHER)]
OTHERS = [("softplus", ALL), ("logsigmoid", OTHER), ("lse", SELF)]
KEYS: dict[str, Any] = {
    "paired": {},
    "unrelated": {"paired": False},
    "labels": {"row_labels": torch.arange(33) % 4 - 1, "col_labels": torch.arange(33) % 5 - 1},
    "ids": {"row_ids": torch.arange(33) % 9, "col_ids": torch.arange(33) % 7},
}


def served(x: Tensor, y: Tensor, **given: Any) -> None:
    """As :func:`check`, of what one pass does."""
    with mock.patch.object(fused, "backward", wraps=fused.backward) as backward:
        check(x, y, "triton", FP32, bias=None, **given)
    assert backward.called


@pytest.mark.parametrize(
    ("keys", "normalize"),
    [("paired", False), ("paired", True), ("unrelated", True), ("labels", False), ("labels", True), ("ids", False)],
)
def test_reductions_of_every_prefix(keys: str, normalize: bool) -> None:
    x, y = unit(33, 70), 3 * unit(33, 70)
    given = {"normalize": normalize, **KEYS[keys]}
    served(x, y, prefixes=(16, 32, 64), rows=SPEC, cols=SPEC[::-1], **given)
    served(x, y, prefixes=(32, 64), rows=[*OTHERS, ("lse", SAME | SELF)] if keys == "labels" else OTHERS, **given)
    if not given["normalize"]:
        served(x, y, prefixes=(16, 48), cols=CLIP, **given)


@pytest.mark.parametrize(
    ("n", "m", "normalize"), [(16, 32, False), (1, 50, False), (1, 50, True), (50, 1, True), (33, 64, True)]
)
def test_sizes(n: int, m: int, normalize: bool) -> None:
    served(unit(n, 48), unit(m, 48), prefixes=(16, 48), rows=SPEC[:2], cols=CLIP[:1], paired=False, normalize=normalize)


@pytest.mark.parametrize(("workspace", "normalize"), [(0, True), (9_000, False)])
def test_several_chunks_of_rows(workspace: int, normalize: bool) -> None:
    given: dict[str, Any] = {"prefixes": (16, 32), "rows": CLIP, "cols": CLIP, "normalize": normalize}
    x, y = unit(41, 32), unit(41, 32)
    served(x, y, workspace=workspace, **given)
    given |= {"bias": None, "backend": "triton", "workspace": workspace}
    runs = [differentiate(at_once, x, y, FP32, **given) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("keys", ["paired", "labels"])
def test_sums_that_one_shift_would_lose(keys: str, normalize: bool) -> None:
    """At scale 150 some rows of one prefix are far below what bounds them all, and of the other they are not."""
    x, y = unit(33, 32), unit(33, 32)
    y[:, :16] = -x[:1, :16]
    x[:17, :16] = x[:1, :16]
    given: dict[str, Any] = {"normalize": normalize, "rows": SPEC, "cols": CLIP, **KEYS[keys], "scale": 150.0}
    with mock.patch.object(fused, "backward", wraps=fused.backward) as backward:
        check(x, y, "triton", FP32, bias=None, prefixes=(16, 32), **given)
    stash = backward.call_args.args[2]
    assert stash[1] == 1


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("wanted", ["x", "y", "scale"])
def test_one_gradient_alone(wanted: str, normalize: bool) -> None:
    masters = {"x": unit(20, 48), "y": unit(35, 48), "scale": torch.tensor(5.0)}

    def gradient(backend: str, dtype: torch.dtype) -> Tensor:
        leaves = {name: t.to(dtype, copy=True) for name, t in masters.items()}
        leaves[wanted].requires_grad_()
        rows, cols = reduce_prefixes(
            **leaves,
            prefixes=(16, 48),
            rows=CLIP[:1],
            cols=CLIP[:1],
            paired=False,
            normalize=normalize,
            backend=backend,
        )
        return torch.autograd.grad(rows[0].sin().sum() + cols[0].sin().sum(), leaves[wanted])[0]

    ours, exact = gradient("triton", FP32), gradient("reference", torch.float64)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e-13])
def test_the_gradient_of_what_is_too_short_to_be_normalized(value: float) -> None:
    x, y = unit(9, 32), unit(9, 32)
    x[1], x[2, :16] = value, value
    served(x, y, prefixes=(16, 32), normalize=True, rows=CLIP, cols=CLIP)


def test_ignored_items_may_hold_nan() -> None:
    x, y, labels = unit(20, 32).float(), unit(20, 32).float(), torch.arange(20) - 1
    x[0], y[0] = torch.nan, torch.inf
    for normalize in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        rows, cols = reduce_prefixes(
            *leaves, prefixes=(16, 32), row_labels=labels, rows=CLIP, cols=CLIP, normalize=normalize, backend="triton"
        )
        assert all(t[..., 1:].isfinite().all() for t in (*rows, *cols))
        sum(t[..., 1:].sum() for t in (*rows, *cols)).backward()
        assert all(t.grad is not None and t.grad[0].eq(0).all() and t.grad.isfinite().all() for t in leaves)


def test_ignored_items_hold_nan_until_the_backward_pass() -> None:
    """As on a GPU, where nothing looks for NaN before the forward pass."""
    x, y, labels = unit(20, 32).float(), unit(20, 32).float(), torch.arange(20) - 1
    x[0], y[0] = torch.nan, torch.inf
    p, *_ = build_problem(*(x, y, 2.0, None, labels), *[None] * 4, CLIP, CLIP, "propagate", prefixes=(16, 32))
    for unit_vectors in (False, True):
        p = replace(p, unit=unit_vectors)
        row_out, col_out, stash = fused.forward(p, 1 << 20, True)
        incoming = torch.ones_like(row_out), torch.ones_like(col_out), row_out, col_out
        grads = fused.backward(p.without_ignored(), incoming, stash, [True, True, True, False], 1 << 20)
        assert all(t.isfinite().all() for t in grads[:3])


def test_nan_is_seen_where_it_counts() -> None:
    x, y = unit(20, 32).float(), unit(20, 32).float()
    x[3, 20] = torch.nan
    for normalize in (False, True):
        rows, cols = reduce_prefixes(
            x, y, prefixes=(16, 32), rows=CLIP[:1], cols=CLIP[:1], normalize=normalize, backend="triton"
        )
        assert torch.equal(rows[0].isnan().nonzero(), torch.tensor([[1, 3]]))
        assert torch.equal(cols[0].isnan().any(1), torch.tensor([False, True]))


def test_dimensions_after_the_last_prefix_get_no_gradient() -> None:
    x, y = (torch.randn(9, 40, requires_grad=True) for _ in range(2))
    rows, _ = reduce_prefixes(x, y, prefixes=(16, 32), rows=CLIP, normalize=True, backend="triton")
    rows[0].sum().backward()
    for grad in (x.grad, y.grad):
        assert grad is not None
        assert grad[:, :32].ne(0).all()
        assert grad[:, 32:].eq(0).all()


@pytest.mark.parametrize(
    "given",
    [
        {"prefixes": (8, 32)},
        {"prefixes": (32,)},
        {"prefixes": tuple(range(16, 160, 16))},
        {"bias": -0.5},
        {"row_limits": torch.full((9,), 0.5)},
        {"guide": (torch.ones(9, 4), torch.ones(9, 4)), "row_limits": torch.full((9,), 5.0)},
    ],
    ids=["no multiple of 16", "one", "nine", "bias", "limits", "guide"],
)
def test_the_others_are_a_loop(given: dict[str, Any]) -> None:
    with mock.patch.object(fused, "forward") as forward:
        check(unit(9, 144), unit(9, 144), "triton", FP32, **{"prefixes": (16, 32), "bias": None, "rows": CLIP, **given})
    assert not forward.called


def test_banks_and_fp16_are_a_loop() -> None:
    with mock.patch.object(fused, "forward") as forward:
        check(unit(2, 9, 32), unit(9, 32), "triton", FP32, prefixes=(16, 32), bias=None, rows=CLIP)
        check(unit(9, 32), unit(9, 32), "triton", torch.float16, prefixes=(16, 32), bias=None, rows=CLIP)
    assert not forward.called


def test_the_loss() -> None:
    x, y = unit(40, 64).float(), unit(40, 64).float()
    options: dict[str, Any] = {"scale": 20.0, "prefixes": (16, 32, 64), "normalize": True}
    losses = [ccu_fast.info_nce(x, y, backend=backend, **options) for backend in ("triton", "reference")]
    torch.testing.assert_close(*losses)


@triton.jit
def _last_tile(x, y, out, N, D, EDGES: tl.constexpr):
    acc = tl.zeros((16, 16), tl.float32)
    acc = more_products(acc, x, y, N - 16, 0, N, 16, D, 0, EDGES, False, 16, 16, 16, "ieee")
    place = tl.arange(0, 16)
    tl.store(out + place[:, None] * 16 + place[None, :], acc)


def test_more_elements_than_32_bits_count() -> None:
    """Nobody writes to most of this memory, so that no machine has to have it."""
    dim = 1 << 15
    items = (1 << 31) // dim + 64
    x, y, out = torch.empty(items, dim, dtype=torch.float16), torch.ones(16, dim).half(), torch.zeros(16, 16)
    x[-16:, :16] = 1
    _last_tile[(1,)](x, y, out, items, dim, EDGES=(0, 16))
    assert out.eq(16).all()


def test_a_plan_is_for_one_alignment_of_the_features() -> None:
    """The kernel that finishes a gradient reads them where they are."""
    memory, y, made = torch.randn(20 * 32 + 1), torch.randn(20, 32), []
    fused.configs.device().plans.clear()
    for x in (memory[:-1].view(20, 32), memory[1:].view(20, 32)):
        leaf = x.detach().requires_grad_()
        with mock.patch.object(fused, "_Backward", wraps=fused._Backward) as plan:
            reduce_prefixes(leaf, y, prefixes=(16, 32), rows=CLIP, normalize=True, backend="triton")[0][
                0
            ].sum().backward()
        made.append(plan.call_count)
    assert made == [1, 1]


def test_chunks_fit_into_the_workspace() -> None:
    for workspace, count in ((1 << 20, 2), (1 << 22, 8)):
        x = torch.zeros(600, 16 * count)
        prefixes = tuple(range(16, 16 * count + 1, 16))
        p, *_ = build_problem(x, x, 2.0, None, *[None] * 5, CLIP, CLIP, "propagate", prefixes=prefixes)
        device = fused.configs.device()
        made = fused._Backward(p, fused.Operands(p, device), device, (True, True, True, False), workspace)
        assert made.chunks[0].first == 0
        assert sum(chunk.rows for chunk in made.chunks) == 600
        assert all(0 < 4 * chunk.size <= workspace for chunk in made.chunks)
        assert (
            fused._Backward(p, fused.Operands(p, device), device, (False, False, True, False), workspace).scratch == 0
        )
