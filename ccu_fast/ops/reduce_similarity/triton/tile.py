"""What the similarity kernels do with one tile of S: its product, its relations, its reductions, its gradient.

Inside the kernels S is carried as ``t = S · log2(e)``, so that an exponential is one ``exp2``. All of them share one
exponential per pair,

    e = exp2(t − bias − shift),    2^-126 <= e <= 2^120 / max(N, M)

with one ``shift`` for the whole problem, so that a tile adds plain sums to its rows and to its columns. The lower clamp
leaves 0 to mean "nothing was summed". A row or column whose sum is so small that clamped terms could show in it
is computed again with its own maximum (``reduce_online``), and the backward pass then uses ``gradient_online``.

A SPEC is a tuple of ``(kind, relations)`` known at compile time: the kind of :data:`LSE`, :data:`SUM`,
:data:`SOFTPLUS`, :data:`LOGSIGMOID`, :data:`COUNT`, :data:`MASS` or :data:`EXPECTED`, and the relation bits. The empty
set of relations costs nothing. A state is one vector of totals for each entry of a SPEC: ``lse`` totals e, ``sum``
totals t, ``expected`` t times the teacher's probability, the others total natural units.

Where there are limits, rows and columns see different relations of a pair (``within``). They look at the products
themselves, so nothing of E is kept for the backward pass, or at products of the guide, which every kernel computes
beside its own. A teacher is a guide whose products make probabilities (``probability``), given the log-sum-exps that
stand in the place of limits.
"""

# mypy: disable-error-code="no-untyped-def, assignment"
# Triton functions are a language of their own: typed when they are compiled, their tuples grown by concatenation.

from __future__ import annotations

import triton
import triton.language as tl

LSE = tl.constexpr(0)
SUM = tl.constexpr(1)
SOFTPLUS = tl.constexpr(2)
LOGSIGMOID = tl.constexpr(3)
COUNT = tl.constexpr(4)
MASS = tl.constexpr(5)
EXPECTED = tl.constexpr(6)

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
    x, y, row, col, x_start, y_start, N, M, D, TMA: tl.constexpr, MASK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile of x yᵀ at (row, col) of one bank, in fp32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    return add_products(
        acc, x, y, row, col, x_start, y_start, N, M, D, 0, D, TMA, MASK_K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION
    )


@triton.jit
def add_products(
    acc, x, y, row, col, x_start, y_start, N, M, D, first, last, TMA: tl.constexpr, MASK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the share that the dimensions [first, last) have in the tile of x yᵀ at (row, col) of one bank.

    ``x_start`` and ``y_start`` are the rows where the bank begins. With TMA x and y are descriptors of
    ``[banks · items, D]``, otherwise pointers; without MASK_K they need a last - first that is a multiple of BLOCK_K.
    What lies beyond the last row or column belongs to some other item: the caller masks it.
    """
    if TMA:
        x_row = (x_start + row).to(tl.int32)
        y_row = (y_start + col).to(tl.int32)
        for k in range(first, last, BLOCK_K):
            a = x.load([x_row, k])
            b = y.load([y_row, k])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    else:
        k = tl.arange(0, BLOCK_K)
        # In 64 bits whatever the starts are: N·D may not fit into 32.
        rows = x_start + tl.minimum(row + tl.arange(0, BLOCK_M), N - 1).to(tl.int64)
        cols = y_start + tl.minimum(col + tl.arange(0, BLOCK_N), M - 1).to(tl.int64)
        x_ptrs = x + rows[:, None] * D + (first + k)[None, :]
        y_ptrs = y + cols[None, :] * D + (first + k)[:, None]
        for start in range(first, last, BLOCK_K):
            if MASK_K:
                a = tl.load(x_ptrs, mask=(start + k < last)[None, :], other=0.0)
                b = tl.load(y_ptrs, mask=(start + k < last)[:, None], other=0.0)
            else:
                a = tl.load(x_ptrs)
                b = tl.load(y_ptrs)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            x_ptrs += BLOCK_K
            y_ptrs += BLOCK_K
    return acc


@triton.jit
def exponential(dots, scale, shift):
    """e of a tile; NaN stays NaN."""
    return tl.exp2(tl.maximum(dots * scale - shift, -126.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def load_bias(bias_ptr):
    """The bias times log2(e); 0 if there is none."""
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr) * LOG2E
    return bias


@triton.jit
def load_keys(keys, bank, index, in_range):
    """The labels and the ids of some rows or columns; out of range the label is negative, so the pair is ignored.

    ``keys`` is (labels, ids, and for each the elements from one bank to the next), where None stands for no keys.
    """
    labels, ids, label_bank, id_bank = keys
    label = index
    name = index
    if ids is not None:
        ids += bank * id_bank  # before the labels are loaded: the other order takes more registers
    if labels is not None:
        label = tl.load(labels + bank * label_bank + index, mask=in_range, other=-1)
    if ids is not None:
        name = tl.load(ids + index, mask=in_range, other=-1)
    return label, name


@triton.jit
def load_limits(limits, bank, limit_bank, index, in_range):
    """The limits of some rows or columns; any number where there are none.

    Out of range a limit leaves nothing out. With a teacher they are its log-sum-exps: there its probabilities are 0.

    What the functions below get is a tuple: (``limits`` as here, what this returns, the address of a teacher's scale),
    with None for what there is not. It is made by the caller, because up to Triton 3.6 no function can return None.
    """
    limit = index
    if limits is not None:
        limit = tl.load(limits + bank * limit_bank + index, mask=in_range, other=float("inf"))
    return limit


@triton.jit
def probability(similar, limits, AXIS: tl.constexpr):
    """The teacher's of every pair of a tile, from its products and the tuple that ``load_limits`` speaks of.

    Where an item takes part in nothing its log-sum-exp is −inf and this is inf: the caller leaves such pairs out.
    """
    scale = tl.load(limits[2]) * LOG2E
    return tl.exp2(similar * scale - tl.expand_dims(limits[1] * LOG2E, AXIS))


@triton.jit
def within(relation, similar, limits, AXIS: tl.constexpr):
    """The relations that reductions over AXIS see: 0 for OTHER pairs above the limits of ``load_limits``.

    A comparison with NaN leaves nothing out.
    """
    if limits[0] is not None and limits[2] is None:
        beyond = (relation == OTHER) & (similar > tl.expand_dims(limits[1], AXIS))
        relation = tl.where(beyond, 0, relation)
    return relation


@triton.jit
def crosses_diagonal(row, col, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether the tile that begins at (row, col) holds a pair (i, i)."""
    return (row < col + BLOCK_N) & (col < row + BLOCK_M)


@triton.jit
def relate(rows, cols, M, row_names, col_names, keys, DIAGONAL: tl.constexpr, MASK_M: tl.constexpr):
    """The relation of every pair of a tile, 0 where it takes no part: one register each, not one for each mask.

    The names are what ``load_keys`` returns, ``keys`` what it is given for either side. What does not apply is a
    constant, which the compiler folds away.
    """
    row_label, row_id = row_names
    col_label, col_id = col_names
    relation = tl.full((rows.shape[0], cols.shape[0]), OTHER, tl.int32)
    if keys[0] is not None:
        relation = tl.where(row_label[:, None] == col_label[None, :], SAME, relation)
    if keys[1] is not None:
        relation = tl.where(row_id[:, None] == col_id[None, :], SELF, relation)
    elif DIAGONAL:
        relation = tl.where(rows[:, None] == cols[None, :], SELF, relation)
    if keys[0] is not None:
        relation = tl.where((row_label >= 0)[:, None] & (col_label >= 0)[None, :], relation, 0)
    elif MASK_M:
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
def empty_state(SPEC: tl.constexpr, ITEMS: tl.constexpr):
    """The state before any tile."""
    state = ()
    for _ in tl.static_range(len(SPEC)):
        state = state + (tl.zeros((ITEMS,), tl.float32),)
    return state


@triton.jit
def reduce_tile(
    t,
    e,
    relation,
    state,
    SPEC: tl.constexpr,
    AXIS: tl.constexpr,
    inside=None,
    MASK: tl.constexpr = False,
    similar=None,
    limits=None,
):
    """The state after one more tile, reduced over AXIS (1: row results, 0: column results).

    With ``MASK`` t counts only in the columns or rows that are ``inside``; e outside has to be 0 already. ``similar``
    and ``limits`` are what a teacher's probabilities are made from.
    """
    result = ()
    for r in tl.static_range(len(SPEC)):
        total = state[r]
        if SPEC[r][1] != 0:
            value = e
            if SPEC[r][0] == SUM:
                value = t
            elif SPEC[r][0] == SOFTPLUS:
                value = softplus(t)
            elif SPEC[r][0] == LOGSIGMOID:
                value = -softplus(-t)
            elif SPEC[r][0] == COUNT:
                value = 1.0
            elif SPEC[r][0] == MASS:
                value = probability(similar, limits, AXIS)
            elif SPEC[r][0] == EXPECTED:
                value = probability(similar, limits, AXIS) * t
            value = tl.where((relation & SPEC[r][1]) != 0, value, 0.0)
            if MASK and SPEC[r][0] != LSE:
                value = tl.where(tl.expand_dims(inside, 1 - AXIS), value, 0.0)
            total += tl.sum(value, AXIS)
        result = result + (total,)
    return result


@triton.jit
def empty_online(SPEC: tl.constexpr, ITEMS: tl.constexpr):
    """The state of ``reduce_online`` before any tile."""
    state = ()
    for _ in tl.static_range(len(SPEC)):
        state = state + ((tl.zeros((ITEMS,), tl.float32), tl.full((ITEMS,), float("-inf"), tl.float32)),)
    return state


@triton.jit
def reduce_online(t, relation, state, SPEC: tl.constexpr):
    """The (total, peak) of every lse along rows after one more tile, each relative to its own maximum so far."""
    result = ()
    for r in tl.static_range(len(SPEC)):
        total, peak = state[r]
        if SPEC[r][0] == LSE:
            masked = tl.where((relation & SPEC[r][1]) != 0, t, float("-inf"))
            top = tl.maximum(peak, tl.max(masked, 1))
            shift = tl.where(top == float("-inf"), 0.0, top)
            total = total * tl.exp2(peak - shift) + tl.sum(tl.exp2(masked - shift[:, None]), 1)
            peak = top
        result = result + ((total, peak),)
    return result


@triton.jit
def load_gradients(source, SPEC: tl.constexpr):
    """For each reduction its incoming gradient and, for lse, its result times log2(e).

    ``source`` is (gradients, results, index, whether that is in range, elements from one reduction to the next).
    An empty set passes no gradient: exp2(t − inf) is 0 and so is its factor. What no relation uses is not loaded.
    """
    grads, outs, index, in_range, stride = source
    result = ()
    for r in tl.static_range(len(SPEC)):
        if SPEC[r][1] != 0:
            grad = tl.load(grads + r * stride + index, mask=in_range, other=0.0)
            lse = grad
            if SPEC[r][0] == LSE:
                lse = tl.load(outs + r * stride + index, mask=in_range, other=float("-inf")) * LOG2E
                nothing = lse == float("-inf")
                grad = tl.where(nothing, 0.0, grad)
                lse = tl.where(nothing, float("inf"), lse)
            result = result + ((grad, lse),)
        else:
            result = result + ((0.0, 0.0),)
    return result


@triton.jit
def gradient_tile(t, e, relation, g, sources, shift, SPEC: tl.constexpr, AXIS: tl.constexpr, similar=None, limits=None):
    """g plus what the reductions over AXIS send back to every entry of S; ``shift`` includes the bias.

    Probability first, gradient second: their product with e in any other order could leave the range of fp32.
    The derivatives of softplus and logsigmoid come from t: of e nothing is left where S is far below its bound.
    ``similar`` and ``limits`` are those of ``reduce_tile``.
    """
    for r in tl.static_range(len(SPEC)):
        if SPEC[r][1] != 0 and SPEC[r][0] != COUNT and SPEC[r][0] != MASS:
            grad, lse = sources[r]
            part = tl.expand_dims(grad, AXIS)
            if SPEC[r][0] == LSE:
                part = e * tl.expand_dims(tl.exp2(shift - lse), AXIS) * part
            elif SPEC[r][0] == EXPECTED:
                part = probability(similar, limits, AXIS) * part
            elif SPEC[r][0] == SOFTPLUS:
                part = part / (1.0 + tl.exp2(-t))
            elif SPEC[r][0] == LOGSIGMOID:
                part = part / (1.0 + tl.exp2(t))
            g += tl.where((relation & SPEC[r][1]) != 0, part, 0.0)
    return g


@triton.jit
def gradient_online(t, relation, g, sources, SPEC: tl.constexpr, AXIS: tl.constexpr, similar=None, limits=None):
    """The same with an exponential for each reduction, where one shift does not suit all."""
    for r in tl.static_range(len(SPEC)):
        if SPEC[r][1] != 0 and SPEC[r][0] != COUNT and SPEC[r][0] != MASS:
            grad, lse = sources[r]
            part = tl.expand_dims(grad, AXIS)
            if SPEC[r][0] == LSE:
                part = part * tl.exp2(t - tl.expand_dims(lse, AXIS))
            elif SPEC[r][0] == EXPECTED:
                part = part * probability(similar, limits, AXIS)
            elif SPEC[r][0] == SOFTPLUS:
                part = part / (1.0 + tl.exp2(-t))
            elif SPEC[r][0] == LOGSIGMOID:
                part = part / (1.0 + tl.exp2(t))
            g += tl.where((relation & SPEC[r][1]) != 0, part, 0.0)
    return g


@triton.jit
def largest(grads, count, REDUCTIONS: tl.constexpr, BLOCK: tl.constexpr = 2048):
    """At least the largest |gradient| that one pair can get from these reductions, ``[REDUCTIONS, count]``."""
    bound = 0.0
    for r in tl.static_range(REDUCTIONS):
        most = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, count, BLOCK):
            index = start + tl.arange(0, BLOCK)
            value = tl.load(grads + r * tl.cast(count, tl.int64) + index, mask=index < count, other=0.0)
            most = tl.maximum(most, tl.abs(value))
        bound += tl.max(most, 0)
    return bound


@triton.jit
def power_of_two(bound, EXPONENT: tl.constexpr):
    """The power of two that brings ``bound`` below 2^EXPONENT, and its inverse."""
    # The exponent of bound in [0.5, 1)·2^exponent, read from its bits: exact at any size. Gradients that are not
    # finite, or absurdly small, must not make a factor that is not finite.
    exponent = (bound.to(tl.int32, bitcast=True) >> 23) - 126
    exponent = tl.minimum(tl.maximum(exponent, -100), 100) - EXPONENT
    up = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    return up, ((127 + exponent) << 23).to(tl.float32, bitcast=True)
