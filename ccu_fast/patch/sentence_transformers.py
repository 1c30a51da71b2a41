"""sentence-transformers: MultipleNegativesRankingLoss, one-way and symmetric, with or without hard negatives."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ccu_fast.losses.functional import info_nce
from ccu_fast.patch.site import Site


def sites() -> list[Site]:
    """What is replaced."""
    losses = importlib.import_module("sentence_transformers.losses")
    util = importlib.import_module("sentence_transformers.util")
    one_way, symmetric = losses.MultipleNegativesRankingLoss, losses.MultipleNegativesSymmetricRankingLoss

    def loss(original: Any, self: Any, embeddings: list[Tensor], labels: Any = None) -> Any:
        ways = _ways(self, symmetric)
        usual = self.similarity_fct in (util.cos_sim, util.dot_score) and not self.gather_across_devices
        if ways is None or not usual or len(embeddings) < 2 or any(e.shape != embeddings[0].shape for e in embeddings):
            return NotImplemented
        if self.similarity_fct is util.cos_sim:
            embeddings = [F.normalize(e, dim=1) for e in embeddings]
        return ranking_loss(embeddings[0], embeddings[1:], scale=self.scale, symmetric=ways == 2)

    parameters = ("self", "embeddings", "labels")
    # Since version 6 the symmetric one inherits the other's.
    own = [c for c in (one_way, symmetric) if "compute_loss_from_embeddings" in vars(c)]
    return [Site(c, "compute_loss_from_embeddings", parameters, loss) for c in own]


def ranking_loss(queries: Tensor, documents: Sequence[Tensor], *, scale: float, symmetric: bool) -> Tensor:
    """InfoNCE of queries against their documents and all other documents::

        s = scale * queries @ torch.cat(documents).T                        # the first N columns are the positives
        loss = F.cross_entropy(s, arange(N))
        if symmetric: loss = (loss + F.cross_entropy(s[:, :N].T, arange(N))) / 2

    Args:
        queries: ``[N, D]``.
        documents: ``[N, D]`` each: the positives, then hard negatives.
        scale: inverse temperature.
        symmetric: also from the positives to the queries.
    """
    if len(documents) == 1:
        return info_nce(queries, documents[0], scale=scale, symmetric=symmetric)
    every = torch.cat(list(documents))
    ids = torch.arange(len(every), device=every.device)
    loss = info_nce(queries, every, scale=scale, symmetric=False, row_ids=ids[: len(queries)], col_ids=ids)
    if symmetric:
        loss = (loss + info_nce(documents[0], queries, scale=scale, symmetric=False)) / 2
    return loss


def _ways(loss: Any, symmetric: type) -> int | None:
    """1 or 2; None for what only the library has: other directions, hardness weights."""
    if getattr(loss, "hardness_mode", None) is not None:
        return None
    directions = getattr(loss, "directions", None)
    if directions is None:  # before version 6 the class says it
        return 2 if isinstance(loss, symmetric) else 1
    if tuple(directions) == ("query_to_doc",):
        return 1
    both_ways = set(directions) == {"query_to_doc", "doc_to_query"}
    return 2 if both_ways and loss.partition_mode == "per_direction" else None
