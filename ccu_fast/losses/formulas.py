"""Every contrastive loss as a short formula over reductions of the similarity matrix, whoever computes them.

A formula gets the function that reduces (:func:`ccu_fast.reduce_similarity`, or its twin over several ranks) and says
for every item what it contributes; taking the mean is the caller's, who knows where the other items are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccu_fast.ops.reduce_similarity.relations import OTHER, SAME, SELF

INVERSE_KINDS = ("bounded", "contrastive", "ascent")
POSITIVES = ("mean", "lse")

Reduce = Callable[..., tuple[list[Tensor], list[Tensor]]]


class Side(NamedTuple):
    """What the rows, or the columns, contribute.

    Attributes:
        raw: fp32 ``[..., items]``; only the items that count mean anything.
        counts: bool ``[..., items]``, or None: all of them count.
    """

    raw: Tensor
    counts: Tensor | None

    def values(self) -> Tensor:
        """What every item contributes: 0 where it does not count."""
        return self.raw if self.counts is None else torch.where(self.counts, self.raw, 0)

    def divisor(self) -> int | Tensor:
        """How many items a mean is over, and 1 where there are none."""
        return max(self.raw.shape[-1], 1) if self.counts is None else self.counts.sum(-1).clamp(min=1)


def softplus(z: Tensor) -> Tensor:
    """log(1 + exp(z)) to its last digits: log1p below 50, and above it z is all that a dtype holds."""
    return torch.nn.functional.softplus(z, threshold=50)


def logsumexp(parts: Tensor, dim: int = 0) -> Tensor:
    """Over one dimension; where all parts are −inf so is the result, with zero gradient and not NaN."""
    if parts.shape[dim] == 0:
        return parts.sum(dim) - torch.inf
    peak = parts.detach().amax(dim, keepdim=True)
    empty = (peak == -torch.inf).squeeze(dim)
    peak = torch.where(peak.isinf(), 0, peak)
    total = torch.exp(parts - peak).sum(dim)
    return torch.where(empty, -torch.inf, torch.log(torch.where(empty, 1, total)) + peak.squeeze(dim))


def attract(rest: Tensor, inside: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """log(exp(rest) + exp(inside)) − total / count, of positives with the log-sum-exp ``inside`` and the sum ``total``.

    Written as the softplus of a difference, because where a pair is sure the difference of two log-sum-exps is all
    rounding: at logits near 100 they agree in every digit that fp32 has.
    """
    # The log-sum-exp of one logit is that logit but for its rounding, and the gradient of an only positive must hold no
    # 1 - 1 beside the sigmoid.
    several = count > 1
    spread = torch.where(several, inside - total / count.clamp(min=1), 0)
    return softplus(rest - torch.where(several, inside, total)) + spread


def info_nce(
    reduce: Reduce, x: Tensor, y: Tensor, *, scale: Any, bias: Any = None, symmetric: bool = True, **similarity: Any
) -> list[Side]:
    """softplus(lse(SAME ∪ OTHER) − SELF), of the rows and if symmetric of the columns.

    That is −log(softmax of SELF). Of several SELF it is lse(ALL) − mean(SELF).
    """
    spec = [("lse", SAME | OTHER), ("sum", SELF)]
    if similarity.get("row_ids") is not None:
        spec += [("lse", SELF), ("count", SELF)]
    elif similarity.get("row_labels") is not None:
        spec.append(("count", SELF))
    rows, cols = reduce(x, y, scale=scale, bias=bias, rows=spec, cols=spec if symmetric else (), **similarity)
    sides = []
    for rest, own, *several in [side for side in (rows, cols) if side]:  # torch 2.8 does not trace filter(None, …)
        counts = several[-1] > 0 if several else None  # without keys every row has its one positive
        sides.append(
            Side(attract(rest, several[0], own, several[1]) if len(several) > 1 else softplus(rest - own), counts)
        )
    return sides


def average(values: Sequence[Tensor]) -> Tensor:
    """The mean over the sides of a loss of what each comes to."""
    if len({v.shape for v in values}) > 1:
        raise ValueError(
            f"reduction: expected 'mean' or 'sum' for a symmetric loss of {values[0].shape[-1]} rows and "
            f"{values[1].shape[-1]} columns, got 'none'"
        )
    return sum(values[1:], values[0]) / len(values)


def inverse_info_nce(reduce: Reduce, x: Tensor, y: Tensor, *, scale: Any, kind: str, **similarity: Any) -> Side:
    """softplus(lse(SELF ∪ SAME) − lse(OTHER)), lse(SAME) − mean(OTHER), or the negated InfoNCE of the rows."""
    if kind == "ascent":
        (side,) = info_nce(reduce, x, y, scale=scale, symmetric=False, **similarity)
        return Side(-side.raw, side.counts)
    if kind == "bounded":
        spec = [("lse", SELF | SAME), ("lse", OTHER), ("count", OTHER), ("count", SELF | SAME)]
        (positive, other, n_other, n_positive), _ = reduce(x, y, scale=scale, rows=spec, **similarity)
        counts = (n_other > 0) & (n_positive > 0)
        return Side(softplus(torch.where(counts, positive, 0) - torch.where(counts, other, 0)), counts)
    spec = [("lse", SAME), ("sum", OTHER), ("count", OTHER), ("count", SAME)]
    (same, other, n_other, n_same), _ = reduce(x, y, scale=scale, rows=spec, **similarity)
    counts = (n_other > 0) & (n_same > 0)
    return Side(torch.where(counts, same, 0) - other / n_other.clamp(min=1), counts)


def sup_con(
    reduce: Reduce,
    x: Tensor,
    y: Tensor,
    *,
    scale: Any,
    row_labels: Tensor,
    positives: str = "mean",
    **similarity: Any,
) -> Side:
    """lse(SAME ∪ OTHER) less the mean or the lse of SAME, of the rows."""
    lse, total, count = [("lse", OTHER), ("lse", SAME)], ("sum", SAME), ("count", SAME)
    spec = [*lse, count] if positives == "lse" else [*lse, total, count]
    (rest, inside, *more), _ = reduce(x, y, scale=scale, rows=spec, row_labels=row_labels, **similarity)
    counts = more[-1] > 0
    if positives == "lse":
        return Side(softplus(rest - torch.where(counts, inside, 0)), counts)
    return Side(attract(rest, inside, *more), counts)


class Taught(NamedTuple):
    """What rows or columns contribute to InfoNCE, and to the cross-entropy with a teacher, from one pass."""

    contrast: Side
    distilled: Side


def distill(
    reduce: Reduce, x: Tensor, y: Tensor, *, scale: Any, symmetric: bool = True, **similarity: Any
) -> list[Taught]:
    """softplus(lse(REST) − SELF) + sum(Q · (SELF − S) over REST), Q a teacher's softmax, REST = SAME ∪ OTHER.

    That is −sum(Q · log softmax(S)) over everything, of the rows and if symmetric of the columns. An item has one SELF
    or none; of one without it is lse(REST) − sum(Q · S) / sum(Q).
    """
    rest = SAME | OTHER
    spec = [("lse", rest), ("sum", SELF), ("expected", rest), ("mass", rest), ("count", SELF)]
    found = reduce(x, y, scale=scale, rows=spec, cols=spec if symmetric else (), **similarity)
    sides = []
    for lse, own, expected, mass, count in [side for side in found if side]:
        paired = count > 0
        contrast = softplus(lse - own)
        # Both sums are over the very probabilities that the kernel made: what rounding adds to all of them cancels.
        anchored = contrast + (own * mass - expected)
        raw = torch.where(paired, anchored, lse - expected / torch.where(mass > 0, mass, 1))
        # NaN counts, or it would not be passed on.
        sides.append(Taught(Side(contrast, paired), Side(raw, paired | (lse != -torch.inf))))
    return sides


def sigmoid_loss(reduce: Reduce, x: Tensor, y: Tensor, *, scale: Any, bias: Any = None, **similarity: Any) -> Side:
    """softplus(S) summed over SAME ∪ OTHER, plus softplus(−S) over SELF, of the rows."""
    # softplus(−S) of a positive, not softplus(S) − S, whose terms cancel where the pair is sure.
    negative, own = ("softplus", SAME | OTHER), ("sum", SELF)
    options: dict[str, Any] = {"scale": scale, "bias": bias, **similarity}
    if similarity.get("row_ids") is not None:
        (negatives, positives), _ = reduce(x, y, rows=[negative, ("logsigmoid", SELF)], **options)
        return Side(negatives - positives, None)
    # Without ids a row has one positive or none, and its sum costs less than a logarithm for every pair of a tile.
    every_row_has_one = all(similarity.get(name) is None for name in ("row_labels", "paired"))
    spec = [negative, own] if every_row_has_one else [negative, own, ("count", SELF)]
    (negatives, logit, *count), _ = reduce(x, y, rows=spec, **options)
    positives = torch.nn.functional.logsigmoid(logit)
    return Side(negatives - (torch.where(count[0] > 0, positives, 0) if count else positives), None)
