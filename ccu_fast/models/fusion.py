"""A small two-modality classifier: two towers, one shared embedding space, three heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast import check


class FusionModel(nn.Module):
    """Two MLP towers, a projector both share, and heads for each modality and for both together::

        z_visual = normalize(projector(visual_tower(visual)))        # unit vectors of one shared space
        z_other  = normalize(projector(other_tower(other)))
        logits   = visual_head(z_visual), other_head(z_other), fused_head([z_visual, z_other])

    Args:
        visual_dim: size of a flattened visual input.
        other_dim: size of a flattened other input.
        classes: number of classes.
        hidden: width of the towers.
        embedding: size D of the shared space.
    """

    def __init__(self, visual_dim: int, other_dim: int, classes: int, *, hidden: int = 128, embedding: int = 64):
        super().__init__()
        sizes = {"visual_dim": visual_dim, "other_dim": other_dim, "classes": classes, "hidden": hidden}
        for name, size in {**sizes, "embedding": embedding}.items():
            check.integer(name, size, low=1)
        self.visual_tower = _tower(visual_dim, hidden)
        self.other_tower = _tower(other_dim, hidden)
        self.projector = nn.Linear(hidden, embedding)
        self.visual_head = nn.Linear(embedding, classes)
        self.other_head = nn.Linear(embedding, classes)
        self.fused_head = nn.Linear(2 * embedding, classes)

    def embed_visual(self, visual: Tensor) -> Tensor:
        """``[N, visual_dim]`` → unit vectors ``[N, D]``."""
        return F.normalize(self.projector(self.visual_tower(visual)), dim=-1)

    def embed_other(self, other: Tensor) -> Tensor:
        """``[N, other_dim]`` → unit vectors ``[N, D]``."""
        return F.normalize(self.projector(self.other_tower(other)), dim=-1)

    def classify_visual(self, visual: Tensor) -> Tensor:
        """Visual embeddings ``[N, D]`` → logits ``[N, classes]``."""
        return self.visual_head(visual)

    def classify_other(self, other: Tensor) -> Tensor:
        """Other embeddings ``[N, D]`` → logits ``[N, classes]``."""
        return self.other_head(other)

    def classify_fused(self, visual: Tensor, other: Tensor) -> Tensor:
        """Both embeddings ``[N, D]`` → logits ``[N, classes]``."""
        return self.fused_head(torch.cat([visual, other], dim=-1))

    def forward(self, visual: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of both modalities → visual, other and fused logits ``[N, classes]``."""
        z_visual, z_other = self.embed_visual(visual), self.embed_other(other)
        return self.classify_visual(z_visual), self.classify_other(z_other), self.classify_fused(z_visual, z_other)


def _tower(inputs: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
