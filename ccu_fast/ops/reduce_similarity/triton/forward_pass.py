"""reduce_similarity on a GPU, forward: what is launched, in which order, with how much memory.

The arithmetic is in :mod:`.forward_kernels`, all sizes are chosen in :mod:`.plan`. Nothing here waits for the GPU:
scale, bias and the bound stay on the device.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch import Tensor

from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem
from ccu_fast.ops.reduce_similarity.triton import configs, plan
from ccu_fast.ops.reduce_similarity.triton.arguments import Operands, Pass, arithmetic
from ccu_fast.ops.reduce_similarity.triton.forward_kernels import (
    bound_kernel,
    forward_kernel,
    merge_kernel,
    online_kernel,
    own_kernel,
)
from ccu_fast.ops.triton.launch import Launch

# e is at most 2^TOP / max(N, M): no sum of it overflows, and exp2(shift − lse) is still a normal number.
TOP = 120


def forward(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Row results fp32 ``[R, B, N]``, column results fp32 ``[C, B, M]`` and the stash."""
    with configs.on_device(p.x):
        device = configs.device()
        operands = Operands(p, device)
        signature = ("forward", workspace, keep, operands.signature(p))
        made = device.plans.get(signature) or device.keep(signature, _Forward(p, operands, device, workspace, keep))
        return made(p, operands)


class _Forward(Pass):
    """The launches of a forward pass."""

    def __init__(
        self, p: SimilarityProblem, operands: Operands, device: configs.Device, workspace: int, keep: bool
    ) -> None:
        super().__init__(p, operands, device, device.tile("forward", arithmetic(p), p))
        launch = functools.partial(Launch, index=device.index)
        rows, own_rows = plan.without_own(p, plan.spec(p, p.rows))
        cols, own_cols = plan.without_own(p, plan.spec(p, p.cols))
        grid = plan.rectangles(p, rows, cols, self.tile, device, workspace)
        groups, _, strips, _ = grid
        self.stash = plan.stash_shape(p, workspace, keep)
        self.squares = (2, device.bounds)
        self.row_parts = (len(rows), strips, p.banks, p.n)
        self.col_parts = (len(cols), groups, p.banks, p.m)
        self.row_out, self.col_out = (len(p.rows), p.banks, p.n), (len(p.cols), p.banks, p.m)
        self.own = self.bound = self.forward = self.merge = self.online = None

        sizes = (p.n, p.m, self.d, p.banks, *self.strides)
        bound_block = {"BLOCK_M": device.bound_tile[0], "BLOCK_K": device.bound_tile[1]}
        if own_rows or own_cols:
            programs = p.banks * triton.cdiv(max(p.n, p.m), device.bound_tile[0])
            self.own = launch(own_kernel, programs, sizes[:8], ROWS=own_rows, COLS=own_cols, **bound_block)
        if not rows and not cols:
            return
        items = (p.x.shape[0] * p.n, p.y.shape[0] * p.m)
        self.bound = launch(bound_kernel, device.bounds, (*items, self.d), **bound_block)

        gradient = device.tile("gradient", self.arithmetic, p)
        whole = plan.chunks(p, gradient.block_m, workspace, int(self.stash[0]))
        kept_rows = sum(chunk.banks * chunk.rows for chunk in whole if chunk.kept)
        top = float(TOP - math.ceil(math.log2(max(p.n, p.m))))
        numbers = (top, *sizes, *grid, kept_rows, configs.row_stride(p.m))
        constants = self.constants(p, p.n, rows, cols)
        constants |= {"PROGRAMS": device.bounds, "KEEP": kept_rows > 0}
        self.forward = launch(forward_kernel, p.banks * groups * strips, numbers, **constants)

        online = device.tile("online", self.arithmetic, p)
        block = online.block_m
        self.blocks = p.banks * (triton.cdiv(p.n, block) * bool(rows) + triton.cdiv(p.m, block) * bool(cols))
        numbers = (p.banks, p.n, p.m, strips, groups)
        self.merge = launch(merge_kernel, self.blocks, numbers, ROWS=rows, COLS=cols, BLOCK=block)
        if any(entry[0] == 0 for entry in (*rows, *cols)):
            constants = {"ROWS": rows, "COLS": cols, "DIAGONAL": p.diagonal, "PRECISION": self.precision}
            constants |= {"MASK_N": p.n % block != 0, "MASK_M": p.m % block != 0}
            constants |= {"MASK_K": self.d % online.block_k != 0, **online.options()}
            self.online = launch(online_kernel, min(self.blocks, 2 * device.processors), sizes, **constants)

    def __call__(self, p: SimilarityProblem, operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
        new = functools.partial(p.x.new_empty, dtype=torch.float32)
        x, y, names = operands.x, operands.y, operands.keys
        stash, row_out, col_out = new(self.stash), new(self.row_out), new(self.col_out)
        if self.own is not None:
            self.own(x, y, p.scale, p.bias, *names[:2], row_out, col_out)
        if self.bound is None or self.forward is None or self.merge is None:
            return row_out, col_out, stash.zero_()
        squares, row_parts, col_parts = new(self.squares), new(self.row_parts), new(self.col_parts)
        self.bound(x, y, squares)
        kept = plan.kept(p, stash)
        self.forward(*self.readers(operands), squares, p.scale, p.bias, *names, row_parts, col_parts, stash, kept)
        flags = p.x.new_empty((self.blocks,), dtype=torch.int32)
        self.merge(row_parts, col_parts, row_out, col_out, flags, stash, p.bias)
        if self.online is not None:
            self.online(x, y, p.scale, p.bias, *names, row_out, col_out, flags, stash)
        else:
            stash[1:2].zero_()
        return row_out, col_out, stash
