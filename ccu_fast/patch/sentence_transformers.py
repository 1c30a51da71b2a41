"""sentence-transformers: MultipleNegativesRankingLoss, one-way and symmetric, with or without hard negatives."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.losses.functional import info_nce
from ccu_fast.patch.site import Site, are_plain, is_one_number, is_stock

HALF = (torch.float16, torch.bfloat16)


def sites() -> list[Site]:
    """What is replaced."""
    losses = importlib.import_module("sentence_transformers.losses")
    util = importlib.import_module("sentence_transformers.util")
    one_way, symmetric = losses.MultipleNegativesRankingLoss, losses.MultipleNegativesSymmetricRankingLoss
    # Since 5.3 the object says which ways, and the symmetric class inherits the other's function; before, the class.
    own = [c for c in (one_way, symmetric) if "compute_loss_from_embeddings" in vars(c)]
    says = "directions" in inspect.signature(one_way).parameters
    # Since version 6 half precision is widened before the similarity.
    one = torch.ones(1, 1, dtype=torch.float16)
    widens = util.dot_score(one, one).dtype == torch.float32

    def site(owner: type) -> Site:
        def loss(original: Any, self: Any, embeddings: list[Tensor], labels: Any = None) -> Any:
            ways = _ways(self) if says else _one_loss(self, 1 + (owner is symmetric))
            cosine, dot = (_is_similarity(self.similarity_fct, name) for name in ("cos_sim", "dot_score"))
            if ways is None or not (cosine or dot) or getattr(self, "gather_across_devices", False):
                return NotImplemented
            if not _are_columns(embeddings):
                return NotImplemented
            columns = [e.float() if widens and e.dtype in HALF else e for e in embeddings]
            queries = columns[0]
            if any(e.dtype != queries.dtype for e in columns) or not is_one_number(self.scale, queries):
                return NotImplemented
            if cosine:
                columns = [F.normalize(e, dim=1) for e in columns]
            value = ranking_loss(columns[0], columns[1:], scale=self.scale, symmetric=ways == 2)
            if torch.is_autocast_enabled(queries.device.type) or queries.dtype in HALF:
                with torch.no_grad():  # the library's loss of the first item, for its dtype
                    first = original(self, [e[:1] for e in embeddings], labels)
                value = value.to(first.dtype)
            return value

        return Site(owner, "compute_loss_from_embeddings", ("self", "embeddings", "labels"), loss)

    return [site(owner) for owner in own]


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


def _ways(loss: Any) -> int | None:
    """1 or 2; None for what only the library has: other directions, hardness weights."""
    if loss.hardness_mode is not None:
        return None
    directions = set(loss.directions)
    if directions == {"query_to_doc"}:
        return 1
    both_ways = directions == {"query_to_doc", "doc_to_query"}
    return 2 if both_ways and loss.partition_mode == "per_direction" else None


def _one_loss(loss: Any, ways: int) -> int | None:
    """``ways`` where the cross entropy that the object holds is the one that it was made with."""
    held, module = loss.cross_entropy_loss, "torch.nn.modules.loss.CrossEntropyLoss"
    stock = (
        type(held) is nn.CrossEntropyLoss
        and is_stock(held.forward, f"{module}.forward")
        and is_stock(F.cross_entropy, "torch.nn.functional.cross_entropy")
        and not (held._forward_hooks or held._forward_pre_hooks)
        and (held.weight, held.ignore_index, held.reduction, held.label_smoothing) == (None, -100, "mean", 0)
    )
    return ways if stock else None


def _is_similarity(function: Any, name: str) -> bool:
    # Before 5.1 all of util was one file.
    return any(is_stock(function, f"sentence_transformers.{module}.{name}") for module in ("util.similarity", "util"))


def _are_columns(embeddings: Any) -> bool:
    """Two or more matrices of one shape on one device."""
    if not isinstance(embeddings, list | tuple) or len(embeddings) < 2 or not are_plain(*embeddings):
        return False
    first = embeddings[0]
    return (
        first.ndim == 2
        and first.numel() > 0
        and first.is_floating_point()
        and all(e.shape == first.shape and e.device == first.device for e in embeddings)
    )
