"""reduce_similarity on a CPU: torch's GEMM makes chunks of dot = x yᵀ, and C++ does everything between the GEMMs.

The workspace is elastic. The forward pass reduces one chunk after the other and keeps as many as fit. The backward pass
takes the kept chunks as they are and recomputes the others, turns each into G, and multiplies it in two GEMMs. If a
fraction f is kept, both passes take (8 − 2f)·N·M·D FLOPs, 6 at best, against 12 for two cross-entropies over
materialised logits.

Everything is fp32, except on a CPU that multiplies bf16, if the inputs are bf16 or if they are fp32 and
``torch.set_float32_matmul_precision("medium")`` is set. Then all GEMMs are bf16, as under autocast: dot is rounded to
bf16, apart from the pairs (i, i) of a paired problem, the positives, which are recomputed in fp32; and G is rounded
once, after all its terms are added in fp32.

Limits look at a chunk of dot as it is, rounded or not, or at one of the guide, which another GEMM writes beside it:
in bf16 if the guide is bf16 and the CPU multiplies that, else in fp32. A teacher's products are such a guide's, but
in what its log-sum-exps were made in, so that its probabilities add up to one. Where all chunks of dot are kept, so
are those of the guide that still fit; the others are made again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from ccu_fast import _C
from ccu_fast.ops.backend import gemm_dtype
from ccu_fast.ops.native import DTYPES
from ccu_fast.ops.reduce_similarity.native.buffers import SCRATCH, STASH, WORTH_KEEPING, Buffer
from ccu_fast.ops.reduce_similarity.native.guide import Guide, Products, own_dots
from ccu_fast.ops.reduce_similarity.native.keys import narrow, strided
from ccu_fast.ops.reduce_similarity.problem import CODES, Gradients, Incoming, SimilarityProblem

# With fewer pairs than this, another thread costs more than it saves.
SERIAL_PAIRS = 1 << 14
# For every buffer whose address C++ gets: the defaults of the process may be others.
FP32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
# Relations without labels and ids, by whether the pairs (i, i) are SELF.
UNLABELLED = {diagonal: _C.Relations((0, 0), (0, 0), (0, 0), (0, 0), diagonal) for diagonal in (False, True)}
# Codes of row and of column reductions in the form that C++ takes.
reductions = lru_cache(maxsize=64)(_C.Reductions)
# Larger chunks do not make the GEMMs faster.
_LARGEST_CHUNK = SCRATCH.most
_FEWEST_ROWS = 64
_SKINNY_ROWS, _SKINNY_COLUMNS = 512, 1024
# The stash starts with a word that says whether it holds bf16; 64 bytes keep the rest aligned.
_HEADER = 16


@dataclass(frozen=True)
class _Chunk:
    """Some rows of some banks, against all columns.

    Attributes:
        shape: ``[banks, rows, M]`` of the products.
        place: where they lie among the products of all chunks.
        kept: they stay there for the backward pass.
        of_guide: where the guide's stay, behind all others; None: they do not.
    """

    of_banks: slice
    of_rows: slice
    shape: tuple[int, int, int]
    place: slice
    kept: bool
    of_guide: slice | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def rows_of(self, results: Tensor) -> int:
        """Where the chunk's rows start in ``[R, B, N]``."""
        if not (self.of_banks.start or self.of_rows.start):  # a view costs more than a small problem's arithmetic
            return results.data_ptr()
        return results[:, self.of_banks, self.of_rows].data_ptr()

    def cols_of(self, results: Tensor) -> int:
        """Where the chunk's banks start in ``[C, B, M]``."""
        return results[:, self.of_banks].data_ptr() if self.of_banks.start else results.data_ptr()


def scratch_bytes(workspace: int) -> int:
    """Bytes of a chunk: a quarter of the workspace at most."""
    return min(workspace // 4, _LARGEST_CHUNK)


def even_rows(n: int, most: int, fewest: int) -> int:
    """Rows of a chunk, a multiple of ``fewest``: chunks of few rows cost almost as much as others, so all are alike."""
    chunks = math.ceil(n / max(fewest, most // fewest * fewest))
    return math.ceil(n / chunks / fewest) * fewest


def _sizes(p: SimilarityProblem) -> tuple[int, int, int]:
    """Banks, N and M in one call: a small problem feels those of its properties."""
    return p.y.shape[0] if p.x.shape[0] == 1 else p.x.shape[0], p.x.shape[1], p.y.shape[1]


@lru_cache(maxsize=64)
def _cut(
    banks: int, n: int, m: int, workspace: int, stash: int, dtype: torch.dtype, guided: torch.dtype | None
) -> list[_Chunk]:
    """The chunks in order, of which the first are kept: as many as fit into the ``stash``, which is in words."""
    scratch = scratch_bytes(workspace) // (dtype.itemsize + (0 if guided is None else guided.itemsize))
    group, rows = 1, n
    if n * m <= scratch or n <= _FEWEST_ROWS:
        group = max(1, scratch // (n * m))
    else:
        rows = even_rows(n, scratch // m, _FEWEST_ROWS)
    room = (stash - _HEADER) * 4 // dtype.itemsize
    chunks: list[_Chunk] = []
    end = 0
    for b in range(0, banks, group):
        for i in range(0, n, rows):
            shape = min(group, banks - b), min(rows, n - i), m
            start, end = end, end + math.prod(shape)
            of_banks, of_rows = slice(b, b + shape[0]), slice(i, i + shape[1])
            chunks.append(_Chunk(of_banks, of_rows, shape, slice(start, end), end <= room))
    if guided != dtype or end > room:
        return chunks
    behind = [slice(end + chunk.place.start, end + chunk.place.stop) for chunk in chunks]
    return [replace(c, of_guide=place if place.stop <= room else None) for c, place in zip(chunks, behind, strict=True)]


def stash_shape(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[int, ...]:
    """Shape of what forward keeps for backward: what the scratch leaves of the workspace, and one chunk at least.

    The sizes may be symbols of a compiled graph. The formula has no branch on them, so one graph serves all sizes; nor
    does it depend on a setting that may change before the graph runs. fp32 inputs in bf16 GEMMs use half of it.
    """
    if not keep:
        return (0,)
    dtype = torch.float32 if p.x.dtype != torch.bfloat16 else gemm_dtype(torch.bfloat16)
    banks, n, m = _sizes(p)
    all_pairs, fewest = banks * n * m, _FEWEST_ROWS * m
    # For symbols only torch's minimum avoids a branch; for numbers it costs as much as a small problem's arithmetic.
    least, most = (min, max) if isinstance(all_pairs, int) else (torch.sym_min, torch.sym_max)
    if p.guide_x is not None and gemm_dtype(p.guide_x.dtype, settings=False) == dtype:
        all_pairs = 2 * all_pairs  # the guide's too
    pairs = least(all_pairs, most((workspace - scratch_bytes(workspace)) // dtype.itemsize, fewest))
    return (_HEADER + (pairs * dtype.itemsize + 3) // 4,)


def _guide_dtype(p: SimilarityProblem) -> torch.dtype | None:
    """What the GEMM of the guide multiplies: no setting changes it unless it is a teacher. None without a guide."""
    return None if p.guide_x is None else gemm_dtype(p.guide_x.dtype, settings=p.teacher_scale is not None)


class Operands:
    """x and y in the dtype of the GEMMs, labels and ids in int32, scale and bias as numbers of the host.

    Args:
        codes: reductions of rows. Default: all that the problem asks for, of rows and of columns.
    """

    def __init__(self, p: SimilarityProblem, dtype: torch.dtype, codes: tuple[int, ...] | None = None) -> None:
        self.p, self.dtype = p, dtype
        self.self_dot: Tensor | None = None
        if dtype == torch.bfloat16 and p.diagonal:
            self.self_dot = own_dots(p.x, p.y).expand(p.banks, -1)
        self.scale = float(p.scale)
        self.bias = 0.0 if p.bias is None else float(p.bias)
        self.row_labels = self.col_labels = self.row_ids = self.col_ids = None
        if p.row_labels is not None and p.col_labels is not None:
            self.row_labels, self.col_labels = narrow(p.row_labels, p.col_labels)
        if p.row_ids is not None and p.col_ids is not None:
            self.row_ids, self.col_ids = narrow(p.row_ids, p.col_ids)
        self.reductions = reductions(p.rows, p.cols) if codes is None else reductions(codes, ())
        self.unlimited = p.row_limits is None and p.col_limits is None  # no property: a small problem feels it
        self.threads = torch.get_num_threads() if math.prod(_sizes(p)) > SERIAL_PAIRS else 1

    @cached_property
    def x(self) -> Tensor:
        return self.p.x.to(self.dtype)

    @cached_property
    def y(self) -> Tensor:
        return self.p.y.to(self.dtype)

    def tile(
        self,
        dot: Tensor,
        banks: slice,
        rows: slice,
        cols: slice = slice(0, None),
        guide: Products | None = None,
        limits_of: slice | None = None,
        factors: tuple[int, int] = (0, 0),
    ) -> _C.Tile:
        """What C++ has to know about a part of S whose products are ``dot``, ``[banks, rows, cols]``.

        ``guide`` are those of the guide, in the same shape. Limits are those of the banks, or of ``limits_of``.
        """
        # self holds it until the next tile, because C++ reads it through an address.
        self.own = None if self.self_dot is None else self.self_dot[banks, rows].contiguous()
        return _C.Tile(
            dot=(dot.data_ptr(), DTYPES[dot.dtype]),
            self_dot=0 if self.own is None else self.own.data_ptr(),
            shape=dot.shape,
            row0=rows.start - cols.start,  # row i and column j of the part are the same item if row0 + i == j
            scale=self.scale,
            bias=self.bias,
            relations=self._relations(banks, rows, cols),
            reductions=self.reductions,
            threads=self.threads,
            limits=None if self.unlimited else self._limits(limits_of or banks, rows, cols, guide),
            factors=factors,
        )

    def _limits(self, banks: slice, rows: slice, cols: slice, guide: Products | None) -> _C.Limits:
        self.guide = guide  # as tile does for its own
        teacher = None
        if guide is not None and self.p.teacher_scale is not None:
            teacher = float(self.p.teacher_scale), 0 if guide.own is None else guide.own.data_ptr()
        return _C.Limits(
            rows=strided(self.p.row_limits, banks, rows),
            cols=strided(self.p.col_limits, banks, cols),
            guide=(0, 0) if guide is None else (guide.dot.data_ptr(), DTYPES[guide.dot.dtype]),
            teacher=teacher,
        )

    def _relations(self, banks: slice, rows: slice, cols: slice) -> _C.Relations:
        if self.row_labels is None and self.row_ids is None:
            return UNLABELLED[self.p.diagonal]
        return _C.Relations(
            row_labels=strided(self.row_labels, banks, rows),
            col_labels=strided(self.col_labels, banks, cols),
            row_ids=strided(self.row_ids, banks, rows),
            col_ids=strided(self.col_ids, banks, cols),
            diagonal=self.p.diagonal,
        )


def of_banks(t: Tensor, banks: slice) -> Tensor:
    """The part that belongs to some banks; the whole if all banks share one."""
    return t if t.shape[0] == 1 else t[banks]


def _dot(x: Tensor, y: Tensor, chunk: _Chunk, out: Tensor) -> Tensor:
    """x yᵀ of one chunk, ``[banks, rows, M]``, written to the flat buffer ``out``."""
    banks, _, m = chunk.shape
    dot = out[: chunk.size].view(chunk.shape)
    x = of_banks(x, chunk.of_banks)[:, chunk.of_rows]
    if y.shape[0] == 1 and x.shape[0] == banks:
        # With few rows and many columns, the GEMM is up to 1.4 times as fast in blocks of columns that stay in the L2
        # cache as in one piece.
        rows, flat = x.reshape(-1, x.shape[-1]), dot.view(-1, m)
        width = m if rows.shape[0] > _SKINNY_ROWS else _SKINNY_COLUMNS
        for j in range(0, m, width):
            torch.mm(rows, y[0, j : j + width].T, out=flat[:, j : j + width])
    else:
        # Of a guide both sides may be shared by all banks.
        torch.bmm(x.expand(banks, -1, -1), of_banks(y, chunk.of_banks).mT.expand(banks, -1, -1), out=dot)
    return dot


def _lent(buffer: Buffer, size: int, dtype: torch.dtype) -> Tensor:
    large = size * dtype.itemsize >= WORTH_KEEPING  # asked here: a small problem would feel the call
    return buffer.borrow(size, dtype) if large else torch.empty(size, dtype=dtype, device="cpu")


def _guide(p: SimilarityProblem, dtype: torch.dtype | None, chunks: list[_Chunk]) -> Guide | None:
    if p.guide_x is None or p.guide_y is None or dtype is None:
        return None
    most = max(0 if chunk.of_guide else chunk.size for chunk in chunks)
    return Guide(p.guide_x, p.guide_y, p, dtype, most)


def _beside(guide: Guide | None, chunk: _Chunk, kept: Tensor, *, made: bool = False) -> Products | None:
    """The guide's products of a chunk, which stay for the backward pass, where they are ``made``, if there is room."""
    if guide is None:
        return None
    if made and chunk.of_guide:
        dot = kept[chunk.of_guide].view(chunk.shape)
    else:
        dot = _dot(guide.x, guide.y, chunk, kept[chunk.of_guide] if chunk.of_guide else guide.scratch)
    return guide.beside(dot, chunk.of_banks, chunk.of_rows)


def forward(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Row results ``[R, B, N]``, column results ``[C, B, M]`` and the kept chunks, flat."""
    dtype = gemm_dtype(p.x.dtype)
    banks, n, m = _sizes(p)
    size = stash_shape(p, workspace, keep)[0]
    guided = _guide_dtype(p)
    chunks = _cut(banks, n, m, workspace, size, dtype, guided)
    native, guide = Operands(p, dtype), _guide(p, guided, chunks)
    stash = _lent(STASH, size, torch.float32)
    stash[:_HEADER].fill_(dtype == torch.bfloat16)
    if guided is not None:
        stash[1:2] = guided == torch.bfloat16
    # The part that no chunk fills must also be the same every time (except the half that bf16 GEMMs of fp32 inputs
    # leave unused).
    kept = stash[_HEADER:].view(dtype)
    filled = sum(chunk.size * (1 if chunk.of_guide is None else 2) for chunk in chunks if chunk.kept)
    largest = max(chunk.size for chunk in chunks)
    if filled < kept.numel():
        kept[filled : filled + largest if guided is None else None] = 0
    scratch = _lent(SCRATCH, 0 if chunks[-1].kept else largest, dtype)
    row_out = torch.empty(len(p.rows), banks, n, **FP32)
    col_max = torch.full((len(p.cols), banks, m), -torch.inf, **FP32)
    col_sum = torch.zeros(len(p.cols), banks, m, dtype=torch.float64, device="cpu")
    for chunk in chunks:
        dot = _dot(native.x, native.y, chunk, kept[chunk.place] if chunk.kept else scratch)
        _C.similarity_forward(
            native.tile(dot, chunk.of_banks, chunk.of_rows, guide=_beside(guide, chunk, kept)),
            (chunk.rows_of(row_out), row_out.stride(0), row_out.stride(1)),
            (chunk.cols_of(col_max), chunk.cols_of(col_sum), col_max.stride(0)),
        )
    return row_out, column_results(p, col_max, col_sum), stash


def column_results(p: SimilarityProblem, peaks: Tensor, sums: Tensor) -> Tensor:
    """What C++ has left of the columns, all chunks together, as results."""
    results = torch.empty_like(peaks)
    for c, code in enumerate(p.cols):
        is_lse = code - code % 8 == CODES["lse"]
        results[c] = peaks[c] + sums[c].log() if is_lse else sums[c]
    return results


def backward(
    p: SimilarityProblem, incoming: Incoming, stash: Tensor, needs: Sequence[bool], workspace: int
) -> Gradients:
    """Gradients of x, y, scale and bias; those not in ``needs`` are empty or zero.

    An empty stash says that nothing was kept. The results in ``incoming`` may then be those of a larger problem of
    which this one is a block: E is relative to them.
    """
    grad_rows, grad_cols, row_out, col_out = incoming
    # The choice of the forward pass, even if the precision setting has changed since.
    dtype = (torch.bfloat16 if float(stash[0]) else torch.float32) if stash.numel() else gemm_dtype(p.x.dtype)
    guided = _guide_dtype(p)
    if guided is not None and stash.numel():
        guided = torch.bfloat16 if float(stash[1]) else torch.float32
    banks, n, m = _sizes(p)
    chunks = _cut(banks, n, m, workspace, stash.numel(), dtype, guided)
    native, guide = Operands(p, dtype), _guide(p, guided, chunks)
    dx, dy = Sum(p.x, needs[0]), Sum(p.y, needs[1])
    kept = stash[_HEADER:].view(dtype)
    scratch = _lent(SCRATCH, max(chunk.size for chunk in chunks), dtype)
    scale_sum = bias_sum = 0.0
    for chunk in chunks:
        dot = kept[chunk.place].view(chunk.shape) if chunk.kept else _dot(native.x, native.y, chunk, scratch)
        grad = scratch[: dot.numel()].view(dot.shape)
        sums = torch.empty(2, dot.shape[0] * dot.shape[1], dtype=torch.float64, device="cpu")
        _C.similarity_backward(
            native.tile(dot, chunk.of_banks, chunk.of_rows, guide=_beside(guide, chunk, kept, made=True)),
            (chunk.rows_of(grad_rows), chunk.rows_of(row_out), row_out.stride(0), row_out.stride(1)),
            (chunk.cols_of(grad_cols), chunk.cols_of(col_out), col_out.stride(0)),
            (grad.data_ptr(), DTYPES[dtype]),
            (sums[0].data_ptr(), sums[1].data_ptr()),
        )
        for_scale, for_bias = sums.sum(1).tolist() if any(needs[2:]) else (0.0, 0.0)
        scale_sum += for_scale
        bias_sum += for_bias
        if needs[0]:
            dx.add(chunk.of_banks, chunk.of_rows, grad, of_banks(native.y, chunk.of_banks))
        if needs[1]:
            dy.add(chunk.of_banks, slice(None), grad.mT, of_banks(native.x, chunk.of_banks)[:, chunk.of_rows])
    return dx.total.to(p.x.dtype), dy.total.to(p.y.dtype), in_fp32(scale_sum), in_fp32(bias_sum)


def in_fp32(value: float) -> Tensor:
    """A number as a tensor, and inf where fp32 ends."""
    return torch.full((), value, dtype=torch.float64, device="cpu").float()


class Sum:
    """The gradient of x or y in fp32: a sum of products over chunks and, where one bank serves all, over banks."""

    def __init__(self, like: Tensor, wanted: bool) -> None:
        self.total = torch.empty(like.shape if wanted else (0,), **FP32)
        self.begun: set[tuple[int, int, int]] = set()  # bank, first row and first column of what holds a product

    def add(self, banks: slice, rows: slice, left: Tensor, right: Tensor, columns: slice = slice(0, None)) -> None:
        """total[banks, rows, columns] += left @ right."""
        out = of_banks(self.total, banks)[:, rows, columns]
        first_bank = 0 if self.total.shape[0] == 1 else banks.start
        if out.shape[0] == 1 and left.shape[0] > 1 and left.mT.is_contiguous():
            # The sum over banks of Gᵀ X is one product, of all their rows.
            left, right = left.mT.reshape(1, -1, left.shape[1]).mT, right.reshape(1, -1, right.shape[2])
        elif out.shape[0] > 1 and right.shape[0] == 1 and left.is_contiguous() and out.is_contiguous():
            # Nor do banks matter if all are multiplied from the right by the same matrix.
            left, out = left.reshape(1, -1, left.shape[2]), out.view(1, -1, out.shape[2])
        for b in range(left.shape[0]):
            slot, factor = out[b % out.shape[0]], right[b % right.shape[0]]
            at = first_bank + b % out.shape[0], rows.start or 0, columns.start
            once = at not in self.begun
            self.begun.add(at)
            if left.dtype != torch.float32:
                (slot.copy_ if once else slot.add_)(torch.mm(left[b], factor))
            elif once:
                torch.mm(left[b], factor, out=slot)
            else:
                slot.addmm_(left[b], factor)
