"""Pictures that keep their size: what a model sees of them is linear in a grid of noise.

A picture of H×W pixels has the noise n, int8 ``[C, Gh, Gw]``, whatever H and W are. It is published as::

    published = clip(original + round(U_h n U_wᵀ), 0, 255)

U ``[size, grid]`` stretches the grid over the whole picture: linear interpolation, of a picture smaller than the grid
the mean under a triangle. Its rows are ≥ 0 and sum to 1, so no pixel changes by more than the largest noise; of a
picture of the grid's own size U is the identity. A model takes windows of the picture (its own centre, and others),
resized by R, one matrix for each axis, as Pillow resizes. Of the published picture it sees::

    R_h (original + U_h n U_wᵀ) R_wᵀ = R_h original R_wᵀ + A_h n A_wᵀ,        A = R U  [H of the model, grid]

up to rounding, and to the clip where parts of a window are black or white. A is made from the few taps of R and U and
costs no more for a large picture than those; the first term is read by Pillow from the window itself. A picture
that is published in grey has the mean of n over the channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.data.captions.dataset import DiskSource
from ccu_fast.data.pictures import Box, centre_box
from ccu_fast.mem.source import Part
from ccu_fast.models.within import within
from ccu_fast.ops.machine import moved

Taps = tuple[np.ndarray, np.ndarray]
_KEPT = 64  # matrices of centre crops, 0.2 MB for a model of 224²: many pictures of a set may have one size


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - np.abs(x))


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = −1/2, which is Pillow's BICUBIC."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def taps(size: int, out: int, places: np.ndarray, low: float = 0.0, high: float | None = None, *, cubic: bool) -> Taps:
    """Which inputs some outputs of Pillow's antialiased resizing are made of, along one axis::

        s       = (high − low) / out                         # inputs for each output
        centre  = low + (place + 1/2) s
        w[i]    ∝ kernel((i + 1/2 − centre) / max(s, 1)),    Σ w = 1, over the inputs 0 ≤ i < size

    Args:
        size: inputs.
        out: outputs that low..high is resized to.
        places: int64 ``[n]``, the outputs that are asked for.
        low, high: the part of the inputs; all of them by default. It may begin and end within an input.
        cubic: the kernel: bicubic, else bilinear.

    Returns:
        int64 ``[n, T]``, numbers of inputs, and fp64 ``[n, T]``, their weights (0 behind the last).
    """
    kernel, radius = (_cubic, 2.0) if cubic else (_triangle, 1.0)
    scale = ((size if high is None else high) - low) / out
    wide = max(scale, 1.0)
    centre = low + (places + 0.5) * scale
    first = np.floor(np.maximum(centre - radius * wide + 0.5, 0.0)).astype(np.int64)
    end = np.minimum(np.floor(centre + radius * wide + 0.5), size).astype(np.int64)
    index = first[:, None] + np.arange(int((end - first).max()))
    weight = kernel((index - centre[:, None] + 0.5) / wide) * (index < end[:, None])
    used = weight.any(0)
    index, weight = np.minimum(index[:, used], size - 1), weight[:, used]
    return index, weight / weight.sum(1, keepdims=True)


def stretch(grid: int, size: int, places: np.ndarray) -> Taps:
    """The rows ``places`` of U: which values of the grid a pixel's noise is made of."""
    if size < grid:
        return taps(grid, size, places, cubic=False)
    # The same, of the two taps that there are; at the edges both are the outermost value.
    centre = (places + 0.5) * (grid / size) - 0.5
    first = np.floor(centre)
    share = centre - first
    index = first.astype(np.int64)[:, None] + np.arange(2)
    return index.clip(0, grid - 1), np.stack([1.0 - share, share], 1)


def seen(size: int, out: int, low: float, high: float, grid: int) -> np.ndarray:
    """A = R U of one axis: fp32 ``[out, grid]``.

    Args:
        size: pixels of the picture along it.
        out: pixels of the model.
        low, high: the window, in pixels of the picture.
        grid: values of the noise.
    """
    pixel, weight = taps(size, out, np.arange(out), low, high, cubic=True)
    start = pixel.min()
    value, share = stretch(grid, size, np.arange(start, pixel.max() + 1))
    pixel = pixel - start
    row = grid * np.arange(out)[:, None]
    total = np.zeros(out * grid)
    for i in range(value.shape[1]):
        total += np.bincount((row + value[pixel, i]).ravel(), (weight * share[pixel, i]).ravel(), out * grid)
    return total.astype(np.float32).reshape(out, grid)


_seen_at_the_centre = lru_cache(_KEPT)(seen)


@dataclass(frozen=True)
class Views:
    """Some pictures, each through K windows.

    Attributes:
        pixels: uint8 ``[K, n, C, H, W]``: the originals.
        rows: fp32 ``[K, n, H, Gh]``, A_h.
        cols: fp32 ``[K, n, W, Gw]``, A_w.
        grey: bool ``[n]``: published in grey.
    """

    pixels: Tensor
    rows: Tensor
    cols: Tensor
    grey: Tensor

    def __len__(self) -> int:
        """K."""
        return len(self.pixels)

    def to(self, device: torch.device) -> Views:
        """On a device."""
        return Views(*(moved(t, device) for t in (self.pixels, self.rows, self.cols, self.grey)))

    def shown(self, noise: Tensor, window: int = 0) -> Tensor:
        """What a model sees with a noise, 0..255: floating ``[n, C, H, W]``, differentiable in the noise.

        Args:
            noise: floating ``[n, C, Gh, Gw]``, or ``[1, C, Gh, Gw]`` for one that all pictures share.
            window: which.
        """
        if noise.shape[1] > 1:
            noise = torch.where(self.grey[:, None, None, None], noise.mean(1, keepdim=True), noise)
        # Half precision cannot hold 0..255 in steps of one.
        with torch.autocast(noise.device.type, enabled=False):
            rows, cols = (matrix[window, :, None].to(noise.dtype) for matrix in (self.rows, self.cols))
            return within(self.pixels[window].to(noise.dtype) + rows @ noise @ cols.mT, 0, 255)


class Pictures(Part):
    """Some pictures of a dataset that keep their size, and their rows.

    Args:
        source: the whole.
        images: int64 ``[n]``, distinct image numbers of ``source``.
        sizes: int64 ``[source.n_images, 3]``: height, width and colours, from :func:`ccu_fast.data.captions.scan`.
        grid: (Gh, Gw), what the noise has in place of pixels.

    Attributes:
        noise_shape: (C, Gh, Gw).
    """

    def __init__(self, source: DiskSource, images: Tensor, sizes: Tensor, grid: tuple[int, int]) -> None:
        check.shape("sizes", sizes, (source.n_images, 3))
        super().__init__(source, images)
        self._disk, self._sizes = source, sizes[images]
        self.noise_shape = (source.image_shape[0], *grid)

    def views(self, index: Tensor, draws: Tensor, *, own: bool = True) -> Views:
        """The pictures of these numbers through windows of the model's aspect; on the CPU.

        Args:
            index: int64 ``[n]``.
            draws: fp64 ``[K, n, 3]``: of each window the share that it has of the area of the largest one, and where
                it lies in the room that is left, from left to right and from top to bottom, all in 0..1.
            own: the model's own centre crop before them.
        """
        count, (channels, height, width) = len(index), self.image_shape
        _, grid_height, grid_width = self.noise_shape
        k = len(draws) + own
        pixels = torch.empty(k, count, channels, height, width, dtype=torch.uint8)
        rows, cols = torch.empty(k, count, height, grid_height), torch.empty(k, count, width, grid_width)
        numbers, sizes, asked = self.whole_images[index].tolist(), self._sizes[index].tolist(), draws.tolist()

        def fill(place: int) -> None:
            high, wide, _ = sizes[place]
            boxes = [centre_box((wide, high), (width, height))] if own else []
            boxes += [window_box((wide, high), (width, height), draw[place]) for draw in asked]
            pixels[:, place] = self._disk.windows(numbers[place], boxes)
            for at, (left, top, right, bottom) in enumerate(boxes):
                matrix = _seen_at_the_centre if own and at == 0 else seen
                rows[at, place] = torch.from_numpy(matrix(high, height, top, bottom, grid_height))
                cols[at, place] = torch.from_numpy(matrix(wide, width, left, right, grid_width))

        self._disk.each(fill, count)
        return Views(pixels, rows, cols, self._sizes[index, 2] == 1)


def window_box(size: tuple[int, int], cut: tuple[int, int], draw: list[float]) -> Box:
    """(left, top, right, bottom) of a window with the aspect of ``cut``, (width, height), in a picture of ``size``.

    ``draw`` is (share, x, y) of :meth:`Pictures.views`.
    """
    wide, high = size
    share, x, y = draw
    side = share**0.5 * min(wide / cut[0], high / cut[1])
    width, height = min(side * cut[0], wide), min(side * cut[1], high)
    left, top = x * (wide - width), y * (high - height)
    return left, top, min(left + width, wide), min(top + height, high)


def noise_in(noise: np.ndarray, size: tuple[int, int], grey: bool) -> Callable[[slice], Callable[[slice], np.ndarray]]:
    """The noise of a picture as it is published, window by window, so that it never has to be held whole.

    Args:
        noise: int8 ``[C, Gh, Gw]``.
        size: (H, W) of the picture.
        grey: the picture is published in grey.

    Returns:
        Columns of the picture → (rows of the picture → int16 ``[rows, columns, 1 or C]``, the rounded noise there).
    """
    grid = noise.astype(np.float32)
    if grey:
        grid = grid.mean(0, keepdims=True, dtype=np.float32)

    def along(values: np.ndarray, found: Taps, axis: int) -> np.ndarray:
        index, weight = found[0], found[1].astype(np.float32)
        shape = (1, -1, 1) if axis == 1 else (1, 1, -1)
        total = np.take(values, index[:, 0], axis) * weight[:, 0].reshape(shape)
        for i in range(1, index.shape[1]):
            total += np.take(values, index[:, i], axis) * weight[:, i].reshape(shape)
        return total

    def through(columns: slice) -> Callable[[slice], np.ndarray]:
        wide = along(grid, stretch(grid.shape[2], size[1], np.arange(columns.start, columns.stop)), 2)

        def part(rows: slice) -> np.ndarray:
            high = along(wide, stretch(grid.shape[1], size[0], np.arange(rows.start, rows.stop)), 1)
            return np.rint(high, out=high).astype(np.int16).transpose(1, 2, 0)

        return part

    return through
