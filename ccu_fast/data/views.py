"""digit-views: digits-halves seen many times, each time as a camera would that moved a little."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ccu_fast import check
from ccu_fast.data.halves import Halves, load_halves
from ccu_fast.data.paired import PairedData

SIZE = (16, 8)  # pixels of one half
STRIDE = 1000  # an item's id is that of its digit times this, plus the number of the view


def load_views(seed: int = 0, *, views: int = 8, unseen_views: int = 2) -> Halves:
    """Views of the digits of :func:`ccu_fast.data.halves.load_halves`, in the same three parts.

    A view enlarges the digit to 16×16 pixels and draws, for the left and the right half independently, a rotation
    (±15°), a scale (0.85 – 1.15), a shift (±1.5 pixels), a contrast (0.7 – 1.1) and Gaussian noise (σ = 0.1). Views of
    one digit are in one part; ``ids // STRIDE`` is the digit. Pixels are fp32 ``[N, 1, 16, 8]``.

    Args:
        seed: of the split and the views, at least 0.
        views: of each training digit, in [1, 1000].
        unseen_views: of each test and held-out digit.

    Raises:
        ValueError: a number out of range.
        ImportError: scikit-learn is not installed.
    """
    for name, count in (("views", views), ("unseen_views", unseen_views)):
        check.integer(name, count, low=1, high=STRIDE)
    halves = load_halves(seed)
    generator = torch.Generator().manual_seed(seed)
    parts = (halves.train, views), (halves.test, unseen_views), (halves.held_out, unseen_views)
    return Halves(*(_views(part, count, generator) for part, count in parts))


def _views(digits: PairedData, views: int, generator: torch.Generator) -> PairedData:
    whole = torch.cat([digits.visual.view(-1, 1, 8, 4), digits.other.view(-1, 1, 8, 4)], dim=3)
    whole = whole.repeat_interleave(views, dim=0)
    number = torch.arange(views).repeat(len(digits))
    ids = digits.ids.repeat_interleave(views) * STRIDE + number
    left, right = _seen(whole, generator)[..., : SIZE[1]], _seen(whole, generator)[..., SIZE[1] :]
    return PairedData(left.contiguous(), right.contiguous(), digits.labels.repeat_interleave(views), ids)


def _seen(images: Tensor, generator: torch.Generator) -> Tensor:
    """``[N, 1, 8, 8]`` → ``[N, 1, 16, 16]``, each image moved at random."""
    size = 2 * images.shape[-1]
    seen = moved(images, size, generator, angle=math.pi / 12, scale=0.15, shift=1.5, contrast=(0.7, 1.1))
    return seen + 0.1 * torch.randn(seen.shape, generator=generator)


def moved(
    images: Tensor,
    size: int,
    generator: torch.Generator,
    *,
    angle: float,
    scale: float,
    shift: float,
    contrast: tuple[float, float],
) -> Tensor:
    """Square images ``[N, C, H, H]`` → ``[N, C, size, size]``, each turned, scaled, shifted and dimmed at random.

    What lies outside an image is 0.

    Args:
        images: fp32.
        size: of the result, in pixels.
        generator: of the draws, which are uniform and independent of each other.
        angle: up to which an image is turned to either side, in radians.
        scale: by how much it may be smaller or larger than 1.
        shift: up to how many pixels of the result it goes to each side.
        contrast: the bounds of the factor on all its values.
    """
    n = len(images)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    turn, stretch = between(-angle, angle), between(1 - scale, 1 + scale)
    offset = between(-2 * shift / size, 2 * shift / size, 2)  # grid units: the image is 2 wide
    cos, sin = turn.cos() / stretch, turn.sin() / stretch
    theta = torch.stack([torch.stack([cos, -sin, offset[:, 0]], 1), torch.stack([sin, cos, offset[:, 1]], 1)], 1)
    grid = F.affine_grid(theta, [n, images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False) * between(*contrast, 1, 1, 1)
