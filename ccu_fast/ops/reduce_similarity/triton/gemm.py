"""The two library GEMMs between G and the gradients: operands in the inputs' dtype, sums in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast.ops.backend import fp32_sums
from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem
from ccu_fast.ops.reduce_similarity.triton.plan import Chunk


def product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """``out = a @ b`` or ``out += a @ b``, batched, with fp32 sums and an fp32 ``out``."""
    if a.dtype == torch.float32:
        torch.baddbmm(out, a, b, out=out) if add else torch.bmm(a, b, out=out)
    elif a.is_cuda:
        with fp32_sums():
            if add:
                torch.ops.aten.baddbmm.dtype_out(out, a, b, torch.float32, out=out)
            else:
                torch.ops.aten.bmm.dtype_out(a, b, torch.float32, out=out)
    else:
        # The interpreter's CPU tensors: there a half GEMM rounds its result, and fp16 would overflow.
        product(out, a.float(), b.float(), add=add)


def row_gradient(p: SimilarityProblem, g: Tensor, chunk: Chunk, parts: int) -> Tensor:
    """The chunk's share of dX = G Y in fp32, ``[banks, rows, D]``, or ``[parts, rows, D]`` to be summed."""
    part = g.new_empty((parts if parts > 1 else chunk.banks, chunk.rows, p.x.shape[2]), dtype=torch.float32)
    if parts > 1:
        # Slices of the columns are views: one batched GEMM, each of whose sums is as much shorter.
        columns = p.m // parts
        slices = g.as_strided((parts, chunk.rows, columns), (columns, g.shape[2], 1))
        product(part, slices, p.y.view(parts, columns, -1), add=False)
    elif p.y.shape[0] > 1:
        y = p.y if chunk.banks == p.y.shape[0] else p.y[chunk.start : chunk.stop]
        product(part, _columns(g, p.m), y, add=False)
    elif chunk.banks == 1:
        product(part, _columns(g, p.m), p.y, add=False)
    else:
        product(part.view(1, -1, part.shape[2]), _columns(g.view(1, -1, g.shape[2]), p.m), p.y, add=False)
    return part


def add_column_gradient(p: SimilarityProblem, total: Tensor, g: Tensor, chunk: Chunk) -> None:
    """Add the chunk's share of dY = Gᵀ X to ``total``, fp32 like y, in place; the first share overwrites it."""
    if chunk.banks == p.x.shape[0] == p.y.shape[0] and chunk.rows == p.n:  # all there is
        product(total, _columns(g, p.m).mT, p.x, add=False)
        return
    rows = slice(chunk.first, chunk.first + chunk.rows)
    if p.y.shape[0] < p.banks:
        # One y for all: rows of all banks are one long reduction. A chunk is whole banks, or one.
        flat = _columns(g.view(1, -1, g.shape[2]), p.m)
        x = p.x[chunk.start : chunk.stop, rows].reshape(1, -1, p.x.shape[2])
        product(total, flat.mT, x, add=chunk.before > 0)
    else:
        x = p.x[:, rows].expand(chunk.banks, -1, -1) if p.x.shape[0] == 1 else p.x[chunk.start : chunk.stop, rows]
        product(total[chunk.start : chunk.stop], _columns(g, p.m).mT, x, add=chunk.first > 0)


def _columns(g: Tensor, m: int) -> Tensor:
    """G without the padding of its rows."""
    return g if g.shape[-1] == m else g[..., :m]
