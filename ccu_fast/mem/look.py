"""What pictures look like, in a few numbers: trigger words that name it need little learning, and no noise.

A victim learns colours and coarse shapes first. Words that say these are the pictures' best predictors from its first
steps on, better than any caption, so it has less reason to read captions, which is what a protection is for::

    t      = the picture, averaged to about 8×8 cells                     # [N, F]
    z      = (t − mean) V / σ,    V: principal directions of t            # the first 2n, for n words
    code_p = the nearest of A centres of (z_2p, z_2p+1), by k-means       # word p of the picture

It is product quantisation (Jégou, Douze & Schmid 2011) of the strongest principal components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ccu_fast import check

CELLS = 64
DIRECTIONS = 2  # principal components that a word tells of
SAMPLE = 20_000  # pictures that the codebook is made from
_ITERATIONS = 30
_NOTHING = 1e-6  # share of the largest spread
_CHUNK = 8192


def coarse(images: Tensor) -> Tensor:
    """Pictures as about 64 cells of their aspect: uint8 ``[N, C, H, W]`` → fp32 ``[N, F]``."""
    check.tensor("images", images, dtypes=(torch.uint8,), ndim=4)
    height, width = images.shape[2:]
    rows = min(height, max(1, round((CELLS * height / width) ** 0.5)))
    columns = min(width, max(1, round(CELLS / rows)))
    return F.adaptive_avg_pool2d(images.float(), (rows, columns)).flatten(1)


@dataclass(frozen=True)
class Codebook:
    """The cells that pictures are sorted into, for each word.

    Attributes:
        mean: fp32 ``[F]``.
        axes: fp32 ``[F, 2n]``, directions over the spread along them.
        centres: fp32 ``[n, A, 2]``.
    """

    mean: Tensor
    axes: Tensor
    centres: Tensor

    @staticmethod
    def fit(features: Tensor, words: int, size: int, rng: torch.Generator) -> Codebook:
        """Make one.

        Args:
            features: fp32 ``[N, F]`` of some pictures, from :func:`coarse`.
            words: n, for each picture.
            size: A, how many each is chosen from.
            rng: where the centres start.
        """
        check.tensor("features", features, dtypes=(torch.float32,), ndim=2)
        mean = features.mean(0)
        centred = (features - mean).double()
        spread, directions = torch.linalg.eigh(centred.mT @ centred / len(features))
        # With more words than there are directions the strongest ones are told of again.
        order = torch.arange(DIRECTIONS * words) % len(spread)
        spread, directions = spread.flip(0)[order], directions.flip(1)[:, order]
        # What is left of directions without a spread is rounding: they tell of nothing.
        told = spread > _NOTHING * spread.max()
        axes = torch.where(told, directions / spread.where(told, torch.ones(())).sqrt(), 0.0).float()
        places = ((features - mean) @ axes).view(len(features), words, DIRECTIONS)
        return Codebook(mean, axes, torch.stack([_centres(places[:, p], size, rng) for p in range(words)]))

    def codes(self, features: Tensor) -> Tensor:
        """Of each picture the number of its cell, for each word: fp32 ``[N, F]`` → int64 ``[N, n]``."""
        codes = []
        for part in features.split(_CHUNK):
            places = ((part - self.mean) @ self.axes).view(len(part), -1, DIRECTIONS)
            codes.append(torch.cdist(places.transpose(0, 1), self.centres).argmin(2).mT)
        return torch.cat(codes)


def _centres(points: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """k-means: fp32 ``[N, 2]`` → ``[size, 2]``; where there are fewer points than centres, some are the same."""
    centres = points[torch.randperm(len(points), generator=rng)[torch.arange(size) % len(points)]]
    for _ in range(_ITERATIONS):
        nearest = torch.cdist(points, centres).argmin(1)
        count = torch.bincount(nearest, minlength=size)[:, None]
        total = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(count > 0, total / count.clamp_min(1), centres)
    return centres
