"""pytorch-metric-learning: NTXentLoss and SupConLoss over labels, without their lists of pairs.

Both work on every pair of rows with equal labels against the pairs with different ones. Mined pairs, other distances
than cosine and dot product, and reducers that want the loss of every pair go to the library.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.losses.functional import sup_con
from ccu_fast.ops.reduce_similarity.api import reduce_similarity
from ccu_fast.ops.reduce_similarity.relations import OTHER, SAME
from ccu_fast.patch.site import Site, arguments

PARAMETERS = ("self", "embeddings", "labels", "indices_tuple", "ref_emb", "ref_labels")
NO_NEGATIVES = -1e4  # stands for −inf in a GEMM, where −inf · 0 would be NaN; softplus of it is 0


def sites() -> list[Site]:
    """What is replaced."""
    losses = importlib.import_module("pytorch_metric_learning.losses")
    distances = importlib.import_module("pytorch_metric_learning.distances")
    reducers = importlib.import_module("pytorch_metric_learning.reducers")

    def usual(call: dict[str, Any], kind: type) -> bool:
        loss, labels, distance = call["self"], call["labels"], call["self"].distance
        integers = labels is not None and labels.dtype in check.INTEGERS and labels.ndim == 1
        return (
            integers
            and call["indices_tuple"] is None
            and call["ref_labels"] is not None
            and type(loss)._compute_loss is kind._compute_loss  # type: ignore[attr-defined]
            and type(distance) in (distances.CosineSimilarity, distances.DotProductSimilarity)
            and (distance.p, distance.power, distance.collect_stats) == (2, 1, False)
            # Two pairs or less: the library calls that nothing to learn from.
            and len(labels) * len(call["ref_labels"]) > 4
        )

    def nt_xent(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = arguments(original, args, kwargs)
        loss = call["self"]
        if not usual(call, losses.NTXentLoss) or type(loss.reducer) is not reducers.MeanReducer:
            return NotImplemented
        value = nt_xent_loss(**_sides(call), temperature=loss.temperature)
        return {"loss": {"losses": value, "indices": None, "reduction_type": "already_reduced"}}

    def supervised(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = arguments(original, args, kwargs)
        if not usual(call, losses.SupConLoss):
            return NotImplemented
        sides = _sides(call)
        rows = sup_con(sides.pop("x"), sides.pop("y"), scale=1 / call["self"].temperature, reduction="none", **sides)
        # Where nothing is negative the library's loss is 0.
        negatives = (sides["row_labels"][0] != sides["col_labels"]).any() | (
            sides["row_labels"] != sides["col_labels"][0]
        ).any()
        rows = torch.where(negatives, rows, 0)
        indices = torch.arange(len(rows), device=rows.device)
        return {"loss": {"losses": rows, "indices": indices, "reduction_type": "element"}}

    return [
        Site(losses.NTXentLoss, "compute_loss", PARAMETERS, nt_xent),
        Site(losses.SupConLoss, "compute_loss", PARAMETERS, supervised),
    ]


def nt_xent_loss(
    x: Tensor, y: Tensor, *, row_labels: Tensor, col_labels: Tensor, paired: bool, temperature: float
) -> Tensor:
    """NT-Xent over every positive pair, each against the negatives of its row alone::

        s = x @ y.T / temperature
        mean over pairs (i, p) of SAME:  log(exp(s[i, p]) + sum(exp(s[i, OTHER]))) - s[i, p]
                                      =  softplus(logsumexp(s[i, OTHER]) - s[i, p])

    Two passes: the log-sum-exp of the negatives, then, with it as one more column of x (and 1 in y), the softplus of a
    similarity.

    Args:
        x: ``[N, D]``; y: ``[M, D]``.
        row_labels: int64 ``[N]`` ≥ 0; col_labels: int64 ``[M]`` ≥ 0.
        paired: x and y are one bank: the pair (i, i) is left out.
        temperature: > 0.

    Returns:
        fp32 scalar; 0 without a positive pair.

    Source: Sohn 2016 and Chen et al. 2020 (arXiv 2002.05709), eq. 1, as pytorch-metric-learning generalises it.
    """
    x, y = x.float(), y.float()
    keys: dict[str, Any] = {"row_labels": row_labels, "col_labels": col_labels, "paired": paired}
    (negatives, pairs), _ = reduce_similarity(
        x, y, scale=1 / temperature, rows=[("lse", OTHER), ("count", SAME)], **keys
    )
    wider = torch.cat([x * (-1 / temperature), negatives.clamp(min=NO_NEGATIVES)[:, None]], 1)
    ones = torch.cat([y, y.new_ones(len(y), 1)], 1)
    (losses,), _ = reduce_similarity(wider, ones, rows=[("softplus", SAME)], **keys)
    return losses.sum() / pairs.sum().clamp(min=1)


def _sides(call: dict[str, Any]) -> dict[str, Any]:
    """Both sides as the library compares them, with labels that are not negative."""
    labels, others, distance = call["labels"], call["ref_labels"], call["self"].distance
    lowest = torch.minimum(labels.min(), others.min())
    return {
        "x": distance.maybe_normalize(call["embeddings"]),
        "y": distance.maybe_normalize(call["ref_emb"]),
        "row_labels": (labels - lowest).long(),
        "col_labels": (others - lowest).long(),
        "paired": others is labels,
    }
