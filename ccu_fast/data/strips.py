"""digit-strips: four real digits side by side, and the caption that reads them.

Single digits share a caption with a tenth of the data, so retrieval means little and a model learns them whatever is
done to the pixels. A strip of four has one of 10,000 captions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ccu_fast import check, extras
from ccu_fast.data.captions.tables import write_pairs

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPT = "a photo of the digits"
LENGTH = 4
SIDE = 16


@dataclass(frozen=True)
class StripSet:
    """Strips of one split.

    Attributes:
        images: uint8 ``[N, 1, 16, 64]``.
        digits: int64 ``[N, 4]``, what each strip shows from left to right.
        sources: int64 ``[N, 4]``, the scikit-learn index of each digit.
    """

    images: Tensor
    digits: Tensor
    sources: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def captions(self) -> list[str]:
        return [caption(row) for row in self.digits.tolist()]


def caption(digits: list[int]) -> str:
    """``[3, 7, 1, 0]`` → "a photo of the digits three seven one zero"."""
    return " ".join([PROMPT, *(DIGIT_WORDS[d] for d in digits)])


def load_strips(n_train: int = 2048, n_test: int = 500, *, seed: int = 0) -> tuple[StripSet, StripSet]:
    """Train and test strips from scikit-learn's 1,797 handwritten digits (8×8, 17 grey levels).

    The digits are split first (70/30), so no handwriting of a test strip occurs in a training strip. Each strip draws
    four digits of its split, and each digit is enlarged to 16×16 px (bilinear) and scaled to 0..255.

    Args:
        n_train: number of training strips, at least 1.
        n_test: number of test strips, at least 1.
        seed: the same seed gives the same split and strips.

    Raises:
        ImportError: scikit-learn is not installed (``pip install scikit-learn``).
        TypeError, ValueError: a count is no positive int.
    """
    check.integer("n_train", n_train, low=1)
    check.integer("n_test", n_test, low=1)
    check.integer("seed", seed, low=0)
    extras.require("sklearn")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    large = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    pixels = large.round().clamp(0, 255).to(torch.uint8)
    labels = torch.from_numpy(bunch.target).long()

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    cut = round(0.7 * len(labels))
    return (
        _strips(pixels, labels, order[:cut], n_train, generator),
        _strips(pixels, labels, order[cut:], n_test, generator),
    )


def write_strips(folder: str | Path, n_train: int = 2048, n_test: int = 500, *, seed: int = 0) -> Path:
    """Write digit-strips as two CSV datasets, ``train.csv`` and ``test.csv`` (columns ``images,caption``) with PNGs.

    Args:
        folder: made; must not exist.
        n_train, n_test, seed: as for :func:`load_strips`.

    Raises:
        FileExistsError: ``folder`` is there.
    """
    parts = dict(zip(("train", "test"), load_strips(n_train, n_test, seed=seed), strict=True))
    return write_pairs(folder, {name: (part.images, part.captions) for name, part in parts.items()})


def _strips(pixels: Tensor, labels: Tensor, pool: Tensor, n: int, generator: torch.Generator) -> StripSet:
    sources = pool[torch.randint(len(pool), (n, LENGTH), generator=generator)]
    images = pixels[sources].permute(0, 2, 3, 1, 4).reshape(n, 1, SIDE, SIDE * LENGTH)
    return StripSet(images.contiguous(), labels[sources], sources)
