"""The backward kernels of reduce_similarity.

In plain torch, for one bank, CLIP's reductions and a chunk of rows:

    gradient_kernel  S = scale * x @ y.T
                     G = grad_row[:, None] * (S - row[:, None]).exp() + grad_col * (S - col).exp()
    scale_kernel     G = E * ((shift - row).exp2() * grad_row)[:, None] + E * (shift - col).exp2() * grad_col
    between them     dx = scale * G @ y;  dy += scale * G.T @ x                                      # two library GEMMs
    finish_kernel    dx = (factor * sum).to(dtype);  dscale = (x * sum).sum()

Work. For a chunk of rows whose E was kept 2 bytes per pair are read and 2 written. Any other takes 2·N·M·D FLOPs to
compute S again, one exponential per pair, and 2 bytes per pair written. The GEMMs take 4·N·M·D. With a fraction f kept
the whole operation, forward included, is (8 − 2f)·N·M·D FLOPs. G goes to a scratch chunk and does not overwrite E: a
graph may be walked twice.

E kept in bf16 has a relative error of 2^-9 at any size. Where a pair is SELF its gradient is a difference of nearly
equal numbers, p − 1, which that error would swamp. Tiles that hold a SELF pair (N/128 tiles of a paired problem) are
therefore left out by scale_kernel and made by gradient_kernel from fp32 products (``FIX``). If online_kernel had to
work, E may have underflowed: a second launch (``AGAIN``), which otherwise returns at once, makes all of G with an
exponential for each reduction. With limits no E is kept, and gradient_kernel makes all of G.

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
    load_bias,
    load_gradients,
    load_keys,
    load_limits,
    power_of_two,
    products,
    relate,
    swizzle,
    within,
)


@triton.jit
def _has_own(row, col, relation, ids, DIAGONAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whether the tile at (row, col) holds a SELF pair."""
    found = False
    if ids is not None:
        found = tl.max(tl.max((relation == SELF).to(tl.int32), 1), 0) != 0
    elif DIAGONAL:
        found = crosses_diagonal(row, col, BLOCK_M, relation.shape[1])
    return found


@triton.jit
def scale_kernel(
    kept, header, norm_ptr, row_labels, col_labels, row_ids, col_ids,
    grad_rows, grad_cols, row_out, col_out, g_out,
    N, M, banks, first_bank, first_row, chunk_rows, g_stride, col_items,
    row_label_bank, col_label_bank, row_id_bank, col_id_bank,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIAGONAL: tl.constexpr,
    WHOLE: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    row_keys = row_labels, row_ids, row_label_bank, row_id_bank
    col_keys = col_labels, col_ids, col_label_bank, col_id_bank
    row_names = load_keys(row_keys, bank, rows, row_ok)
    col_names = load_keys(col_keys, bank, cols, cols < M)
    relation = relate(rows, cols, M, row_names, col_names, row_keys, False, False)
    left_out = tl.load(header + ONLINE) != 0.0
    if row_ids is not None or DIAGONAL:
        row = first_row + row_tile // PARTS * PARTS * BLOCK_M
        left_out = left_out | _has_own(row, col_tile * BLOCK_N, relation, row_ids, DIAGONAL, PARTS * BLOCK_M)
    if not left_out:
        shift = tl.load(header + SHIFT)
        at = (slab * chunk_rows + local)[:, None] * g_stride + cols[None, :]
        mask = row_ok[:, None]
        if not WHOLE:
            mask = mask & (cols < g_stride)[None, :]
        e = tl.load(kept + at, mask=mask, other=0.0).to(tl.float32)
        row_slot = tl.cast(banks, tl.int64) * N
        col_slot = tl.cast(banks, tl.int64) * col_items
        row_sources = load_gradients((grad_rows, row_out, bank * N + rows, row_ok, row_slot), ROWS)
        col_at = bank * col_items + cols
        col_sources = load_gradients((grad_cols, col_out, col_at, cols < col_items, col_slot), COLS)
        g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # Where a softplus is asked for no E is kept, so nothing here reads t.
        g = gradient_tile(e, e, relation, g, row_sources, shift, ROWS, 1)
        g = gradient_tile(e, e, relation, g, col_sources, shift, COLS, 0)
        if norm_ptr is not None:
            g = g * tl.load(norm_ptr)
        tl.store(g_out + at, g.to(g_out.dtype.element_ty), mask=mask)


@triton.jit
def _send_back(
    dots, scale, shift, bias, relation, similar, row_limit, col_limit, g, rows, cols,
    ROWS: tl.constexpr, COLS: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """g plus what rows and columns send back. Only products and g live across calls, or registers would run out."""
    of_rows = within(relation, similar, row_limit, 1)
    of_cols = within(relation, similar, col_limit, 0)
    row_sources = load_gradients(rows, ROWS)
    col_sources = load_gradients(cols, COLS)
    t = dots * scale + bias
    if AGAIN:
        g = gradient_online(t, of_rows, g, row_sources, ROWS, 1, similar, row_limit)
        g = gradient_online(t, of_cols, g, col_sources, COLS, 0, similar, col_limit)
    else:
        e = exponential(dots, scale, shift)
        g = gradient_tile(t, e, of_rows, g, row_sources, shift + bias, ROWS, 1, similar, row_limit)
        g = gradient_tile(t, e, of_cols, g, col_sources, shift + bias, COLS, 0, similar, col_limit)
    return g


@triton.jit
def gradient_kernel(
    x, y, header, scale_ptr, bias_ptr, norm_ptr, row_labels, col_labels, row_ids, col_ids,
    row_limits, col_limits, guide_x, guide_y, teacher, grad_rows, grad_cols, row_out, col_out, g_out, totals_out,
    N, M, D, banks, first_bank, chunk_banks, first_row, chunk_rows, g_stride, col_items, totals_stride,
    x_bank, y_bank, row_label_bank, col_label_bank, row_id_bank, col_id_bank,
    row_limit_bank, col_limit_bank, guide_x_bank, guide_y_bank, guide_d,
    ROWS: tl.constexpr, ROWS_ALWAYS: tl.constexpr, ROWS_NEAR: tl.constexpr, ROWS_FAR: tl.constexpr,
    COLS: tl.constexpr, COLS_ALWAYS: tl.constexpr, COLS_NEAR: tl.constexpr, COLS_FAR: tl.constexpr,
    DIAGONAL: tl.constexpr, STORE: tl.constexpr, TOTALS: tl.constexpr, FIX: tl.constexpr, AGAIN: tl.constexpr,
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
    bias = load_bias(bias_ptr)
    row_keys = row_labels, row_ids, row_label_bank, row_id_bank
    col_keys = col_labels, col_ids, col_label_bank, col_id_bank
    weighted = 0.0
    plain = 0.0
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        slab = (tile // (row_tiles * col_tiles)).to(tl.int64)
        bank = slab + first_bank
        row_tile, col_tile = swizzle(tile % (row_tiles * col_tiles), row_tiles, col_tiles, BAND)
        row = first_row + row_tile * BLOCK_M
        col = col_tile * BLOCK_N
        local = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        rows = first_row + local
        cols = col + tl.arange(0, BLOCK_N)
        row_ok = local < chunk_rows
        col_ok = cols < M
        row_names = load_keys(row_keys, bank, rows, row_ok)
        col_names = load_keys(col_keys, bank, cols, col_ok)
        relation = relate(rows, cols, M, row_names, col_names, row_keys, False, False)
        wanted = True
        if FIX and not AGAIN:
            wanted = _has_own(row, col, relation, row_ids, DIAGONAL, BLOCK_M)
        if wanted:
            if guide_x is not None:
                similar = products(
                    guide_x, guide_y, row, col, bank * guide_x_bank, bank * guide_y_bank, N, M, guide_d, False, False,
                    BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
                )  # fmt: skip
            dots = products(
                x, y, row, col, bank * x_bank, bank * y_bank, N, M, D, TMA, False, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
            )
            if guide_x is None:
                similar = dots
            row_limit = row_limits, load_limits(row_limits, bank, row_limit_bank, rows, row_ok), teacher
            col_limit = col_limits, load_limits(col_limits, bank, col_limit_bank, cols, col_ok), teacher
            row_slot = tl.cast(banks, tl.int64) * N
            col_slot = tl.cast(banks, tl.int64) * col_items
            by_row = grad_rows, row_out, bank * N + rows, row_ok, row_slot
            by_col = grad_cols, col_out, bank * col_items + cols, cols < col_items, col_slot
            g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            g = _send_back(
                dots, scale, shift, bias, relation, similar, row_limit, col_limit, g, by_row, by_col,
                ROWS_ALWAYS, COLS_ALWAYS, AGAIN,
            )  # fmt: skip
            if DIAGONAL:
                if crosses_diagonal(row, col, BLOCK_M, BLOCK_N):
                    near = relate(rows, cols, M, row_names, col_names, row_keys, True, False)
                    g = _send_back(
                        dots, scale, shift, bias, near, similar, row_limit, col_limit, g, by_row, by_col,
                        ROWS_NEAR, COLS_NEAR, AGAIN,
                    )  # fmt: skip
                else:
                    g = _send_back(
                        dots, scale, shift, bias, relation, similar, row_limit, col_limit, g, by_row, by_col,
                        ROWS_FAR, COLS_FAR, AGAIN,
                    )  # fmt: skip
            if TOTALS:
                if MASK_N or MASK_M:
                    g = tl.where(row_ok[:, None] & col_ok[None, :], g, 0.0)
                if not STORE:
                    weighted += tl.sum(g * dots)
                plain += tl.sum(g)
            if STORE:
                if norm_ptr is not None:
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
    grad_rows, grad_cols, norm, row_count, col_count, ROWS: tl.constexpr, COLS: tl.constexpr, EXPONENT: tl.constexpr
):
    """The power of two that brings the largest possible |G| below 2^EXPONENT: ``norm`` is it and its inverse.

    |G| is at most the sum over the reductions of their largest incoming gradient. One program: (N + M)·4 bytes.
    """
    bound = largest(grad_rows, row_count, ROWS) + largest(grad_cols, col_count, COLS)
    up, down = power_of_two(bound, EXPONENT)
    tl.store(norm, up)
    tl.store(norm + 1, down)


@triton.jit
def finish_kernel(
    total, like, out, norm_ptr, scale_ptr, dots, size, DOT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """fp32 sums → a gradient in its dtype, times scale and what undoes the norm; and Σ like∘sums for dscale.

    ``total`` is fp32 ``[PARTS, size]``, ``dots`` fp32 ``[programs]``.
    """
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    value = tl.load(total + index, mask=inside, other=0.0)
    for part in tl.static_range(1, PARTS):
        value += tl.load(total + tl.cast(size, tl.int64) * part + index, mask=inside, other=0.0)
    if norm_ptr is not None:
        value = value * tl.load(norm_ptr + 1)
    if DOT:
        other = tl.load(like + index, mask=inside, other=0.0).to(tl.float32)
        tl.store(dots + tl.program_id(0), tl.sum(value * other))
    tl.store(out + index, (value * tl.load(scale_ptr)).to(out.dtype.element_ty), mask=inside)
