"""Retrieval with one rule for ties, for both systems."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ccu_fast import check

CHUNK = 1024
SCORES = 1 << 24  # that are held at a time


def retrieval_ranks(query: Tensor, gallery: Tensor, query_group: Tensor, gallery_group: Tensor) -> Tensor:
    """The rank of the best right answer for each query::

        S = query @ gallery.T
        1 + #{wrong j : S[i, j] >= max(S[i, right])}

    Right are all gallery items of the query's group, so equal captions are equally right and several captions an image
    need no special case. A tie counts against the query: a model that scores everything alike finds nothing.

    Args:
        query: ``[N, D]``.
        gallery: ``[M, D]``. Scores are dot products, computed in fp64.
        query_group: int64 ``[N]``.
        gallery_group: int64 ``[M]``. Every query has a right answer.

    Returns:
        int64 ``[N]``, at least 1.

    Raises:
        ValueError: a query without a right answer, or shapes that do not fit.
    """
    check.tensor("query", query, ndim=2)
    check.tensor("gallery", gallery, ndim=2)
    check.shape("query_group", query_group, (len(query),))
    check.shape("gallery_group", gallery_group, (len(gallery),))
    lonely = (~torch.isin(query_group, gallery_group)).nonzero()
    if len(lonely):
        raise ValueError(
            f"query_group: expected each query's group in gallery_group, got none for query {int(lonely[0])}"
        )
    keys, ranks = gallery.double().mT, []
    rows = max(1, min(CHUNK, SCORES // max(1, len(gallery))))
    for part, group in zip(query.split(rows), query_group.split(rows), strict=True):
        score = part.double() @ keys
        right = group[:, None] == gallery_group
        best = score.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks.append(1 + (~right & (score >= best)).sum(1))
    return torch.cat(ranks)


def recall_at(ranks: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """R@k: the share of queries with a right answer among the k best.

    Args:
        ranks: of :func:`retrieval_ranks`.
        ks: numbers of at least 1.

    Returns:
        k → share in [0, 1].

    Raises:
        TypeError, ValueError: not such numbers.
    """
    return {check.integer("ks", k, low=1): float((ranks <= k).double().mean()) for k in ks}


def shared_groups(*views: Sequence[Hashable]) -> Tensor:
    """The same number for all rows that share a value in one of the views, also through other rows.

    Args:
        views: each with a value for every row, such as its caption or the number of its image.

    Returns:
        int64 ``[rows]``.
    """
    parent = list(range(len(views[0])))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for view in views:
        first: dict[Hashable, int] = {}
        for row, value in enumerate(view):
            parent[root(row)] = root(first.setdefault(value, row))
    return torch.tensor([root(row) for row in range(len(parent))], dtype=torch.int64)
