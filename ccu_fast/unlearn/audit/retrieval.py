"""Retrieval for pairs without labels: does the right partner come first?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.loop import embed
from ccu_fast.unlearn.model import TwoTowerModel

CHUNK = 1024


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
        ``{"i2t@1": …, "t2i@1": …, …}`` in [0, 1], where i is the visual and t the other modality. Candidates of equal
        similarity share the places they take, so a model that maps everything to one point is at chance.

    Raises:
        ValueError: an item of data is not among the candidates.
    """
    for k in ks:
        check.integer("ks", k, low=1)
    pool = data if among is None else among
    positions = {item: position for position, item in enumerate(pool.ids.tolist())}
    absent = [item for item in data.ids.tolist() if item not in positions]
    if absent:
        raise ValueError(f"among: expected the items of data, got none with id {absent[0]}")
    own = torch.tensor([positions[item] for item in data.ids.tolist()], device=data.ids.device)
    visual, other = embed(model, data)  # type: ignore[arg-type]
    keys_visual, keys_other = embed(model, pool)  # type: ignore[arg-type]
    result: dict[str, float] = {}
    for name, queries, keys in (("i2t", visual, keys_other), ("t2i", other, keys_visual)):
        above, equal = _places(queries, keys, own)
        for k in ks:
            result[f"{name}@{k}"] = ((k - above) / equal).clamp(0, 1).mean().item()
    return result


def _places(queries: Tensor, keys: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates more similar than the partner, and those as similar, the partner included; fp64."""
    above, equal = [], []
    for part, mine in zip(queries.split(CHUNK), own.split(CHUNK), strict=True):
        similarity = part @ keys.T
        partner = similarity.gather(1, mine[:, None])
        above.append((similarity > partner).sum(1))
        equal.append((similarity == partner).sum(1))
    return torch.cat(above).double(), torch.cat(equal).double()
