"""reduce_similarity on a GPU: what is launched, in which order, with how much memory.

Forward: a bound of S, one pass over its tiles that keeps what the workspace holds of E, a merge, and a second look at
sums that underflowed, which is nearly never needed and decides so on the device. Backward, for each chunk of rows: G
from E or from S, two library GEMMs, and the rounding. The arithmetic is in :mod:`.forward_kernels` and
:mod:`.gradient_kernels`, all sizes are chosen in :mod:`.plan`. Nothing here waits for the GPU: scale, bias, the bound
and the range of the gradients stay on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ccu_fast.backends.problem import SimilarityProblem
from ccu_fast.backends.triton import configs, plan
from ccu_fast.backends.triton.forward_kernels import (
    bound_kernel,
    forward_kernel,
    merge_kernel,
    online_kernel,
    own_kernel,
)
from ccu_fast.backends.triton.gemm import ColumnGradient, RowGradient
from ccu_fast.backends.triton.gradient_kernels import finish_kernel, gradient_kernel, norm_kernel, scale_kernel
from ccu_fast.backends.triton.names import keys
from ccu_fast.backends.triton.plan import stash_shape

__all__ = ["backward", "forward", "stash_shape"]

# e is at most 2^TOP / max(N, M): no sum of it overflows, and exp2(shift − lse) is still a normal number.
TOP = 120
# fp16 gradients are stored times a power of two that brings the largest possible one below 2^14: a factor 2 under
# fp16's largest for each of rows and columns, and 2^28 above its smallest normal number.
HALF_EXPONENT = 14
FINISH_BLOCK = 4096


def forward(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Row results fp32 ``[R, B, N]``, column results fp32 ``[C, B, M]`` and the stash."""
    with configs.on_device(p.x):
        device = configs.device()
        problem = _Problem(p, device)
        tile = device.tile("forward", problem.arithmetic, p)
        x, y = problem.operands(tile)
        rows, own_rows = plan.without_own(p, problem.rows)
        cols, own_cols = plan.without_own(p, problem.cols)
        cut = plan.rectangles(p, rows, cols, tile, device, workspace)
        new = p.x.new_empty
        stash = new(stash_shape(p, workspace, keep), dtype=torch.float32)
        squares = new((2, device.bounds), dtype=torch.float32)
        row_parts = new((len(rows), cut.strips, p.banks, p.n), dtype=torch.float32)
        col_parts = new((len(cols), cut.groups, p.banks, p.m), dtype=torch.float32)
        row_out = new((len(p.rows), p.banks, p.n), dtype=torch.float32)
        col_out = new((len(p.cols), p.banks, p.m), dtype=torch.float32)

        d = problem.x.shape[2]
        if own_rows or own_cols:
            own_blocks = p.banks * triton.cdiv(max(p.n, p.m), device.bound_tile[0])
            own_kernel[(own_blocks,)](
                problem.x, problem.y, p.scale, p.bias, *problem.keys[:2], row_out, col_out,
                p.n, p.m, d, p.banks, *problem.strides[:4],
                ROWS=own_rows, COLS=own_cols, HAS_BIAS=p.bias is not None, HAS_LABELS=p.row_labels is not None,
                BLOCK_M=device.bound_tile[0], BLOCK_K=device.bound_tile[1], **configs.OPTIONS,
            )  # fmt: skip
        if not rows and not cols:
            stash.zero_()
            return row_out, col_out, stash
        bound_kernel[(device.bounds,)](
            problem.x, problem.y, squares, p.x.shape[0] * p.n, p.y.shape[0] * p.m, d,
            BLOCK_M=device.bound_tile[0], BLOCK_K=device.bound_tile[1], **configs.OPTIONS,
        )  # fmt: skip
        whole = plan.chunks(p, device.tile("gradient", problem.arithmetic, p).block_m, workspace, stash.shape[0])
        kept_rows = sum(chunk.banks * chunk.rows for chunk in whole if chunk.kept)
        forward_kernel[(p.banks * cut.groups * cut.strips,)](
            x, y, squares, p.scale, p.bias, *problem.keys, row_parts, col_parts, stash, _kept(p, stash),
            float(TOP - math.ceil(math.log2(max(p.n, p.m)))),
            p.n, p.m, d, p.banks, *problem.strides,
            cut.groups, cut.group_tiles, cut.strips, cut.strip_tiles, kept_rows, plan.stride(p),
            **problem.constants(tile), **by_distance(p, rows, cols), **tile.options(),
            PRECISION=problem.precision, TMA=device.tma,
            MASK_N=p.n % tile.block_m != 0, PROGRAMS=device.bounds, KEEP=kept_rows > 0,
        )  # fmt: skip
        online = device.tile("online", problem.arithmetic, p)
        block = online.block_m
        blocks = p.banks * (triton.cdiv(p.n, block) * bool(rows) + triton.cdiv(p.m, block) * bool(cols))
        flags = new((blocks,), dtype=torch.int32)
        merge_kernel[(blocks,)](
            row_parts, col_parts, row_out, col_out, flags, stash, p.bias, p.banks, p.n, p.m, cut.strips, cut.groups,
            ROWS=rows, COLS=cols, HAS_BIAS=p.bias is not None, BLOCK=block, **configs.OPTIONS,
        )  # fmt: skip
        if any(entry[0] == 0 for entry in (*rows, *cols)):
            online_kernel[(min(blocks, 2 * device.processors),)](
                problem.x, problem.y, p.scale, p.bias, *problem.keys, row_out, col_out, flags, stash,
                p.n, p.m, d, p.banks, *problem.strides,
                ROWS=rows, COLS=cols, **problem.traits, DIAGONAL=p.diagonal, PRECISION=problem.precision,
                MASK_N=p.n % block != 0, MASK_M=p.m % block != 0, MASK_K=d % online.block_k != 0, **online.options(),
            )  # fmt: skip
        else:
            stash[1:2].zero_()
        return row_out, col_out, stash


def backward(
    p: SimilarityProblem,
    grad_rows: Tensor,
    grad_cols: Tensor,
    row_out: Tensor,
    col_out: Tensor,
    stash: Tensor,
    needs: Sequence[bool],
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx and dy like x and y (empty where not needed), dscale and dbias 0-dim fp32.

    dscale is Σ x∘dx before scale and rounding, or that of y; only where neither is needed does it cost a pass over S.
    """
    with configs.on_device(p.x):
        device = configs.device()
        want_x, want_y, want_scale, want_bias = needs
        store = want_x or want_y
        totals = torch.zeros(2, dtype=torch.float64, device=p.x.device)
        dx = p.x.new_empty(p.x.shape if want_x else (0,))
        dy = p.y.new_empty((0,))
        if any(needs):
            problem = _Problem(p, device)
            norm = _norm(p, grad_rows, grad_cols) if store and p.x.dtype == torch.float16 else None
            maker = _Gradient(problem, device, (grad_rows, grad_cols, row_out, col_out), stash, norm, store)
            row_gradient = RowGradient(p) if want_x else None
            col_gradient = ColumnGradient(p) if want_y else None

            def finish(out: Tensor, total: Tensor, like: Tensor, dot: bool) -> None:
                programs = triton.cdiv(total.numel(), FINISH_BLOCK)
                dots = total.new_empty((programs if dot else 0,))
                finish_kernel[(programs,)](
                    total, like, out, norm, p.scale, dots, total.numel(),
                    HAS_NORM=norm is not None, DOT=dot, BLOCK=FINISH_BLOCK, num_warps=8, **configs.OPTIONS,
                )  # fmt: skip
                if dot:
                    totals[0] += dots.sum(dtype=torch.float64)

            for chunk in plan.chunks(p, maker.tile.block_m, workspace, stash.shape[0]):
                g, parts = maker.make(chunk, want_bias or (want_scale and not store))
                if parts is not None:
                    totals[1] += parts[1]
                    if not store:
                        totals[0] += parts[0]
                if row_gradient is not None:
                    part = row_gradient.add(g, chunk)
                    if part is not None:
                        rows = slice(chunk.first, chunk.first + chunk.rows)
                        finish(
                            dx[chunk.start : chunk.stop, rows], part, p.x[chunk.start : chunk.stop, rows], want_scale
                        )
                if col_gradient is not None:
                    col_gradient.add(g, chunk)
            maker.release()
            del g
            if row_gradient is not None and row_gradient.sum is not None:
                finish(dx, row_gradient.sum, p.x, want_scale)
            if col_gradient is not None:
                dy = p.y.new_empty(p.y.shape)
                finish(dy, col_gradient.sum, p.y, want_scale and not want_x)
        dscale, dbias = totals.float().unbind(0)
        return dx, dy, dscale.clone(), dbias.clone()


def _kept(p: SimilarityProblem, stash: Tensor) -> Tensor:
    return stash[plan.HEADER :].view(plan.kept_dtype(p))


def _norm(p: SimilarityProblem, grad_rows: Tensor, grad_cols: Tensor) -> Tensor:
    """The power of two that G is stored with, and what undoes it."""
    norm = p.x.new_empty((2,), dtype=torch.float32)
    norm_kernel[(1,)](
        grad_rows, grad_cols, norm, p.banks * p.n, p.banks * p.m, EXPONENT=HALF_EXPONENT,
        ROWS=len(p.rows), COLS=len(p.cols), BLOCK=2048, num_warps=8, **configs.OPTIONS,
    )  # fmt: skip
    return norm


class _Problem:
    """The problem as the kernels want it."""

    def __init__(self, p: SimilarityProblem, device: configs.Device) -> None:
        self.p, self.device = p, device
        self.arithmetic = configs.arithmetic(p.x.dtype)
        self.precision = "tf32" if self.arithmetic == "tf32" else "ieee"
        # Descriptors want rows of whole 16 bytes; pointers whole steps along D: aligned loads and no mask.
        multiple = 16 // p.x.element_size() if device.tma else device.largest_step
        self.x, self.y = _padded(p.x, multiple), _padded(p.y, multiple)
        self.keys = keys(p)
        self.rows, self.cols = plan.spec(p, p.rows), plan.spec(p, p.cols)
        self.traits = {
            "HAS_BIAS": p.bias is not None,
            "HAS_LABELS": p.row_labels is not None,
            "HAS_IDS": p.row_ids is not None,
        }
        items = (0 if p.x.shape[0] == 1 else p.n, 0 if p.y.shape[0] == 1 else p.m)
        self.key_strides = tuple(0 if k is None or k.shape[0] == 1 else k.shape[1] for k in self.keys)
        self.strides = (*items, *self.key_strides)

    def operands(self, tile: configs.Tile) -> tuple[Any, Any]:
        """x and y, or their descriptors."""
        if not self.device.tma:
            return self.x, self.y
        d = self.x.shape[2]
        return (
            TensorDescriptor.from_tensor(self.x.view(-1, d), [tile.block_m, tile.block_k]),
            TensorDescriptor.from_tensor(self.y.view(-1, d), [tile.block_n, tile.block_k]),
        )

    def constants(self, tile: configs.Tile) -> dict[str, Any]:
        return {
            **self.traits,
            "DIAGONAL": self.p.diagonal,
            "MASK_M": self.p.m % tile.block_n != 0,
        }


def by_distance(p: SimilarityProblem, rows: plan.Spec, cols: plan.Spec) -> dict[str, plan.Spec]:
    """The specs as arguments of a kernel that tells tiles near the diagonal from others."""
    found: dict[str, plan.Spec] = {"ROWS": rows, "COLS": cols}
    for name, spec in (("ROWS", rows), ("COLS", cols)):
        parts = plan.by_distance(p, spec)
        found |= {f"{name}_{where}": part for where, part in zip(("ALWAYS", "NEAR", "FAR"), parts, strict=True)}
    return found


def _padded(t: Tensor, multiple: int) -> Tensor:
    missing = -t.shape[2] % multiple
    if missing:
        return torch.nn.functional.pad(t, (0, missing))
    return t if t.data_ptr() % 16 == 0 else t.clone()


@dataclass
class _Gradient:
    """Makes G of one chunk after another in one scratch buffer."""

    problem: _Problem
    device: configs.Device
    incoming: tuple[Tensor, Tensor, Tensor, Tensor]
    stash: Tensor
    norm: Tensor | None
    store: bool

    def __post_init__(self) -> None:
        p = self.problem.p
        self.tile = self.device.tile("gradient", self.problem.arithmetic, p)
        self.operands = self.problem.operands(self.tile)
        # A relation for each pair, or twice the bytes, need the registers of more threads.
        keyed = any(key is not None for key in self.problem.keys)
        self.scale_warps = 16 if keyed or p.x.dtype == torch.float32 else 8
        self.scratch: Tensor | None = None

    def release(self) -> None:
        """Let go of the scratch before the last results are allocated."""
        self.scratch = None

    def make(self, chunk: plan.Chunk, totals: bool) -> tuple[Tensor, Tensor | None]:
        """G ``[banks, rows, stride]`` of the chunk, and fp64 ``[2]``, its sums of G∘(x yᵀ) and G.

        The first sum is right only where nothing is stored.
        """
        problem, p, tile = self.problem, self.problem.p, self.tile
        stride = plan.stride(p)
        size = chunk.banks * chunk.rows * stride if self.store else 0
        if self.scratch is None or self.scratch.numel() < size:
            self.scratch = p.x.new_empty((size,))
        g = self.scratch[:size].view(chunk.banks, chunk.rows, stride) if self.store else self.scratch
        tiles = chunk.banks * triton.cdiv(chunk.rows, tile.block_m) * triton.cdiv(p.m, tile.block_n)
        programs = min(tiles, 2 * self.device.processors)
        kept = chunk.kept and self.store and not totals
        parts = None
        if totals:
            parts = g.new_zeros((2, 2, programs), dtype=torch.float32)
        shared = {
            **problem.constants(tile), "HAS_NORM": self.norm is not None, "TOTALS": totals,
            "MASK_N": chunk.rows % tile.block_m != 0,
        }  # fmt: skip
        for again in (False, True):
            gradient_kernel[(programs,)](
                *self.operands, self.stash, p.scale, p.bias, self.norm, *problem.keys, *self.incoming, g,
                g if parts is None else parts[int(again)],
                p.n, p.m, problem.x.shape[2], p.banks, chunk.start, chunk.banks, chunk.first, chunk.rows, stride,
                0 if parts is None else parts.shape[2], *problem.strides,
                **shared, **by_distance(p, problem.rows, problem.cols), **tile.options(), PRECISION=problem.precision,
                TMA=self.device.tma, STORE=self.store, FIX=kept and not again, AGAIN=again,
            )  # fmt: skip
        if kept:
            for foreign in ("HAS_BIAS", "TOTALS"):
                del shared[foreign]
            e = _kept(p, self.stash)[chunk.before * stride :]
            scale_kernel[(tiles,)](
                e, self.stash, self.norm, *problem.keys, *self.incoming, g,
                p.n, p.m, p.banks, chunk.start, chunk.first, chunk.rows, stride, *problem.key_strides,
                **shared, ROWS=plan.far_from_diagonal(p, problem.rows), COLS=plan.far_from_diagonal(p, problem.cols),
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=self.scale_warps, **configs.OPTIONS,
            )  # fmt: skip
        return g, None if parts is None else parts.sum((0, 2), dtype=torch.float64)
