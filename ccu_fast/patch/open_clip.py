"""open_clip: ``ClipLoss.forward`` and ``SigLipLoss.forward``; ``CoCaLoss`` calls the former as part of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from ccu_fast import check
from ccu_fast.distributed.open_clip import ClipLoss, SigLipLoss
from ccu_fast.patch.site import Site, are_pairs, arguments, cross_entropy_dtype, is_one_number, is_stock, torch_is_stock

PARAMETERS = ("self", "image_features", "text_features", "logit_scale")


def sites(*, same: Any = None) -> list[Site]:
    """What is replaced.

    Args:
        same: "texts", or what gives the ids of pairs from their features; None: each pair is another.
    """
    ids_of = equal_texts if same == "texts" else same
    module = importlib.import_module("open_clip.loss")
    equals = "mean" if ids_of is None else "own"
    clip_alone, siglip_alone = ClipLoss(positives=equals), SigLipLoss()  # made once: that takes as long as a small loss

    # Since version 4, which can also compute SigLipLoss in chunks.
    gather = ("_all_gather_with_grad",) if hasattr(module, "_all_gather_with_grad") else ()

    def are_stock(theirs: Any, kind: str, methods: tuple[str, ...], functions: tuple[str, ...]) -> bool:
        return (
            getattr(module, "F", None) is functional
            and all(is_stock(getattr(theirs, m, None), f"open_clip.loss.{kind}.{m}") for m in methods)
            and all(is_stock(getattr(module, f, None), f"open_clip.loss.{f}") for f in (*functions, *gather))
        )

    def clip(theirs: Any, images: Tensor, ranks: dict[str, Any]) -> Any:
        if not are_stock(theirs, "ClipLoss", ("get_logits", "get_ground_truth"), ("gather_features",)):
            return None
        ours = ClipLoss(theirs.local_loss, theirs.gather_with_grad, positives=equals, **ranks) if ranks else clip_alone
        return ours, cross_entropy_dtype(images)

    def siglip(theirs: Any, images: Tensor, ranks: dict[str, Any]) -> Any:
        exchanges = ("neighbour_exchange_with_grad", "neighbour_exchange_bidir_with_grad")
        if not are_stock(theirs, "SigLipLoss", ("_loss", "get_logits", "get_ground_truth"), exchanges):
            return None
        if getattr(theirs, "chunk_size", 0):
            chunked = is_stock(getattr(theirs, "_chunked_loss", None), "open_clip.loss.SigLipLoss._chunked_loss")
            if not chunked or theirs.chunk_size < 0 or not is_stock(functional.softplus, "builtins.softplus"):
                return None
            dtype = torch.promote_types(images.dtype, torch.float32)  # of the sum over chunks
            return SigLipLoss(**ranks) if ranks else siglip_alone, dtype
        dtype = cross_entropy_dtype(images)
        # Its last operation is a sum, which autocast takes to fp32 on a GPU only.
        if images.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            dtype = torch.promote_types(images.dtype, torch.get_autocast_dtype("cpu"))
        return SigLipLoss(**ranks) if ranks else siglip_alone, dtype

    return [
        Site(module.ClipLoss, "forward", PARAMETERS, _by(clip, ids_of)),
        Site(module.SigLipLoss, "forward", (*PARAMETERS, "logit_bias"), _by(siglip, ids_of)),
    ]


@torch.no_grad()
def equal_texts(images: Tensor, texts: Tensor) -> Tensor:
    """Ids of pairs, the same for texts whose features are equal bit for bit, on whatever rank they are.

    A sum of 64 mixed bits of every feature (the finaliser of MurmurHash3), modulo 2^64.
    """
    mixed = texts.contiguous().view(_INTEGERS[texts.element_size()]).long() + _places(texts.shape[1], texts.device)
    for factor in (-0x00AE502812AA7333, -0x3B314601E57A13AD):
        mixed = (mixed ^ (mixed >> 33)) * factor
    return (mixed ^ (mixed >> 33)).sum(1)


@lru_cache(maxsize=8)
def _places(features: int, device: torch.device) -> Tensor:
    """A random number for the place of every feature."""
    generator = torch.Generator("cpu").manual_seed(0)  # whatever the default device is
    return torch.randint(-(2**63), 2**63 - 1, (features,), generator=generator, device="cpu").to(device)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _by(ours: Callable[..., Any], ids_of: Callable[[Tensor, Tensor], Tensor] | None) -> Callable[..., Any]:
    """A forward by the loss that ``ours`` makes in place of one of theirs, in the dtype that it names."""

    def served(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = arguments(original, args, kwargs)
        theirs, as_dict = call.pop("self"), call.pop("output_dict", False)
        ranks = _ranks(theirs)
        if ranks is None or not torch_is_stock() or not _is_usual(**call):
            return NotImplemented
        found = ours(theirs, call["image_features"], ranks)
        if found is None:
            return NotImplemented
        loss, dtype = found
        if ids_of is not None:
            ids = ids_of(call["image_features"], call["text_features"])
            call["ids"] = check.tensor("same", ids, dtypes=check.INTEGERS)
        value = loss(**call).to(dtype)
        return {"contrastive_loss": value} if as_dict else value

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        value = served(original, *args, **kwargs)
        if value is NotImplemented and ids_of is not None:
            raise RuntimeError(
                "same: expected plain features and open_clip's own methods, got a call that the patch would leave to "
                "open_clip, whose loss has one positive for each item"
            )
        return value

    return forward


def _is_usual(
    image_features: Any, text_features: Any, logit_scale: Any, logit_bias: Any = None, **unknown: Any
) -> bool:
    """Pairs, one scale and at most one bias."""
    return (
        not unknown
        and are_pairs(image_features, text_features)
        and is_one_number(logit_scale, image_features)
        and (logit_bias is None or is_one_number(logit_bias, image_features))
    )


def _ranks(theirs: Any) -> dict[str, Any] | None:
    """Nothing on one process, else the place in the default group; None when torch.distributed knows another one."""
    if getattr(theirs, "use_horovod", False):
        return None
    if theirs.world_size == 1:
        return {}
    ranks = {"rank": theirs.rank, "world_size": theirs.world_size}
    here = dist.is_available() and dist.is_initialized()
    return ranks if here and ranks == {"rank": dist.get_rank(), "world_size": dist.get_world_size()} else None
