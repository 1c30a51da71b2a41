"""reduce_similarity on a GPU, backward: what is launched, in which order, with how much memory.

The arithmetic is in :mod:`.gradient_kernels`, all sizes are chosen in :mod:`.plan`. Nothing here waits for the GPU:
scale, bias and the range of the gradients stay on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from ccu_fast.ops.reduce_similarity.problem import Gradients, Incoming, SimilarityProblem
from ccu_fast.ops.reduce_similarity.triton import configs, plan
from ccu_fast.ops.reduce_similarity.triton.arguments import HALF_EXPONENT, N_KEYS, Operands, Pass, arithmetic
from ccu_fast.ops.reduce_similarity.triton.gemm import add_column_gradient, row_gradient
from ccu_fast.ops.reduce_similarity.triton.gradient_kernels import (
    finish_kernel,
    gradient_kernel,
    norm_kernel,
    scale_kernel,
)
from ccu_fast.ops.triton.launch import Launch

FINISH_BLOCK = 4096


def backward(
    p: SimilarityProblem, incoming: Incoming, stash: Tensor, needs: Sequence[bool], workspace: int
) -> Gradients:
    """dx and dy like x and y, dscale and dbias 0-dim fp32; empty or without a value where not needed.

    dscale is Σ x∘dx before scale and rounding, or that of y; only where neither is needed does it cost a pass over S.
    """
    if not any(needs):
        return p.x.new_empty((0,)), p.y.new_empty((0,)), p.scale.new_empty(()), p.scale.new_empty(())
    with configs.on_device(p.x):
        device = configs.device()
        operands = Operands(p, device)
        signature = (
            "backward",
            workspace,
            tuple(needs),
            stash.shape,
            operands.signature(p, p.x, p.y, *incoming, stash),
        )
        made = device.plans.get(signature) or device.keep(
            signature, _Backward(p, operands, device, stash.shape[0], tuple(needs), workspace)
        )
        return made(p, operands, incoming, stash)


class _Backward(Pass):
    """The launches of a backward pass, chunk by chunk in one scratch buffer."""

    def __init__(
        self,
        p: SimilarityProblem,
        operands: Operands,
        device: configs.Device,
        stash_words: int,
        needs: tuple[bool, ...],
        workspace: int,
    ) -> None:
        super().__init__(p, operands, device, device.tile("gradient", arithmetic(p), p))
        self.want_x, self.want_y, self.want_scale, self.want_bias = needs
        self.store = self.want_x or self.want_y
        self.norm = _norm(p, device) if self.store and p.x.dtype == torch.float16 else None
        totals = self.want_bias or (self.want_scale and not self.store)
        self.x_dot, self.y_dot = self.want_scale, self.want_scale and not self.want_x
        # Long rows are padded like those of G, so that what columns get is loaded in whole packs: the addresses of
        # single elements would fill the registers.
        self.missing = -p.m % 16 if self.tile.block_n == device.gradient[self.arithmetic].block_n else 0
        self.col_items = p.m + self.missing
        chunks = plan.chunks(p, self.tile.block_m, workspace, stash_words)
        self.chunks = [_Chunk(self, p, device, chunk, totals) for chunk in chunks]
        self.scratch = max(chunk.size for chunk in self.chunks)
        # A bank of x that serves several banks of y is summed before it is finished.
        shared = p.x.shape[0] < p.banks
        self.finish_x = _finisher(device, p.x.numel(), self.x_dot) if self.want_x and shared else None
        self.finish_y = _finisher(device, p.y.numel(), self.y_dot) if self.want_y else None

    def __call__(self, p: SimilarityProblem, operands: Operands, incoming: Incoming, stash: Tensor) -> Gradients:
        dx = p.x.new_empty(p.x.shape if self.want_x else (0,))
        dy = p.y.new_empty((0,))
        norm = None
        if self.norm is not None:
            norm = p.x.new_empty((2,), dtype=torch.float32)
            self.norm(incoming[0], incoming[1], norm)
        if self.missing:
            rows, cols, row_out, col_out = incoming
            incoming = rows, pad(cols, (0, self.missing)), row_out, pad(col_out, (0, self.missing))
        scale_terms: list[Tensor] = []
        bias_terms: list[Tensor] = []

        def finish(launch: Launch, out: Tensor, total: Tensor, like: Tensor, dot: bool) -> None:
            dots = total.new_empty((launch.grid[0] if dot else 0,))
            launch(total, like, out, norm, p.scale, dots)
            if dot:
                scale_terms.append(dots.sum(dtype=torch.float64))

        readers = self.readers(operands)
        x_sum = torch.zeros_like(p.x, dtype=torch.float32) if self.finish_x is not None else None
        y_sum = torch.empty_like(p.y, dtype=torch.float32) if self.want_y else None
        scratch = p.x.new_empty((self.scratch,))
        common = (norm, *operands.keys), incoming
        for planned in self.chunks:
            chunk = planned.chunk
            g, parts = planned.make(self, p, readers, stash, common, scratch)
            if parts is not None:
                bias_terms.append(parts[1])
                if not self.store:
                    scale_terms.append(parts[0])
            if self.want_x:
                part = row_gradient(p, g, chunk, planned.parts_of_sum)
                if x_sum is not None:
                    x_sum[0, chunk.first : chunk.first + chunk.rows] += part.sum(0)
                elif planned.finish is not None:
                    finish(planned.finish, _rows(dx, chunk), part, _rows(p.x, chunk), self.x_dot)
            if y_sum is not None:
                add_column_gradient(p, y_sum, g, chunk)
        del g, scratch  # before the last results are allocated
        if x_sum is not None and self.finish_x is not None:
            finish(self.finish_x, dx, x_sum, p.x, self.x_dot)
        if y_sum is not None and self.finish_y is not None:
            dy = p.y.new_empty(p.y.shape)
            finish(self.finish_y, dy, y_sum, p.y, self.y_dot)
        return dx, dy, _total(scale_terms, p.scale), _total(bias_terms if self.want_bias else [], p.scale)


class _Chunk:
    """The launches that make G of one chunk."""

    def __init__(
        self, backward: _Backward, p: SimilarityProblem, device: configs.Device, chunk: plan.Chunk, totals: bool
    ) -> None:
        self.chunk, tile = chunk, backward.tile
        stride = configs.row_stride(p.m)
        self.shape = (chunk.banks, chunk.rows, stride)
        self.size = chunk.banks * chunk.rows * stride if backward.store else 0

        def tiles(block_m: int) -> int:
            return chunk.banks * triton.cdiv(chunk.rows, block_m) * triton.cdiv(p.m, tile.block_n)

        programs = min(tiles(tile.block_m), 2 * device.processors)
        kept = chunk.kept and backward.store and not totals
        self.parts = (2, 2, programs) if totals else None
        rows, cols = plan.spec(p, p.rows), plan.spec(p, p.cols)
        launch = functools.partial(Launch, index=device.index)
        chunk_rows = (chunk.first, chunk.rows, stride, backward.col_items)
        sizes = (p.n, p.m, backward.d, p.banks, chunk.start, chunk.banks, *chunk_rows)
        numbers = (*sizes, programs if totals else 0, *backward.strides)
        constants = backward.constants(p, chunk.rows, rows, cols)
        constants |= {"STORE": backward.store, "TOTALS": totals}
        self.gradient = [
            launch(gradient_kernel, programs, numbers, FIX=kept and not again, AGAIN=again, **constants)
            for again in (False, True)
        ]
        self.scale = None
        if kept:
            # A relation for each pair, or twice the bytes, need the registers of more threads.
            keyed = p.row_labels is not None or p.row_ids is not None
            warps = 16 if keyed or p.x.dtype == torch.float32 else 8
            parts = 1 if p.row_ids is not None else plan.parts_of_tile(tile, warps)
            block_m = tile.block_m // parts
            numbers = (p.n, p.m, p.banks, chunk.start, *chunk_rows, *backward.strides[2 : 2 + N_KEYS])
            constants = {name: constants[name] for name in ("DIAGONAL", "WHOLE", "BLOCK_N")}
            constants |= {"ROWS": plan.far_from_diagonal(p, rows), "COLS": plan.far_from_diagonal(p, cols)}
            constants |= {"PARTS": parts, "BLOCK_M": block_m, "num_warps": warps}
            self.scale = launch(scale_kernel, tiles(block_m), numbers, **constants)
        self.before = chunk.before * stride
        self.finish = None
        self.parts_of_sum = plan.parts_of_sum(p, chunk, device.processors)
        if backward.want_x and p.x.shape[0] == p.banks:
            size = chunk.banks * chunk.rows * p.x.shape[2]
            self.finish = _finisher(device, size, backward.x_dot, self.parts_of_sum)

    def make(
        self, backward: _Backward, p: SimilarityProblem, readers: Any, stash: Tensor, common: Any, scratch: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """G ``[banks, rows, stride]`` of the chunk, and fp64 ``[2]``, its sums of G∘(x yᵀ) and G.

        The first sum is right only where nothing is stored. ``common`` is what both kernels get: norm and keys (but
        limits, which come without kept E), gradients and results.
        """
        keys, incoming = common
        g = scratch
        if backward.store:
            g = (scratch if scratch.shape[0] == self.size else scratch[: self.size]).view(self.shape)
        parts = None if self.parts is None else g.new_zeros(self.parts, dtype=torch.float32)
        for again, launch in enumerate(self.gradient):
            launch(*readers, stash, p.scale, p.bias, *keys, *incoming, g, g if parts is None else parts[again])
        if self.scale is not None:
            e = plan.kept(p, stash)
            self.scale(e[self.before :] if self.before else e, stash, *keys[: 1 + N_KEYS], *incoming, g)
        return g, None if parts is None else parts.sum((0, 2), dtype=torch.float64)


def _finisher(device: configs.Device, size: int, dot: bool, parts: int = 1) -> Launch:
    constants = {"DOT": dot, "PARTS": parts, "BLOCK": FINISH_BLOCK, "num_warps": 8}
    return Launch(finish_kernel, triton.cdiv(size, FINISH_BLOCK), (size,), index=device.index, **constants)


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
    """Given the gradients of rows and columns: the power of two that G is stored with, and its inverse."""
    constants = {"ROWS": len(p.rows), "COLS": len(p.cols), "EXPONENT": HALF_EXPONENT, "num_warps": 8}
    return Launch(norm_kernel, 1, (p.banks * p.n, p.banks * p.m), index=device.index, **constants)
