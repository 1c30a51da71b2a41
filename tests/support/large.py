"""Two small towers for inputs that are large."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Towers(nn.Module):
    """Ten thousand bytes, and one of two words."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Linear(10_000, 8)
        self.words = nn.Embedding(2, 8)

    def embed_visual(self, visual: Tensor) -> Tensor:
        return F.normalize(self.visual(visual / 255), dim=-1)

    def embed_other(self, other: Tensor) -> Tensor:
        return F.normalize(self.words(other[:, 0]), dim=-1)
