"""The kernels of all prefixes at once, of one bank.

In plain torch, with the inverse norms r_q of the rows and c_q of the columns of prefix q (1 if they are not unit):

    prefix_norms_kernel     r_q = 1 / norm(x[:, :d_q], dim=1)
    prefix_forward_kernel   dots_q = dots_{q-1} + x[:, d_{q-1}:d_q] @ y[:, d_{q-1}:d_q].T      # in registers, a tile
                            E_q = (scale * log2(e) * dots_q * r_q[:, None] * c_q - shift).exp2()
                            row_q = E_q.sum(1);  col_q = E_q.sum(0)                            # merged as of P banks
    prefix_online_kernel    every lse of all prefixes with its own maximum, for the rows where one was too small
    prefix_gradient_kernel  G_q of all prefixes from dots_q;  A_q = G_q * r_q[:, None] * c_q + A_{q+1}
                            sums_q = (G_q * dots_q * r_q[:, None] * c_q).sum(1), and .sum(0)
    between them            total[:, d_{q-1}:d_q] = A_q @ y[:, d_{q-1}:d_q]                    # library GEMMs, as for y
    prefix_finish_kernel    dx = scale * (total - x * (sum of sums_p * r_p**2 over p >= q)[:, None])

Work. The three products take 6·N·M·d_P FLOPs, those of the longest prefix alone, and two more to make all dots_q again
in the backward pass; a loop over prefixes takes Σ d_q in the place of d_P. Each prefix costs one exponential per pair
each way and an element of A_q that is written and read. Nothing of E is kept: it would be read and written as often as
A is, for a product that prefixes share.

All prefixes have one shift, that of the longest, which bounds them all. The A_q of a tile are sums from the longest
prefix down, but their products come from the shortest up, so that a tile holds the G_q of all of them.
"""

# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from ccu_fast.ops.l2_normalize.api import EPS
from ccu_fast.ops.reduce_similarity.triton.forward_kernels import BAND, SHIFT, any_flagged, bounded_shift
from ccu_fast.ops.reduce_similarity.triton.tile import (
    LN2,
    LOG2E,
    LSE,
    add_products,
    crosses_diagonal,
    empty_online,
    empty_state,
    exponential,
    load_keys,
    reduce_online,
    reduce_tile,
    relate,
    swizzle,
)

LEAST_NORM = tl.constexpr(EPS)


@triton.jit
def _norms(t, inverse, squares, rows, D, EDGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Inverse norms of this program's rows, fp32 ``[P, rows]``, and the largest |row|², 1 with inverse norms."""
    most = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        square = tl.zeros((BLOCK_M,), tl.float32)
        for q in tl.static_range(len(EDGES) - 1):
            for start in range(EDGES[q], EDGES[q + 1], BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                inside = (row < rows)[:, None] & (k < EDGES[q + 1])[None, :]
                value = tl.load(t + row.to(tl.int64)[:, None] * D + k[None, :], mask=inside, other=0.0).to(tl.float32)
                square += tl.sum(value * value, 1)
            if inverse is not None:
                norm = tl.sqrt_rn(square)
                # Not NaN: the backward pass has zeros for what is ignored, and multiplies them by this.
                norm = tl.where(norm > LEAST_NORM, norm, LEAST_NORM)
                tl.store(inverse + q * tl.cast(rows, tl.int64) + row, tl.div_rn(1.0, norm), mask=row < rows)
        if inverse is None:
            most = tl.maximum(most, square)
    if inverse is not None:
        most += 1.0
    tl.store(squares + tl.program_id(0), tl.max(most, 0))


@triton.jit
def prefix_norms_kernel(
    x, y, x_inverse, y_inverse, squares, N, M, D, EDGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Inverse norms of all prefixes, ``[P, N]`` and ``[P, M]``, if wanted; ``squares`` is ``[2, programs]``."""
    _norms(x, x_inverse, squares, N, D, EDGES, BLOCK_M, BLOCK_K)
    _norms(y, y_inverse, squares + tl.num_programs(0), M, D, EDGES, BLOCK_M, BLOCK_K)


@triton.jit
def factors(x_inverse, y_inverse, q, rows, cols, N, M, row_ok, col_ok):
    """The inverse norms of the rows and columns of a tile; without any the constant 1, which costs nothing."""
    if x_inverse is None:
        return 1.0, 1.0
    else:  # what is not taken is not compiled
        of_rows = tl.load(x_inverse + q * tl.cast(N, tl.int64) + rows, mask=row_ok, other=0.0)
        of_cols = tl.load(y_inverse + q * tl.cast(M, tl.int64) + cols, mask=col_ok, other=0.0)
        return of_rows[:, None], of_cols[None, :]


@triton.jit
def more_products(
    acc,
    x,
    y,
    row,
    col,
    N,
    M,
    D,
    q,
    EDGES: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``acc`` plus the products that prefix q has and the one before has not.

    The end is no constant to the compiler, which would make straight code of short prefixes and load all of it at once.
    """
    end = tl.minimum(EDGES[q + 1], D)
    return add_products(
        acc, x, y, row, col, 0, 0, N, M, D, EDGES[q], end, TMA, False, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )


@triton.jit
def _of_prefix(states, q, COUNT: tl.constexpr):
    """The states of one prefix among those of all."""
    found = ()
    for r in tl.static_range(COUNT):
        found = found + (states[q * COUNT + r],)
    return found


@triton.jit
def prefix_forward_kernel(
    x, y, x_inverse, y_inverse, squares, scale_ptr, row_labels, col_labels, row_ids, col_ids,
    row_parts, col_parts, header, top, N, M, D, groups, group_tiles, strips, strip_tiles, EDGES: tl.constexpr,
    ROWS: tl.constexpr, ROWS_ALWAYS: tl.constexpr, ROWS_NEAR: tl.constexpr, ROWS_FAR: tl.constexpr,
    COLS: tl.constexpr, COLS_ALWAYS: tl.constexpr, COLS_NEAR: tl.constexpr, COLS_FAR: tl.constexpr,
    DIAGONAL: tl.constexpr, MASK_N: tl.constexpr, MASK_M: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Partial row and column sums of one rectangle of tiles, as forward_kernel's of P banks.

    ``EDGES`` is 0 and the prefixes; ``row_parts`` is fp32 ``[len(ROWS), strips, P, N]``, ``col_parts`` ``[len(COLS),
    groups, P, M]``.
    """
    P: tl.constexpr = len(EDGES) - 1
    pid = tl.program_id(0)
    group, strip = swizzle(pid, groups, strips, BAND)
    scale = tl.load(scale_ptr) * LOG2E
    shift = bounded_shift(squares, scale, top, PROGRAMS)
    if pid == 0:
        tl.store(header + SHIFT, shift)
    last_row_tile = tl.minimum((group + 1) * group_tiles, tl.cdiv(N, BLOCK_M))
    last_col_tile = tl.minimum((strip + 1) * strip_tiles, tl.cdiv(M, BLOCK_N))
    row_slot = strips * P * tl.cast(N, tl.int64)
    col_slot = groups * P * tl.cast(M, tl.int64)
    row_parts += strip * P * tl.cast(N, tl.int64)
    col_parts += group * P * tl.cast(M, tl.int64)
    row_keys = row_labels, row_ids, 0, 0
    col_keys = col_labels, col_ids, 0, 0

    for row_tile in range(group * group_tiles, last_row_tile):
        row = row_tile * BLOCK_M
        rows = row + tl.arange(0, BLOCK_M)
        row_ok = rows < N
        row_names = load_keys(row_keys, 0, rows, row_ok)
        state = ()
        for _ in tl.static_range(P):
            state = state + empty_state(ROWS, BLOCK_M)
        for col_tile in range(strip * strip_tiles, last_col_tile):
            col = col_tile * BLOCK_N
            cols = col + tl.arange(0, BLOCK_N)
            col_ok = cols < M
            col_names = load_keys(col_keys, 0, cols, col_ok)
            relation = relate(rows, cols, M, row_names, col_names, row_keys, False, False)
            # Compared as vectors, because the interpreter makes no mask of a scalar.
            seen = col_ok & (tl.full((BLOCK_N,), row_tile, tl.int32) > group * group_tiles)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            after = ()
            for q in tl.static_range(P):
                acc = more_products(acc, x, y, row, col, N, M, D, q, EDGES, TMA, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
                of_rows, of_cols = factors(x_inverse, y_inverse, q, rows, cols, N, M, row_ok, col_ok)
                dots = acc * of_rows * of_cols
                t = dots * scale
                e = exponential(dots, scale, shift)
                if MASK_N or MASK_M:  # noqa: SIM102
                    if (row + BLOCK_M > N) | (col + BLOCK_N > M):
                        e = tl.where(row_ok[:, None] & col_ok[None, :], e, 0.0)
                col_state = empty_state(COLS, BLOCK_N)
                row_state = reduce_tile(t, e, relation, _of_prefix(state, q, len(ROWS)), ROWS_ALWAYS, 1, col_ok, MASK_M)
                col_state = reduce_tile(t, e, relation, col_state, COLS_ALWAYS, 0, row_ok, MASK_N)
                if DIAGONAL:
                    if crosses_diagonal(row, col, BLOCK_M, BLOCK_N):
                        near = relate(rows, cols, M, row_names, col_names, row_keys, True, False)
                        row_state = reduce_tile(t, e, near, row_state, ROWS_NEAR, 1, col_ok, MASK_M)
                        col_state = reduce_tile(t, e, near, col_state, COLS_NEAR, 0, row_ok, MASK_N)
                    else:
                        row_state = reduce_tile(t, e, relation, row_state, ROWS_FAR, 1, col_ok, MASK_M)
                        col_state = reduce_tile(t, e, relation, col_state, COLS_FAR, 0, row_ok, MASK_N)
                after = after + row_state
                for c in tl.static_range(len(COLS)):
                    totals = col_parts + c * col_slot + q * tl.cast(M, tl.int64) + cols
                    tl.store(totals, col_state[c] + tl.load(totals, mask=seen, other=0.0), mask=col_ok)
            if len(ROWS) > 0:  # as in forward_kernel
                state = after

        for q in tl.static_range(P):
            for r in tl.static_range(len(ROWS)):
                at = row_parts + r * row_slot + q * tl.cast(N, tl.int64) + rows
                tl.store(at, state[q * len(ROWS) + r], mask=row_ok)
        # The next row tile reads column sums that other threads of this program have written.
        tl.debug_barrier()


@triton.jit
def _online(
    side, other, results, common, block, EDGES: tl.constexpr, SPEC: tl.constexpr,
    DIAGONAL: tl.constexpr, MASK_M: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of one side's items; ``side`` and ``other`` are what the caller knows of either side."""
    x, x_inverse, row_keys, N = side
    y, y_inverse, col_keys, M = other
    out, flags = results
    scale, D = common
    P: tl.constexpr = len(EDGES) - 1
    flagged = 0
    for q in tl.static_range(P):
        flagged |= tl.load(flags + q * tl.cdiv(N, BLOCK_M) + block)
    if flagged != 0:
        row = block * BLOCK_M
        rows = row + tl.arange(0, BLOCK_M)
        row_ok = rows < N
        row_names = load_keys(row_keys, 0, rows, row_ok)
        state = ()
        for _ in tl.static_range(P):
            state = state + empty_online(SPEC, BLOCK_M)
        for col in range(0, M, BLOCK_N):
            cols = col + tl.arange(0, BLOCK_N)
            col_ok = cols < M
            col_names = load_keys(col_keys, 0, cols, col_ok)
            relation = relate(rows, cols, M, row_names, col_names, row_keys, DIAGONAL, MASK_M)
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            after = ()
            for q in tl.static_range(P):
                acc = more_products(acc, x, y, row, col, N, M, D, q, EDGES, False, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
                of_rows, of_cols = factors(x_inverse, y_inverse, q, rows, cols, N, M, row_ok, col_ok)
                dots = acc * of_rows * of_cols
                after = after + reduce_online(dots * scale, relation, _of_prefix(state, q, len(SPEC)), SPEC)
            if len(SPEC) > 0:  # as in forward_kernel
                state = after
        for q in tl.static_range(P):
            for r in tl.static_range(len(SPEC)):
                if SPEC[r][0] == LSE:
                    total, peak = state[q * len(SPEC) + r]
                    lse = (peak + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN2  # the empty set: −inf + 0
                    tl.store(out + (SPEC[r][2] * P + q) * tl.cast(N, tl.int64) + rows, lse, mask=row_ok)


@triton.jit
def prefix_online_kernel(
    x, y, x_inverse, y_inverse, scale_ptr, row_labels, col_labels, row_ids, col_ids, row_out, col_out, flags, header,
    N, M, D, EDGES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DIAGONAL: tl.constexpr,
    MASK_N: tl.constexpr, MASK_M: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As online_kernel. A block is computed again for all prefixes if one of them is flagged."""
    P: tl.constexpr = len(EDGES) - 1
    row_blocks = tl.cdiv(N, BLOCK_M) if len(ROWS) > 0 else 0
    col_blocks = tl.cdiv(M, BLOCK_M) if len(COLS) > 0 else 0
    if any_flagged(flags, P * (row_blocks + col_blocks), header):
        common = tl.load(scale_ptr) * LOG2E, D
        rows = x, x_inverse, (row_labels, row_ids, 0, 0), N
        cols = y, y_inverse, (col_labels, col_ids, 0, 0), M
        of_rows = row_out, flags
        of_cols = col_out, flags + P * row_blocks
        for block in range(tl.program_id(0), row_blocks, tl.num_programs(0)):
            _online(
                rows, cols, of_rows, common, block, EDGES, ROWS, DIAGONAL, MASK_M, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
            )
        for block in range(tl.program_id(0), col_blocks, tl.num_programs(0)):
            _online(
                cols, rows, of_cols, common, block, EDGES, COLS, DIAGONAL, MASK_N, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
            )
