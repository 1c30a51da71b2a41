"""colpali-engine: the in-batch losses of its bi-encoders, ``BiEncoderLoss`` and ``BiPairedEncoderLoss``.

``BiNegativeCELoss`` calls the former for its in-batch term. The other losses stay with the library: they look for the
hardest negative, or compare many vectors of a query with many of a document. So does ``pos_aware_negative_filtering``,
which changes the scores.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from ccu_fast import check
from ccu_fast.losses.functional import info_nce
from ccu_fast.patch.info_nce import is_temperature
from ccu_fast.patch.site import (
    Site,
    are_plain,
    arguments,
    cross_entropy_dtype,
    is_mean_cross_entropy,
    is_stock,
    torch_is_stock,
)

HOME = "colpali_engine.loss.bi_encoder_losses"


def sites() -> list[Site]:
    """What is replaced."""
    module = importlib.import_module(HOME)
    parameters = ("self", "query_embeddings", "doc_embeddings", "offset")
    kinds = ((module.BiEncoderLoss, False), (module.BiPairedEncoderLoss, True))
    return [Site(kind, "forward", parameters, _loss(symmetric)) for kind, symmetric in kinds]


def _loss(symmetric: bool) -> Callable[..., Any]:
    def loss(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = arguments(original, args, kwargs)
        theirs, x, y, offset = call["self"], call["query_embeddings"], call["doc_embeddings"], call["offset"]
        usual = (
            torch_is_stock()
            and not theirs.pos_aware_negative_filtering
            and is_mean_cross_entropy(theirs.ce_loss)
            and is_stock(theirs._get_idx, f"{HOME}.BiEncoderModule._get_idx")
            and are_plain(x, y)
            and x.ndim == y.ndim == 2
            and x.shape[1] == y.shape[1]
            and x.numel() > 0
            and (x.dtype, x.device) == (y.dtype, y.device)
            and x.dtype in check.FLOATS
            and len(x) <= len(theirs.idx_buffer)
            and type(offset) is int
            and 0 <= offset <= len(y) - len(x)
            and (len(x) == len(y) or not symmetric)
            and is_temperature(theirs.temperature, x)
        )
        if not usual:
            return NotImplemented
        ids: dict[str, Any] = {}
        if len(x) != len(y):  # documents of several ranks
            every = torch.arange(len(y), device=x.device)
            ids = {"row_ids": every[offset : offset + len(x)], "col_ids": every}
        value = info_nce(x, y, scale=1 / theirs.temperature, symmetric=symmetric, **ids)
        return value.to(cross_entropy_dtype(x))

    return loss
