"""info-nce-pytorch: its function ``info_nce``, which its module ``InfoNCE`` calls too.

With one set of negatives for all queries, or with the other positives as negatives. Negatives of each query's own
(``negative_mode="paired"``) stay with the library: their similarities are no product of two matrices.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ccu_fast.losses.formulas import softplus
from ccu_fast.losses.functional import info_nce
from ccu_fast.ops.reduce_similarity.api import reduce_similarity
from ccu_fast.ops.reduce_similarity.relations import ALL
from ccu_fast.patch.site import (
    Site,
    are_pairs,
    are_plain,
    arguments,
    cross_entropy_dtype,
    is_one_number,
    is_stock,
    torch_is_stock,
)

REDUCTIONS = ("mean", "sum", "none")


def sites() -> list[Site]:
    """What is replaced."""
    module = importlib.import_module("info_nce")

    def loss(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = arguments(original, args, kwargs)
        queries, positives, negatives = call["query"], call["positive_key"], call["negative_keys"]
        usual = (
            torch_is_stock()
            and getattr(module, "F", None) is F
            and all(is_stock(getattr(module, f, None), f"info_nce.{f}") for f in ("normalize", "transpose"))
            and are_pairs(queries, positives)
            and is_temperature(call["temperature"], queries)
            and call["reduction"] in REDUCTIONS
        )
        if not usual:
            return NotImplemented
        scale, dtype = 1 / call["temperature"], cross_entropy_dtype(queries)
        if negatives is None:
            queries, positives = F.normalize(queries, dim=-1), F.normalize(positives, dim=-1)
            return info_nce(queries, positives, scale=scale, symmetric=False, reduction=call["reduction"]).to(dtype)
        if call["negative_mode"] != "unpaired" or not are_keys(queries, negatives):
            return NotImplemented
        queries, positives, negatives = (F.normalize(t, dim=-1) for t in (queries, positives, negatives))
        losses = against_keys(queries, positives, negatives, scale=scale).to(dtype)
        return losses if call["reduction"] == "none" else getattr(losses, call["reduction"])()

    return [Site(module, "info_nce", ("query", "positive_key", "negative_keys"), loss)]


def against_keys(x: Tensor, positives: Tensor, keys: Tensor, *, scale: float | Tensor) -> Tensor:
    """InfoNCE of pairs against keys that all of them share, for each row::

        logits = scale * torch.cat([(x * positives).sum(1, keepdim=True), x @ keys.T], 1)
        F.cross_entropy(logits, torch.zeros(N), reduction="none")

    Args:
        x: ``[N, D]``.
        positives: ``[N, D]``.
        keys: ``[M, D]``.
        scale: number or one-element tensor; 1 / temperature.

    Returns:
        fp32 ``[N]`` (fp64 for fp64).

    Source: He et al. 2020 (arXiv 1911.05722), eq. 1.
    """
    (rest,), _ = reduce_similarity(x, keys, scale=scale, paired=False, rows=[("lse", ALL)])
    own = scale * (x.to(rest.dtype) * positives.to(rest.dtype)).sum(1)
    return softplus(rest - own)


def are_keys(x: Tensor, keys: Any) -> bool:
    """Whether these are negatives that all rows of x can share: a plain matrix with at least one row."""
    return (
        are_plain(keys)
        and keys.ndim == 2
        and keys.shape[1] == x.shape[1]
        and len(keys) > 0
        and keys.dtype == x.dtype
        and keys.device == x.device
    )


def is_temperature(value: Any, like: Tensor) -> bool:
    """Whether a temperature is one number, not 0; a tensor is not looked into."""
    return is_one_number(value, like) and (isinstance(value, torch.Tensor) or value != 0)
