"""reduce_similarity of all prefixes of x and y at once on a CPU: their products are one product's partial sums.

With prefixes of d₁ < d₂ < … dimensions, and X_k the columns d_{k−1} to d_k of x,

    dot_k = dot_{k−1} + X_k Y_kᵀ                        forward: products of d_P dimensions in all
    H_k   = H_{k+1} + scale · G_k                       backward, from the longest prefix to the shortest
    dX_k  = H_k Y_k,  dY_k = H_kᵀ X_k                   two such products in all

so that 6·N·M·d_P FLOPs serve all prefixes, if all dot_k are kept, and what is left for each of them is to reduce N·M
similarities: in the forward pass C++ adds a block of X_k Y_kᵀ to what the L1 cache has of dot_{k−1}. A loop over the
prefixes multiplies Σ d_k dimensions instead.

Prefixes that are made unit vectors have S_k = scale · dot_k · r_k c_kᵀ, with their inverse norms r_k and c_k. C++ takes
these as factors, and gives back q_k, the row and column sums of G_k ∘ dot_k ∘ r_k c_kᵀ: r_k = 1/‖x[:d_k]‖ adds
−scale · q_k r_k² x[:d_k] to the gradient of x, and this sum over k telescopes as well.

The GEMMs are fp32: where a CPU multiplies bf16, partial sums would be rounded at each prefix, and a loop is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ccu_fast import _C
from ccu_fast.ops.backend import gemm_dtype
from ccu_fast.ops.l2_normalize.api import EPS
from ccu_fast.ops.native import DTYPES
from ccu_fast.ops.reduce_similarity.native.buffers import SCRATCH, STASH
from ccu_fast.ops.reduce_similarity.native.chunks import (
    FP32,
    Operands,
    Sum,
    column_results,
    even_rows,
    in_fp32,
    of_banks,
    scratch_bytes,
)
from ccu_fast.ops.reduce_similarity.native.guide import Products
from ccu_fast.ops.reduce_similarity.problem import Gradients, Incoming, SimilarityProblem

_FEWEST_ROWS = 16


class _Chunk(NamedTuple):
    """Some rows of one bank against all columns.

    Attributes:
        shape: ``[P, rows, M]`` of the products.
        place: where the products of all prefixes lie among those that are kept; None: they are not.
    """

    bank: int
    rows: slice
    shape: tuple[int, int, int]
    place: slice | None


def serves(dtype: torch.dtype) -> bool:
    """Whether the products are exact enough to be added up prefix by prefix."""
    return gemm_dtype(dtype) == torch.float32


def stash_shape(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[int, ...]:
    """Shape of the products that forward keeps for backward: what the scratch leaves of the workspace."""
    if not keep:
        return (0,)
    every = p.sets * p.n * p.m
    room = max(workspace - scratch_bytes(workspace), 0) // 4
    return (min(every, room) if isinstance(every, int) else torch.sym_min(every, room),)


def _chunks(p: SimilarityProblem, workspace: int, stash: int) -> list[_Chunk]:
    pairs = len(p.prefixes) * p.m
    # Of a chunk that is not kept the products of all prefixes are made again at once; else H, and the guide's, are all.
    at_a_time = p.m * (1 + (p.guide_x is not None)) + (0 if stash >= p.sets * p.n * p.m else pairs)
    rows = even_rows(p.n, scratch_bytes(workspace) // 4 // at_a_time, _FEWEST_ROWS)
    chunks: list[_Chunk] = []
    end = 0
    for bank in range(p.banks):
        for first in range(0, p.n, rows):
            last = min(first + rows, p.n)
            start, end = end, end + (last - first) * pairs
            place = slice(start, end) if end <= stash else None
            chunks.append(_Chunk(bank, slice(first, last), (len(p.prefixes), last - first, p.m), place))
    return chunks


class _Memory:
    """Where the products of a chunk lie, and H."""

    def __init__(self, chunks: list[_Chunk], stash: Tensor, *, backward: bool) -> None:
        self.stash = stash
        prefixes, rows, m = chunks[0].shape
        self.pairs = rows * m if backward else 0
        unkept = chunks[-1].place is None
        self.scratch = SCRATCH.borrow(self.pairs + (prefixes * rows * m if unkept else 0))

    def dots(self, chunk: _Chunk) -> Tensor:
        """``[P, rows, M]``."""
        if chunk.place is not None:
            return self.stash[chunk.place].view(chunk.shape)
        return self.scratch[self.pairs :][: math.prod(chunk.shape)].view(chunk.shape)

    def grad(self, chunk: _Chunk) -> Tensor:
        """``[rows, M]``."""
        return self.scratch[: chunk.shape[1] * chunk.shape[2]].view(chunk.shape[1:])


class _Prefixes(Operands):
    """The operands, cut into what each prefix adds, and the inverse norms of prefixes."""

    def __init__(self, p: SimilarityProblem) -> None:
        super().__init__(p, torch.float32)
        self.parts = [slice(a, b) for a, b in zip((0, *p.prefixes[:-1]), p.prefixes, strict=True)]
        self.inverse = [_inverse_norms(t, self.parts) for t in (self.x, self.y)] if p.unit else []
        if p.guide_x is not None and p.guide_y is not None:
            self.guides = p.guide_x.float(), p.guide_y.float()

    def products(self, chunk: _Chunk, k: int, out: Tensor) -> None:
        """Writes X_k Y_kᵀ, to which dot_{k−1} is yet to be added."""
        x, y = self.rows_of(self.x, chunk)[:, self.parts[k]], _of(self.y, chunk.bank)[:, self.parts[k]].T
        torch.mm(x, y, out=out)

    def guided(self, chunk: _Chunk) -> Products | None:
        """The guide's products, which all prefixes share."""
        if self.p.guide_x is None:
            return None
        return Products(torch.mm(self.rows_of(self.guides[0], chunk), _of(self.guides[1], chunk.bank).T), None)

    @staticmethod
    def rows_of(t: Tensor, chunk: _Chunk) -> Tensor:
        return _of(t, chunk.bank)[chunk.rows]

    def tile_of(self, chunk: _Chunk, k: int, dots: Tensor, guide: Products | None) -> _C.Tile:
        """As :meth:`tile`, of one prefix, whose limits are those of a bank."""
        factors = (0, 0)
        if self.p.unit:
            rows, cols = (_of(t[k], chunk.bank) for t in self.inverse)
            factors = rows[chunk.rows].data_ptr(), cols.data_ptr()
        bank = slice(chunk.bank, chunk.bank + 1)
        limits_of = slice(self.set_of(chunk, k), self.set_of(chunk, k) + 1)
        return self.tile(dots[k : k + 1], bank, chunk.rows, guide=guide, limits_of=limits_of, factors=factors)

    def set_of(self, chunk: _Chunk, k: int) -> int:
        """Which of the results are those of a prefix and a bank."""
        return k * self.p.banks + chunk.bank

    def squares(self, side: int, chunk: _Chunk) -> Tensor:
        """Squared inverse norms ``[P, items]`` of x (0) or y (1), zero for those that EPS has replaced: no gradient."""
        inverse = self.inverse[side]
        found = torch.stack([_of(inverse[k], chunk.bank) for k in range(len(self.parts))])
        return torch.where(found < 1 / EPS, found.double().square(), 0)


def _inverse_norms(t: Tensor, parts: list[slice]) -> Tensor:
    """Of all prefixes of ``[B, N, D]``: ``[P, B, N]``."""
    squares = [torch.linalg.vector_norm(t[..., part], dim=-1).double().square() for part in parts]
    return torch.stack(squares).cumsum(0).sqrt().clamp(min=EPS).reciprocal().float()


def _of(t: Tensor, bank: int) -> Tensor:
    """One bank; the whole if all banks share one."""
    return t[0] if t.shape[0] == 1 else t[bank]


def forward(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Row results ``[R, P·B, N]``, column results ``[C, P·B, M]``, prefix by prefix, and the kept products, flat."""
    size = stash_shape(p, workspace, keep)[0]
    stash = STASH.borrow(size)
    native = _Prefixes(p)
    row_out = torch.empty(len(p.rows), p.sets, p.n, **FP32)
    col_max = torch.full((len(p.cols), p.sets, p.m), -torch.inf, **FP32)
    col_sum = torch.zeros(len(p.cols), p.sets, p.m, dtype=torch.float64, device="cpu")
    chunks = _chunks(p, workspace, size)
    memory, filled = _Memory(chunks, stash, backward=False), 0
    for chunk in chunks:
        guide, dots = native.guided(chunk), memory.dots(chunk)
        filled = filled if chunk.place is None else chunk.place.stop
        each = []
        for k in range(len(p.prefixes)):
            native.products(chunk, k, dots[k])
            at = slice(native.set_of(chunk, k), None)
            rows = row_out[:, at, chunk.rows].data_ptr(), row_out.stride(0), row_out.stride(1)
            cols = col_max[:, at].data_ptr(), col_sum[:, at].data_ptr(), col_max.stride(0)
            each.append((native.tile_of(chunk, k, dots, guide), rows, cols))
        _C.similarity_forward_prefixes(each)
    stash[filled:] = 0  # the same bits every time
    return row_out, column_results(p, col_max, col_sum), stash


def backward(
    p: SimilarityProblem, incoming: Incoming, stash: Tensor, needs: Sequence[bool], workspace: int
) -> Gradients:
    """Gradients of x, y, scale and bias; those not in ``needs`` are empty or zero."""
    grad_rows, grad_cols, row_out, col_out = incoming
    native, last = _Prefixes(p), len(p.prefixes) - 1
    dx, dy = Sum(p.x, needs[0]), Sum(p.y, needs[1])
    for grads in (dx, dy):
        grads.total[..., p.prefixes[-1] :] = 0
    chunks = _chunks(p, workspace, stash.numel())
    memory = _Memory(chunks, stash, backward=True)
    col_sums = torch.zeros(p.banks, len(p.prefixes), p.m, dtype=torch.float64, device="cpu")
    scale_sum = bias_sum = 0.0
    for chunk in chunks:
        dots, grad, guide = memory.dots(chunk), memory.grad(chunk), native.guided(chunk)
        bank = slice(chunk.bank, chunk.bank + 1)
        for k in range(0 if chunk.place is not None else last + 1):
            native.products(chunk, k, dots[k])
            if k > 0:
                dots[k] += dots[k - 1]
        sums = torch.empty(last + 1, 2, chunk.shape[1], dtype=torch.float64, device="cpu")
        for k in range(last, -1, -1):
            at, part = slice(native.set_of(chunk, k), None), native.parts[k]
            _C.similarity_backward(
                native.tile_of(chunk, k, dots, guide),
                (
                    grad_rows[:, at, chunk.rows].data_ptr(),
                    row_out[:, at, chunk.rows].data_ptr(),
                    row_out.stride(0),
                    row_out.stride(1),
                ),
                (grad_cols[:, at].data_ptr(), col_out[:, at].data_ptr(), col_out.stride(0)),
                (grad.data_ptr(), DTYPES[torch.float32]),
                (sums[k, 0].data_ptr(), sums[k, 1].data_ptr()),
                add=k < last,
                col_sums=col_sums[chunk.bank, k].data_ptr() if p.unit and needs[1] else 0,
            )
            if needs[0]:
                dx.add(bank, chunk.rows, grad[None], of_banks(native.y, bank)[..., part], part)
            if needs[1]:
                dy.add(bank, slice(None), grad.T[None], of_banks(native.x, bank)[:, chunk.rows, part], part)
        for_scale, for_bias = sums.sum((0, 2)).tolist()
        scale_sum += for_scale
        bias_sum += for_bias
        if needs[0] and p.unit:
            factors = native.squares(0, chunk)[:, chunk.rows]
            _through_norms(
                native, native.rows_of(dx.total, chunk), native.rows_of(native.x, chunk), sums[:, 0], factors
            )
        if needs[1] and p.unit and chunk.rows.stop == p.n:
            factors = native.squares(1, chunk)
            _through_norms(native, _of(dy.total, chunk.bank), _of(native.y, chunk.bank), col_sums[chunk.bank], factors)
    return dx.total.to(p.x.dtype), dy.total.to(p.y.dtype), in_fp32(scale_sum), in_fp32(bias_sum)


def _through_norms(native: _Prefixes, total: Tensor, items: Tensor, sums: Tensor, squares: Tensor) -> None:
    """Adds to the gradient of ``items`` what goes through the inverse norms of their prefixes."""
    share = torch.zeros(len(items), dtype=torch.float64, device="cpu")
    for k in range(len(native.parts) - 1, -1, -1):
        share = share + native.scale * sums[k] * squares[k]
        part = native.parts[k]
        total[:, part].addcmul_(items[:, part], share[:, None].float(), value=-1)
