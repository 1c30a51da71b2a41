"""digit-features: the embedded digits as numbers that two methods of image analysis take of them, without any image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ccu_fast.data.halves import Halves, load_halves
from ccu_fast.data.paired import PairedData

WAVES = 36  # two-dimensional cosine waves, the six slowest each way
ORIENTATIONS = 8  # bins of a cell's histogram
EDGES = 4 * ORIENTATIONS  # of the four quarters of an image


def load_features(seed: int = 0) -> Halves:
    """The digits of :func:`ccu_fast.data.halves.load_halves`, in the same parts, as two descriptions of each image.

    ``visual`` is its spectrum: the 6 × 6 lowest coefficients of the two-dimensional discrete cosine transform,
    ``[N, 36]``. ``other`` is its edges: for each quarter of the image how much gradient points in each of eight
    directions, ``[N, 32]``, as shares of the image's whole. Both are fp32, shifted and scaled by the mean and the
    deviation that the training part has in each column. ids are positions in the original data set.

    Args:
        seed: of the split, at least 0.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    halves = load_halves(seed)
    scales = [_mean_and_deviation(of(_images(halves.train))) for of in (spectrum, edges)]
    made = []
    for part in (halves.train, halves.test, halves.held_out):
        images = _images(part)
        visual, other = (
            (of(images) - mean) / deviation for of, (mean, deviation) in zip((spectrum, edges), scales, strict=True)
        )
        made.append(PairedData(visual, other, part.labels, part.ids))
    return Halves(*made)


def spectrum(images: Tensor) -> Tensor:
    """``[N, 8, 8]`` → the 36 slowest coefficients of the orthonormal DCT-II.

    >>> ccu_fast.data.features.spectrum(torch.ones(1, 8, 8))[0, :2].round().tolist()
    [8.0, 0.0]
    """
    side = images.shape[-1]
    slow = math.isqrt(WAVES)
    angles = torch.outer(torch.arange(slow), torch.arange(side) + 0.5) * math.pi / side
    waves = angles.cos() * math.sqrt(2 / side)
    waves[0] /= math.sqrt(2)
    return torch.einsum("ui,nij,vj->nuv", waves, images, waves).flatten(1)


def edges(images: Tensor) -> Tensor:
    """``[N, 8, 8]`` → histograms of the gradients' directions in the four quarters, weighted by their lengths.

    >>> ramp = torch.arange(8.0).expand(1, 8, 8)  # grows to the right, direction 0, everywhere
    >>> ccu_fast.data.features.edges(ramp).view(4, 8)[:, 4].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    down, right = torch.gradient(images, dim=(1, 2))
    length = torch.hypot(down, right)
    turn = (torch.atan2(down, right) / (2 * math.pi) + 0.5) * ORIENTATIONS  # in bins; direction 0 is in the middle
    # Shared between the two nearest bins: a direction on the border of two is no jump.
    low = turn.floor()
    share = turn - low
    bins = torch.zeros(*images.shape, ORIENTATIONS)
    for number, part in ((low, 1 - share), (low + 1, share)):
        bins.scatter_add_(3, (number.long() % ORIENTATIONS).unsqueeze(3), (part * length).unsqueeze(3))
    half = images.shape[-1] // 2
    quarters = bins.unflatten(2, (2, half)).unflatten(1, (2, half)).sum((2, 4)).flatten(1)
    return quarters / quarters.sum(1, keepdim=True).clamp_min(1e-12)


def _images(part: PairedData) -> Tensor:
    """The whole images ``[N, 8, 8]`` again."""
    return torch.cat([part.visual.view(-1, 8, 4), part.other.view(-1, 8, 4)], dim=2)


def _mean_and_deviation(columns: Tensor) -> tuple[Tensor, Tensor]:
    return columns.mean(0), columns.std(0).clamp_min(1e-6)
