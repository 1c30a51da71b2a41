"""The backward kernels of all prefixes at once; see :mod:`.prefix_kernels`."""

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ccu_fast.ops.l2_normalize.api import EPS
from ccu_fast.ops.reduce_similarity.triton.forward_kernels import BAND, ONLINE, SHIFT
from ccu_fast.ops.reduce_similarity.triton.prefix_kernels import factors, more_products
from ccu_fast.ops.reduce_similarity.triton.tile import (
    LOG2E,
    crosses_diagonal,
    exponential,
    gradient_online,
    gradient_tile,
    load_gradients,
    load_keys,
    relate,
    swizzle,
)

# From here on an inverse norm is that of EPS, which replaces smaller norms and passes no gradient on; but for rounding.
MOST_INVERSE = tl.constexpr(1 / EPS * (1 - 1e-6))


@triton.jit
def _send_back(
    t, dots, scale, shift, relation, g, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, AGAIN: tl.constexpr
):
    """g plus what rows and columns send back."""
    row_sources = load_gradients(rows, ROWS)
    col_sources = load_gradients(cols, COLS)
    if AGAIN:
        g = gradient_online(t, relation, g, row_sources, ROWS, 1)
        g = gradient_online(t, relation, g, col_sources, COLS, 0)
    else:
        e = exponential(dots, scale, shift)
        g = gradient_tile(t, e, relation, g, row_sources, shift, ROWS, 1)
        g = gradient_tile(t, e, relation, g, col_sources, shift, COLS, 0)
    return g


@triton.jit
def prefix_gradient_kernel(
    x, y, x_inverse, y_inverse, header, scale_ptr, row_labels, col_labels, row_ids, col_ids,
    grad_rows, grad_cols, row_out, col_out, a_out, row_sums, col_sums,
    N, M, D, first_row, chunk_rows, a_stride, col_items, EDGES: tl.constexpr,
    ROWS: tl.constexpr, ROWS_ALWAYS: tl.constexpr, ROWS_NEAR: tl.constexpr, ROWS_FAR: tl.constexpr,
    COLS: tl.constexpr, COLS_ALWAYS: tl.constexpr, COLS_NEAR: tl.constexpr, COLS_FAR: tl.constexpr,
    DIAGONAL: tl.constexpr, STORE: tl.constexpr, ROW_SUMS: tl.constexpr, COL_SUMS: tl.constexpr, AGAIN: tl.constexpr,
    MASK_N: tl.constexpr, MASK_M: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tiles of A of all prefixes, for the rows [first_row, first_row + chunk_rows).

    Launched twice, as gradient_kernel is. ``a_out`` is ``[P, chunk_rows, a_stride]`` in the dtype of x. ``row_sums`` is
    fp32 ``[P, tiles of a row, chunk_rows]`` and ``col_sums`` ``[P, tiles of a column, col_items]``: Σ G∘S/scale.
    """
    P: tl.constexpr = len(EDGES) - 1
    row_tiles = tl.cdiv(chunk_rows, BLOCK_M)
    col_tiles = tl.cdiv(M, BLOCK_N)
    scale = tl.load(scale_ptr) * LOG2E
    shift = tl.load(header + SHIFT)
    tiles = row_tiles * col_tiles
    if (tl.load(header + ONLINE) != 0.0) != AGAIN:
        tiles = 0
    row_keys = row_labels, row_ids, 0, 0
    col_keys = col_labels, col_ids, 0, 0
    row_slot = P * tl.cast(N, tl.int64)
    col_slot = P * tl.cast(col_items, tl.int64)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # A remainder that changes nothing: the interpreter counts in Python's integers, which swizzle does not take.
        row_tile, col_tile = swizzle(tile % (row_tiles * col_tiles), row_tiles, col_tiles, BAND)
        row = first_row + row_tile * BLOCK_M
        col = col_tile * BLOCK_N
        local = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        rows = first_row + local
        cols = col + tl.arange(0, BLOCK_N)
        row_ok = local < chunk_rows
        col_ok = cols < M
        row_names = load_keys(row_keys, 0, rows, row_ok)
        col_names = load_keys(col_keys, 0, cols, col_ok)
        relation = relate(rows, cols, M, row_names, col_names, row_keys, False, False)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        held = ()
        for q in tl.static_range(P):
            acc = more_products(acc, x, y, row, col, N, M, D, q, EDGES, TMA, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
            of_rows, of_cols = factors(x_inverse, y_inverse, q, rows, cols, N, M, row_ok, col_ok)
            dots = acc * of_rows * of_cols
            t = dots * scale
            by_row = grad_rows, row_out, q * tl.cast(N, tl.int64) + rows, row_ok, row_slot
            by_col = grad_cols, col_out, q * tl.cast(col_items, tl.int64) + cols, cols < col_items, col_slot
            g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            g = _send_back(t, dots, scale, shift, relation, g, by_row, by_col, ROWS_ALWAYS, COLS_ALWAYS, AGAIN)
            if DIAGONAL:
                if crosses_diagonal(row, col, BLOCK_M, BLOCK_N):
                    near = relate(rows, cols, M, row_names, col_names, row_keys, True, False)
                    g = _send_back(t, dots, scale, shift, near, g, by_row, by_col, ROWS_NEAR, COLS_NEAR, AGAIN)
                else:
                    g = _send_back(t, dots, scale, shift, relation, g, by_row, by_col, ROWS_FAR, COLS_FAR, AGAIN)
            if ROW_SUMS or COL_SUMS:
                weighted = g * dots
                if MASK_N or MASK_M:
                    weighted = tl.where(row_ok[:, None] & col_ok[None, :], weighted, 0.0)
                if ROW_SUMS:
                    at = row_sums + (q * col_tiles + col_tile) * tl.cast(chunk_rows, tl.int64) + local
                    tl.store(at, tl.sum(weighted, 1), mask=row_ok)
                if COL_SUMS:
                    at = col_sums + (q * row_tiles + row_tile) * tl.cast(col_items, tl.int64) + cols
                    tl.store(at, tl.sum(weighted, 0), mask=cols < col_items)
            held = held + (g * of_rows * of_cols,)
        if STORE:
            mask = row_ok[:, None]
            if not WHOLE:
                mask = mask & (cols < a_stride)[None, :]
            total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for place in tl.static_range(P):
                total += held[P - 1 - place]
                slab = (P - 1 - place) * tl.cast(chunk_rows, tl.int64)
                at = a_out + (slab + local)[:, None] * a_stride + cols[None, :]
                tl.store(at, total.to(a_out.dtype.element_ty), mask=mask)


@triton.jit
def prefix_finish_kernel(
    totals, items, out, sums, inverse, scale_ptr, item_count, D, first, count, steps,
    EDGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of the items [first, first + count), BLOCK_K dimensions of which never cross an edge.

    ``totals`` is fp32, for one prefix after the other ``[count, d_q - d_{q-1}]``; ``sums`` is fp32 ``[P, count]``,
    ``inverse`` ``[P, item_count]``; ``items`` and ``out`` are ``[item_count, D]``.
    """
    start = tl.program_id(0) % steps * BLOCK_K
    local = tl.program_id(0) // steps * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = local < count
    k = tl.arange(0, BLOCK_K)
    begin = 0
    width = EDGES[1]
    share = tl.zeros((BLOCK_M,), tl.float32)
    for q in tl.static_range(len(EDGES) - 1):
        if inverse is not None:
            r = tl.load(inverse + q * tl.cast(item_count, tl.int64) + first + local, mask=inside, other=0.0)
            part = tl.load(sums + q * tl.cast(count, tl.int64) + local, mask=inside, other=0.0) * r * r
            share += tl.where((start < EDGES[q + 1]) & (r < MOST_INVERSE), part, 0.0)
        later = start >= EDGES[q]
        begin = tl.where(later, EDGES[q], begin)
        width = tl.where(later, EDGES[q + 1] - EDGES[q], width)
    at = tl.cast(count, tl.int64) * begin + local[:, None] * tl.cast(width, tl.int64) + (start - begin + k)[None, :]
    value = tl.load(totals + at, mask=inside[:, None], other=0.0)
    at = (first + local).to(tl.int64)[:, None] * D + (start + k)[None, :]
    if inverse is not None:
        value -= tl.load(items + at, mask=inside[:, None], other=0.0).to(tl.float32) * share[:, None]
    tl.store(out + at, (value * tl.load(scale_ptr)).to(out.dtype.element_ty), mask=inside[:, None])
