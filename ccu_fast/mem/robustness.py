"""What may happen to published images before somebody trains on them: JPEG, blur, crop."""

from __future__ import annotations

import io

import torch
import torch.nn.functional as F
from torch import Tensor

from ccu_fast import check

TREATMENTS = ("jpeg", "blur", "crop")
QUALITY = 75
SIGMA = 1.0
KEPT = 0.9


def jpeg(images: Tensor, quality: int = QUALITY) -> Tensor:
    """Each image written as JPEG and read back: uint8 ``[N, C, H, W]``, C = 1 or 3.

    Raises:
        ValueError: another number of channels.
    """
    import numpy as np
    from PIL import Image

    if images.shape[1] not in (1, 3):
        raise ValueError(f"images: expected 1 or 3 channels, got {images.shape[1]}")
    out = torch.empty_like(images)
    for i, image in enumerate(images):
        array = image.permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(buffer, "JPEG", quality=quality)
        read = torch.from_numpy(np.array(Image.open(buffer)))
        out[i] = read[None] if read.ndim == 2 else read.permute(2, 0, 1)
    return out


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


def treat(treatment: str, images: Tensor, rng: torch.Generator) -> Tensor:
    """What is left of published images after "jpeg" (quality 75), "blur" (sigma 1 px) or "crop" (90 % of each side).

    Args:
        treatment: one of :data:`TREATMENTS`.
        images: uint8 ``[N, C, H, W]`` as published.
        rng: where the crops are.
    """
    check.one_of("treatment", treatment, TREATMENTS)
    check.tensor("images", images, dtypes=(torch.uint8,), ndim=4)
    if treatment == "crop":
        return crop(images, rng)
    return jpeg(images) if treatment == "jpeg" else blur(images)
