"""Retrieval for pairs without labels: does the right partner come first?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ccu_fast.data.paired import PairedData
from ccu_fast.runs.retrieval import recall_at, retrieval_ranks
from ccu_fast.unlearn.loop import embed
from ccu_fast.unlearn.model import TwoTowerModel


def recall(
    model: TwoTowerModel, data: PairedData, *, among: PairedData | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """R@k in both directions: the share of items whose partner is among the k most similar candidates.

    Args:
        model: two towers.
        data: the pairs that ask, such as the forget set.
        among: the candidates, which must contain the pairs that ask (by id); default ``data``. Take the same candidates
            for the forget and the retain set, or the smaller set has the easier question.
        ks: numbers ≥ 1.

    Returns:
        ``{"i2t@1": …, "t2i@1": …, …}`` in [0, 1], where i is the visual and t the other modality. A candidate
        as similar as the partner counts against it, see :func:`~ccu_fast.runs.retrieval.retrieval_ranks`.

    Raises:
        ValueError: an item of data is not among the candidates.
    """
    pool = data if among is None else among
    absent = data.ids[~torch.isin(data.ids, pool.ids)]
    if len(absent):
        raise ValueError(f"among: expected the items of data, got none with id {int(absent[0])}")
    visual, other = embed(model, data)  # type: ignore[arg-type]
    keys_visual, keys_other = embed(model, pool)  # type: ignore[arg-type]
    result: dict[str, float] = {}
    for name, queries, keys in (("i2t", visual, keys_other), ("t2i", other, keys_visual)):
        found = recall_at(retrieval_ranks(queries, keys, data.ids, pool.ids), ks)
        result |= {f"{name}@{k}": share for k, share in found.items()}
    return result
