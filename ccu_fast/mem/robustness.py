"""What may happen to published images before somebody trains on them: JPEG, filters, denoisers, other sizes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ccu_fast import check, extras
from ccu_fast.mem.denoisers import learned, nlmeans

if TYPE_CHECKING:
    from PIL.Image import Image

TREATMENTS = ("jpeg", "blur", "crop", "resize", "grey", "median", "nlmeans", "learned")
QUALITY = 75
SIGMA = 1.0
KEPT = 0.9
SCALE = 0.5
MEDIAN = 3
# Treatment → modules that it needs beyond torch.
NEEDS = {"jpeg": ("PIL",), "resize": ("PIL",), "median": ("PIL",), "nlmeans": ("cv2",)}


def jpeg(images: Tensor, quality: int = QUALITY) -> Tensor:
    """Each image written as JPEG and read back: uint8 ``[N, C, H, W]``, C = 1 or 3.

    Raises:
        ValueError: another number of channels.
    """

    def written(picture: Image) -> Image:
        from PIL import Image

        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer)

    return _each(images, written)


def blur(images: Tensor, sigma: float = SIGMA) -> Tensor:
    """Gaussian blur, ``sigma`` in pixels, edges repeated, rounded: uint8 ``[N, C, H, W]``."""
    radius = max(1, round(3 * sigma))
    weight = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    weight = (weight / weight.sum()).view(1, 1, 1, -1)
    flat = images.float().flatten(0, 1)[:, None]
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), mode="replicate"), weight)
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), mode="replicate"), weight.mT)
    return flat.view(images.shape).round().clamp(0, 255).to(torch.uint8)


def crop(images: Tensor, rng: torch.Generator, kept: float = KEPT) -> Tensor:
    """A window of ``kept`` of each side at a random place of each image, enlarged (bilinear) to the old size."""
    n, _, height, width = images.shape
    h, w = max(1, round(kept * height)), max(1, round(kept * width))
    top = torch.randint(height - h + 1, (n,), generator=rng).tolist()
    left = torch.randint(width - w + 1, (n,), generator=rng).tolist()
    windows = torch.stack([image[:, t : t + h, x : x + w] for image, t, x in zip(images, top, left, strict=True)])
    large = F.interpolate(windows.float(), size=(height, width), mode="bilinear", align_corners=False)
    return large.round().clamp(0, 255).to(torch.uint8)


def resize(images: Tensor, scale: float = SCALE) -> Tensor:
    """Each image made smaller, to ``scale`` of each side, and as large as before, by Pillow's bicubic filter.

    That filter is antialiased: a smaller image has the mean of many pixels where noise cancels out.

    Args:
        images: uint8 ``[N, C, H, W]``, C = 1 or 3; of a side of 1 px 1 px is left.
        scale: of each side, rounded to pixels.

    Raises:
        ValueError: another number of channels.

    Source: Guo et al. 2018 (arXiv 1711.00117), who undo adversarial noise so.
    """

    def through(picture: Image) -> Image:
        from PIL.Image import Resampling

        small = (max(1, round(scale * picture.width)), max(1, round(scale * picture.height)))
        return picture.resize(small, Resampling.BICUBIC).resize(picture.size, Resampling.BICUBIC)

    return _each(images, through)


def grey(images: Tensor) -> Tensor:
    """The luma of each image in all its channels, with Pillow's weights (ITU-R 601) and rounding.

    Args:
        images: uint8 ``[N, C, H, W]``; of 3 channels, which are red, green and blue. 1 channel stays as it is.

    Raises:
        ValueError: another number of channels.

    Source: Liu et al. 2023, Image shortcut squeezing (arXiv 2301.13838), who undo unlearnable noise so.
    """
    _check_channels(images)
    if images.shape[1] == 1:
        return images.clone()
    weight = torch.tensor((19595, 38470, 7471), dtype=torch.int32).view(1, 3, 1, 1)
    luma = ((images.int() * weight).sum(1, keepdim=True) + (1 << 15)) >> 16
    return luma.to(torch.uint8).expand_as(images).contiguous()


def median(images: Tensor, size: int = MEDIAN) -> Tensor:
    """The median of each pixel's ``size`` × ``size`` surroundings, by Pillow: uint8 ``[N, C, H, W]``, C = 1 or 3.

    Raises:
        ValueError: another number of channels.

    Source: Xu, Evans & Qi 2018, Feature squeezing (arXiv 1704.01155).
    """

    def filtered(picture: Image) -> Image:
        from PIL.ImageFilter import MedianFilter

        return picture.filter(MedianFilter(size))

    return _each(images, filtered)


def require(treatment: str, name: str = "treatment") -> None:
    """Check a treatment before work begins: that it is one, and that what it needs is installed.

    Raises:
        ImportError: a package is missing; says what to install.
        ValueError: no treatment; ``name`` is the argument.
    """
    check.one_of(name, treatment, TREATMENTS)
    extras.require(*NEEDS.get(treatment, ()))


def treat(treatment: str, images: Tensor, rng: torch.Generator) -> Tensor:
    """What a treatment leaves of published images.

    - ``jpeg``: quality 75
    - ``blur``: Gaussian of 1 px
    - ``crop``: 90 % of each side, at a random place, enlarged again
    - ``resize``: half of each side and back, bicubic, antialiased
    - ``grey``: without colours
    - ``median``: of 3 × 3 px
    - ``nlmeans``: non-local means, OpenCV's defaults; needs the extra ``denoise``
    - ``learned``: a small net trained on these images alone; see :func:`ccu_fast.mem.denoisers.learned`

    Args:
        treatment: one of :data:`TREATMENTS`.
        images: uint8 ``[N, C, H, W]`` as published, C = 1 or 3.
        rng: where the crops are, and what the net begins with.

    Raises:
        ImportError: a package is missing; says what to install.
        ValueError: no such treatment, or another number of channels.
    """
    require(treatment)
    check.tensor("images", images, dtypes=(torch.uint8,), ndim=4)
    _check_channels(images)
    if treatment == "crop":
        return crop(images, rng)
    return learned(images, rng) if treatment == "learned" else _FIXED[treatment](images)


_FIXED: dict[str, Callable[[Tensor], Tensor]] = {
    "jpeg": jpeg,
    "blur": blur,
    "resize": resize,
    "grey": grey,
    "median": median,
    "nlmeans": nlmeans,
}


def _each(images: Tensor, work: Callable[[Image], Image]) -> Tensor:
    """Each image through Pillow, whose result has the same size and channels."""
    import numpy as np
    from PIL import Image

    _check_channels(images)
    out = torch.empty_like(images)
    for i, image in enumerate(images):
        array = image.permute(1, 2, 0).numpy()
        picture = work(Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array))
        out[i] = torch.from_numpy(np.array(picture).reshape(array.shape)).permute(2, 0, 1)
    return out


def _check_channels(images: Tensor) -> None:
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected 1 or 3 channels, got {images.shape[1]}")
