"""Every contrastive loss as a short formula over reductions of the similarity matrix, whoever computes them.

A formula gets the function that reduces (:func:`ccu_fast.reduce_similarity`, or its twin over several ranks) and says
for every item what it contributes; taking the mean is the caller's, who knows where the other items are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.ops.reduce_similarity.relations import ALL, OTHER, SAME, SELF

INVERSE_KINDS = ("bounded", "contrastive", "ascent")

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


def info_nce(
    reduce: Reduce, x: Tensor, y: Tensor, *, scale: Any, bias: Any = None, symmetric: bool = True, **similarity: Any
) -> list[Side]:
    """lse(ALL) − mean(SELF), of the rows and if symmetric of the columns."""
    spec = [("lse", ALL), ("sum", SELF)]
    if similarity.get("row_ids") is not None or similarity.get("row_labels") is not None:
        spec.append(("count", SELF))
    rows, cols = reduce(x, y, scale=scale, bias=bias, rows=spec, cols=spec if symmetric else (), **similarity)
    sides = []
    for lse, positive, *count in filter(None, (rows, cols)):
        if count:
            sides.append(Side(lse - positive / count[0].clamp(min=1), count[0] > 0))
        else:  # every row has its one positive
            sides.append(Side(lse - positive, None))
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
    """lse(ALL) − lse(OTHER), lse(SAME) − mean(OTHER), or the negated InfoNCE of the rows."""
    if kind == "ascent":
        (side,) = info_nce(reduce, x, y, scale=scale, symmetric=False, **similarity)
        return Side(-side.raw, side.counts)
    if kind == "bounded":
        spec = [("lse", ALL), ("lse", OTHER), ("count", OTHER), ("count", SELF | SAME)]
        (everything, other, n_other, n_positive), _ = reduce(x, y, scale=scale, rows=spec, **similarity)
        counts = (n_other > 0) & (n_positive > 0)
        return Side(everything - torch.where(counts, other, 0), counts)
    if similarity.get("row_labels") is None:
        raise ValueError("row_labels: expected a tensor for kind='contrastive', got None")
    spec = [("lse", SAME), ("sum", OTHER), ("count", OTHER), ("count", SAME)]
    (same, other, n_other, n_same), _ = reduce(x, y, scale=scale, rows=spec, **similarity)
    counts = (n_other > 0) & (n_same > 0)
    return Side(torch.where(counts, same, 0) - other / n_other.clamp(min=1), counts)


def sup_con(reduce: Reduce, x: Tensor, y: Tensor, *, scale: Any, row_labels: Tensor, **similarity: Any) -> Side:
    """lse(SAME ∪ OTHER) − mean(SAME) of the rows."""
    check.tensor("row_labels", row_labels, dtypes=check.INTEGERS)
    spec = [("lse", SAME | OTHER), ("sum", SAME), ("count", SAME)]
    (rest, positive, n_positive), _ = reduce(x, y, scale=scale, rows=spec, row_labels=row_labels, **similarity)
    counts = n_positive > 0
    return Side(torch.where(counts, rest, 0) - positive / n_positive.clamp(min=1), counts)


def sigmoid_loss(reduce: Reduce, x: Tensor, y: Tensor, *, scale: Any, bias: Any = None, **similarity: Any) -> Side:
    """softplus(S) summed over SAME ∪ OTHER, plus softplus(−S) over SELF, of the rows."""
    # softplus(-S) of a positive, not softplus(S) - S, whose terms cancel where the pair is sure.
    spec = [("softplus", SAME | OTHER), ("sum", SELF), ("softplus", SELF), ("count", SELF)]
    every_row_has_one = all(similarity.get(name) is None for name in ("row_ids", "row_labels", "paired"))
    (negatives, own, *several), _ = reduce(
        x, y, scale=scale, bias=bias, rows=spec[:2] if every_row_has_one else spec, **similarity
    )
    positives = -torch.nn.functional.logsigmoid(own)
    if several:
        softplus, count = several
        positives = torch.where(count == 1, positives, softplus - own)
    return Side(negatives + positives, None)
