"""reduce_similarity of batches so small that launches, not arithmetic, take the time: one kernel each way.

In plain torch, for one bank and CLIP's reductions:

    small_forward_kernel   t = scale * x @ y.T + bias;  row = t.logsumexp(1);  col = t.logsumexp(0)
    small_gradient_kernel  G = grad_row[:, None] * (t - row[:, None]).exp() + grad_col * (t - col).exp()
                           dx = scale * G @ y;  dy = scale * G.T @ x;  dscale = (G * (x @ y.T)).sum();  dbias = G.sum()

Rows are one half of the grid and columns, the rows of the transposed problem, the other. A program keeps BLOCK_M whole
items of its side in registers and walks along the other side, of which each step is read once and serves S and, in the
backward pass, the gradient too: nothing of N × M is ever stored, and no sum is shared between programs. S is computed
for rows and again for columns, 8·N·M·D FLOPs forward and backward instead of 6: at 1024 × 1024 × 512 that costs a
few microseconds, and the launches it saves cost tens.

Every row has its own maximum, as in ``online_kernel``. G is rounded once, to the dtype of its product, after a power of
two that keeps fp16 in range.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ccu_fast.ops.reduce_similarity.triton.tile import (
    COUNT,
    LN2,
    LOG2E,
    LOGSIGMOID,
    LSE,
    SOFTPLUS,
    SUM,
    empty_online,
    gradient_online,
    largest,
    load_bias,
    load_gradients,
    load_keys,
    load_limits,
    power_of_two,
    reduce_online,
    relate,
    softplus,
    within,
)


@triton.jit
def _items(t, index, items, D, BLOCK_D: tl.constexpr, MASK_D: tl.constexpr):
    """Whole rows ``index`` of one bank; 0 beyond the last."""
    k = tl.arange(0, BLOCK_D)
    mask = (index < items)[:, None]
    if MASK_D:
        mask = mask & (k < D)[None, :]
    return tl.load(t + index[:, None] * D + k[None, :], mask=mask, other=0.0)


@triton.jit
def _reduce(
    side, other, common, block,
    SPEC: tl.constexpr, DIAGONAL: tl.constexpr, MASK_M: tl.constexpr, MASK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The results of one block of one side's items; ``side`` and ``other`` are what the caller knows of either side."""
    x, row_keys, x_bank, N, out, limits, limit_bank = side
    y, col_keys, y_bank, M, _, _, _ = other
    scale, bias, D, banks = common
    blocks = tl.cdiv(N, BLOCK_M)
    bank = (block // blocks).to(tl.int64)
    rows = block % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row_names = load_keys(row_keys, bank, rows, rows < N)
    limit = limits, load_limits(limits, bank, limit_bank, rows, rows < N), None
    a = _items(x + bank * x_bank * D, rows, N, D, BLOCK_D, MASK_D)
    state = empty_online(SPEC, BLOCK_M)
    for start in range(0, M, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col_names = load_keys(col_keys, bank, cols, cols < M)
        b = _items(y + bank * y_bank * D, cols, M, D, BLOCK_D, MASK_D)
        dots = tl.dot(a, b.T)
        t = dots * scale + bias
        relation = relate(rows, cols, M, row_names, col_names, row_keys, DIAGONAL, MASK_M)
        relation = within(relation, dots, limit, 1)
        online = reduce_online(t, relation, state, SPEC)
        others = ()
        for r in tl.static_range(len(SPEC)):
            total, peak = online[r]
            if SPEC[r][0] != LSE:
                value = t
                if SPEC[r][0] == SOFTPLUS:
                    value = softplus(t)
                elif SPEC[r][0] == LOGSIGMOID:
                    value = -softplus(-t)
                elif SPEC[r][0] == COUNT:
                    value = 1.0
                total += tl.sum(tl.where((relation & SPEC[r][1]) != 0, value, 0.0), 1)
            others = others + ((total, peak),)
        if len(SPEC) > 0:  # Triton 3.4 cannot carry an empty tuple, and nothing else, through a loop
            state = others
    for r in tl.static_range(len(SPEC)):
        total, peak = state[r]
        if SPEC[r][0] == LSE:
            total = (peak + tl.log2(tl.where(total == 0.0, 1.0, total))) * LN2  # the empty set: −inf + 0
        elif SPEC[r][0] == SUM:
            total = total * LN2
        tl.store(out + (SPEC[r][2] * tl.cast(banks, tl.int64) + bank) * N + rows, total, mask=rows < N)


@triton.jit
def small_forward_kernel(
    x, y, scale_ptr, bias_ptr, row_labels, col_labels, row_ids, col_ids, row_out, col_out,
    row_limits, col_limits,
    N, M, D, banks, x_bank, y_bank, row_label_bank, col_label_bank, row_id_bank, col_id_bank,
    row_limit_bank, col_limit_bank,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIAGONAL: tl.constexpr,
    MASK_N: tl.constexpr, MASK_M: tl.constexpr, MASK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row and column results ``[len(ROWS), banks, N]`` and ``[len(COLS), banks, M]``.

    ``x_bank`` and ``y_bank`` are rows from one bank to the next, the other ``_bank`` arguments are elements; 0 if
    shared. MASK_N and MASK_M: the side is no multiple of BLOCK_N.
    """
    common = tl.load(scale_ptr) * LOG2E, load_bias(bias_ptr), D, banks
    rows = x, (row_labels, row_ids, row_label_bank, row_id_bank), x_bank, N, row_out, row_limits, row_limit_bank
    cols = y, (col_labels, col_ids, col_label_bank, col_id_bank), y_bank, M, col_out, col_limits, col_limit_bank
    row_blocks = banks * tl.cdiv(N, BLOCK_M) if len(ROWS) > 0 else 0
    pid = tl.program_id(0)
    if pid < row_blocks:
        _reduce(rows, cols, common, pid, ROWS, DIAGONAL, MASK_M, MASK_D, BLOCK_M, BLOCK_N, BLOCK_D)
    else:
        _reduce(cols, rows, common, pid - row_blocks, COLS, DIAGONAL, MASK_N, MASK_D, BLOCK_M, BLOCK_N, BLOCK_D)


@triton.jit
def _gradient(
    side, other, common, block,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIAGONAL: tl.constexpr, SHARED: tl.constexpr, STORE: tl.constexpr,
    TOTALS: tl.constexpr, EXPONENT: tl.constexpr, MASK_M: tl.constexpr, MASK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of one side's items, and the block's totals."""
    x, row_keys, x_bank, N, grad_rows, row_out, dx, row_limits, row_limit_bank = side
    y, col_keys, y_bank, M, grad_cols, col_out, _, col_limits, col_limit_bank = other
    natural, bias, D, banks, totals = common
    scale = natural * LOG2E
    blocks = tl.cdiv(N, BLOCK_M)
    # One x for all banks: its gradient is the sum over them.
    first_bank = 0 if SHARED else block // blocks
    last_bank = banks if SHARED else first_bank + 1
    rows = block % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < N
    row_slot = tl.cast(banks, tl.int64) * N
    col_slot = tl.cast(banks, tl.int64) * M
    x += tl.cast(first_bank, tl.int64) * x_bank * D
    a = _items(x, rows, N, D, BLOCK_D, MASK_D)
    up = 1.0
    down = 1.0
    if EXPONENT is not None:
        bound = largest(grad_rows, row_slot, len(ROWS)) + largest(grad_cols, col_slot, len(COLS))
        up, down = power_of_two(bound, EXPONENT)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    plain = tl.zeros((BLOCK_M,), tl.float32)
    for index in range(first_bank, last_bank):
        bank = tl.cast(index, tl.int64)
        row_names = load_keys(row_keys, bank, rows, row_ok)
        row_limit = row_limits, load_limits(row_limits, bank, row_limit_bank, rows, row_ok), None
        row_sources = load_gradients((grad_rows, row_out, bank * N + rows, row_ok, row_slot), ROWS)
        for start in range(0, M, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            col_names = load_keys(col_keys, bank, cols, cols < M)
            b = _items(y + bank * y_bank * D, cols, M, D, BLOCK_D, MASK_D)
            dots = tl.dot(a, b.T)
            relation = relate(rows, cols, M, row_names, col_names, row_keys, DIAGONAL, MASK_M)
            relation = tl.where(row_ok[:, None], relation, 0)
            col_limit = col_limits, load_limits(col_limits, bank, col_limit_bank, cols, cols < M), None
            of_rows = within(relation, dots, row_limit, 1)
            of_cols = within(relation, dots, col_limit, 0)
            col_sources = load_gradients((grad_cols, col_out, bank * M + cols, cols < M, col_slot), COLS)
            t = dots * scale + bias
            g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            g = gradient_online(t, of_rows, g, row_sources, ROWS, 1)
            g = gradient_online(t, of_cols, g, col_sources, COLS, 0)
            if TOTALS:
                weighted += tl.sum(g * dots, 1)
                plain += tl.sum(g, 1)
            if STORE:
                acc = tl.dot((g * up).to(b.dtype), b, acc)
    if STORE:
        k = tl.arange(0, BLOCK_D)
        at = dx + (tl.cast(first_bank, tl.int64) * x_bank + rows)[:, None] * D + k[None, :]
        mask = row_ok[:, None]
        if MASK_D:
            mask = mask & (k < D)[None, :]
        tl.store(at, (acc * (natural * down)).to(dx.dtype.element_ty), mask=mask)
    if TOTALS:
        tl.store(totals + block, tl.sum(weighted, 0))
        tl.store(totals + (1 if SHARED else banks) * blocks + block, tl.sum(plain, 0))


@triton.jit
def small_gradient_kernel(
    x, y, scale_ptr, bias_ptr, row_labels, col_labels, row_ids, col_ids,
    grad_rows, grad_cols, row_out, col_out, dx, dy, totals, row_limits, col_limits,
    N, M, D, banks, row_programs, x_bank, y_bank, row_label_bank, col_label_bank, row_id_bank, col_id_bank,
    row_limit_bank, col_limit_bank,
    ROWS: tl.constexpr, COLS: tl.constexpr, DIAGONAL: tl.constexpr, X_SHARED: tl.constexpr, Y_SHARED: tl.constexpr,
    STORE: tl.constexpr, TOTALS: tl.constexpr, EXPONENT: tl.constexpr,
    MASK_N: tl.constexpr, MASK_M: tl.constexpr, MASK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx by the first ``row_programs`` programs, dy by the rest.

    The first also make the sums for dscale and dbias, fp32 ``[2, row_programs]``. ``STORE``: dx is wanted, ``TOTALS``:
    the sums are.
    """
    common = tl.load(scale_ptr), load_bias(bias_ptr), D, banks, totals
    row_keys = row_labels, row_ids, row_label_bank, row_id_bank
    col_keys = col_labels, col_ids, col_label_bank, col_id_bank
    rows = x, row_keys, x_bank, N, grad_rows, row_out, dx, row_limits, row_limit_bank
    cols = y, col_keys, y_bank, M, grad_cols, col_out, dy, col_limits, col_limit_bank
    pid = tl.program_id(0)
    if pid < row_programs:
        _gradient(
            rows, cols, common, pid, ROWS, COLS, DIAGONAL, X_SHARED, STORE, TOTALS, EXPONENT,
            MASK_M, MASK_D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        _gradient(
            cols, rows, common, pid - row_programs, COLS, ROWS, DIAGONAL, Y_SHARED, True, False, EXPONENT,
            MASK_N, MASK_D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
