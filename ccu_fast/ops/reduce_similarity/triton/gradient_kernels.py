"""The backward kernels of reduce_similarity.

In plain torch, for one bank, CLIP's reductions and a chunk of rows:

    gradient_kernel  S = scale * x @ y.T
                     G = grad_row[:, None] * (S - row[:, None]).exp() + grad_col * (S - col).exp()
    scale_kernel     G = E * ((shift - row).exp2() * grad_row)[:, None] + E * (shift - col).exp2() * grad_col
    between them     dx = scale * G @ y;  dy += scale * G.T @ x                                      # two library GEMMs
    finish_kernel    dx = (factor * sum).to(dtype);  dscale = (x * sum).sum()

Work. A chunk of rows whose E was kept: 2 bytes per pair are read and 2 written. Another: 2·N·M·D FLOPs to have S again,
one exponential per pair, 2 bytes per pair written. The GEMMs take 4·N·M·D. With a fraction f kept the whole operation,
forward included, is (8 − 2f)·N·M·D FLOPs. G goes to a scratch chunk and not over E: a graph may be walked twice.

E kept in bf16 has a relative error of 2^-9 at any size. Where a pair is SELF its gradient is a difference of nearly
equal numbers, p − 1, which that error would fill. Tiles that hold a SELF pair (N/128 tiles of a paired problem) are
therefore left out by scale_kernel and made by gradient_kernel from fp32 products (``FIX``). If online_kernel had to
work, E may have underflowed: a second launch (``AGAIN``), which else returns at once, makes all of G with an
exponential for each reduction.

The grids. scale_kernel: one program for each tile, or part of one, nothing is shared. gradient_kernel: a few programs
for each processor share the tiles in bands of rows, so that a launch that has little or nothing to fix costs next to
nothing.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ccu_fast.ops.reduce_similarity.triton.forward_kernels import BAND, ONLINE, SHIFT
from ccu_fast.ops.reduce_similarity.triton.tile import (
    LOG2E,
    SELF,
    crosses_diagonal,
    exponential,
    gradient_online,
    gradient_tile,
    largest,
    load_gradients,
    load_keys,
    power_of_two,
    products,
    relate,
    swizzle,
)


@triton.jit
def _has_own(
    row, col, relation, HAS_IDS: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Whether the tile at (row, col) holds a SELF pair."""
    found = False
    if HAS_IDS:
        found = tl.max(tl.max((relation == SELF).to(tl.int32), 1), 0) != 0
    elif DIAGONAL:
        found = crosses_diagonal(row, col, BLOCK_M, BLOCK_N)
    return found


@triton.jit
def scale_kernel(
    kept, header, norm_ptr, row_labels, col_labels, row_ids, col_ids,
    grad_rows, grad_cols, row_out, col_out, g_out,
    N, M, banks, first_bank, first_row, chunk_rows, g_stride, col_items,
    row_label_bank, col_label_bank, row_id_bank, col_id_bank,
    ROWS: tl.constexpr, COLS: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, DIAGONAL: tl.constexpr,
    HAS_NORM: tl.constexpr, WHOLE: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of G from E, for the rows [first_row, first_row + chunk_rows) of some banks; there is no bias.

    ``PARTS`` of these tiles, one below the other, are a tile of gradient_kernel; with ids ``PARTS`` is 1. ``kept`` and
    ``g_out`` are ``[banks in the chunk, chunk_rows, g_stride]``, ``grad_cols`` and ``col_out`` ``[len(COLS), banks,
    col_items]``; ROWS and COLS are those far from the diagonal.
    """
    pid = tl.program_id(0)
    row_tiles = tl.cdiv(chunk_rows, BLOCK_M)
    col_tiles = tl.cdiv(M, BLOCK_N)
    slab = (pid // (row_tiles * col_tiles)).to(tl.int64)
    bank = slab + first_bank
    row_tile, col_tile = swizzle(pid % (row_tiles * col_tiles), row_tiles, col_tiles, BAND)
    local = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = first_row + local
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = local < chunk_rows
    col_ok = cols < M
    row_label, row_id = load_keys(
        row_labels + bank * row_label_bank if HAS_LABELS else row_labels,
        row_ids + bank * row_id_bank if HAS_IDS else row_ids,
        rows, row_ok, HAS_LABELS, HAS_IDS,
    )  # fmt: skip
    col_label, col_id = load_keys(
        col_labels + bank * col_label_bank if HAS_LABELS else col_labels,
        col_ids + bank * col_id_bank if HAS_IDS else col_ids,
        cols, col_ok, HAS_LABELS, HAS_IDS,
    )  # fmt: skip
    relation = relate(
        rows, cols, first_row + chunk_rows, M, row_label, col_label, row_id, col_id,
        HAS_LABELS, HAS_IDS, False, False, False, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    left_out = tl.load(header + ONLINE) != 0.0
    if HAS_IDS or DIAGONAL:
        left_out = left_out | _has_own(
            first_row + row_tile // PARTS * PARTS * BLOCK_M, col_tile * BLOCK_N, relation,
            HAS_IDS, DIAGONAL, PARTS * BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if not left_out:
        shift = tl.load(header + SHIFT)
        at = (slab * chunk_rows + local)[:, None] * g_stride + cols[None, :]
        mask = row_ok[:, None]
        if not WHOLE:
            mask = mask & (cols < g_stride)[None, :]
        e = tl.load(kept + at, mask=mask, other=0.0).to(tl.float32)
        row_sources = load_gradients(grad_rows, row_out, bank * N + rows, row_ok, tl.cast(banks, tl.int64) * N, ROWS)
        col_sources = load_gradients(
            grad_cols, col_out, bank * col_items + cols, cols < col_items, tl.cast(banks, tl.int64) * col_items, COLS
        )
        g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # Where a softplus is asked for no E is kept, so nothing here reads t.
        g = gradient_tile(e, e, relation, g, row_sources, shift, ROWS, 1)
        g = gradient_tile(e, e, relation, g, col_sources, shift, COLS, 0)
        if HAS_NORM:
            g = g * tl.load(norm_ptr)
        tl.store(g_out + at, g.to(g_out.dtype.element_ty), mask=mask)


@triton.jit
def _send_back(
    dots, scale, shift, bias, relation, g, grad_rows, row_out, row_at, row_ok, row_stride,
    grad_cols, col_out, col_at, col_ok, col_stride, ROWS: tl.constexpr, COLS: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """g plus what rows and columns send back. Only the product and g live across calls, or registers would run out."""
    row_sources = load_gradients(grad_rows, row_out, row_at, row_ok, row_stride, ROWS)
    col_sources = load_gradients(grad_cols, col_out, col_at, col_ok, col_stride, COLS)
    t = dots * scale + bias
    if AGAIN:
        g = gradient_online(t, relation, g, row_sources, ROWS, 1)
        g = gradient_online(t, relation, g, col_sources, COLS, 0)
    else:
        e = exponential(dots, scale, shift)
        g = gradient_tile(t, e, relation, g, row_sources, shift + bias, ROWS, 1)
        g = gradient_tile(t, e, relation, g, col_sources, shift + bias, COLS, 0)
    return g


@triton.jit
def gradient_kernel(
    x, y, header, scale_ptr, bias_ptr, norm_ptr, row_labels, col_labels, row_ids, col_ids,
    grad_rows, grad_cols, row_out, col_out, g_out, totals_out,
    N, M, D, banks, first_bank, chunk_banks, first_row, chunk_rows, g_stride, col_items, totals_stride,
    x_bank, y_bank, row_label_bank, col_label_bank, row_id_bank, col_id_bank,
    ROWS: tl.constexpr, ROWS_ALWAYS: tl.constexpr, ROWS_NEAR: tl.constexpr, ROWS_FAR: tl.constexpr,
    COLS: tl.constexpr, COLS_ALWAYS: tl.constexpr, COLS_NEAR: tl.constexpr, COLS_FAR: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, DIAGONAL: tl.constexpr,
    HAS_NORM: tl.constexpr, STORE: tl.constexpr, TOTALS: tl.constexpr, FIX: tl.constexpr, AGAIN: tl.constexpr,
    MASK_N: tl.constexpr, MASK_M: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tiles of G from x and y, for the rows [first_row, first_row + chunk_rows) of some banks.

    With ``FIX`` only those that scale_kernel leaves out. Launched twice, without and with ``AGAIN``: one of the two
    finds that the header speaks of the other and has no tiles. ``g_out`` is ``[chunk_banks, chunk_rows, g_stride]`` in
    the dtype of x, times ``norm``; ``totals_out`` is fp32 ``[2, totals_stride]``: Σ G∘(x yᵀ) and Σ G of each
    program, from fp32 values; the first only without ``STORE``.
    """
    row_tiles = tl.cdiv(chunk_rows, BLOCK_M)
    col_tiles = tl.cdiv(M, BLOCK_N)
    scale = tl.load(scale_ptr) * LOG2E
    shift = tl.load(header + SHIFT)
    tiles = chunk_banks * row_tiles * col_tiles
    if (tl.load(header + ONLINE) != 0.0) != AGAIN:
        tiles = 0
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr) * LOG2E
    # A chunk may end inside a tile whose next rows exist: they belong to the next chunk.
    end = first_row + chunk_rows
    weighted = 0.0
    plain = 0.0
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        slab = (tile // (row_tiles * col_tiles)).to(tl.int64)
        bank = slab + first_bank
        row_tile, col_tile = swizzle(tile % (row_tiles * col_tiles), row_tiles, col_tiles, BAND)
        first = first_row + row_tile * BLOCK_M
        local = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        rows = first_row + local
        cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        row_ok = local < chunk_rows
        col_ok = cols < M
        row_label, row_id = load_keys(
            row_labels + bank * row_label_bank if HAS_LABELS else row_labels,
            row_ids + bank * row_id_bank if HAS_IDS else row_ids,
            rows, row_ok, HAS_LABELS, HAS_IDS,
        )  # fmt: skip
        col_label, col_id = load_keys(
            col_labels + bank * col_label_bank if HAS_LABELS else col_labels,
            col_ids + bank * col_id_bank if HAS_IDS else col_ids,
            cols, col_ok, HAS_LABELS, HAS_IDS,
        )  # fmt: skip
        relation = relate(
            rows, cols, end, M, row_label, col_label, row_id, col_id,
            HAS_LABELS, HAS_IDS, False, False, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        wanted = True
        if FIX and not AGAIN:
            wanted = _has_own(first, col_tile * BLOCK_N, relation, HAS_IDS, DIAGONAL, BLOCK_M, BLOCK_N)
        if wanted:
            dots = products(
                x, y, first, col_tile * BLOCK_N, bank * x_bank, bank * y_bank, N, M, D,
                TMA, False, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            row_at = bank * N + rows
            col_at = bank * col_items + cols
            col_in = cols < col_items
            row_stride = tl.cast(banks, tl.int64) * N
            col_stride = tl.cast(banks, tl.int64) * col_items
            g = _send_back(
                dots, scale, shift, bias, relation, tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
                grad_rows, row_out, row_at, row_ok, row_stride, grad_cols, col_out, col_at, col_in, col_stride,
                ROWS_ALWAYS, COLS_ALWAYS, AGAIN,
            )  # fmt: skip
            if DIAGONAL:
                if crosses_diagonal(first, col_tile * BLOCK_N, BLOCK_M, BLOCK_N):
                    near = relate(
                        rows, cols, end, M, row_label, col_label, row_id, col_id,
                        HAS_LABELS, HAS_IDS, True, False, False, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                    g = _send_back(
                        dots, scale, shift, bias, near, g,
                        grad_rows, row_out, row_at, row_ok, row_stride, grad_cols, col_out, col_at, col_in, col_stride,
                        ROWS_NEAR, COLS_NEAR, AGAIN,
                    )  # fmt: skip
                else:
                    g = _send_back(
                        dots, scale, shift, bias, relation, g,
                        grad_rows, row_out, row_at, row_ok, row_stride, grad_cols, col_out, col_at, col_in, col_stride,
                        ROWS_FAR, COLS_FAR, AGAIN,
                    )  # fmt: skip
            if TOTALS:
                if MASK_N or MASK_M:
                    g = tl.where(row_ok[:, None] & col_ok[None, :], g, 0.0)
                if not STORE:
                    weighted += tl.sum(g * dots)
                plain += tl.sum(g)
            if STORE:
                if HAS_NORM:
                    g = g * tl.load(norm_ptr)
                at = g_out + (slab * chunk_rows + local)[:, None] * g_stride + cols[None, :]
                mask = row_ok[:, None]
                if not WHOLE:
                    mask = mask & (cols < g_stride)[None, :]
                tl.store(at, g.to(g_out.dtype.element_ty), mask=mask)
    if TOTALS:
        tl.store(totals_out + tl.program_id(0), weighted)
        tl.store(totals_out + totals_stride + tl.program_id(0), plain)


@triton.jit
def norm_kernel(
    grad_rows, grad_cols, norm, row_count, col_count, EXPONENT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The power of two that brings the largest possible |G| below 2^EXPONENT: ``norm`` is it and its inverse.

    |G| is at most the sum over the reductions of their largest incoming gradient. One program: (N + M)·4 bytes.
    """
    up, down = power_of_two(
        largest(grad_rows, row_count, ROWS, BLOCK) + largest(grad_cols, col_count, COLS, BLOCK), EXPONENT
    )
    tl.store(norm, up)
    tl.store(norm + 1, down)


@triton.jit
def finish_kernel(
    total, like, out, factor, scale_ptr, dots, size,
    HAS_NORM: tl.constexpr, DOT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """fp32 sums → a gradient in its dtype, times scale and what undoes the norm; and Σ like∘sums for dscale.

    ``total`` is fp32 ``[PARTS, size]``, ``dots`` fp32 ``[programs]``.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    value = tl.load(total + index, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        value += tl.load(total + tl.cast(size, tl.int64) * part + index, mask=inside, other=0.0)
    if HAS_NORM:
        value = value * tl.load(factor + 1)
    if DOT:
        other = tl.load(like + index, mask=inside, other=0.0).to(tl.float32)
        tl.store(dots + tl.program_id(0), tl.sum(value * other))
    tl.store(out + index, (value * tl.load(scale_ptr)).to(out.dtype.element_ty), mask=inside)
