"""reduce_similarity on a GPU: what is launched, in which order, with how much memory.

The arithmetic is in :mod:`.similarity_kernels`. Nothing here waits for the GPU: scale, bias and the range of the
gradients stay on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ccu_fast.backends.problem import SimilarityProblem
from ccu_fast.backends.triton import configs
from ccu_fast.backends.triton.similarity_kernels import forward_kernel, gradient_kernel, merge_kernel
from ccu_fast.relations import ALL, OTHER, SAME, SELF

Spec = tuple[tuple[int, int, int], ...]

RECTANGLES_PER_PROCESSOR = 8
MERGE_BLOCK = 256
# fp16 gradients are stored times a power of two that brings the largest possible one below 2^14: a factor 2 under
# fp16's largest for each of rows and columns, and 2^28 above its smallest normal number.
HALF_EXPONENT = 14


def stash_shape(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[int, ...]:
    """Nothing is kept: the backward pass computes S again, chunk by chunk."""
    return (0,)


def forward(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Row results fp32 ``[R, B, N]``, column results fp32 ``[C, B, M]`` and an empty stash."""
    with _on(p.x):
        device = configs.device()
        arithmetic = configs.arithmetic(p.x.dtype)
        keys = _keys(p)
        tile = device.tile("forward", arithmetic, p)
        rows, cols = _spec(p, p.rows), _spec(p, p.cols)
        x, y = _padded(p.x, tile.block_k), _padded(p.y, tile.block_k)
        plan = _rectangles(p, tile, device, workspace)
        row_parts = _parts(p.x, rows, plan.strips, p.banks, p.n)
        col_parts = _parts(p.x, cols, plan.groups, p.banks, p.m)
        forward_kernel[(p.banks * plan.groups * plan.strips,)](
            x, y, p.scale, p.bias, *keys, row_parts, col_parts,
            p.n, p.m, x.shape[2], p.banks, *_bank_strides(x, y, *keys),
            plan.groups, plan.group_tiles, plan.strips, plan.strip_tiles,
            **_constants(p, tile, arithmetic),
            MASK_N=p.n % tile.block_m != 0,
        )  # fmt: skip
        row_out = _merge(row_parts, rows, plan.strips, p.banks, p.n)
        col_out = _merge(col_parts, cols, plan.groups, p.banks, p.m)
        return row_out, col_out, row_out.new_empty((0,))


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

    G is made for as many rows as ``workspace`` holds, or for several whole banks when they are small, and used at once
    by two GEMMs.
    """
    with _on(p.x):
        device = configs.device()
        arithmetic = configs.arithmetic(p.x.dtype)
        keys = _keys(p)
        tile = device.tile("gradient", arithmetic, p)
        x, y = _padded(p.x, tile.block_k), _padded(p.y, tile.block_k)
        want_x, want_y = needs[0], needs[1]
        want_totals = needs[2] or needs[3]
        norm, undo = _normalisation(p, grad_rows, grad_cols)
        dx = _Accumulator(p.x, want_x, undo)
        dy = _Accumulator(p.y, want_y, undo)
        totals = torch.zeros(2, dtype=torch.float64, device=p.x.device)
        pad = 16 // p.x.element_size()  # G's rows start on 16 bytes, or the GEMMs would take their slow path
        stride = triton.cdiv(p.m, pad) * pad
        constants = _constants(p, tile, arithmetic)
        for banks, first, count in _chunks(p, stride, tile, workspace) if any(needs) else ():
            n_banks = banks.stop - banks.start
            programs = n_banks * triton.cdiv(count, tile.block_m) * triton.cdiv(p.m, tile.block_n)
            g = p.x.new_empty((n_banks, count, stride) if want_x or want_y else (0,))
            parts = totals.new_empty((2, programs) if want_totals else (0,), dtype=torch.float32)
            gradient_kernel[(programs,)](
                x, y, p.scale, p.bias, norm, *keys,
                grad_rows, grad_cols, row_out, col_out, g, parts,
                p.n, p.m, x.shape[2], p.banks, banks.start, first, count, stride, *_bank_strides(x, y, *keys),
                **constants,
                HAS_NORM=norm is not None, STORE=want_x or want_y, TOTALS=want_totals,
                MASK_N=count % tile.block_m != 0,
            )  # fmt: skip
            if want_totals:
                totals += parts.sum(1, dtype=torch.float64)
            rows = slice(first, first + count)
            if want_x:
                dx.add(_times_y(g, p, banks), banks, rows)
            if want_y:
                dy.add(_times_x(g, p, banks, rows), banks, slice(0, p.m))
        dscale, dbias = totals.float().unbind(0)
        return dx.result(), dy.result(), dscale.clone(), dbias.clone()


def _on(t: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device; make it that of the data."""
    return torch.cuda.device(t.device) if t.is_cuda else nullcontext()


def _available(p: SimilarityProblem) -> int:
    """The relations that can occur at all."""
    own = SELF if p.diagonal or p.row_ids is not None else 0
    alike = SAME if p.row_labels is not None else 0
    return int(OTHER | own | alike)


def _spec(p: SimilarityProblem, codes: Sequence[int]) -> Spec:
    """(kind, relations, slot of the running maximum) for each reduction, relations that cannot occur left out.

    All that can occur is ALL, so that the kernels test nothing where nothing needs a test.
    """
    spec = []
    slot = len(codes)
    for code in codes:
        kind, relations = code // 8, code % 8
        spec.append((kind, _simplest(relations, _available(p)), slot))
        slot += kind == 0
    return tuple(spec)


def _simplest(relations: int, available: int) -> int:
    relations &= available
    return int(ALL) if relations == available else relations


def _by_distance(p: SimilarityProblem, spec: Spec) -> tuple[Spec, Spec, Spec]:
    """A spec in three: what holds for every tile, what is added near the diagonal, what is added far from it.

    Only relations by position differ: far from the diagonal nothing is SELF.
    """
    if not p.diagonal:
        return spec, (), ()
    far = _available(p) & ~int(SELF)
    return (
        tuple((kind, relations if relations == ALL else 0, slot) for kind, relations, slot in spec),
        tuple((kind, 0 if relations == ALL else relations, slot) for kind, relations, slot in spec),
        tuple((kind, 0 if relations == ALL else _simplest(relations, far), slot) for kind, relations, slot in spec),
    )


def _constants(p: SimilarityProblem, tile: configs.Tile, arithmetic: str) -> dict[str, Any]:
    """The compile-time arguments that both kernels share."""
    specs: dict[str, Spec] = {}
    for name, codes in (("ROWS", p.rows), ("COLS", p.cols)):
        spec = specs[name] = _spec(p, codes)
        specs[f"{name}_ALWAYS"], specs[f"{name}_NEAR"], specs[f"{name}_FAR"] = _by_distance(p, spec)
    return {
        **specs,
        "HAS_BIAS": p.bias is not None,
        "HAS_LABELS": p.row_labels is not None,
        "HAS_IDS": p.row_ids is not None,
        "DIAGONAL": p.diagonal,
        "MASK_M": p.m % tile.block_n != 0,
        "PRECISION": "tf32" if arithmetic == "tf32" else "ieee",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def _padded(t: Tensor, multiple: int) -> Tensor:
    """Zeros to a whole number of steps along D: aligned 16-byte loads and no mask, whatever D is."""
    missing = -t.shape[2] % multiple
    return torch.nn.functional.pad(t, (0, missing)) if missing else t


def _keys(p: SimilarityProblem) -> tuple[Tensor | None, ...]:
    """Row labels, column labels, row ids, column ids as int32 names: half the registers of int64, one comparison."""
    return (*_names(p.row_labels, p.col_labels, signed=True), *_names(p.row_ids, p.col_ids, signed=False))


def _names(row: Tensor | None, col: Tensor | None, *, signed: bool) -> tuple[Tensor | None, Tensor | None]:
    """Equal keys get equal names, the place of their first occurrence in sorted order; negative labels get −1."""
    if row is None or col is None:
        return None, None
    banks = max(row.shape[0], col.shape[0])
    keys = torch.cat([row.expand(banks, -1), col.expand(banks, -1)], 1)
    names = torch.searchsorted(keys.sort(dim=1).values, keys, out_int32=True)
    if signed:
        names = names.masked_fill(keys < 0, -1)
    return names[:, : row.shape[1]].contiguous(), names[:, row.shape[1] :].contiguous()


def _bank_strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Elements from one bank to the next; 0 where one serves all."""
    return tuple(0 if t is None or t.shape[0] == 1 else t[0].numel() for t in tensors)


@dataclass(frozen=True)
class _Rectangles:
    groups: int
    group_tiles: int
    strips: int
    strip_tiles: int


def _rectangles(p: SimilarityProblem, tile: configs.Tile, device: configs.Device, workspace: int) -> _Rectangles:
    """Cut the tiles of one bank into groups × strips: enough programs for the device, bounded partial results.

    Partial results may take half the workspace for each side, or as much as x or y itself.
    """
    row_tiles, col_tiles = triton.cdiv(p.n, tile.block_m), triton.cdiv(p.m, tile.block_n)

    def most(items: int, spec: Spec) -> int:
        per_item = 4 * _slots(spec)
        budget = max(workspace // (2 * p.banks * items), 4 * p.x.shape[2])
        return max(4, budget // per_item) if per_item else max(row_tiles, col_tiles)

    cols, rows = _spec(p, p.cols), _spec(p, p.rows)
    groups = min(row_tiles, most(p.m, cols), device.max_groups if cols else row_tiles)
    group_tiles = triton.cdiv(row_tiles, groups)
    groups = triton.cdiv(row_tiles, group_tiles)
    wanted = triton.cdiv(RECTANGLES_PER_PROCESSOR * device.processors, groups * p.banks)
    strips = min(col_tiles, wanted, most(p.n, rows))
    strip_tiles = triton.cdiv(col_tiles, strips)
    return _Rectangles(groups, group_tiles, triton.cdiv(col_tiles, strip_tiles), strip_tiles)


def _slots(spec: Spec) -> int:
    return len(spec) + sum(kind == 0 for kind, _, _ in spec)


def _parts(like: Tensor, spec: Spec, count: int, banks: int, items: int) -> Tensor:
    return like.new_empty((_slots(spec), count, banks, items), dtype=torch.float32)


def _merge(parts: Tensor, spec: Spec, count: int, banks: int, items: int) -> Tensor:
    out = parts.new_empty((len(spec), banks, items))
    if spec:
        merge_kernel[(triton.cdiv(banks * items, MERGE_BLOCK),)](
            parts, out, banks * items, count, SPEC=spec, BLOCK=MERGE_BLOCK
        )
    return out


def _normalisation(p: SimilarityProblem, grad_rows: Tensor, grad_cols: Tensor) -> tuple[Tensor | None, Tensor]:
    """The power of two that G is stored with (None: 1), and what undoes it and applies scale; both on the device.

    |G| is at most the sum over the reductions of their largest incoming gradient.
    """
    if p.x.dtype != torch.float16:
        return None, p.scale
    bound = sum(g.abs().amax((1, 2)).sum() for g in (grad_rows, grad_cols) if g.numel())
    # Gradients that are not finite, or absurdly small, must not make a factor that is not finite.
    exponent = torch.frexp(torch.as_tensor(bound))[1].clamp(-100, 100) - HALF_EXPONENT
    one = torch.ones_like(p.scale)
    return torch.ldexp(one, -exponent), p.scale * torch.ldexp(one, exponent)


def _chunks(p: SimilarityProblem, stride: int, tile: configs.Tile, workspace: int) -> Iterator[tuple[slice, int, int]]:
    """(banks, first row, rows) of each piece of G: several whole banks, or some rows of one bank."""
    row_bytes = stride * p.x.element_size()
    whole = workspace // (row_bytes * p.n)
    if whole:
        for bank in range(0, p.banks, whole):
            yield slice(bank, min(bank + whole, p.banks)), 0, p.n
        return
    most = max(workspace // row_bytes // tile.block_m, 1) * tile.block_m
    even = triton.cdiv(triton.cdiv(p.n, triton.cdiv(p.n, most)), tile.block_m) * tile.block_m
    for bank in range(p.banks):
        for first in range(0, p.n, even):
            yield slice(bank, bank + 1), first, min(even, p.n - first)


class _Accumulator:
    """The gradient of x or y: Σ over chunks (and over banks, where one tensor serves all) in fp32, rounded once."""

    def __init__(self, like: Tensor, wanted: bool, factor: Tensor) -> None:
        self.like, self.wanted, self.factor = like, wanted, factor
        self.sum = torch.zeros(like.shape if wanted else (0,), dtype=torch.float32, device=like.device)

    def add(self, value: Tensor, banks: slice, rows: slice) -> None:
        if self.like.shape[0] == 1:
            self.sum[0, rows] += value.sum(0) if value.shape[0] > 1 else value[0]
        else:
            self.sum[banks, rows] += value

    def result(self) -> Tensor:
        return self.sum.mul_(self.factor).to(self.like.dtype) if self.wanted else self.like.new_empty((0,))


def _times_y(g: Tensor, p: SimilarityProblem, banks: slice) -> Tensor:
    """G Y for a chunk: fp32 ``[banks, rows, D]``."""
    if p.y.shape[0] > 1:
        return _matmul(g[..., : p.m], p.y[banks])
    flat = g.view(1, -1, g.shape[2])[..., : p.m]
    return _matmul(flat, p.y).view(*g.shape[:2], -1)


def _times_x(g: Tensor, p: SimilarityProblem, banks: slice, rows: slice) -> Tensor:
    """Gᵀ X for a chunk: fp32 ``[banks, M, D]``, or ``[1, M, D]`` summed over banks where y is shared."""
    if p.x.shape[0] == 1:
        return _matmul(g[..., : p.m].mT, p.x[:, rows].expand(g.shape[0], -1, -1))
    if p.y.shape[0] > 1:
        return _matmul(g[..., : p.m].mT, p.x[banks, rows])
    # One y for all: rows of all banks are one long reduction. A chunk is whole banks, or one.
    flat = g.view(1, -1, g.shape[2])[..., : p.m]
    return _matmul(flat.mT, p.x[banks, rows].reshape(1, -1, p.x.shape[2]))


_KEEPS_FP32 = "dtype" in torch.ops.aten.bmm.overloads()


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Batched a @ b with fp32 accumulation and an fp32 result, by the library."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.is_cuda and _KEEPS_FP32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    # The interpreter's CPU tensors, and torch releases whose GEMM rounds its result: fp16 would overflow there.
    return torch.bmm(a.float(), b.float())
