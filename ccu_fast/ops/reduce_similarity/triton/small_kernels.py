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
    LN2,
    LOG2E,
    LSE,
    SOFTPLUS,
    SUM,
    gradient_online,
    largest,
    load_gradients,
    load_keys,
    power_of_two,
    reduce_online,
    relate,
    softplus,
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
def _keys(labels, ids, bank, label_bank, id_bank, index, items, HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr):
    return load_keys(
        labels + bank * label_bank if HAS_LABELS else labels, ids + bank * id_bank if HAS_IDS else ids,
        index, index < items, HAS_LABELS, HAS_IDS,
    )  # fmt: skip


@triton.jit
def _reduce(
    x, y, scale, bias, row_labels, col_labels, row_ids, col_ids, out, block,
    N, M, D, banks, x_bank, y_bank, row_label_bank, col_label_bank, row_id_bank, col_id_bank,
    SPEC: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, DIAGONAL: tl.constexpr,
    MASK_M: tl.constexpr, MASK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_M)
    bank = (block // blocks).to(tl.int64)
    rows = block % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row_label, row_id = _keys(
        row_labels, row_ids, bank, row_label_bank, row_id_bank, rows, N, HAS_LABELS, HAS_IDS
    )  # fmt: skip
    a = _items(x + bank * x_bank * D, rows, N, D, BLOCK_D, MASK_D)
    state = ()
    for _ in tl.static_range(len(SPEC)):
        state = state + ((tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32)),)
    for start in range(0, M, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        col_label, col_id = _keys(
            col_labels, col_ids, bank, col_label_bank, col_id_bank, cols, M, HAS_LABELS, HAS_IDS
        )  # fmt: skip
        b = _items(y + bank * y_bank * D, cols, M, D, BLOCK_D, MASK_D)
        t = tl.dot(a, b.T) * scale + bias
        relation = relate(
            rows, cols, N, M, row_label, col_label, row_id, col_id,
            HAS_LABELS, HAS_IDS, DIAGONAL, False, MASK_M, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        online = reduce_online(t, relation, state, SPEC)
        others = ()
        for r in tl.static_range(len(SPEC)):
            total, peak = online[r]
            if SPEC[r][0] != LSE:
                value = t
                if SPEC[r][0] == SOFTPLUS:
                    value = softplus(t)
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
    N, M, D, banks, x_bank, y_bank, row_label_bank, col_label_bank, row_id_bank, col_id_bank,
    ROWS: tl.constexpr, COLS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, DIAGONAL: tl.constexpr,
    MASK_N: tl.constexpr, MASK_M: tl.constexpr, MASK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row and column results ``[len(ROWS), banks, N]`` and ``[len(COLS), banks, M]``.

    ``x_bank`` and ``y_bank`` are rows from one bank to the next, the other ``_bank`` arguments are elements; 0 if
    shared. MASK_N and MASK_M: the side is no multiple of BLOCK_N.
    """
    scale = tl.load(scale_ptr) * LOG2E
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr) * LOG2E
    row_blocks = banks * tl.cdiv(N, BLOCK_M) if len(ROWS) > 0 else 0
    pid = tl.program_id(0)
    if pid < row_blocks:
        _reduce(
            x, y, scale, bias, row_labels, col_labels, row_ids, col_ids, row_out, pid,
            N, M, D, banks, x_bank, y_bank, row_label_bank, col_label_bank, row_id_bank, col_id_bank,
            ROWS, HAS_LABELS, HAS_IDS, DIAGONAL, MASK_M, MASK_D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        _reduce(
            y, x, scale, bias, col_labels, row_labels, col_ids, row_ids, col_out, pid - row_blocks,
            M, N, D, banks, y_bank, x_bank, col_label_bank, row_label_bank, col_id_bank, row_id_bank,
            COLS, HAS_LABELS, HAS_IDS, DIAGONAL, MASK_N, MASK_D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _gradient(
    x, y, scale_ptr, bias, row_labels, col_labels, row_ids, col_ids,
    grad_rows, grad_cols, row_out, col_out, dx, totals, block,
    N, M, D, banks, x_bank, y_bank, row_label_bank, col_label_bank, row_id_bank, col_id_bank,
    ROWS: tl.constexpr, COLS: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, DIAGONAL: tl.constexpr,
    SHARED: tl.constexpr, HALF: tl.constexpr, STORE: tl.constexpr, TOTALS: tl.constexpr, EXPONENT: tl.constexpr,
    MASK_M: tl.constexpr, MASK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    natural = tl.load(scale_ptr)
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
    if HALF:
        bound = largest(grad_rows, row_slot, len(ROWS)) + largest(grad_cols, col_slot, len(COLS))
        up, down = power_of_two(bound, EXPONENT)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    weighted = tl.zeros((BLOCK_M,), tl.float32)
    plain = tl.zeros((BLOCK_M,), tl.float32)
    for index in range(first_bank, last_bank):
        bank = tl.cast(index, tl.int64)
        row_label, row_id = _keys(
            row_labels, row_ids, bank, row_label_bank, row_id_bank, rows, N, HAS_LABELS, HAS_IDS
        )  # fmt: skip
        row_sources = load_gradients(grad_rows, row_out, bank * N + rows, row_ok, row_slot, ROWS)
        for start in range(0, M, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            col_label, col_id = _keys(
                col_labels, col_ids, bank, col_label_bank, col_id_bank, cols, M, HAS_LABELS, HAS_IDS
            )  # fmt: skip
            b = _items(y + bank * y_bank * D, cols, M, D, BLOCK_D, MASK_D)
            dots = tl.dot(a, b.T)
            relation = relate(
                rows, cols, N, M, row_label, col_label, row_id, col_id,
                HAS_LABELS, HAS_IDS, DIAGONAL, False, MASK_M, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            relation = tl.where(row_ok[:, None], relation, 0)
            col_sources = load_gradients(grad_cols, col_out, bank * M + cols, cols < M, col_slot, COLS)
            t = dots * scale + bias
            g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            g = gradient_online(t, relation, g, row_sources, ROWS, 1)
            g = gradient_online(t, relation, g, col_sources, COLS, 0)
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
    grad_rows, grad_cols, row_out, col_out, dx, dy, totals,
    N, M, D, banks, row_programs, x_bank, y_bank, row_label_bank, col_label_bank, row_id_bank, col_id_bank,
    ROWS: tl.constexpr, COLS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, DIAGONAL: tl.constexpr,
    X_SHARED: tl.constexpr, Y_SHARED: tl.constexpr, HALF: tl.constexpr, STORE: tl.constexpr, TOTALS: tl.constexpr,
    EXPONENT: tl.constexpr, MASK_N: tl.constexpr, MASK_M: tl.constexpr, MASK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx by the first ``row_programs`` programs, dy by the rest.

    The first also make the sums for dscale and dbias, fp32 ``[2, row_programs]``. ``STORE``: dx is wanted, ``TOTALS``:
    the sums are.
    """
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr) * LOG2E
    pid = tl.program_id(0)
    if pid < row_programs:
        _gradient(
            x, y, scale_ptr, bias, row_labels, col_labels, row_ids, col_ids,
            grad_rows, grad_cols, row_out, col_out, dx, totals, pid,
            N, M, D, banks, x_bank, y_bank, row_label_bank, col_label_bank, row_id_bank, col_id_bank,
            ROWS, COLS, HAS_LABELS, HAS_IDS, DIAGONAL, X_SHARED, HALF, STORE, TOTALS, EXPONENT,
            MASK_M, MASK_D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        _gradient(
            y, x, scale_ptr, bias, col_labels, row_labels, col_ids, row_ids,
            grad_cols, grad_rows, col_out, row_out, dy, totals, pid - row_programs,
            M, N, D, banks, y_bank, x_bank, col_label_bank, row_label_bank, col_id_bank, row_id_bank,
            COLS, ROWS, HAS_LABELS, HAS_IDS, DIAGONAL, Y_SHARED, HALF, True, False, EXPONENT,
            MASK_N, MASK_D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
