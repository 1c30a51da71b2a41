"""reduce_similarity on a GPU: what is launched, in which order, with how much memory.

Forward: a bound of S, one pass over its tiles that keeps what the workspace holds of E, a merge, and a second look at
sums that underflowed, which is nearly never needed and decides so on the device. Backward, for each chunk of rows: G
from E or from S, two library GEMMs, and the rounding. The arithmetic is in :mod:`.forward_kernels` and
:mod:`.gradient_kernels`, all sizes are chosen in :mod:`.plan`. Nothing here waits for the GPU: scale, bias, the bound
and the range of the gradients stay on the device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem
from ccu_fast.ops.reduce_similarity.triton import configs, plan
from ccu_fast.ops.reduce_similarity.triton.forward_kernels import (
    bound_kernel,
    forward_kernel,
    merge_kernel,
    online_kernel,
    own_kernel,
)
from ccu_fast.ops.reduce_similarity.triton.gemm import ColumnGradient, RowGradient
from ccu_fast.ops.reduce_similarity.triton.gradient_kernels import (
    finish_kernel,
    gradient_kernel,
    norm_kernel,
    scale_kernel,
)
from ccu_fast.ops.reduce_similarity.triton.keys import keys
from ccu_fast.ops.reduce_similarity.triton.plan import stash_shape
from ccu_fast.ops.triton.launch import Descriptor, Launch, specialised_on

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
        operands = _Operands(p, device)
        signature = ("forward", workspace, keep, operands.signature(p))
        made = device.plans.get(signature) or device.keep(signature, _Forward(p, operands, device, workspace, keep))
        return made(p, operands)


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
    """dx and dy like x and y, dscale and dbias 0-dim fp32; empty or without a value where not needed.

    dscale is Σ x∘dx before scale and rounding, or that of y; only where neither is needed does it cost a pass over S.
    """
    if not any(needs):
        return p.x.new_empty((0,)), p.y.new_empty((0,)), p.scale.new_empty(()), p.scale.new_empty(())
    with configs.on_device(p.x):
        device = configs.device()
        operands = _Operands(p, device)
        incoming = grad_rows, grad_cols, row_out, col_out
        signature = ("backward", workspace, tuple(needs), stash.shape, operands.signature(p, *incoming, stash))
        made = device.plans.get(signature) or device.keep(
            signature, _Backward(p, operands, device, stash.shape[0], tuple(needs), workspace)
        )
        return made(p, operands, incoming, stash)


class _Operands:
    """x, y and the keys as the kernels want them."""

    __slots__ = ("keys", "x", "y")

    def __init__(self, p: SimilarityProblem, device: configs.Device) -> None:
        # Descriptors want rows of whole 16 bytes; pointers whole steps along D: aligned loads and no mask.
        multiple = 16 // p.x.element_size() if device.tma else device.largest_step
        self.x, self.y = _padded(p.x, multiple), _padded(p.y, multiple)
        self.keys = keys(p)

    def signature(self, p: SimilarityProblem, *others: Tensor) -> tuple[Hashable, ...]:
        """Of what the launches depend on: equal for problems that differ in values only."""
        return (
            p.x.shape, p.y.shape, p.rows, p.cols, p.diagonal, configs.arithmetic(p.x.dtype),
            *[None if key is None else key.shape for key in self.keys],
            specialised_on(self.x, self.y, p.scale, p.bias, *self.keys, *others),
        )  # fmt: skip


class _Plan:
    """What the launches of a problem have in common, made from sizes and types alone. No tensor is kept."""

    def __init__(self, p: SimilarityProblem, operands: _Operands, device: configs.Device) -> None:
        self.arithmetic = configs.arithmetic(p.x.dtype)
        self.precision = "tf32" if self.arithmetic == "tf32" else "ieee"
        self.d = operands.x.shape[2]
        # What is beyond an edge needs no mask where there are labels: its label is negative, so it is ignored.
        self.edges = p.row_labels is None
        self.traits = {
            "HAS_BIAS": p.bias is not None,
            "HAS_LABELS": p.row_labels is not None,
            "HAS_IDS": p.row_ids is not None,
        }
        items = (0 if p.x.shape[0] == 1 else p.n, 0 if p.y.shape[0] == 1 else p.m)
        self.key_strides = tuple(0 if k is None or k.shape[0] == 1 else k.shape[1] for k in operands.keys)
        self.strides = (*items, *self.key_strides)

    def constants(self, p: SimilarityProblem, tile: configs.Tile) -> dict[str, Any]:
        return {**self.traits, "DIAGONAL": p.diagonal, "MASK_M": self.edges and p.m % tile.block_n != 0,
                "WHOLE": plan.stride(p) % tile.block_n == 0}  # fmt: skip


class _Readers:
    """How one tile reads x and y: through pointers, or through descriptors."""

    def __init__(self, device: configs.Device, tile: configs.Tile) -> None:
        blocks = (tile.block_m, tile.block_k), (tile.block_n, tile.block_k)
        self.descriptors = tuple(map(Descriptor, blocks)) if device.tma else None

    def __call__(self, operands: _Operands) -> tuple[Any, Any]:
        if self.descriptors is None:
            return operands.x, operands.y
        return self.descriptors[0](operands.x), self.descriptors[1](operands.y)


class _Forward(_Plan):
    """The launches of a forward pass."""

    def __init__(
        self, p: SimilarityProblem, operands: _Operands, device: configs.Device, workspace: int, keep: bool
    ) -> None:
        super().__init__(p, operands, device)
        launch = functools.partial(Launch, index=device.index)
        tile = device.tile("forward", self.arithmetic, p)
        self.readers = _Readers(device, tile)
        row_spec, col_spec = plan.spec(p, p.rows), plan.spec(p, p.cols)
        rows, own_rows = plan.without_own(p, row_spec)
        cols, own_cols = plan.without_own(p, col_spec)
        cut = plan.rectangles(p, rows, cols, tile, device, workspace)
        self.stash = stash_shape(p, workspace, keep)
        self.squares = (2, device.bounds)
        self.row_parts = (len(rows), cut.strips, p.banks, p.n)
        self.col_parts = (len(cols), cut.groups, p.banks, p.m)
        self.row_out, self.col_out = (len(p.rows), p.banks, p.n), (len(p.cols), p.banks, p.m)
        self.own = self.bound = self.forward = self.merge = self.online = None
        self.kept_dtype = plan.kept_dtype(p)

        bound_block = {"BLOCK_M": device.bound_tile[0], "BLOCK_K": device.bound_tile[1]}
        if own_rows or own_cols:
            self.own = launch(
                own_kernel, p.banks * triton.cdiv(max(p.n, p.m), device.bound_tile[0]),
                (p.n, p.m, self.d, p.banks, *self.strides[:4]),
                ROWS=own_rows, COLS=own_cols, HAS_BIAS=p.bias is not None, HAS_LABELS=p.row_labels is not None,
                **bound_block, **configs.OPTIONS,
            )  # fmt: skip
        if not rows and not cols:
            return
        self.bound = launch(
            bound_kernel, device.bounds, (p.x.shape[0] * p.n, p.y.shape[0] * p.m, self.d),
            **bound_block, **configs.OPTIONS,
        )  # fmt: skip
        gradient = device.tile("gradient", self.arithmetic, p)
        whole = plan.chunks(p, gradient.block_m, workspace, int(self.stash[0]))
        kept_rows = sum(chunk.banks * chunk.rows for chunk in whole if chunk.kept)
        self.forward = launch(
            forward_kernel, p.banks * cut.groups * cut.strips,
            (
                float(TOP - math.ceil(math.log2(max(p.n, p.m)))), p.n, p.m, self.d, p.banks, *self.strides,
                cut.groups, cut.group_tiles, cut.strips, cut.strip_tiles, kept_rows, plan.stride(p),
            ),
            **self.constants(p, tile), **by_distance(p, rows, cols), **tile.options(),
            PRECISION=self.precision, TMA=device.tma,
            MASK_N=self.edges and p.n % tile.block_m != 0, PROGRAMS=device.bounds, KEEP=kept_rows > 0,
        )  # fmt: skip
        online = device.tile("online", self.arithmetic, p)
        block = online.block_m
        self.blocks = p.banks * (triton.cdiv(p.n, block) * bool(rows) + triton.cdiv(p.m, block) * bool(cols))
        self.merge = launch(
            merge_kernel, self.blocks, (p.banks, p.n, p.m, cut.strips, cut.groups),
            ROWS=rows, COLS=cols, HAS_BIAS=p.bias is not None, BLOCK=block, **configs.OPTIONS,
        )  # fmt: skip
        if any(entry[0] == 0 for entry in (*rows, *cols)):
            self.online = launch(
                online_kernel, min(self.blocks, 2 * device.processors),
                (p.n, p.m, self.d, p.banks, *self.strides),
                ROWS=rows, COLS=cols, **self.traits, DIAGONAL=p.diagonal, PRECISION=self.precision,
                MASK_N=p.n % block != 0, MASK_M=p.m % block != 0, MASK_K=self.d % online.block_k != 0,
                **online.options(),
            )  # fmt: skip

    def __call__(self, p: SimilarityProblem, operands: _Operands) -> tuple[Tensor, Tensor, Tensor]:
        new = functools.partial(p.x.new_empty, dtype=torch.float32)
        x, y, names = operands.x, operands.y, operands.keys
        stash, row_out, col_out = new(self.stash), new(self.row_out), new(self.col_out)
        if self.own is not None:
            self.own(x, y, p.scale, p.bias, *names[:2], row_out, col_out)
        if self.bound is None or self.forward is None or self.merge is None:
            return row_out, col_out, stash.zero_()
        squares, row_parts, col_parts = new(self.squares), new(self.row_parts), new(self.col_parts)
        self.bound(x, y, squares)
        kept = _kept(stash, self.kept_dtype)
        self.forward(*self.readers(operands), squares, p.scale, p.bias, *names, row_parts, col_parts, stash, kept)
        flags = p.x.new_empty((self.blocks,), dtype=torch.int32)
        self.merge(row_parts, col_parts, row_out, col_out, flags, stash, p.bias)
        if self.online is not None:
            self.online(x, y, p.scale, p.bias, *names, row_out, col_out, flags, stash)
        else:
            stash[1:2].zero_()
        return row_out, col_out, stash


class _Backward(_Plan):
    """The launches of a backward pass, chunk by chunk in one scratch buffer."""

    def __init__(
        self,
        p: SimilarityProblem,
        operands: _Operands,
        device: configs.Device,
        stash_words: int,
        needs: tuple[bool, ...],
        workspace: int,
    ) -> None:
        super().__init__(p, operands, device)
        self.want_x, self.want_y, self.want_scale, self.want_bias = needs
        self.store = self.want_x or self.want_y
        self.kept_dtype = plan.kept_dtype(p)
        tile = device.tile("gradient", self.arithmetic, p)
        self.readers = _Readers(device, tile)
        self.norm = _norm(p, device) if self.store and p.x.dtype == torch.float16 else None
        totals = self.want_bias or (self.want_scale and not self.store)
        self.x_dot, self.y_dot = self.want_scale, self.want_scale and not self.want_x
        # Of long rows, as G: what the columns get is loaded in whole packs, or its addresses fill the registers.
        self.missing = -p.m % 16 if tile.block_n == device.gradient[self.arithmetic].block_n else 0
        self.col_items = p.m + self.missing
        chunks = plan.chunks(p, tile.block_m, workspace, stash_words)
        self.chunks = [_Chunk(self, p, device, tile, chunk, totals) for chunk in chunks]
        self.scratch = max(chunk.size for chunk in self.chunks)
        # A bank of x that serves several banks of y is summed before it is finished.
        self.x_shared = p.x.shape[0] < p.banks
        self.finish_x = self.finisher(p, device, p.x.numel(), self.x_dot) if self.want_x and self.x_shared else None
        self.finish_y = self.finisher(p, device, p.y.numel(), self.y_dot) if self.want_y else None

    def finisher(self, p: SimilarityProblem, device: configs.Device, size: int, dot: bool, parts: int = 1) -> Launch:
        return Launch(
            finish_kernel, triton.cdiv(size, FINISH_BLOCK), (size,), index=device.index,
            HAS_NORM=self.norm is not None, DOT=dot, PARTS=parts, BLOCK=FINISH_BLOCK, num_warps=8, **configs.OPTIONS,
        )  # fmt: skip

    def __call__(
        self, p: SimilarityProblem, operands: _Operands, incoming: tuple[Tensor, Tensor, Tensor, Tensor], stash: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dx = p.x.new_empty(p.x.shape if self.want_x else (0,))
        dy = p.y.new_empty((0,))
        norm = None
        if self.norm is not None:
            norm = p.x.new_empty((2,), dtype=torch.float32)
            self.norm(incoming[0], incoming[1], norm)
        if self.missing:
            rows, cols, row_out, col_out = incoming
            incoming = rows, _filled(cols, self.missing), row_out, _filled(col_out, self.missing)
        scale_terms: list[Tensor] = []
        bias_terms: list[Tensor] = []

        def finish(launch: Launch, out: Tensor, total: Tensor, like: Tensor, dot: bool) -> None:
            dots = total.new_empty((launch.grid[0] if dot else 0,))
            launch(total, like, out, norm, p.scale, dots)
            if dot:
                scale_terms.append(dots.sum(dtype=torch.float64))

        readers = self.readers(operands)
        row_gradient = RowGradient(p) if self.want_x else None
        col_gradient = ColumnGradient(p) if self.want_y else None
        scratch = p.x.new_empty((self.scratch,))
        for planned in self.chunks:
            chunk = planned.chunk
            g, parts = planned.make(self, p, readers, operands.keys, incoming, stash, norm, scratch)
            if parts is not None:
                bias_terms.append(parts[1])
                if not self.store:
                    scale_terms.append(parts[0])
            if row_gradient is not None:
                part = row_gradient.add(g, chunk, planned.parts_of_sum)
                if part is not None and planned.finish is not None:
                    finish(planned.finish, _rows(dx, chunk), part, _rows(p.x, chunk), self.x_dot)
            if col_gradient is not None:
                col_gradient.add(g, chunk)
        del g, scratch  # before the last results are allocated
        if row_gradient is not None and row_gradient.sum is not None and self.finish_x is not None:
            finish(self.finish_x, dx, row_gradient.sum, p.x, self.x_dot)
        if col_gradient is not None and self.finish_y is not None:
            dy = p.y.new_empty(p.y.shape)
            finish(self.finish_y, dy, col_gradient.sum, p.y, self.y_dot)
        return dx, dy, _total(scale_terms, p.scale), _total(bias_terms if self.want_bias else [], p.scale)


class _Chunk:
    """The launches that make G of one chunk."""

    def __init__(
        self,
        backward: _Backward,
        p: SimilarityProblem,
        device: configs.Device,
        tile: configs.Tile,
        chunk: plan.Chunk,
        totals: bool,
    ) -> None:
        self.chunk = chunk
        stride = plan.stride(p)
        self.shape = (chunk.banks, chunk.rows, stride)
        self.size = chunk.banks * chunk.rows * stride if backward.store else 0

        def tiles(block_m: int) -> int:
            return chunk.banks * triton.cdiv(chunk.rows, block_m) * triton.cdiv(p.m, tile.block_n)

        programs = min(tiles(tile.block_m), 2 * device.processors)
        kept = chunk.kept and backward.store and not totals
        self.parts = (2, 2, programs) if totals else None
        shared = {
            **backward.constants(p, tile), "HAS_NORM": backward.norm is not None, "TOTALS": totals,
            "MASK_N": backward.edges and chunk.rows % tile.block_m != 0,
        }  # fmt: skip
        rows, cols = plan.spec(p, p.rows), plan.spec(p, p.cols)
        launch = functools.partial(Launch, index=device.index)
        self.gradient = [
            launch(
                gradient_kernel, programs,
                (
                    p.n, p.m, backward.d, p.banks, chunk.start, chunk.banks, chunk.first, chunk.rows, stride,
                    backward.col_items, programs if totals else 0, *backward.strides,
                ),
                **shared, **by_distance(p, rows, cols), **tile.options(), PRECISION=backward.precision,
                TMA=device.tma, STORE=backward.store, FIX=kept and not again, AGAIN=again,
            )
            for again in (False, True)
        ]  # fmt: skip
        self.scale = None
        if kept:
            for foreign in ("HAS_BIAS", "TOTALS", "MASK_N", "MASK_M"):
                del shared[foreign]
            # A relation for each pair, or twice the bytes, need the registers of more threads.
            keyed = p.row_labels is not None or p.row_ids is not None
            warps = 16 if keyed or p.x.dtype == torch.float32 else 8
            parts = 1 if p.row_ids is not None else plan.parts_of_tile(tile, warps)
            block_m = tile.block_m // parts
            self.scale = launch(
                scale_kernel, tiles(block_m),
                (
                    p.n, p.m, p.banks, chunk.start, chunk.first, chunk.rows, stride, backward.col_items,
                    *backward.key_strides,
                ),
                **shared, ROWS=plan.far_from_diagonal(p, rows), COLS=plan.far_from_diagonal(p, cols),
                PARTS=parts, BLOCK_M=block_m, BLOCK_N=tile.block_n, num_warps=warps, **configs.OPTIONS,
            )  # fmt: skip
        self.before = chunk.before * stride
        self.finish = None
        self.parts_of_sum = plan.parts_of_sum(p, chunk, device.processors)
        if backward.want_x and p.x.shape[0] == p.banks:
            size = chunk.banks * chunk.rows * p.x.shape[2]
            self.finish = backward.finisher(p, device, size, backward.x_dot, self.parts_of_sum)

    def make(
        self,
        backward: _Backward,
        p: SimilarityProblem,
        readers: tuple[Any, Any],
        names: tuple[Tensor | None, ...],
        incoming: tuple[Tensor, Tensor, Tensor, Tensor],
        stash: Tensor,
        norm: Tensor | None,
        scratch: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """G ``[banks, rows, stride]`` of the chunk, and fp64 ``[2]``, its sums of G∘(x yᵀ) and G.

        The first sum is right only where nothing is stored.
        """
        g = scratch
        if backward.store:
            g = (scratch if scratch.shape[0] == self.size else scratch[: self.size]).view(self.shape)
        parts = None if self.parts is None else g.new_zeros(self.parts, dtype=torch.float32)
        for again, launch in enumerate(self.gradient):
            launch(*readers, stash, p.scale, p.bias, norm, *names, *incoming, g, g if parts is None else parts[again])
        if self.scale is not None:
            e = _kept(stash, backward.kept_dtype)
            self.scale(e[self.before :] if self.before else e, stash, norm, *names, *incoming, g)
        return g, None if parts is None else parts.sum((0, 2), dtype=torch.float64)


def _filled(t: Tensor, missing: int) -> Tensor:
    return torch.nn.functional.pad(t, (0, missing))


def _rows(t: Tensor, chunk: plan.Chunk) -> Tensor:
    """The chunk's rows of x or of its gradient."""
    if chunk.banks == t.shape[0] and chunk.rows == t.shape[1]:
        return t
    return t[chunk.start : chunk.stop, chunk.first : chunk.first + chunk.rows]


def _total(terms: list[Tensor], like: Tensor) -> Tensor:
    """The sum of fp64 scalars in fp32; without a value if there are none."""
    if not terms:
        return like.new_empty(())
    return functools.reduce(torch.add, terms).float()


def _norm(p: SimilarityProblem, device: configs.Device) -> Launch:
    """Of gradients of rows and columns: the power of two that G is stored with, and what undoes it."""
    return Launch(
        norm_kernel, 1, (p.banks * p.n, p.banks * p.m), index=device.index, EXPONENT=HALF_EXPONENT,
        ROWS=len(p.rows), COLS=len(p.cols), BLOCK=2048, num_warps=8, **configs.OPTIONS,
    )  # fmt: skip


def _kept(stash: Tensor, dtype: torch.dtype) -> Tensor:
    return stash[plan.HEADER :].view(dtype)


def by_distance(p: SimilarityProblem, rows: plan.Spec, cols: plan.Spec) -> dict[str, Any]:
    """The specs as arguments of a kernel that tells tiles near the diagonal from others."""
    found: dict[str, Any] = {"ROWS": rows, "COLS": cols}
    for name, spec in (("ROWS", rows), ("COLS", cols)):
        parts = plan.by_distance(p, spec)
        found |= {f"{name}_{where}": part for where, part in zip(("ALWAYS", "NEAR", "FAR"), parts, strict=True)}
    return found


def _padded(t: Tensor, multiple: int) -> Tensor:
    missing = -t.shape[2] % multiple
    if missing:
        return torch.nn.functional.pad(t, (0, missing))
    return t if t.data_ptr() % 16 == 0 else t.clone()
