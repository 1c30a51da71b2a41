"""transformers: the contrastive loss inside the forward of two-tower models.

The model's own forward runs without its loss; the loss is computed from the embeddings it returns. The logits that the
output carries are still computed, as its users expect them; what is saved is everything between them and the loss, in
both passes.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ccu_fast.losses.functional import info_nce, sigmoid_loss
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


# The image tower of CLIP and SigLIP may live on another device than the text tower, and so may their scale.
def _clip(model: Any, out: Any) -> Tensor:
    where = out.text_embeds.device
    return info_nce(out.text_embeds, out.image_embeds.to(where), scale=model.logit_scale.exp().to(where))


def _siglip(model: Any, out: Any) -> Tensor:
    where = out.text_embeds.device
    scale, bias = model.logit_scale.exp().to(where), model.logit_bias.to(where)
    return sigmoid_loss(out.text_embeds, out.image_embeds.to(where), scale=scale, bias=bias)


def _align(model: Any, out: Any) -> Tensor:
    return info_nce(out.text_embeds, out.image_embeds, scale=1 / model.temperature, smoothing=0.1)


def _clap(model: Any, out: Any) -> Tensor:
    # Both of its terms go from text to audio, with a scale each.
    scales = model.logit_scale_t.exp(), model.logit_scale_a.exp()
    losses = [info_nce(out.text_embeds, out.audio_embeds, scale=scale, symmetric=False) for scale in scales]
    return (losses[0] + losses[1]) / 2


@dataclass(frozen=True)
class _Model:
    """A model whose loss is known.

    Attributes:
        name: its class.
        loss: its loss, of the model and of its output.
        scales: its parameters that make the logits: one number each.
        sigmoid: its loss is written out in its forward; the others' is a function of its module.
    """

    name: str
    loss: Callable[[Any, Any], Tensor] = _clip
    scales: tuple[str, ...] = ("logit_scale",)
    sigmoid: bool = False


# By the name of their module, which is also that of a loss that some of them have. Other models end in another loss, or
# in similarities that are no product of two matrices. X-CLIP prompts every text with every video, [videos, texts, D]:
# its logits cost no more than these features, which the model has made by then, so there is nothing to save either.
_MODELS = {
    "clip": _Model("CLIPModel"),
    "align": _Model("AlignModel", _align, ("temperature",)),
    "altclip": _Model("AltCLIPModel"),
    "blip": _Model("BlipModel"),
    "chinese_clip": _Model("ChineseCLIPModel"),
    "clap": _Model("ClapModel", _clap, ("logit_scale_t", "logit_scale_a")),
    "clipseg": _Model("CLIPSegModel"),
    "groupvit": _Model("GroupViTModel"),
    "metaclip_2": _Model("MetaClip2Model"),
    "siglip": _Model("SiglipModel", _siglip, ("logit_scale", "logit_bias"), sigmoid=True),
    "siglip2": _Model("Siglip2Model", _siglip, ("logit_scale", "logit_bias"), sigmoid=True),
    "vision_text_dual_encoder": _Model("VisionTextDualEncoderModel"),
}
_FIRST = ("clip", "siglip", "align", "clap")  # which every known version has


def sites() -> list[Site]:
    """What is replaced: the models that this version has."""
    found = []
    for name, known in _MODELS.items():
        home = f"transformers.models.{name}"
        if name in _FIRST or importlib.util.find_spec(home) is not None:
            module = importlib.import_module(f"{home}.modeling_{name}")
            found.append(Site(getattr(module, known.name), "forward", ("self", "input_ids"), _with(known, module)))
    return found


def _with(known: _Model, module: Any) -> Callable[..., Any]:
    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = arguments(original, args, kwargs)
        if not call.get("return_loss") or not _is_usual(known, module, call):
            return NotImplemented
        model = call.pop("self")
        wants = call.pop("return_dict", None)
        if wants is None:
            wants = getattr(model.config, "return_dict", True)
        out = original(model, **{**call, "return_loss": False}, return_dict=True)
        other = out.audio_embeds if "audio_embeds" in out else out.image_embeds
        # The towers may live on two devices. What are no pairs, the library refuses, or its weights are not plain.
        if not are_pairs(out.text_embeds, other.to(out.text_embeds.device)):
            return NotImplemented
        loss = known.loss(model, out).to(_dtype(known, out.logits_per_text))
        result = type(out)(loss=loss, **dict(out.items()))
        return result if wants else result.to_tuple()

    return forward


def _is_usual(known: _Model, module: Any, call: dict[str, Any]) -> bool:
    """What can be said before the towers run: nobody has replaced a loss, and the tensors are plain."""
    names = ("contrastive_loss", "image_text_contrastive_loss", "clip_loss", f"{module.__name__.split('.')[-2]}_loss")
    there = [name for name in names if hasattr(module, name)]
    if not torch_is_stock() or not all(is_stock(getattr(module, n), f"{module.__name__}.{n}") for n in there):
        return False
    scales = [getattr(call["self"], name) for name in known.scales]
    return all(is_one_number(scale, scale) for scale in scales) and are_plain(
        *(value for value in call.values() if isinstance(value, Tensor))
    )


def _dtype(known: _Model, logits: Tensor) -> torch.dtype:
    if known.sigmoid:  # the identity matrix that makes the signs is of the default dtype
        return torch.promote_types(logits.dtype, torch.get_default_dtype())
    return cross_entropy_dtype(logits)
