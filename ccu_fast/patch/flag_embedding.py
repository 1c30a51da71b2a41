"""FlagEmbedding: the contrastive loss of its dense embedders, with negatives of the batch and of all devices.

The library's functions for the loss return the matrix of scores beside it, which the ``forward`` of AbsEmbedderModel
throws away. So only what that ``forward`` calls is served, and gets None for the scores, where all of these functions
are the library's. Where a query has no negatives but its own, only its own scores are made, without the matrix that the
library picks them from.

With a teacher's scores the losses stay with the library, which distils from the matrix, and so do those of the M3
embedder, which adds sparse and multi-vector scores to the dense ones.
"""

from __future__ import annotations

import importlib
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.losses.functional import info_nce
from ccu_fast.losses.logits import products_of_own
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

HOME = "FlagEmbedding.abc.finetune.embedder.AbsModeling"
# The embedders whose scores are products over a temperature.
DENSE = (
    "FlagEmbedding.finetune.embedder.encoder_only.base.modeling.BiEncoderOnlyEmbedderModel",
    "FlagEmbedding.finetune.embedder.decoder_only.base.modeling.BiDecoderOnlyEmbedderModel",
    "FlagEmbedding.finetune.embedder.decoder_only.icl.modeling.BiDecoderOnlyEmbedderICLModel",
)
# Who else may read the scores that a function for the loss returns: another of these, and what is called before them.
LOSS_METHODS = ("_compute_no_in_batch_neg_loss", "_compute_in_batch_neg_loss", "_compute_cross_device_neg_loss")
SCORE_METHODS = ("compute_score", "_compute_similarity")
LOSS_PARAMETERS = ("self", "q_reps", "p_reps", "teacher_targets", "compute_score_func")

# The model in whose forward this thread is, which does not read the scores.
_unread: ContextVar[Any] = ContextVar("unread", default=None)


def sites() -> list[Site]:
    """What is replaced."""
    owner = importlib.import_module(HOME).AbsEmbedderModel
    return [
        Site(owner, "forward", ("self", "queries", "passages", "teacher_scores", "no_in_batch_neg_flag"), _forward),
        Site(owner, "_compute_in_batch_neg_loss", LOSS_PARAMETERS, _in_batch),
        Site(owner, "_compute_cross_device_neg_loss", LOSS_PARAMETERS, _across_devices),
        Site(owner, "compute_local_score", ("self", "q_reps", "p_reps", "compute_score_func"), _local_score),
    ]


def _forward(original: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling() or not is_stock(original, f"{HOME}.AbsEmbedderModel.forward"):
        return NotImplemented
    token = _unread.set(arguments(original, args, kwargs)["self"])
    try:
        return original(*args, **kwargs)
    finally:
        _unread.reset(token)


def _in_batch(original: Any, *args: Any, **kwargs: Any) -> Any:
    call = arguments(original, args, kwargs)
    if not _is_usual_loss(call):
        return NotImplemented
    return None, _loss(call["self"], call["q_reps"], call["p_reps"])


def _across_devices(original: Any, *args: Any, **kwargs: Any) -> Any:
    call = arguments(original, args, kwargs)
    model = call["self"]
    if not _is_usual_loss(call) or not is_stock(
        model._dist_gather_tensor, f"{HOME}.AbsEmbedderModel._dist_gather_tensor"
    ):
        return NotImplemented
    # As in the library every device has the loss of all queries, and gradients for its own.
    return None, _loss(model, *(model._dist_gather_tensor(call[name]) for name in ("q_reps", "p_reps")))


def _local_score(original: Any, *args: Any, **kwargs: Any) -> Any:
    call = arguments(original, args, kwargs)
    model, x, y = call["self"], call["q_reps"], call["p_reps"]
    usual = (
        call["compute_score_func"] is None
        and _is_dense(model, *SCORE_METHODS)
        and is_stock(model.get_local_score, f"{HOME}.AbsEmbedderModel.get_local_score")
        and _are_groups(x, y)
        and is_temperature(model.temperature, x)
    )
    if not usual:
        return NotImplemented
    scores = products_of_own(x, y.unflatten(0, (len(x), -1))) / model.temperature
    return scores.to(torch.matmul(x.detach()[:0], y.detach()[:0].T).dtype)  # autocast has a say


def _is_usual_loss(call: dict[str, Any]) -> bool:
    model, x, y = call["self"], call["q_reps"], call["p_reps"]
    return (
        _unread.get() is model
        and call["teacher_targets"] is None
        and call["compute_score_func"] is None
        and torch_is_stock()
        and all(is_stock(getattr(model, name), f"{HOME}.AbsEmbedderModel.{name}") for name in LOSS_METHODS)
        and _is_dense(model, *SCORE_METHODS, "compute_loss", "encode")
        and is_mean_cross_entropy(model.cross_entropy)
        and _are_groups(x, y)
        and is_temperature(model.temperature, x)
    )


def _is_dense(model: Any, *methods: str) -> bool:
    """Whether methods of a model are those that the library wrote for one of its dense embedders."""
    kinds = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__)
    kind = next((name for name in kinds if name in DENSE), None)
    return kind is not None and all(is_stock(getattr(model, name), f"{kind}.{name}") for name in methods)


def _are_groups(x: Any, y: Any) -> bool:
    """Queries, and for each of them the same number of passages."""
    return (
        are_plain(x, y)
        and x.ndim == y.ndim == 2
        and x.shape[1] == y.shape[1]
        and x.numel() > 0
        and len(y) > 0
        and len(y) % len(x) == 0
        and (x.dtype, x.device) == (y.dtype, y.device)
        and x.dtype in check.FLOATS
    )


def _loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """InfoNCE of queries whose positives are the first of their groups of passages."""
    ids: dict[str, Any] = {}
    if len(y) != len(x):
        every = torch.arange(len(y), device=x.device)
        ids = {"row_ids": every[:: len(y) // len(x)], "col_ids": every}
    return info_nce(x, y, scale=1 / model.temperature, symmetric=False, **ids).to(cross_entropy_dtype(x))
