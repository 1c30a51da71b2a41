"""What a dual encoder has learned: retrieval, and reading by zero-shot classification."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.runs.retrieval import recall_at, retrieval_ranks, shared_groups


def retrieval(image: Tensor, text: Tensor, image_group: Tensor, text_group: Tensor) -> dict[str, float]:
    """Measure retrieval: R@1, R@5, R@10 (shares in [0, 1]) and the median rank, in both directions::

        ranks = retrieval_ranks(image, text, ...)          # image to text; then text to image
        R@k = (ranks <= k).mean()

    Args:
        image: ``[N, D]`` and text: ``[M, D]``, unit vectors.
        image_group: int64 ``[N]``.
        text_group: int64 ``[M]``. Equal numbers belong together.

    Returns:
        ``i2t_r1, i2t_r5, i2t_r10, i2t_medr, t2i_r1, …``; see :func:`~ccu_fast.runs.retrieval.retrieval_ranks` for ties.

    Raises:
        TypeError, ValueError: shapes that do not fit, an item that belongs to nothing.

    >>> found = ccu_fast.mem.retrieval(torch.eye(3), torch.eye(3)[[1, 0, 2]], torch.arange(3), torch.arange(3))
    >>> round(found["i2t_r1"], 3), found["i2t_r5"], found["t2i_medr"]
    (0.333, 1.0, 3.0)
    """
    result: dict[str, float] = {}
    sides = {"i2t": (image, text, image_group, text_group), "t2i": (text, image, text_group, image_group)}
    for name, side in sides.items():
        ranks = retrieval_ranks(*side)
        result |= {f"{name}_r{k}": share for k, share in recall_at(ranks).items()}
        result[f"{name}_medr"] = float(ranks.double().quantile(0.5))
    return result


def groups(captions: Sequence[str], image_of: Tensor) -> Tensor:
    """The same number for all rows that share an image or a caption, also through other rows: int64 ``[rows]``."""
    return shared_groups(captions, image_of.tolist())


def reading(image: Tensor, classes: Tensor, digits: Tensor) -> dict[str, Any]:
    """Measure zero-shot reading: each image picks the nearest of all possible captions, and some of it is right.

    Args:
        image: ``[N, D]``, unit vectors.
        classes: ``[10**P, D]``, the embedding of the caption of each number with P digits, in numerical order.
        digits: int64 ``[N, P]``.

    Returns:
        ``digit`` (share of right digits, guessing .1), ``position`` (the same for each of the P positions), ``strip``
        (share of images with all digits right, guessing 10**−P).

    Raises:
        ValueError: classes of another shape.

    >>> classes = torch.eye(10)
    >>> ccu_fast.mem.reading(classes[[3, 7]], classes, torch.tensor([[3], [8]]))
    {'digit': 0.5, 'position': [0.5], 'strip': 0.5}
    """
    places = digits.shape[1]
    check.shape("classes", classes, (10**places, image.shape[1]))
    number = (image @ classes.mT).argmax(1)
    powers = 10 ** torch.arange(places - 1, -1, -1, device=number.device)
    right = (number[:, None] // powers % 10) == digits
    return {
        "digit": float(right.double().mean()),
        "position": right.double().mean(0).tolist(),
        "strip": float(right.all(1).double().mean()),
    }


def guessing(query_group: Tensor, gallery_group: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[int, float]:
    """The expected R@k of a random order: 1 − C(M−g, k) / C(M, k) for a query with g right answers among M."""
    right = (query_group[:, None] == gallery_group).sum(1).tolist()
    total = len(gallery_group)
    return {k: sum(1 - math.comb(total - g, k) / math.comb(total, k) for g in right) / max(len(right), 1) for k in ks}
