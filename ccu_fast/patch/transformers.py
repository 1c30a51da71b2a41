"""transformers: the contrastive loss inside the forward of two-tower models.

The model's own forward runs without its loss; the loss is computed from the embeddings it returns. The logits that the
output carries are still computed, as its users expect them; what is saved is everything between them and the loss, in
both passes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ccu_fast.losses.formulas import softplus
from ccu_fast.losses.functional import info_nce, sigmoid_loss
from ccu_fast.ops.reduce_similarity.api import reduce_similarity
from ccu_fast.ops.reduce_similarity.relations import ALL, OTHER, SELF
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
    return smoothed_info_nce(out.text_embeds, out.image_embeds, scale=1 / model.temperature, smoothing=0.1)


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
        scales: its parameters that make the logits: one number each.
        functions: those of its module that make the loss, under all names that they have had.
        loss: what they give, of the model and of its output.
    """

    name: str
    scales: tuple[str, ...]
    functions: tuple[str, ...]
    loss: Callable[[Any, Any], Tensor]


_MODELS = {
    "clip": _Model(
        "CLIPModel", ("logit_scale",), ("contrastive_loss", "clip_loss", "image_text_contrastive_loss"), _clip
    ),
    "siglip": _Model("SiglipModel", ("logit_scale", "logit_bias"), (), _siglip),
    "align": _Model("AlignModel", ("temperature",), ("contrastive_loss", "align_loss"), _align),
    "clap": _Model("ClapModel", ("logit_scale_t", "logit_scale_a"), ("contrastive_loss",), _clap),
}


def sites() -> list[Site]:
    """What is replaced."""
    found = []
    for name, known in _MODELS.items():
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        found.append(Site(getattr(module, known.name), "forward", ("self", "input_ids"), _with(known, module)))
    return found


def smoothed_info_nce(x: Tensor, y: Tensor, *, scale: Tensor, smoothing: float) -> Tensor:
    """Symmetric InfoNCE with label smoothing, the loss of ALIGN::

        s = scale * x @ y.T;  target = arange(N)
        (F.cross_entropy(s, target, label_smoothing=smoothing)
         + F.cross_entropy(s.T, target, label_smoothing=smoothing)) / 2

    The smoothed target puts smoothing / N on every column. A row is that of InfoNCE, and smoothing times what its own
    logit has over the mean of all.
    """
    spec = [("lse", OTHER), ("sum", SELF), ("sum", ALL)]
    sides = reduce_similarity(x, y, scale=scale, rows=spec, cols=spec)
    losses = [softplus(rest - own) + smoothing * (own - every / len(x)) for rest, own, every in sides]
    return (losses[0] + losses[1]).mean() / 2


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
    there = [name for name in known.functions if hasattr(module, name)]
    if not torch_is_stock() or not all(is_stock(getattr(module, n), f"{module.__name__}.{n}") for n in there):
        return False
    scales = [getattr(call["self"], name) for name in known.scales]
    return all(is_one_number(scale, scale) for scale in scales) and are_plain(
        *(value for value in call.values() if isinstance(value, Tensor))
    )


def _dtype(known: _Model, logits: Tensor) -> torch.dtype:
    if known.functions:
        return cross_entropy_dtype(logits)
    return torch.promote_types(logits.dtype, torch.get_default_dtype())  # of the identity matrix that makes the signs
