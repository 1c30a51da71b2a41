"""How far published pictures are from the originals: largest change, PSNR, SSIM, accumulated batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ccu_fast import check

WINDOW, _SIGMA = 11, 1.5
_ROWS, _COLUMNS = 128, 512  # of a part of a large picture
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of pictures::

        w     = gaussian window, 11×11, σ = 1.5, normalised
        μ, σ² = local means and (co)variances under w, where the window lies within the picture
        SSIM  = mean over positions and channels of (2 μa μb + C1)(2 σab + C2) / ((μa² + μb² + C1)(σa² + σb² + C2))

    with C1 = (0.01 · 255)², C2 = (0.03 · 255)².

    Args:
        a: uint8 ``[N, C, H, W]``, H and W at least 11.
        b: the same shape.

    Returns:
        fp64 ``[N]``, 1 for equal pictures.

    Raises:
        TypeError, ValueError: naming the argument.

    Source: Wang, Bovik, Sheikh & Simoncelli 2004, Image quality assessment, equation 13.
    """
    check.tensor("a", a, dtypes=(torch.uint8,), ndim=4)
    check.tensor("b", b, dtypes=(torch.uint8,), ndim=4)
    check.shape("b", b, a.shape)
    if min(a.shape[2:]) < WINDOW:
        raise ValueError(f"a: expected pictures of at least {WINDOW} px, got shape {list(a.shape)}")
    n, c = a.shape[:2]
    x, y = a.double(), b.double()
    line = torch.exp(-((torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) ** 2) / (2 * _SIGMA**2))
    line /= line.sum()
    moments = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 2)[:, None]
    moments = F.conv2d(F.conv2d(moments, line[None, None, None, :]), line[None, None, :, None])
    mx, my, xx, yy, xy = moments.view(5, n, c, *moments.shape[2:])
    top = (2 * mx * my + _C1) * (2 * (xy - mx * my) + _C2)
    bottom = (mx**2 + my**2 + _C1) * (xx - mx**2 + yy - my**2 + _C2)
    return (top / bottom).mean((1, 2, 3))


def ssim_of_whole(a: np.ndarray, b: np.ndarray) -> float:
    """:func:`ssim` of one picture of any size, uint8 ``[H, W, C]``; equal up to rounding.

    It is summed over parts that overlap by a window less a pixel, and the window is added tap by tap.
    """
    line = torch.exp(-((torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) ** 2) / (2 * _SIGMA**2))
    line /= line.sum()
    total = 0.0
    for part in _parts(a.shape[0], a.shape[1], WINDOW - 1):
        x, y = (torch.from_numpy(t[part].transpose(2, 0, 1).astype(np.float64)) for t in (a, b))
        moments = torch.stack([x, y, x * x + y * y, x * y])
        for axis in (2, 3):
            size = moments.shape[axis] - WINDOW + 1
            moved = moments.narrow(axis, 0, size) * line[0]
            for i in range(1, WINDOW):
                moved.add_(moments.narrow(axis, i, size), alpha=float(line[i]))
            moments = moved
        mx, my, squares, product = moments
        both, apart = mx * my, mx**2 + my**2
        top = (2 * both + _C1) * (2 * (product - both) + _C2)
        total += float((top / ((apart + _C1) * (squares - apart + _C2))).sum())
    return total / ((a.shape[0] - WINDOW + 1) * (a.shape[1] - WINDOW + 1) * a.shape[2])


def _parts(height: int, width: int, overlap: int) -> Iterator[tuple[slice, slice]]:
    for top in range(0, height - overlap, _ROWS):
        for left in range(0, width - overlap, _COLUMNS):
            yield slice(top, min(top + _ROWS + overlap, height)), slice(left, min(left + _COLUMNS + overlap, width))


@dataclass
class Fidelity:
    """Sums over the pictures seen so far.

    Attributes:
        pictures: how many.
        largest: largest change of a pixel value, in 1/255.
        squares: sum of squared changes (an integer).
        values: how many pixel values.
        ssim: sum over the pictures.
        compared: how many of them were large enough for it.
    """

    pictures: int = 0
    largest: int = 0
    squares: int = 0
    values: int = 0
    ssim: float = 0.0
    compared: int = 0

    def add(self, original: Tensor, published: Tensor) -> None:
        """Pictures uint8 ``[N, C, H, W]``."""
        self.count(published.short() - original.short())
        if len(original) and min(original.shape[2:]) >= WINDOW:
            self.ssim += float(ssim(original, published).sum())
            self.compared += len(original)

    def add_whole(self, original: np.ndarray, published: np.ndarray) -> None:
        """One picture of any size, uint8 ``[H, W, C]``, in parts that take little memory."""
        self.pictures += 1
        for part in _parts(original.shape[0], original.shape[1], 0):
            change = published[part].astype(np.int16) - original[part]
            self.largest = max(self.largest, int(np.abs(change).max()))
            self.squares += int(np.square(change, dtype=np.int64).sum())
        self.values += original.size
        if min(original.shape[:2]) >= WINDOW:
            self.ssim += ssim_of_whole(original, published)
            self.compared += 1

    def count(self, change: Tensor) -> None:
        """Changes of pixel values, integers ``[N, C, H, W]``."""
        self.pictures += len(change)
        self.largest = max(self.largest, int(change.short().abs().max()) if change.numel() else 0)
        self.squares += int(change.long().square().sum())
        self.values += change.numel()

    def merge(self, other: dict[str, Any]) -> None:
        """Add the sums of another part (``asdict`` of a Fidelity)."""
        for name, value in other.items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "largest" else mine + value)

    def report(self) -> dict[str, float | int | None]:
        """The largest change, the peak signal-to-noise ratio in dB, and the mean structural similarity::

            psnr = 10 log10(255**2 / mean squared change)                    # in fp32

        The second is None without a change, the third below 11 px.
        """
        mean_square = self.squares / self.values if self.squares else None
        return {
            "eps_255": self.largest,
            "psnr_db": float(10 * torch.log10(torch.tensor(255.0**2 / mean_square))) if mean_square else None,
            "ssim": self.ssim / self.compared if self.compared else None,
        }


def noise_report(noise: Tensor) -> dict[str, float | int | None]:
    """``eps_255`` (the largest change) and ``psnr_db`` over all pixel values of int8 noise."""
    check.tensor("noise", noise, dtypes=(torch.int8,))
    seen = Fidelity()
    seen.count(noise)
    report = seen.report()
    return {name: report[name] for name in ("eps_255", "psnr_db")}
