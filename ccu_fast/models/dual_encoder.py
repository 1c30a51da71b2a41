"""The dual-encoder protocol the MEM system works with, and a small model that fulfils it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccu_fast import check
from ccu_fast.models.within import within


class DualEncoder(Protocol):
    """What a model must offer: two encoders to unit vectors, the token embedding matrix, the logit scale."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1], ``[N, C, H, W]`` → unit vectors ``[N, D]``."""
        ...

    def encode_text(self, tokens: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """Token ids ``[N, L]`` → unit vectors ``[N, D]``; ``embeddings`` ``[N, L, W]`` replace the look-up."""
        ...

    @property
    def embedding_matrix(self) -> Tensor:
        """``[V, W]``."""
        ...

    @property
    def scale(self) -> Tensor:
        """0-dim: the inverse temperature, exp of the learned logarithm."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def train(self, mode: bool = True) -> Any: ...


class SmallDualEncoder(nn.Module):
    """Convolutional image tower and causal transformer text tower, for images of about 16×64 px.

    Image: three 3×3 stride-2 convolutions to width, then one linear map of the whole feature map, so that
    position counts. Text: ``text_depth`` pre-norm causal blocks with rotary positions, feature at
    the first EOT. Rotary positions are relative: with learned absolute ones any word in front of a caption of fixed
    form moves all that follow to untrained positions, and a protection would be credited with that.
    No dropout and no batch statistics: training and evaluation are the same function.

    Args:
        vocabulary: number of token ids.
        eot: id of the token whose position gives the text feature.
        image_size: (height, width) in pixels, at least 8 each.
        channels: image channels.
        image_tower: "convolutional", or "patches": a vision transformer on patches of 8×8 px with learned positions
            and two blocks.
        width: channels of the last convolution and width of the transformer; a multiple of 32.
        text_depth: transformer blocks, at least 1.
        context: longest token sequence.
        dim: size of the shared space.
    """

    rotation: Tensor

    def __init__(
        self,
        vocabulary: int,
        eot: int,
        *,
        image_size: tuple[int, int] = (16, 64),
        channels: int = 1,
        image_tower: str = "convolutional",
        width: int = 128,
        text_depth: int = 2,
        context: int = 32,
        dim: int = 128,
    ) -> None:
        super().__init__()
        check.integer("vocabulary", vocabulary, low=1)
        check.integer("eot", eot, low=0, high=vocabulary - 1)
        check.integer("width", width, low=32)
        if width % 32:
            raise ValueError(f"width: expected a multiple of 32, got {width}")
        check.integer("text_depth", text_depth, low=1)
        if len(image_size) != 2 or min(image_size) < 8:
            raise ValueError(f"image_size: expected (height, width) of at least 8 px, got {image_size}")
        self.eot = eot
        self.image_shape = (channels, *image_size)
        check.one_of("image_tower", image_tower, ("convolutional", "patches"))
        tower = _ImageTower if image_tower == "convolutional" else _PatchTower
        self.image_tower = tower(channels, image_size, width, dim)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.register_buffer("rotation", _rotation(context, 32), persistent=False)
        self.blocks = nn.ModuleList(_Block(width, heads=width // 32) for _ in range(text_depth))
        self.text_norm = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.3)

    @property
    def embedding_matrix(self) -> Tensor:
        return self.token_embedding.weight

    @property
    def scale(self) -> Tensor:
        # CLIP's bound: above 100 training becomes unstable.
        return within(self.log_scale, -math.inf, math.log(100.0)).exp()

    def encode_image(self, images: Tensor) -> Tensor:
        check.tensor("images", images, ndim=4)
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"images: expected shape [N, {', '.join(map(str, self.image_shape))}], got {list(images.shape)}"
            )
        return F.normalize(self.image_tower(images), dim=-1)

    def encode_text(self, tokens: Tensor, embeddings: Tensor | None = None) -> Tensor:
        check.tensor("tokens", tokens, dtypes=(torch.int64,), ndim=2)
        n, length = tokens.shape
        if length > self.rotation.shape[1]:
            raise ValueError(f"tokens: expected at most {self.rotation.shape[1]} positions, got {length}")
        if embeddings is None:
            embeddings = self.token_embedding(tokens)
        else:
            check.shape("embeddings", embeddings, (n, length, self.embedding_matrix.shape[1]))
        rotation = self.rotation[:, :length]
        end = (tokens == self.eot).int().argmax(1)
        x = embeddings
        for block in self.blocks[:-1]:
            x = block(x, rotation)
        # Only the feature at EOT is read, so the last block need not compute the other positions.
        x = cast(_Block, self.blocks[-1]).at(x, end, rotation)
        return F.normalize(self.text_projection(self.text_norm(x)), dim=-1)


class _ImageTower(nn.Module):
    def __init__(self, channels: int, size: tuple[int, int], width: int, dim: int) -> None:
        super().__init__()
        widths = (channels, width // 4, width // 2, width)
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths))
        self.norm = nn.GroupNorm(width // 32, width)
        cells = -(-size[0] // 8) * -(-size[1] // 8)
        self.projection = nn.Linear(width * cells, dim)

    def forward(self, images: Tensor) -> Tensor:
        x = images - 0.5
        for stage in self.stages:
            x = F.relu(stage(x))
        return self.projection(self.norm(x).flatten(1))


class _PatchTower(nn.Module):
    def __init__(self, channels: int, size: tuple[int, int], width: int, dim: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, 8, stride=8)
        cells = (size[0] // 8) * (size[1] // 8)
        self.position = nn.Parameter(torch.randn(cells, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, width // 32, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width * cells, dim)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images - 0.5).flatten(2).mT + self.position
        for block in self.blocks:
            x = block(x)
        return self.projection(self.norm(x).flatten(1))


class _Block(nn.Module):
    """Pre-norm causal attention and a feed-forward layer of twice the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        h = self.norm1(x)
        key, value = self._split(self.key_value(h), 2)
        (query,) = self._split(self.query(h), 1)
        query, key = _rotate(query, rotation), _rotate(key, rotation)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))

    def at(self, x: Tensor, position: Tensor, rotation: Tensor) -> Tensor:
        """``forward(x, rotation)[i, position[i]]`` without the other positions: ``[N, W]``."""
        n, length, _ = x.shape
        h = self.norm1(x)
        key, value = self._split(self.key_value(h), 2)
        item = torch.arange(n, device=x.device)
        (query,) = self._split(self.query(h[item, position])[:, None], 1)
        query = _rotate(query, rotation[:, position][:, :, None, None])
        key = _rotate(key, rotation)
        seen = torch.arange(length, device=x.device) <= position[:, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None, None])
        y = x[item, position] + self.out(mixed.transpose(1, 2).flatten(1))
        return y + self.mlp(self.norm2(y))

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        n, length, _ = x.shape
        return x.view(n, length, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _rotation(context: int, head_width: int) -> Tensor:
    """Cosines and sines of rotary positions: ``[2, context, head_width / 2]``."""
    frequency = 100.0 ** -torch.arange(0, 1, 2 / head_width)
    angle = torch.arange(context)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the halves of the last dimension against each other (Su et al. 2021, arXiv 2104.09864)."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
