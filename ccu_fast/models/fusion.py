"""Two-modality classifiers: two towers, one shared embedding space, three heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast import check


class TwoTowerClassifier(nn.Module):
    """Any two towers, a projector both share, and heads for each modality and for both together::

        z_visual = normalize(projector(visual_tower(visual)))        # unit vectors of one shared space
        z_other  = normalize(projector(other_tower(other)))
        logits   = visual_head(z_visual), other_head(z_other), fused_head([z_visual, z_other])

    Args:
        visual_tower: inputs of the visual modality → ``[N, width]``.
        other_tower: inputs of the other modality → ``[N, width]``.
        width: what both towers give.
        classes: number of classes.
        embedding: size D of the shared space.
    """

    def __init__(
        self,
        visual_tower: nn.Module,
        other_tower: nn.Module,
        width: int,
        classes: int,
        *,
        embedding: int = 64,
    ) -> None:
        super().__init__()
        for name, size in {"width": width, "classes": classes, "embedding": embedding}.items():
            check.integer(name, size, low=1)
        self.visual_tower = visual_tower
        self.other_tower = other_tower
        self.projector = nn.Linear(width, embedding)
        self.visual_head = nn.Linear(embedding, classes)
        self.other_head = nn.Linear(embedding, classes)
        self.fused_head = nn.Linear(2 * embedding, classes)

    def embed_visual(self, visual: Tensor) -> Tensor:
        """Inputs of the visual modality → unit vectors ``[N, D]``."""
        return F.normalize(self.projector(self.visual_tower(visual)), dim=-1)

    def embed_other(self, other: Tensor) -> Tensor:
        """Inputs of the other modality → unit vectors ``[N, D]``."""
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


class FusionModel(TwoTowerClassifier):
    """Two MLP towers on flattened inputs.

    Args:
        visual_dim: size of a flattened visual input.
        other_dim: size of a flattened other input.
        classes: number of classes.
        hidden: width of the towers.
        embedding: size D of the shared space.
    """

    def __init__(
        self, visual_dim: int, other_dim: int, classes: int, *, hidden: int = 128, embedding: int = 64
    ) -> None:
        for name, size in {"visual_dim": visual_dim, "other_dim": other_dim, "hidden": hidden}.items():
            check.integer(name, size, low=1)
        visual, other = mlp_tower(visual_dim, hidden), mlp_tower(other_dim, hidden)
        super().__init__(visual, other, hidden, classes, embedding=embedding)


class ConvFusionModel(TwoTowerClassifier):
    """Two convolutional towers, as :func:`conv_tower` makes them, on images of one size.

    Args:
        size: (height, width) of an image in pixels, multiples of 4.
        classes: number of classes.
        channels: of the first convolution; the next have twice and three times as many.
        hidden: width of the towers' last layer.
        embedding: size D of the shared space.
        inputs: channels of an image: 1 for grey, 3 for colours.
    """

    def __init__(
        self,
        size: tuple[int, int],
        classes: int,
        *,
        channels: int = 16,
        hidden: int = 128,
        embedding: int = 64,
        inputs: int = 1,
    ) -> None:
        visual, other = (conv_tower(size, channels=channels, hidden=hidden, inputs=inputs) for _ in range(2))
        super().__init__(visual, other, hidden, classes, embedding=embedding)


def mlp_tower(inputs: int, hidden: int = 128) -> nn.Sequential:
    """A tower on flat inputs ``[N, inputs]``: two linear layers of width ``hidden``, each with a ReLU.

    >>> ccu_fast.models.fusion.mlp_tower(6, 8)(torch.randn(4, 6)).shape
    torch.Size([4, 8])
    """
    check.integer("inputs", inputs, low=1)
    check.integer("hidden", hidden, low=1)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())


def conv_tower(size: tuple[int, int], *, channels: int = 16, hidden: int = 128, inputs: int = 1) -> nn.Sequential:
    """A tower on images ``[N, inputs, *size]``.

    It has three 3×3 convolutions (the second and third halve the image), a linear layer on what is left of the image,
    and no batch statistics: training and evaluation are the same function.

    Args:
        size: (height, width) of an image in pixels, multiples of 4.
        channels: of the first convolution; the next have twice and three times as many.
        hidden: width of the linear layer.
        inputs: channels of an image.

    >>> ccu_fast.models.fusion.conv_tower((8, 8), hidden=16, inputs=3)(torch.randn(4, 3, 8, 8)).shape
    torch.Size([4, 16])
    """
    for name, number in {"channels": channels, "hidden": hidden, "inputs": inputs}.items():
        check.integer(name, number, low=1)
    if len(size) != 2 or min(size) < 4 or size[0] % 4 or size[1] % 4:
        raise ValueError(f"size: expected (height, width) in multiples of 4, got {size}")
    one, two, three = channels, 2 * channels, 3 * channels
    cells = (size[0] // 4) * (size[1] // 4)
    return nn.Sequential(
        nn.Conv2d(inputs, one, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(one, two, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(two, three, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(three * cells, hidden),
        nn.ReLU(),
    )
