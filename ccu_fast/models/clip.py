"""CLIP models of open_clip and transformers, as a dual encoder for protection and as two towers for unlearning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccu_fast import check
from ccu_fast.models import clip_towers
from ccu_fast.models.within import within

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ClipEncoder(nn.Module):
    """What both libraries share: pixels in [0, 1] outside, the model's mean and std inside, unit vectors.

    Attributes:
        model: the library's own.
    """

    mean: Tensor
    std: Tensor
    log_scale_limit = 4.6052  # ln 100, CLIP's bound

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                raise ValueError(f"{name}: expected three numbers, got {len(values)}")
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def embed_visual(self, visual: Tensor) -> Tensor:
        """Pictures ``[N, 3, H, W]``, uint8 or floating point in [0, 1] → unit vectors ``[N, D]``."""
        return self.encode_image(visual.float() / 255 if visual.dtype == torch.uint8 else visual)

    def embed_other(self, other: Tensor) -> Tensor:
        """Token ids ``[N, L]`` → unit vectors ``[N, D]``."""
        return self.encode_text(other if other.is_floating_point() else other.long())

    def encode_image(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1], ``[N, 3, H, W]`` → unit vectors ``[N, D]``."""
        check.tensor("images", images, ndim=4)
        return F.normalize(self._image_features((images - self.mean) / self.std), dim=-1)

    def encode_text(self, tokens: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Ids ``[N, L]`` → unit vectors; ``embeddings`` stand in for what the embedding layer returns."""
        check.tensor("tokens", tokens, dtypes=(torch.int64,), ndim=2)
        if embeddings is None:
            embeddings = self._embedding(tokens)
        check.shape("embeddings", embeddings, (*tokens.shape, self.embedding_matrix.shape[1]))
        return F.normalize(self._text_features(tokens, embeddings), dim=-1)

    def _image_features(self, normalised: Tensor) -> Tensor:
        raise NotImplementedError

    def _text_features(self, tokens: Tensor, embeddings: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def _embedding(self) -> nn.Embedding:
        raise NotImplementedError

    @property
    def embedding_matrix(self) -> Tensor:
        """``[V, W]``."""
        return self._embedding.weight

    @property
    def scale(self) -> Tensor:
        """0-dim."""
        logarithm: Tensor = self.model.logit_scale  # type: ignore[assignment]
        return within(logarithm.reshape(()), -math.inf, self.log_scale_limit).exp()


class OpenClipEncoder(ClipEncoder):
    """An ``open_clip.CLIP`` (ResNet or ViT image tower, causal text tower).

    Args:
        model: as ``open_clip.create_model`` or ``open_clip.CLIP(...)`` gives it.
        mean, std: of the three channels, default OpenAI's.

    Raises:
        TypeError: a model without the attributes of ``open_clip.CLIP`` (``CustomTextCLIP``, CoCa).
        ValueError: attention in the text tower that is not causal, or a feature that is not taken at EOT.
    """

    def __init__(self, model: nn.Module, *, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        missing = [a for a in ("visual", "transformer", "token_embedding", "ln_final") if not hasattr(model, a)]
        if missing:
            raise TypeError(f"model: expected an open_clip.CLIP, got {type(model).__name__} without {missing[0]}")
        if model.attn_mask is None or model.text_pool_type not in ("argmax", "eos"):
            raise ValueError("model: expected causal text with the feature at EOT, got another text tower")
        super().__init__(model, mean, std)

    @property
    def _embedding(self) -> nn.Embedding:
        return self.model.token_embedding  # type: ignore[return-value]

    def _image_features(self, normalised: Tensor) -> Tensor:
        return self.model.visual(normalised)  # type: ignore[operator]

    def _text_features(self, tokens: Tensor, embeddings: Tensor) -> Tensor:
        """``open_clip.CLIP.encode_text`` for any length up to its context: what stands behind EOT cannot matter."""
        model: Any = self.model
        length = tokens.shape[1]
        x = embeddings + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
        end_id = tokens.amax(1, keepdim=True) if model.text_pool_type == "argmax" else model.text_eos_id
        end = (tokens == end_id).int().argmax(1)
        x = x[torch.arange(len(x), device=x.device), end]
        projection = model.text_projection
        if projection is not None:
            x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
        return x


class TransformersClipEncoder(ClipEncoder):
    """A ``transformers.CLIPModel``.

    Args:
        model: from ``CLIPModel(config)`` or ``CLIPModel.from_pretrained(folder)``.
        mean, std: of the three channels, default OpenAI's.

    Raises:
        TypeError: another class of model.
    """

    def __init__(self, model: nn.Module, *, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        if not hasattr(model, "get_text_features") or not hasattr(getattr(model, "text_model", None), "embeddings"):
            raise TypeError(f"model: expected a transformers.CLIPModel, got {type(model).__name__}")
        super().__init__(model, mean, std)

    @property
    def _embedding(self) -> nn.Embedding:
        return self.model.text_model.embeddings.token_embedding  # type: ignore[union-attr, return-value]

    def _image_features(self, normalised: Tensor) -> Tensor:
        found = clip_towers.image_feature(self.model, normalised)
        if found is not None:
            return found
        return _features(self.model.get_image_features(pixel_values=normalised))  # type: ignore[operator]

    def _text_features(self, tokens: Tensor, embeddings: Tensor) -> Tensor:
        found = clip_towers.text_feature(self.model, tokens, embeddings)
        if found is not None:
            return found
        # The library takes ids alone; a hook hands the embeddings in, whatever its version does around the layer.
        handle = self._embedding.register_forward_hook(lambda *_: embeddings)
        try:
            return _features(self.model.get_text_features(input_ids=tokens))  # type: ignore[operator]
        finally:
            handle.remove()


def _features(output: Any) -> Tensor:
    """Features of transformers 4 (a tensor) and 5 (an output with ``pooler_output``)."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found
