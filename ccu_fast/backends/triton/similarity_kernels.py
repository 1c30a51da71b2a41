"""The kernels of reduce_similarity.

In plain torch, for one bank and CLIP's reductions:

    forward    S = scale * x @ y.T + bias
               row = S.logsumexp(1);  col = S.logsumexp(0)                                     # and sums, softplus
    backward   G = grad_row[:, None] * (S - row[:, None]).exp() + grad_col * (S - col).exp()   # a chunk of rows
               dscale = (G * (x @ y.T)).sum();  dbias = G.sum()
               dx = scale * G @ y;  dy = scale * G.T @ x                                       # two library GEMMs

Work. Forward: 2·N·M·D FLOPs on the tensor cores and one exponential per pair and lse; reads x and y from L2, writes
8 bytes per item, lse and strip. Backward: 2·N·M·D FLOPs to have S again, writes G once in the inputs' dtype; the GEMMs
take 4·N·M·D more. 8·N·M·D in all, no atomics, the same bits every time.

The forward grid. A tile of S serves rows and columns at once, so its partial results go both ways. A program owns a
rectangle: a *group* of row tiles by a *strip* of column tiles. It keeps the state of its current row tile in
registers along the strip and the state of the strip's columns in a private row of the column buffer, which stays
in L2 (and is not read at all when the group is one row tile). Partial results are therefore N·strips + M·groups, both
counts bounded, however large N·M is; a second kernel joins them in a fixed order.

The backward grid. One program for each tile of the chunk: its only products are G and two numbers.

Programs walk in bands of rows so that those running together share x and y in L2.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from ccu_fast.backends.triton.similarity_tile import (
    LN2,
    LOG2E,
    LSE,
    SUM,
    crosses_diagonal,
    empty_state,
    gradient_tile,
    join,
    load_gradients,
    load_keys,
    products,
    reduce_tile,
    relate,
    swizzle,
)

BAND = tl.constexpr(8)


@triton.jit
def _reduce_both(t, relation, state, col_state, ROWS: tl.constexpr, COLS: tl.constexpr):
    """One tile into the states of its rows and of its columns."""
    state = reduce_tile(t, relation, state, ROWS, 1)
    return state, reduce_tile(t, relation, col_state, COLS, 0)


@triton.jit
def forward_kernel(
    x, y, scale_ptr, bias_ptr, row_labels, col_labels, row_ids, col_ids, row_parts, col_parts,
    N, M, D, banks, x_bank, y_bank, row_label_bank, col_label_bank, row_id_bank, col_id_bank,
    groups, group_tiles, strips, strip_tiles,
    ROWS: tl.constexpr, ROWS_ALWAYS: tl.constexpr, ROWS_NEAR: tl.constexpr, ROWS_FAR: tl.constexpr,
    COLS: tl.constexpr, COLS_ALWAYS: tl.constexpr, COLS_NEAR: tl.constexpr, COLS_FAR: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, DIAGONAL: tl.constexpr,
    MASK_N: tl.constexpr, MASK_M: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Partial row and column states of one rectangle of tiles.

    ``row_parts`` is fp32 ``[slots, strips, banks, N]``, ``col_parts`` ``[slots, groups, banks, M]``. The ``_bank``
    arguments are strides, 0 if shared. Where pairs are SELF by position (``DIAGONAL``) the reductions over everything
    are ``_ALWAYS`` alike; the others are ``_NEAR`` the diagonal and without SELF ``_FAR`` from it.
    """
    pid = tl.program_id(0)
    bank = (pid // (groups * strips)).to(tl.int64)
    group, strip = swizzle(pid % (groups * strips), groups, strips, BAND)
    x += bank * x_bank
    y += bank * y_bank
    scale = tl.load(scale_ptr) * LOG2E
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr) * LOG2E
    first_row_tile = group * group_tiles
    last_row_tile = tl.minimum(first_row_tile + group_tiles, tl.cdiv(N, BLOCK_M))
    first_col_tile = strip * strip_tiles
    last_col_tile = tl.minimum(first_col_tile + strip_tiles, tl.cdiv(M, BLOCK_N))
    row_slot = strips * tl.cast(banks, tl.int64) * N
    col_slot = groups * tl.cast(banks, tl.int64) * M
    row_parts += (strip * banks + bank) * N
    col_parts += (group * banks + bank) * M

    for row_tile in range(first_row_tile, last_row_tile):
        rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_ok = rows < N
        row_label, row_id = load_keys(
            row_labels + bank * row_label_bank if HAS_LABELS else row_labels,
            row_ids + bank * row_id_bank if HAS_IDS else row_ids,
            rows, row_ok, HAS_LABELS, HAS_IDS,
        )  # fmt: skip
        state = empty_state(ROWS, BLOCK_M)
        for col_tile in range(first_col_tile, last_col_tile):
            cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
            col_ok = cols < M
            col_label, col_id = load_keys(
                col_labels + bank * col_label_bank if HAS_LABELS else col_labels,
                col_ids + bank * col_id_bank if HAS_IDS else col_ids,
                cols, col_ok, HAS_LABELS, HAS_IDS,
            )  # fmt: skip
            # Out of range an existing row is read again; relate() keeps it out.
            dots = products(
                x, y, tl.minimum(rows, N - 1), tl.minimum(cols, M - 1), D,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            t = dots * scale + bias
            relation = relate(
                rows, cols, N, M, row_label, col_label, row_id, col_id,
                HAS_LABELS, HAS_IDS, False, MASK_N, MASK_M, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            col_state = empty_state(COLS, BLOCK_N)
            state, col_state = _reduce_both(t, relation, state, col_state, ROWS_ALWAYS, COLS_ALWAYS)
            if DIAGONAL:
                if crosses_diagonal(row_tile * BLOCK_M, col_tile * BLOCK_N, BLOCK_M, BLOCK_N):
                    relation = relate(
                        rows, cols, N, M, row_label, col_label, row_id, col_id,
                        HAS_LABELS, HAS_IDS, True, MASK_N, MASK_M, BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                    state, col_state = _reduce_both(t, relation, state, col_state, ROWS_NEAR, COLS_NEAR)
                else:
                    state, col_state = _reduce_both(t, relation, state, col_state, ROWS_FAR, COLS_FAR)

            seen = col_ok & (row_tile > first_row_tile)
            for c in tl.static_range(len(COLS)):
                total, peak = col_state[c]
                totals = col_parts + c * col_slot + cols
                before = tl.load(totals, mask=seen, other=0.0)
                if COLS[c][0] == LSE:
                    peaks = col_parts + COLS[c][2] * col_slot + cols
                    total, peak = join(total, peak, before, tl.load(peaks, mask=seen, other=float("-inf")))
                    tl.store(peaks, peak, mask=col_ok)
                else:
                    total += before
                tl.store(totals, total, mask=col_ok)

        for r in tl.static_range(len(ROWS)):
            total, peak = state[r]
            tl.store(row_parts + r * row_slot + rows, total, mask=row_ok)
            if ROWS[r][0] == LSE:
                tl.store(row_parts + ROWS[r][2] * row_slot + rows, peak, mask=row_ok)
        # The next row tile reads column states that other threads of this program have written.
        tl.debug_barrier()


@triton.jit
def merge_kernel(parts, out, items, count, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """``parts`` fp32 [slots, count, items] of partial states → ``out`` fp32 [len(SPEC), items], in natural units."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < items
    slot = count * tl.cast(items, tl.int64)
    for r in tl.static_range(len(SPEC)):
        total = tl.zeros((BLOCK,), tl.float32)
        peak = tl.full((BLOCK,), float("-inf"), tl.float32)
        at = parts + index
        for _ in range(count):
            other = tl.load(at + r * slot, mask=inside, other=0.0)
            if SPEC[r][0] == LSE:
                other_peak = tl.load(at + SPEC[r][2] * slot, mask=inside, other=float("-inf"))
                total, peak = join(total, peak, other, other_peak)
            else:
                total += other
            at += items
        if SPEC[r][0] == LSE:
            total = peak * LN2 + tl.log(tl.where(total == 0.0, 1.0, total))  # the empty set: −inf + 0
        elif SPEC[r][0] == SUM:
            total = total * LN2
        tl.store(out + r * tl.cast(items, tl.int64) + index, total, mask=inside)


@triton.jit
def gradient_kernel(
    x, y, scale_ptr, bias_ptr, norm_ptr, row_labels, col_labels, row_ids, col_ids,
    grad_rows, grad_cols, row_out, col_out, g_out, totals_out,
    N, M, D, banks, first_bank, first_row, chunk_rows, g_stride,
    x_bank, y_bank, row_label_bank, col_label_bank, row_id_bank, col_id_bank,
    ROWS: tl.constexpr, ROWS_ALWAYS: tl.constexpr, ROWS_NEAR: tl.constexpr, ROWS_FAR: tl.constexpr,
    COLS: tl.constexpr, COLS_ALWAYS: tl.constexpr, COLS_NEAR: tl.constexpr, COLS_FAR: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, DIAGONAL: tl.constexpr,
    HAS_NORM: tl.constexpr, STORE: tl.constexpr, TOTALS: tl.constexpr,
    MASK_N: tl.constexpr, MASK_M: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of G for the rows [first_row, first_row + chunk_rows) of some banks.

    ``g_out`` is ``[banks in the chunk, chunk_rows, g_stride]`` in the dtype of x, times ``norm``; ``totals_out`` is
    fp32 ``[2, programs]``: Σ G∘(x yᵀ) and Σ G of each tile, from fp32 values.
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
    scale = tl.load(scale_ptr) * LOG2E
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr) * LOG2E
    dots = products(
        x + bank * x_bank, y + bank * y_bank, tl.minimum(rows, N - 1), tl.minimum(cols, M - 1), D,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    t = dots * scale + bias

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
    rows_sources = load_gradients(grad_rows, row_out, bank * N + rows, row_ok, tl.cast(banks, tl.int64) * N, ROWS)
    cols_sources = load_gradients(grad_cols, col_out, bank * M + cols, col_ok, tl.cast(banks, tl.int64) * M, COLS)
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # A chunk may end inside a tile whose next rows exist: they belong to the next chunk.
    end = first_row + chunk_rows
    relation = relate(
        rows, cols, end, M, row_label, col_label, row_id, col_id,
        HAS_LABELS, HAS_IDS, False, MASK_N, MASK_M, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    g = gradient_tile(t, relation, g, rows_sources, ROWS_ALWAYS, 1)
    g = gradient_tile(t, relation, g, cols_sources, COLS_ALWAYS, 0)
    if DIAGONAL:
        if crosses_diagonal(first_row + row_tile * BLOCK_M, col_tile * BLOCK_N, BLOCK_M, BLOCK_N):
            relation = relate(
                rows, cols, end, M, row_label, col_label, row_id, col_id,
                HAS_LABELS, HAS_IDS, True, MASK_N, MASK_M, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            g = gradient_tile(t, relation, g, rows_sources, ROWS_NEAR, 1)
            g = gradient_tile(t, relation, g, cols_sources, COLS_NEAR, 0)
        else:
            g = gradient_tile(t, relation, g, rows_sources, ROWS_FAR, 1)
            g = gradient_tile(t, relation, g, cols_sources, COLS_FAR, 0)

    if TOTALS:
        tl.store(totals_out + pid, tl.sum(g * dots))
        tl.store(totals_out + tl.num_programs(0) + pid, tl.sum(g))
    if STORE:
        if HAS_NORM:
            g = g * tl.load(norm_ptr)
        at = g_out + (slab * chunk_rows + local)[:, None] * g_stride + cols[None, :]
        tl.store(at, g.to(g_out.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])
