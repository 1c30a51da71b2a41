"""open_clip: the forward of ``ClipLoss``, which ``CoCaLoss`` calls too, ``SigLipLoss`` and ``DistillClipLoss``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from ccu_fast import check
from ccu_fast.distributed.distill_clip import DistillClipLoss
from ccu_fast.distributed.open_clip import ClipLoss, SigLipLoss
from ccu_fast.patch.site import Site, are_pairs, arguments, cross_entropy_dtype, is_one_number, is_stock, torch_is_stock

PARAMETERS = ("self", "image_features", "text_features", "logit_scale")
TAUGHT = (*PARAMETERS, "dist_image_features", "dist_text_features", "dist_logit_scale")

# A loss of ours in place of one of theirs, and what it returns: names and dtypes.
Found = tuple[Any, dict[str, torch.dtype]]


def sites(*, same: Any = None) -> list[Site]:
    """What is replaced.

    Args:
        same: "texts", or what gives the ids of pairs from their features; None: each pair is another.
    """
    ids_of = equal_texts if same == "texts" else same
    module = importlib.import_module("open_clip.loss")
    equals = "mean" if ids_of is None else "own"
    # Made once: that takes as long as a small loss.
    clip_alone, siglip_alone, distill_alone = ClipLoss(positives=equals), SigLipLoss(), DistillClipLoss()

    # Since version 4, which can also compute SigLipLoss in chunks.
    gather = ("_all_gather_with_grad",) if hasattr(module, "_all_gather_with_grad") else ()

    def are_stock(theirs: Any, kind: str, methods: tuple[str, ...], functions: tuple[str, ...]) -> bool:
        return (
            getattr(module, "F", None) is functional
            and all(is_stock(getattr(theirs, m, None), f"open_clip.loss.{kind}.{m}") for m in methods)
            and all(is_stock(getattr(module, f, None), f"open_clip.loss.{f}") for f in (*functions, *gather))
        )

    def clip(theirs: Any, images: Tensor, ranks: dict[str, Any]) -> Found | None:
        if not are_stock(theirs, "ClipLoss", ("get_logits", "get_ground_truth"), ("gather_features",)):
            return None
        ours = ClipLoss(theirs.local_loss, theirs.gather_with_grad, positives=equals, **ranks) if ranks else clip_alone
        return ours, {"contrastive_loss": cross_entropy_dtype(images)}

    def distill(theirs: Any, images: Tensor, ranks: dict[str, Any]) -> Found | None:
        inherited = are_stock(theirs, "ClipLoss", ("get_logits", "get_ground_truth"), ("gather_features",))
        if not inherited or not are_stock(theirs, "DistillClipLoss", ("dist_loss",), ()):
            return None
        ours = DistillClipLoss(theirs.local_loss, theirs.gather_with_grad, **ranks) if ranks else distill_alone
        return ours, {"contrastive_loss": cross_entropy_dtype(images), "distill_loss": _softmax_dtype(images)}

    def siglip(theirs: Any, images: Tensor, ranks: dict[str, Any]) -> Found | None:
        exchanges = ("neighbour_exchange_with_grad", "neighbour_exchange_bidir_with_grad")
        if not are_stock(theirs, "SigLipLoss", ("_loss", "get_logits", "get_ground_truth"), exchanges):
            return None
        if getattr(theirs, "chunk_size", 0):
            chunked = is_stock(getattr(theirs, "_chunked_loss", None), "open_clip.loss.SigLipLoss._chunked_loss")
            if not chunked or theirs.chunk_size < 0 or not is_stock(functional.softplus, "builtins.softplus"):
                return None
            dtype = torch.promote_types(images.dtype, torch.float32)  # of the sum over chunks
            return SigLipLoss(**ranks) if ranks else siglip_alone, {"contrastive_loss": dtype}
        dtype = cross_entropy_dtype(images)
        # Its last operation is a sum, which autocast takes to fp32 on a GPU only.
        if images.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            dtype = torch.promote_types(images.dtype, torch.get_autocast_dtype("cpu"))
        return SigLipLoss(**ranks) if ranks else siglip_alone, {"contrastive_loss": dtype}

    return [
        Site(module.ClipLoss, "forward", PARAMETERS, _by(clip, ids_of, _is_usual)),
        Site(module.SigLipLoss, "forward", (*PARAMETERS, "logit_bias"), _by(siglip, ids_of, _is_usual)),
        Site(module.DistillClipLoss, "forward", TAUGHT, _by(distill, None, _is_taught) if ids_of is None else _refused),
    ]


@torch.no_grad()
def equal_texts(images: Tensor, texts: Tensor) -> Tensor:
    """Ids of pairs, the same for texts whose features are equal bit for bit, on whatever rank they are.

    A sum of 64 mixed bits of every feature (the finaliser of MurmurHash3), modulo 2^64.
    """
    # Every place adds its multiple of 2^64 / the golden ratio, so that an order counts; a table of random numbers would
    # do as well, but torch.compile cannot make one.
    places = torch.arange(texts.shape[1], device=texts.device) * -0x61C8864680B583EB
    mixed = texts.contiguous().view(_INTEGERS[texts.element_size()]).long() + places
    for factor in (-0x00AE502812AA7333, -0x3B314601E57A13AD):
        mixed = (mixed ^ (mixed >> 33)) * factor
    return (mixed ^ (mixed >> 33)).sum(1)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _by(
    ours: Callable[..., Found | None],
    ids_of: Callable[[Tensor, Tensor], Tensor] | None,
    usual: Callable[..., bool],
) -> Callable[..., Any]:
    """A forward by the loss that ``ours`` makes in place of one of theirs, in the dtypes that it names."""

    def served(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = arguments(original, args, kwargs)
        theirs, as_dict = call.pop("self"), call.pop("output_dict", False)
        ranks = _ranks(theirs)
        if ranks is None or not torch_is_stock() or not usual(**call):
            return NotImplemented
        found = ours(theirs, call["image_features"], ranks)
        if found is None:
            return NotImplemented
        loss, dtypes = found
        if ids_of is not None:
            ids = ids_of(call["image_features"], call["text_features"])
            call["ids"] = check.tensor("same", ids, dtypes=check.INTEGERS)
        values = loss(**call)
        several = isinstance(values, tuple)
        pairs = zip(dtypes.items(), values if several else (values,), strict=True)
        named = {name: value.to(dtype) for (name, dtype), value in pairs}
        return named if as_dict else tuple(named.values()) if several else named["contrastive_loss"]

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        value = served(original, *args, **kwargs)
        if value is NotImplemented and ids_of is not None:
            raise RuntimeError(
                "same: expected plain features and open_clip's own methods, got a call that the patch would leave to "
                "open_clip, whose loss has one positive for each item"
            )
        return value

    return forward


def _refused(original: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of DistillClipLoss where some pairs are no negatives of each other."""
    arguments(original, args, kwargs)
    raise RuntimeError("same: expected ClipLoss or SigLipLoss, got DistillClipLoss, which knows nothing of equal items")


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


def _is_taught(dist_image_features: Any, dist_text_features: Any, dist_logit_scale: Any, **student: Any) -> bool:
    """The same of student and teacher, of as many pairs in one dtype, and no gradient to the teacher."""
    if not _is_usual(**student) or not are_pairs(dist_image_features, dist_text_features):
        return False
    images = student["image_features"]
    alike = (dist_image_features.dtype, dist_image_features.device) == (images.dtype, images.device)
    learns = any(
        isinstance(t, Tensor) and t.requires_grad for t in (dist_image_features, dist_text_features, dist_logit_scale)
    )
    return (
        alike
        and len(dist_image_features) == len(images)
        and is_one_number(dist_logit_scale, dist_image_features)
        and not (learns and torch.is_grad_enabled())
    )


def _softmax_dtype(images: Tensor) -> torch.dtype:
    """That of a sum of probabilities times their logarithms, which autocast makes in fp32 on a GPU only."""
    kind = images.device.type
    if images.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return images.dtype
    return torch.get_autocast_dtype(kind) if kind == "cpu" else torch.float32


def _ranks(theirs: Any) -> dict[str, Any] | None:
    """Nothing on one process, else the place in the default group; None when torch.distributed knows another one."""
    if getattr(theirs, "use_horovod", False):
        return None
    if theirs.world_size == 1:
        return {}
    ranks = {"rank": theirs.rank, "world_size": theirs.world_size}
    here = dist.is_available() and dist.is_initialized()
    return ranks if here and ranks == {"rank": dist.get_rank(), "world_size": dist.get_world_size()} else None
