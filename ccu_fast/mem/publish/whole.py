"""A published picture of the input's size: its own colours, transparency and colour profile, and its noise."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ccu_fast.data.pictures import Whole, encode_whole
from ccu_fast.mem.fidelity import Fidelity
from ccu_fast.mem.views import noise_in

_ROWS, _COLUMNS = 128, 1024  # that get their noise at a time


@dataclass(frozen=True)
class Made:
    """A picture that is ready to be written.

    Attributes:
        png: the file.
        size: (width, height).
        sums: how far it is from the original.
    """

    png: bytes
    size: tuple[int, int]
    sums: Fidelity


def with_noise(original: Whole, noise: Tensor) -> Whole:
    """The picture as it is published, see :mod:`ccu_fast.mem.views`: no pixel changes by more than the largest noise.

    Args:
        original: its transparency and profile stay.
        noise: int8 ``[C, Gh, Gw]``. In grey its mean over the channels; one channel is added to all colours.
    """
    pixels, colours = original.pixels, original.colours
    height, width = pixels.shape[:2]
    through = noise_in(noise.numpy(), (height, width), grey=colours == 1)
    published = pixels.copy()
    for left in range(0, width, _COLUMNS):
        columns = slice(left, min(left + _COLUMNS, width))
        part = through(columns)
        for top in range(0, height, _ROWS):
            rows = slice(top, min(top + _ROWS, height))
            changed = pixels[rows, columns, :colours] + part(rows)
            published[rows, columns, :colours] = np.clip(changed, 0, 255, out=changed)
    return replace(original, pixels=published)


def published_picture(original: Whole, noise: Tensor) -> Made:
    """The file of a picture with its noise, and its distance from the original, both measured on what is written."""
    published = with_noise(original, noise)
    sums = Fidelity()
    sums.add_whole(original.pixels[:, :, : original.colours], published.pixels[:, :, : original.colours])
    height, width = published.pixels.shape[:2]
    del original  # which is large
    return Made(encode_whole(published), (width, height), sums)
