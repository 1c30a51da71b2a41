"""CLIP-like models, with no heads, for unlearning: any pair of encoders under the names the protocol uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PairModel(nn.Module):
    """Two encoders as the "visual" and the "other" tower, whatever their modalities; no heads.

    Args:
        visual: a module; its output is normalised.
        other: a module; its output is normalised.
        scale: inverse temperature of the pairs' InfoNCE; CLIP's initial one by default.
    """

    scale: Tensor

    def __init__(self, visual: nn.Module, other: nn.Module, *, scale: float = 1 / 0.07) -> None:
        super().__init__()
        self.visual = visual
        self.other = other
        self.register_buffer("scale", torch.tensor(float(scale)))

    def embed_visual(self, visual: Tensor) -> Tensor:
        """Inputs of the visual modality → unit vectors ``[N, D]``."""
        return F.normalize(self.visual(visual), dim=-1)

    def embed_other(self, other: Tensor) -> Tensor:
        """Inputs of the other modality → unit vectors ``[N, D]``."""
        return F.normalize(self.other(other), dim=-1)


class DualEncoderPair(nn.Module):
    """A :class:`ccu_fast.models.dual_encoder.DualEncoder`, such as an adapted CLIP: images are visual, tokens other.

    Args:
        encoder: its parameters are shared, not copied.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    @property
    def scale(self) -> Tensor:
        """The encoder's inverse temperature."""
        return self.encoder.scale

    def embed_visual(self, visual: Tensor) -> Tensor:
        """Images → unit vectors ``[N, D]``."""
        return self.encoder.encode_image(visual)

    def embed_other(self, other: Tensor) -> Tensor:
        """Token ids → unit vectors ``[N, D]``."""
        return self.encoder.encode_text(other)
