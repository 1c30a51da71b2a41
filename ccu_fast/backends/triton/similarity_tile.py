"""What both similarity kernels do with one tile of S: its product, its relations, its reductions, its gradient.

Inside the kernels S is carried as ``t = S · log2(e)``, so that an exponential is one ``exp2`` of one difference and
no rounding is added to S's own. A SPEC is a tuple of ``(kind, relations, peak)`` known at compile time: the kind of
:data:`LSE`, :data:`SUM` or :data:`SOFTPLUS`, the relation bits, and the slot that keeps an lse's running maximum.
The empty set of relations costs nothing.

A state is one ``(total, peak)`` pair of vectors for each entry of a SPEC: an lse is ``peak + log2(total)``, the other
kinds use only the total. ``sum`` totals t itself, ``softplus`` totals natural units.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# Triton functions are a language of their own: typed when they are compiled, their tuples grown by concatenation.

from __future__ import annotations

import triton
import triton.language as tl

LSE = tl.constexpr(0)
SUM = tl.constexpr(1)
SOFTPLUS = tl.constexpr(2)

SELF = tl.constexpr(1)
SAME = tl.constexpr(2)
OTHER = tl.constexpr(4)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def swizzle(pid, n_rows, n_cols, WIDTH: tl.constexpr):
    """Walk a grid of n_rows × n_cols in bands of WIDTH rows: neighbours in time share rows and columns in L2."""
    band = pid // (WIDTH * n_cols)
    first = band * WIDTH
    height = tl.minimum(n_rows - first, WIDTH)
    inside = pid % (WIDTH * n_cols)
    return first + inside % height, inside // height


@triton.jit
def products(
    x, y, rows, cols, D,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x[rows] · y[cols]ᵀ in fp32; rows and cols are in range, D is a multiple of BLOCK_K."""
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x + rows.to(tl.int64)[:, None] * D + k[None, :]
    y_ptrs = y + cols.to(tl.int64)[None, :] * D + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, D, BLOCK_K):
        a = tl.load(x_ptrs)
        b = tl.load(y_ptrs)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        y_ptrs += BLOCK_K
    return acc


@triton.jit
def load_keys(labels, ids, index, in_range, HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr):
    """Names of the labels and ids of some rows or columns; out of range the label is negative, so it is ignored."""
    label = index
    if HAS_LABELS:
        label = tl.load(labels + index, mask=in_range, other=-1)
    name = index
    if HAS_IDS:
        name = tl.load(ids + index, mask=in_range, other=-1)
    return label, name


@triton.jit
def crosses_diagonal(row, col, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether the tile that begins at (row, col) holds a pair (i, i)."""
    return (row < col + BLOCK_N) & (col < row + BLOCK_M)


@triton.jit
def relate(
    rows, cols, N, M, row_label, col_label, row_id, col_id,
    HAS_LABELS: tl.constexpr, HAS_IDS: tl.constexpr, DIAGONAL: tl.constexpr,
    MASK_N: tl.constexpr, MASK_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The relation of every pair of a tile, 0 where it takes no part: one register each, not one for each mask.

    What does not apply is a constant, which the compiler folds away.
    """
    relation = tl.full((BLOCK_M, BLOCK_N), OTHER, tl.int32)
    if HAS_LABELS:
        relation = tl.where(row_label[:, None] == col_label[None, :], SAME, relation)
    if HAS_IDS:
        relation = tl.where(row_id[:, None] == col_id[None, :], SELF, relation)
    elif DIAGONAL:
        relation = tl.where(rows[:, None] == cols[None, :], SELF, relation)
    if HAS_LABELS:
        relation = tl.where((row_label >= 0)[:, None] & (col_label >= 0)[None, :], relation, 0)
    else:
        if MASK_N:
            relation = tl.where((rows < N)[:, None], relation, 0)
        if MASK_M:
            relation = tl.where((cols < M)[None, :], relation, 0)
    return relation


@triton.jit
def softplus(t):
    """log(1 + exp(S)) in natural units with full relative precision on both sides.

    log1p(e)/e on [0, 1] is a polynomial of degree 9 (minimax, relative error 5e-9): log(1 + e) itself loses every
    digit where SigLIP starts, at S = −10 and below.
    """
    e = tl.exp2(-tl.abs(t))
    p = -0.003244020277634263 * e + 0.01985144056379795
    p = p * e - 0.05695949122309685
    p = p * e + 0.10603650659322739
    p = p * e - 0.15305590629577637
    p = p * e + 0.1967593878507614
    p = p * e - 0.24954134225845337
    p = p * e + 0.3332996368408203
    p = p * e - 0.4999990165233612
    p = p * e + 1.0
    return tl.maximum(t, 0.0) * LN2 + p * e


@triton.jit
def join(total, peak, other_total, other_peak):
    """Two partial log-sum-exps as one; (0, −inf) is the empty one."""
    top = tl.maximum(peak, other_peak)
    shift = tl.where(top == float("-inf"), 0.0, top)
    return total * tl.exp2(peak - shift) + other_total * tl.exp2(other_peak - shift), top


@triton.jit
def empty_state(SPEC: tl.constexpr, ITEMS: tl.constexpr):
    """The state before any tile."""
    state = ()
    for _ in tl.static_range(len(SPEC)):
        state = state + ((tl.zeros((ITEMS,), tl.float32), tl.full((ITEMS,), float("-inf"), tl.float32)),)
    return state


@triton.jit
def reduce_tile(t, relation, state, SPEC: tl.constexpr, AXIS: tl.constexpr):
    """The state after one more tile, reduced over AXIS (1: row results, 0: column results)."""
    result = ()
    for r in tl.static_range(len(SPEC)):
        total, peak = state[r]
        if SPEC[r][1] != 0:
            chosen = (relation & SPEC[r][1]) != 0
            if SPEC[r][0] == LSE:
                masked = tl.where(chosen, t, float("-inf"))
                top = tl.maximum(peak, tl.max(masked, AXIS))
                shift = tl.where(top == float("-inf"), 0.0, top)
                total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(masked - tl.expand_dims(shift, AXIS)), AXIS)
                peak = top
            elif SPEC[r][0] == SUM:
                total += tl.sum(tl.where(chosen, t, 0.0), AXIS)
            else:
                total += tl.sum(tl.where(chosen, softplus(t), 0.0), AXIS)
        result = result + ((total, peak),)
    return result


@triton.jit
def load_gradients(grads, outs, index, in_range, stride, SPEC: tl.constexpr):
    """For each reduction its incoming gradient and, for lse, its result times log2(e).

    An empty set passes no gradient: exp2(t − inf) is 0 and so is its factor.
    """
    result = ()
    for r in tl.static_range(len(SPEC)):
        grad = tl.load(grads + r * stride + index, mask=in_range, other=0.0)
        lse = grad
        if SPEC[r][0] == LSE:
            lse = tl.load(outs + r * stride + index, mask=in_range, other=float("-inf")) * LOG2E
            nothing = lse == float("-inf")
            grad = tl.where(nothing, 0.0, grad)
            lse = tl.where(nothing, float("inf"), lse)
        result = result + ((grad, lse),)
    return result


@triton.jit
def gradient_tile(t, relation, g, sources, SPEC: tl.constexpr, AXIS: tl.constexpr):
    """g plus what the reductions over AXIS send back to every entry of S."""
    for r in tl.static_range(len(SPEC)):
        if SPEC[r][1] != 0:
            grad, lse = sources[r]
            part = tl.expand_dims(grad, AXIS)
            if SPEC[r][0] == LSE:
                part = part * tl.exp2(t - tl.expand_dims(lse, AXIS))
            elif SPEC[r][0] == SOFTPLUS:
                part = part / (1.0 + tl.exp2(-t))
            g += tl.where((relation & SPEC[r][1]) != 0, part, 0.0)
    return g
