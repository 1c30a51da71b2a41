"""reduce_similarity of all prefixes at once on a GPU: what is launched, in which order, with how much memory.

The arithmetic is in :mod:`.prefix_kernels` and :mod:`.prefix_gradient_kernels`. Nothing here waits for the GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from ccu_fast.ops.reduce_similarity.problem import Gradients, Incoming, SimilarityProblem
from ccu_fast.ops.reduce_similarity.triton import configs, plan
from ccu_fast.ops.reduce_similarity.triton.arguments import N_KEYS, Operands, Pass, arithmetic
from ccu_fast.ops.reduce_similarity.triton.forward_kernels import merge_kernel
from ccu_fast.ops.reduce_similarity.triton.forward_pass import TOP
from ccu_fast.ops.reduce_similarity.triton.gemm import product
from ccu_fast.ops.reduce_similarity.triton.prefix_gradient_kernels import prefix_finish_kernel, prefix_gradient_kernel
from ccu_fast.ops.reduce_similarity.triton.prefix_kernels import (
    prefix_forward_kernel,
    prefix_norms_kernel,
    prefix_online_kernel,
)
from ccu_fast.ops.triton.launch import Launch

FINISH_ROWS = 32
_PACK = 16  # words, to which parts of the stash are aligned


def stash_shape(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[int, ...]:
    """fp32 words of the header and of all inverse norms, which forward needs even if nothing is kept."""
    return (plan.HEADER + (_words(p, p.n) + _words(p, p.m)) * p.unit,)


def _words(p: SimilarityProblem, items: int) -> int:
    return (len(p.prefixes) * items + _PACK - 1) // _PACK * _PACK


def _inverse(p: SimilarityProblem, stash: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Both sides' inverse norms, after the stash's header."""
    if not p.unit:
        return None, None
    of_rows = plan.HEADER + _words(p, p.n)
    return stash[plan.HEADER : of_rows], stash[of_rows:]


class _Prefixes(Pass):
    """What both passes have in common."""

    def __init__(self, p: SimilarityProblem, operands: Operands, device: configs.Device, kernel: str) -> None:
        super().__init__(p, operands, device, _tile(p, device, kernel))
        self.edges = (0, *p.prefixes)
        self.launch = functools.partial(Launch, index=device.index)
        self.rows, self.cols = plan.spec(p, p.rows), plan.spec(p, p.cols)


def _tile(p: SimilarityProblem, device: configs.Device, kernel: str) -> configs.Tile:
    """A tile of steps that end where prefixes do, in which a thread holds few enough similarities.

    In the gradient there are as many G in a tile as prefixes; relations and edges are held beside what is reduced.
    """
    if kernel == "online":
        tile = device.tile(kernel, arithmetic(p), p)
    else:
        tile = device.tile("gradient", arithmetic(p), p)
        sets = len(p.prefixes)
        plain = p.row_labels is None and p.row_ids is None and not (p.n % tile.block_m or p.m % tile.block_n)
        most = (32 if plain and sets <= 4 else 16) if kernel == "forward" else (16 if sets <= 4 else 8)
        rows, columns = tile.block_m, tile.block_n
        while rows * columns > 32 * tile.num_warps * most:
            rows, columns = (rows // 2, columns) if rows > columns else (rows, columns // 2)
        tile = replace(tile, block_m=rows, block_n=columns)
    return replace(tile, block_k=math.gcd(tile.block_k, *p.prefixes))


def forward(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Row results fp32 ``[R, P, N]``, column results fp32 ``[C, P, M]`` and the stash."""
    with configs.on_device(p.x):
        device = configs.device()
        operands = Operands(p, device)
        signature = ("prefixes forward", workspace, p.prefixes, p.unit, operands.signature(p))
        made = device.plans.get(signature) or device.keep(signature, _Forward(p, operands, device, workspace))
        return made(p, operands)


class _Forward(_Prefixes):
    """The launches of a forward pass."""

    def __init__(self, p: SimilarityProblem, operands: Operands, device: configs.Device, workspace: int) -> None:
        super().__init__(p, operands, device, "forward")
        sets, rows, cols = len(p.prefixes), self.rows, self.cols
        grid = plan.rectangles(p, rows * sets, cols * sets, self.tile, device, workspace)
        groups, _, strips, _ = grid
        self.stash = stash_shape(p, workspace, True)
        self.squares = (2, device.bounds)
        self.row_parts, self.col_parts = (len(rows), strips, sets, p.n), (len(cols), groups, sets, p.m)
        self.row_out, self.col_out = (len(rows), sets, p.n), (len(cols), sets, p.m)

        sizes = (p.n, p.m, self.d)
        block = {"BLOCK_M": device.bound_tile[0], "BLOCK_K": device.bound_tile[1]}
        self.norms = self.launch(prefix_norms_kernel, device.bounds, sizes, EDGES=self.edges, **block)
        top = float(TOP - math.ceil(math.log2(max(p.n, p.m))))
        constants = self.constants(p, p.n, rows, cols)
        del constants["WHOLE"]
        constants |= {"EDGES": self.edges, "PROGRAMS": device.bounds}
        self.forward = self.launch(prefix_forward_kernel, groups * strips, (top, *sizes, *grid), **constants)

        online = _tile(p, device, "online")
        blocks = triton.cdiv(p.n, online.block_m) * bool(rows) + triton.cdiv(p.m, online.block_m) * bool(cols)
        self.flags = sets * blocks
        numbers = (sets, p.n, p.m, strips, groups)
        self.merge = self.launch(merge_kernel, self.flags, numbers, ROWS=rows, COLS=cols, BLOCK=online.block_m)
        self.online = None
        if any(entry[0] == 0 for entry in (*rows, *cols)):
            constants = {"EDGES": self.edges, "ROWS": rows, "COLS": cols, "DIAGONAL": p.diagonal}
            constants |= {"MASK_N": p.n % online.block_m != 0, "MASK_M": p.m % online.block_m != 0}
            constants |= {"PRECISION": self.precision, **online.options()}
            self.online = self.launch(prefix_online_kernel, min(blocks, 2 * device.processors), sizes, **constants)

    def __call__(self, p: SimilarityProblem, operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
        new = functools.partial(p.x.new_empty, dtype=torch.float32)
        x, y, keys = operands.x, operands.y, operands.keys[:N_KEYS]
        stash, row_out, col_out = new(self.stash), new(self.row_out), new(self.col_out)
        squares, row_parts, col_parts = new(self.squares), new(self.row_parts), new(self.col_parts)
        inverse = _inverse(p, stash)
        self.norms(x, y, *inverse, squares)
        self.forward(*self.readers(operands), *inverse, squares, p.scale, *keys, row_parts, col_parts, stash)
        flags = p.x.new_empty((self.flags,), dtype=torch.int32)
        self.merge(row_parts, col_parts, row_out, col_out, flags, stash, None)
        if self.online is not None:
            self.online(x, y, *inverse, p.scale, *keys, row_out, col_out, flags, stash)
        else:
            stash[1:2].zero_()
        return row_out, col_out, stash


def backward(
    p: SimilarityProblem, incoming: Incoming, stash: Tensor, needs: Sequence[bool], workspace: int
) -> Gradients:
    """dx and dy like x and y, dscale 0-dim fp32; empty or without a value where not needed. There is no bias."""
    if not any(needs):
        return p.x.new_empty((0,)), p.y.new_empty((0,)), p.scale.new_empty(()), p.scale.new_empty(())
    with configs.on_device(p.x):
        device = configs.device()
        operands = Operands(p, device)
        asked = (workspace, tuple(needs), p.prefixes, p.unit)
        signature = ("prefixes backward", *asked, operands.signature(p, p.x, p.y, *incoming, stash))
        made = device.plans.get(signature) or device.keep(
            signature, _Backward(p, operands, device, tuple(needs), workspace)
        )
        return made(p, operands, incoming, stash)


class _Backward(_Prefixes):
    """The launches of a backward pass, chunk by chunk in one scratch buffer."""

    def __init__(
        self,
        p: SimilarityProblem,
        operands: Operands,
        device: configs.Device,
        needs: tuple[bool, ...],
        workspace: int,
    ) -> None:
        super().__init__(p, operands, device, "gradient")
        self.want_x, self.want_y, self.want_scale, _ = needs
        self.row_sums = self.want_scale or (p.unit and self.want_x)
        self.col_sums = p.unit and self.want_y
        self.missing = -p.m % 16
        self.parts = [slice(a, b) for a, b in zip(self.edges, p.prefixes, strict=False)]
        chunks = plan.chunks(p, self.tile.block_m, workspace // len(p.prefixes), plan.HEADER)
        self.chunks = [_Chunk(self, p, device, chunk) for chunk in chunks]
        self.scratch = max(chunk.size for chunk in self.chunks)
        self.finish_y = self.finisher(p, p.m, 0, p.m)

    def finisher(self, p: SimilarityProblem, items: int, first: int, count: int) -> Launch:
        """What makes the gradient of ``count`` of the items from sums."""
        step = math.gcd(64, *p.prefixes)
        steps = self.edges[-1] // step
        numbers = (items, p.x.shape[2], first, count, steps)
        constants: dict[str, Any] = {"EDGES": self.edges, "BLOCK_M": FINISH_ROWS, "BLOCK_K": step}
        return self.launch(prefix_finish_kernel, steps * triton.cdiv(count, FINISH_ROWS), numbers, **constants)

    def __call__(self, p: SimilarityProblem, operands: Operands, incoming: Incoming, stash: Tensor) -> Gradients:
        whole = self.edges[-1] == p.x.shape[2]
        new = torch.empty_like if whole else torch.zeros_like
        dx = new(p.x) if self.want_x else p.x.new_empty((0,))
        dy = new(p.y) if self.want_y else p.y.new_empty((0,))
        inverse = _inverse(p, stash)
        if self.missing:
            rows, cols, row_out, col_out = incoming
            incoming = rows, pad(cols, (0, self.missing)), row_out, pad(col_out, (0, self.missing))
        scratch = p.x.new_empty((self.scratch,))
        y_total = p.y.new_empty((p.m * self.edges[-1] * self.want_y,), dtype=torch.float32)
        y_sums, scale_terms = None, []
        common = (self.readers(operands), (*inverse, stash, p.scale, *operands.keys[:N_KEYS], *incoming))
        for planned in self.chunks:
            chunk = slice(planned.first, planned.first + planned.rows)
            a, row_sums, col_sums = planned.make(p, common, scratch)
            if self.want_scale:
                scale_terms.append(row_sums.sum(dtype=torch.float64))
            if self.want_x:
                total = self.totals(planned.rows, row_sums)
                for out, of_prefix, part in zip(self.views(total, planned.rows), a, self.parts, strict=True):
                    product(out, of_prefix[None], p.y[..., part], add=False)
                planned.finish(total, p.x, dx, row_sums, inverse[0], p.scale)
            if self.want_y:
                for out, of_prefix, part in zip(self.views(y_total, p.m), a, self.parts, strict=True):
                    product(out, of_prefix.mT[None], p.x[:, chunk, part], add=planned.first > 0)
                y_sums = col_sums if y_sums is None else y_sums.add_(col_sums)
        del a, scratch  # before the last results are allocated
        if self.want_y:
            self.finish_y(y_total, p.y, dy, y_sums, inverse[1], p.scale)
        dscale = functools.reduce(torch.add, scale_terms).float() if scale_terms else p.scale.new_empty(())
        return dx, dy, dscale, p.scale.new_empty(())

    def totals(self, rows: int, like: Tensor) -> Tensor:
        """Room for the sums of some rows, one prefix after the other."""
        return like.new_empty((rows * self.edges[-1],), dtype=torch.float32)

    def views(self, total: Tensor, items: int) -> list[Tensor]:
        """``[1, items, d_q - d_{q-1}]`` for every prefix."""
        return [total[items * part.start : items * part.stop].view(1, items, -1) for part in self.parts]


class _Chunk:
    """The launches that make A of one chunk of rows."""

    def __init__(self, backward: _Backward, p: SimilarityProblem, device: configs.Device, chunk: plan.Chunk) -> None:
        self.first, self.rows, tile, sets = chunk.first, chunk.rows, backward.tile, len(p.prefixes)
        stride, items = configs.row_stride(p.m), p.m + backward.missing
        store = backward.want_x or backward.want_y
        self.shape = (sets, chunk.rows if store else 0, stride)
        self.size = math.prod(self.shape)
        self.columns = p.m
        row_tiles, col_tiles = triton.cdiv(chunk.rows, tile.block_m), triton.cdiv(p.m, tile.block_n)
        self.row_sums = (sets, col_tiles, chunk.rows) if backward.row_sums else (0,)
        self.col_sums = (sets, row_tiles, items) if backward.col_sums else (0,)
        numbers = (p.n, p.m, backward.d, chunk.first, chunk.rows, stride, items)
        constants = backward.constants(p, chunk.rows, backward.rows, backward.cols)
        constants |= {"EDGES": backward.edges, "STORE": store}
        constants |= {"ROW_SUMS": backward.row_sums, "COL_SUMS": backward.col_sums}
        programs = min(row_tiles * col_tiles, 2 * device.processors)
        self.gradient = [
            backward.launch(prefix_gradient_kernel, programs, numbers, AGAIN=again, **constants)
            for again in (False, True)
        ]
        self.finish = backward.finisher(p, p.n, chunk.first, chunk.rows)

    def make(self, p: SimilarityProblem, common: Any, scratch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A ``[P, rows, M]``, and fp32 ``[P, rows]`` and ``[P, M]``, the sums over columns and rows of G∘S/scale."""
        readers, tensors = common
        a = scratch[: self.size].view(self.shape)
        row_sums, col_sums = (scratch.new_empty(size, dtype=torch.float32) for size in (self.row_sums, self.col_sums))
        for launch in self.gradient:
            launch(*readers, *tensors, a, row_sums, col_sums)
        row_sums = row_sums.sum(1) if row_sums.ndim > 1 else row_sums
        col_sums = col_sums.sum(1)[:, : self.columns].contiguous() if col_sums.ndim > 1 else col_sums
        return a[..., : self.columns], row_sums, col_sums
