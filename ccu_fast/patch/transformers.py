"""transformers: the contrastive loss inside the forward of two-tower models.

The model's own forward runs without its loss; the loss is computed from the embeddings it returns. The logits that the
output carries are still computed, as its users expect them; what is saved is everything between them and the loss, in
both passes. The loss is fp32.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ccu_fast.losses.functional import info_nce, sigmoid_loss
from ccu_fast.ops.reduce_similarity.api import reduce_similarity
from ccu_fast.ops.reduce_similarity.relations import ALL, SELF
from ccu_fast.patch.site import Site, arguments


# The image tower of CLIP and SigLIP may live on another device.
def _clip(model: Any, out: Any) -> Tensor:
    image = out.image_embeds.to(out.text_embeds.device)
    return info_nce(out.text_embeds, image, scale=model.logit_scale.exp())


def _siglip(model: Any, out: Any) -> Tensor:
    image = out.image_embeds.to(out.text_embeds.device)
    return sigmoid_loss(out.text_embeds, image, scale=model.logit_scale.exp(), bias=model.logit_bias)


def _align(model: Any, out: Any) -> Tensor:
    return smoothed_info_nce(out.text_embeds, out.image_embeds, scale=1 / model.temperature, smoothing=0.1)


def _clap(model: Any, out: Any) -> Tensor:
    # Both of its terms go from text to audio, with a scale each.
    scales = model.logit_scale_t.exp(), model.logit_scale_a.exp()
    losses = [info_nce(out.text_embeds, out.audio_embeds, scale=scale, symmetric=False) for scale in scales]
    return (losses[0] + losses[1]) / 2


_MODELS: dict[str, tuple[str, Callable[[Any, Any], Tensor]]] = {
    "clip": ("CLIPModel", _clip),
    "siglip": ("SiglipModel", _siglip),
    "align": ("AlignModel", _align),
    "clap": ("ClapModel", _clap),
}


def sites() -> list[Site]:
    """What is replaced."""
    found = []
    for module, (name, loss) in _MODELS.items():
        owner = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)
        found.append(Site(owner, "forward", ("self", "input_ids"), _with(loss)))
    return found


def smoothed_info_nce(x: Tensor, y: Tensor, *, scale: Tensor, smoothing: float) -> Tensor:
    """Symmetric InfoNCE with label smoothing, the loss of ALIGN::

        s = scale * x @ y.T;  target = arange(N)
        (F.cross_entropy(s, target, label_smoothing=smoothing)
         + F.cross_entropy(s.T, target, label_smoothing=smoothing)) / 2

    The smoothed target puts smoothing / N on every column, so a row is its log-sum-exp less that mean of its logits.
    """
    spec = [("lse", ALL), ("sum", SELF), ("sum", ALL)]
    sides = reduce_similarity(x, y, scale=scale, rows=spec, cols=spec)
    losses = [lse - (1 - smoothing) * own - smoothing / len(x) * every for lse, own, every in sides]
    return (losses[0] + losses[1]).mean() / 2


def _with(loss: Callable[[Any, Any], Tensor]) -> Callable[..., Any]:
    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = arguments(original, args, kwargs)
        if not call.get("return_loss"):
            return NotImplemented
        model = call.pop("self")
        wants = call.pop("return_dict", None)
        if wants is None:
            wants = getattr(model.config, "return_dict", True)
        out = original(model, **{**call, "return_loss": False}, return_dict=True)
        other = out.audio_embeds if "audio_embeds" in out else out.image_embeds
        if other.shape != out.text_embeds.shape:  # the library raises its own error
            return NotImplemented
        result = type(out)(loss=loss(model, out), **dict(out.items()))
        return result if wants else result.to_tuple()

    return forward
