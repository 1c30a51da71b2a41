"""Published pictures beside their originals, to look at: which of them, and what is shown of each."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import torch
from torch import Tensor

from ccu_fast.mem.verification.check import as_text
from ccu_fast.mem.verification.originals import Distance, Pairs, order_of_similarity, published_names

GAIN = 10
SIDES = (256, 512)  # width and height that a thumbnail has at most


@dataclass(frozen=True)
class Shown:
    """One pair.

    Attributes:
        name: of the published picture.
        place: "worst", "median", "best" by SSIM, or "".
        largest: change of a pixel, in 1/255.
        ssim: of the whole picture; None below 11 px.
        size: (width, height) of the picture.
        clean, protected, noise: PNG in base64; of the noise (times ten) no noise is grey.
        before, after: captions.
    """

    name: str
    place: str
    largest: int
    ssim: float | None
    size: tuple[int, int]
    clean: str
    protected: str
    noise: str
    before: list[str]
    after: list[str]


def choose(distances: dict[int, Distance], count: int) -> list[tuple[int, str]]:
    """Picture numbers and what they are, the least similar first: the worst, the median, the best and some between."""
    order = order_of_similarity(distances)
    n, count = len(order), min(count, len(distances))
    if count == 0:
        return []
    median = (n - 1) // 2
    places = [round(i * (n - 1) / max(1, count - 1)) for i in range(count)]
    if median not in places and count > 1:  # instead of the nearest; the worst stays
        places[min(range(1, count), key=lambda i: abs(places[i] - median))] = median
    names = {n - 1: "best", median: "median", 0: "worst"}
    return [(order[place], names.get(place, "")) for place in places]


def show(pairs: Pairs, number: int, found: Distance, place: str, clean: Tensor, protected: Tensor) -> Shown:
    """What is shown of a pair of pictures uint8 ``[C, H, W]``; large ones as thumbnails, of noise at full size."""
    partner = pairs.partner[number]
    assert partner is not None
    noise = (128 + GAIN * (protected.short() - clean.short())).clamp(0, 255).to(torch.uint8)
    return Shown(
        as_text(published_names(pairs.published)[number]),
        place,
        found.largest,
        found.ssim,
        (clean.shape[2], clean.shape[1]),
        _thumbnail(clean),
        _thumbnail(protected),
        _thumbnail(noise, smooth=False),  # a mean of neighbours would hide it
        pairs.before[partner],
        pairs.after[number],
    )


def _thumbnail(pixels: Tensor, *, smooth: bool = True) -> str:
    from PIL import Image

    array = pixels.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    picture.thumbnail(SIDES, Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
