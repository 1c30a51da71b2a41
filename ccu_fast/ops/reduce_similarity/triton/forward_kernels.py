"""The forward kernels of reduce_similarity.

In plain torch, for one bank and CLIP's reductions:

    bound_kernel    bound = abs(scale) * log2(e) * norm(x, dim=1).max() * norm(y, dim=1).max()
                    shift = (bound - top).clamp(min=0).ceil()
    forward_kernel  E = (scale * log2(e) * x @ y.T - shift).exp2()          # a tile; kept in bf16 where there is room
                    row = E.sum(1);  col = E.sum(0)                         # and sums, softplus, over any relations
    own_kernel      positive = scale * (x * y).sum(1) + bias                # sums over SELF by position need no tiles
    merge_kernel    row = (row.log2() + shift) * log(2) + bias              # the same for col
    online_kernel   row = (scale * x @ y.T + bias).logsumexp(1)             # where row was too small to be right

Work. 2·N·M·D FLOPs on the tensor cores and one exponential per pair, whatever is reduced; x and y come from L2; 2 bytes
per pair are written where E is kept. The bound reads x and y once more, (N + M)·D.

The grid. A tile of S serves rows and columns at once, so its partial sums go both ways. A program owns a rectangle: a
*group* of row tiles by a *strip* of column tiles, and walks it row tile by row tile. It keeps the sums of its current
row tile in registers along the strip and those of the strip's columns in a private row of the column buffer, which
stays in L2 (and is not read at all when the group is one row tile). Partial sums are therefore N·strips + M·groups,
both counts bounded however large N·M is; the merge adds them in a fixed order: no atomics, the same bits every time.
Programs walk in bands of rows so that those running together share x and y in L2.

The shift makes overflow impossible: no e is above 2^120 / max(N, M). Underflow is possible where the bound of |S| is
more than about 60, and the merge detects it: a sum below count · 2^-102 could miss more than 2^-24 of itself. The merge
raises the flag of such a block of rows, and online_kernel, which is always launched, returns at once if no flag is up.
Nothing waits for the host.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ccu_fast.ops.reduce_similarity.triton.tile import (
    EXPECTED,
    LN2,
    LOG2E,
    LSE,
    SUM,
    crosses_diagonal,
    empty_online,
    empty_state,
    exponential,
    load_bias,
    load_keys,
    load_limits,
    products,
    reduce_online,
    reduce_tile,
    relate,
    swizzle,
    within,
)

BAND = tl.constexpr(8)
# Partial sums of an item that the merge loads at once.
AT_ONCE = tl.constexpr(8)
# What the stash opens with: the shift, and whether any row or column needed the online maximum.
SHIFT = tl.constexpr(0)
ONLINE = tl.constexpr(1)


@triton.jit
def _largest_square(t, rows, D, programs, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The largest |row|² among this program's rows; NaN does not count."""
    largest = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(tl.program_id(0) * BLOCK_M, rows, programs * BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        square = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for start in range(0, D, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = (row < rows)[:, None] & (k < D)[None, :]
            value = tl.load(t + row.to(tl.int64)[:, None] * D + k[None, :], mask=inside, other=0.0).to(tl.float32)
            square += value * value
        largest = tl.maximum(largest, tl.sum(square, 1))
    return tl.max(largest, 0)


@triton.jit
def bound_kernel(x, y, out, x_rows, y_rows, D, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Largest squared norms, one of x and one of y for each program: ``out`` fp32 ``[2, programs]``."""
    programs = tl.num_programs(0)
    tl.store(out + tl.program_id(0), _largest_square(x, x_rows, D, programs, BLOCK_M, BLOCK_K))
    tl.store(out + programs + tl.program_id(0), _largest_square(y, y_rows, D, programs, BLOCK_M, BLOCK_K))


@triton.jit
def bounded_shift(squares, scale, top, PROGRAMS: tl.constexpr):
    """The smallest whole number that keeps every e at 2^top or below, by Cauchy and Schwarz; 0 if nothing is needed.

    It is a whole number and as small as can be, so that subtracting it costs S few digits or none.
    """
    index = tl.arange(0, PROGRAMS)
    x_norm = tl.sqrt(tl.max(tl.load(squares + index), 0))
    y_norm = tl.sqrt(tl.max(tl.load(squares + PROGRAMS + index), 0))
    # Half a percent for what rounding, that of TF32 included, adds to norms and products.
    bound = tl.abs(scale) * x_norm * y_norm * 1.005
    return tl.minimum(tl.maximum(tl.ceil(bound - top), 0.0), 1e30)


@triton.jit
def own_kernel(
    x, y, scale_ptr, bias_ptr, row_labels, col_labels, row_out, col_out,
    N, M, D, banks, x_bank, y_bank, row_label_bank, col_label_bank,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """S[i, i] of a paired problem into its row and column results number ROWS and COLS: no tiles are needed."""
    blocks = tl.cdiv(tl.maximum(N, M), BLOCK_M)
    bank = (tl.program_id(0) // blocks).to(tl.int64)
    index = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (index < N) & (index < M)
    dots = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    x += (bank * x_bank + index)[:, None] * D
    y += (bank * y_bank + index)[:, None] * D
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (k < D)[None, :]
        a = tl.load(x + k[None, :], mask=mask, other=0.0).to(tl.float32)
        dots += a * tl.load(y + k[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.sum(dots, 1) * tl.load(scale_ptr)
    if bias_ptr is not None:
        value += tl.load(bias_ptr)
    if row_labels is not None:
        row_label = tl.load(row_labels + bank * row_label_bank + index, mask=inside, other=-1)
        col_label = tl.load(col_labels + bank * col_label_bank + index, mask=inside, other=-1)
        inside = (row_label >= 0) & (col_label >= 0)
    value = tl.where(inside, value, 0.0)
    for r in tl.static_range(len(ROWS)):
        tl.store(row_out + (ROWS[r] * tl.cast(banks, tl.int64) + bank) * N + index, value, mask=index < N)
    for c in tl.static_range(len(COLS)):
        tl.store(col_out + (COLS[c] * tl.cast(banks, tl.int64) + bank) * M + index, value, mask=index < M)


@triton.jit
def forward_kernel(
    x, y, squares, scale_ptr, bias_ptr, row_labels, col_labels, row_ids, col_ids,
    row_limits, col_limits, guide_x, guide_y, teacher, row_parts, col_parts, header, kept,
    top, N, M, D, banks, x_bank, y_bank, row_label_bank, col_label_bank, row_id_bank, col_id_bank,
    row_limit_bank, col_limit_bank, guide_x_bank, guide_y_bank, guide_d,
    groups, group_tiles, strips, strip_tiles, kept_rows, kept_stride,
    ROWS: tl.constexpr, ROWS_ALWAYS: tl.constexpr, ROWS_NEAR: tl.constexpr, ROWS_FAR: tl.constexpr,
    COLS: tl.constexpr, COLS_ALWAYS: tl.constexpr, COLS_NEAR: tl.constexpr, COLS_FAR: tl.constexpr,
    DIAGONAL: tl.constexpr, MASK_N: tl.constexpr, MASK_M: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    PROGRAMS: tl.constexpr, KEEP: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Partial row and column sums of one rectangle of tiles.

    ``row_parts`` is fp32 ``[len(ROWS), strips, banks, N]``, ``col_parts`` ``[len(COLS), groups, banks, M]``. ``kept``
    takes E of the first ``kept_rows`` rows, counted through all banks. ``x_bank`` and ``y_bank`` are rows from one bank
    to the next, the other ``_bank`` arguments are elements; 0 if shared. Where pairs are SELF by position
    (``DIAGONAL``) reductions over everything are in ``_ALWAYS``; the others are in ``_NEAR`` for tiles that cross the
    diagonal and, without SELF, in ``_FAR`` for the rest.
    """
    pid = tl.program_id(0)
    bank = (pid // (groups * strips)).to(tl.int64)
    group, strip = swizzle(pid % (groups * strips), groups, strips, BAND)
    scale = tl.load(scale_ptr) * LOG2E
    shift = bounded_shift(squares, scale, top, PROGRAMS)
    if pid == 0:
        tl.store(header + SHIFT, shift)
    bias = load_bias(bias_ptr)
    first_row_tile = group * group_tiles
    last_row_tile = tl.minimum(first_row_tile + group_tiles, tl.cdiv(N, BLOCK_M))
    first_col_tile = strip * strip_tiles
    last_col_tile = tl.minimum(first_col_tile + strip_tiles, tl.cdiv(M, BLOCK_N))
    row_slot = strips * tl.cast(banks, tl.int64) * N
    col_slot = groups * tl.cast(banks, tl.int64) * M
    row_parts += (strip * banks + bank) * N
    col_parts += (group * banks + bank) * M
    row_keys = row_labels, row_ids, row_label_bank, row_id_bank
    col_keys = col_labels, col_ids, col_label_bank, col_id_bank

    for row_tile in range(first_row_tile, last_row_tile):
        row = row_tile * BLOCK_M
        rows = row + tl.arange(0, BLOCK_M)
        row_ok = rows < N
        row_names = load_keys(row_keys, bank, rows, row_ok)
        row_limit = row_limits, load_limits(row_limits, bank, row_limit_bank, rows, row_ok), teacher
        state = empty_state(ROWS, BLOCK_M)
        for col_tile in range(first_col_tile, last_col_tile):
            col = col_tile * BLOCK_N
            cols = col + tl.arange(0, BLOCK_N)
            col_ok = cols < M
            col_names = load_keys(col_keys, bank, cols, col_ok)
            col_limit = col_limits, load_limits(col_limits, bank, col_limit_bank, cols, col_ok), teacher
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
            t = dots * scale + bias
            e = exponential(dots, scale, shift)
            if KEEP:
                flat = bank * N + rows
                at = kept + flat[:, None] * kept_stride + cols[None, :]
                # Rows beyond N are the next bank's. Columns beyond M fill up the row, so that whole packs are stored.
                mask = ((flat < kept_rows) & row_ok)[:, None]
                if not WHOLE:
                    mask = mask & (cols < kept_stride)[None, :]
                tl.store(at, e.to(kept.dtype.element_ty), mask=mask)
            if MASK_N or MASK_M:  # noqa: SIM102
                if (row + BLOCK_M > N) | (col + BLOCK_N > M):
                    e = tl.where(row_ok[:, None] & col_ok[None, :], e, 0.0)
            relation = relate(rows, cols, M, row_names, col_names, row_keys, False, False)
            of_rows = within(relation, similar, row_limit, 1)
            of_cols = within(relation, similar, col_limit, 0)
            col_state = empty_state(COLS, BLOCK_N)
            row_state = reduce_tile(t, e, of_rows, state, ROWS_ALWAYS, 1, col_ok, MASK_M, similar, row_limit)
            col_state = reduce_tile(t, e, of_cols, col_state, COLS_ALWAYS, 0, row_ok, MASK_N, similar, col_limit)
            if DIAGONAL:
                if crosses_diagonal(row, col, BLOCK_M, BLOCK_N):
                    relation = relate(rows, cols, M, row_names, col_names, row_keys, True, False)
                    of_rows = within(relation, similar, row_limit, 1)
                    of_cols = within(relation, similar, col_limit, 0)
                    row_state = reduce_tile(t, e, of_rows, row_state, ROWS_NEAR, 1, col_ok, MASK_M, similar, row_limit)
                    col_state = reduce_tile(t, e, of_cols, col_state, COLS_NEAR, 0, row_ok, MASK_N, similar, col_limit)
                else:
                    row_state = reduce_tile(t, e, of_rows, row_state, ROWS_FAR, 1, col_ok, MASK_M, similar, row_limit)
                    col_state = reduce_tile(t, e, of_cols, col_state, COLS_FAR, 0, row_ok, MASK_N, similar, col_limit)
            if len(ROWS) > 0:  # Triton 3.4 cannot carry an empty tuple, and nothing else, through a loop
                state = row_state

            # Compared as vectors, because the interpreter makes no mask of a scalar.
            seen = col_ok & (tl.full((BLOCK_N,), row_tile, tl.int32) > first_row_tile)
            for c in tl.static_range(len(COLS)):
                totals = col_parts + c * col_slot + cols
                tl.store(totals, col_state[c] + tl.load(totals, mask=seen, other=0.0), mask=col_ok)

        for r in tl.static_range(len(ROWS)):
            tl.store(row_parts + r * row_slot + rows, state[r], mask=row_ok)
        # The next row tile reads column sums that other threads of this program have written.
        tl.debug_barrier()


@triton.jit
def _merge(parts, out, flags, block, shift, bias, banks, items, count, least, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(items, BLOCK)
    bank = (block // blocks).to(tl.int64)
    index = block % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = index < items
    slot = tl.cast(banks, tl.int64) * items
    low = tl.zeros((BLOCK,), tl.int32)
    part = tl.arange(0, AT_ONCE)
    for r in tl.static_range(len(SPEC)):
        at = parts + r * count * slot + bank * items + index
        totals = tl.zeros((AT_ONCE, BLOCK), tl.float32)
        for first in range(0, count, AT_ONCE):
            mask = (first + part < count)[:, None] & inside[None, :]
            totals += tl.load(at[None, :] + (first + part)[:, None] * slot, mask=mask, other=0.0)
        total = tl.sum(totals, 0)
        if SPEC[r][0] == LSE:
            low |= ((total > 0.0) & (total < least)).to(tl.int32) | (total == float("inf")).to(tl.int32)
            empty = total == 0.0
            total = tl.where(empty, float("-inf"), (tl.log2(tl.where(empty, 1.0, total)) + shift + bias) * LN2)
        elif SPEC[r][0] == SUM or SPEC[r][0] == EXPECTED:
            total = total * LN2
        tl.store(out + SPEC[r][2] * slot + bank * items + index, total, mask=inside)
    tl.store(flags + block, tl.max(low, 0))


@triton.jit
def merge_kernel(
    row_parts, col_parts, row_out, col_out, flags, header, bias_ptr, banks, N, M, strips, groups,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums → row and column results in natural units, and a flag for every block that needs another look."""
    shift = tl.load(header + SHIFT)
    bias = load_bias(bias_ptr)
    row_blocks = banks * tl.cdiv(N, BLOCK) if len(ROWS) > 0 else 0
    pid = tl.program_id(0)
    least = 1.9721522630525295e-31  # 2^-102
    if pid < row_blocks:
        _merge(row_parts, row_out, flags, pid, shift, bias, banks, N, strips, least * M, ROWS, BLOCK)
    else:
        pid -= row_blocks
        _merge(col_parts, col_out, flags + row_blocks, pid, shift, bias, banks, M, groups, least * N, COLS, BLOCK)


@triton.jit
def _online(
    side, other, common, block,
    SPEC: tl.constexpr, DIAGONAL: tl.constexpr, MASK_M: tl.constexpr, MASK_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of one side's items; ``side`` and ``other`` are what the caller knows of either side."""
    x, row_keys, x_bank, N, out, limits, limit_bank, u, u_bank = side
    y, col_keys, y_bank, M, _, _, _, v, v_bank = other
    scale, bias, D, banks, guide_d, teacher = common
    blocks = tl.cdiv(N, BLOCK_M)
    bank = (block // blocks).to(tl.int64)
    row = block % blocks * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    row_ok = rows < N
    row_names = load_keys(row_keys, bank, rows, row_ok)
    limit = limits, load_limits(limits, bank, limit_bank, rows, row_ok), teacher
    state = empty_online(SPEC, BLOCK_M)
    for col in range(0, M, BLOCK_N):
        cols = col + tl.arange(0, BLOCK_N)
        col_names = load_keys(col_keys, bank, cols, cols < M)
        dots = products(
            x, y, row, col, bank * x_bank, bank * y_bank, N, M, D, False, MASK_K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
        )
        similar = dots
        if u is not None and teacher is None:
            similar = products(
                u, v, row, col, bank * u_bank, bank * v_bank, N, M, guide_d, False, False, BLOCK_M, BLOCK_N, BLOCK_K,
                PRECISION,
            )  # fmt: skip
        relation = relate(rows, cols, M, row_names, col_names, row_keys, DIAGONAL, MASK_M)
        relation = within(relation, similar, limit, 1)
        if len(SPEC) > 0:  # as in forward_kernel
            state = reduce_online(dots * scale + bias, relation, state, SPEC)
    for r in tl.static_range(len(SPEC)):
        if SPEC[r][0] == LSE:
            total, peak = state[r]
            lse = (peak + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN2  # the empty set: −inf + 0
            tl.store(out + (SPEC[r][2] * tl.cast(banks, tl.int64) + bank) * N + rows, lse, mask=row_ok)


@triton.jit
def any_flagged(flags, count, header):
    """Whether one of the flags is up, which the first program also tells the backward pass."""
    flagged = tl.zeros((1024,), tl.int32)
    for start in range(0, count, 1024):
        index = start + tl.arange(0, 1024)
        flagged |= tl.load(flags + index, mask=index < count, other=0)
    online = tl.max(flagged, 0)
    if tl.program_id(0) == 0:
        tl.store(header + ONLINE, online.to(tl.float32))
    return online != 0


@triton.jit
def online_kernel(
    x, y, scale_ptr, bias_ptr, row_labels, col_labels, row_ids, col_ids,
    row_limits, col_limits, guide_x, guide_y, teacher, row_out, col_out, flags, header,
    N, M, D, banks, x_bank, y_bank, row_label_bank, col_label_bank, row_id_bank, col_id_bank,
    row_limit_bank, col_limit_bank, guide_x_bank, guide_y_bank, guide_d,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIAGONAL: tl.constexpr,
    MASK_N: tl.constexpr, MASK_M: tl.constexpr, MASK_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Every lse of the flagged blocks again, each row with its own maximum: one walk along y for BLOCK_M rows.

    Columns are rows of the transposed problem. The grid is a few programs for each processor, which share the blocks.
    """
    row_blocks = banks * tl.cdiv(N, BLOCK_M) if len(ROWS) > 0 else 0
    blocks = row_blocks + (banks * tl.cdiv(M, BLOCK_M) if len(COLS) > 0 else 0)
    if any_flagged(flags, blocks, header):
        common = tl.load(scale_ptr) * LOG2E, load_bias(bias_ptr), D, banks, guide_d, teacher
        row_keys = row_labels, row_ids, row_label_bank, row_id_bank
        col_keys = col_labels, col_ids, col_label_bank, col_id_bank
        rows = x, row_keys, x_bank, N, row_out, row_limits, row_limit_bank, guide_x, guide_x_bank
        cols = y, col_keys, y_bank, M, col_out, col_limits, col_limit_bank, guide_y, guide_y_bank
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            if tl.load(flags + block) != 0:
                if block < row_blocks:
                    _online(
                        rows, cols, common, block, ROWS, DIAGONAL, MASK_M, MASK_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
                    )
                else:
                    column = block - row_blocks
                    _online(
                        cols, rows, common, column, COLS, DIAGONAL, MASK_N, MASK_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
                    )
