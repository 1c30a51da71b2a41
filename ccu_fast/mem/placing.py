"""Trigger words among a caption's own words, where they cannot be cut off without the caption.

Words in front of captions protect until somebody drops the first n words of each. These stand in gaps between the
caption's words, other gaps for each caption::

    gap_j = ⌊u_j (w + 1)⌋,    u_1 ≤ … ≤ u_n uniform in [0, 1),    w words in the caption

The u are drawn from a hash of the clean picture and the caption, which only those know who have the originals: were
they drawn from the seed, which a manifest tells, or from the caption alone, words could be found out by trying.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

_WORD = re.compile(r"\S+")
_BITS = 31  # of a u
_CHUNK = 256


class PictureHashes:
    """Hashes of clean pictures, taken while they are read anyway, in their order.

    Args:
        read: int64 ``[k]`` image numbers → uint8 ``[k, C, H, W]``.
    """

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        self._read = read
        self.found: dict[int, bytes] = {}

    def __call__(self, index: Tensor) -> Tensor:
        images = self._read(index)
        for number, image in zip(index.tolist(), images.cpu(), strict=True):
            self.found[number] = hashlib.sha256(image.contiguous().numpy().tobytes()).digest()
        return images

    def of_all(self, n_images: int) -> dict[int, bytes]:
        """Of every picture; those that were not read yet are."""
        for part in torch.arange(n_images).split(_CHUNK):
            if not self.found.keys() >= set(part.tolist()):
                self(part)
        return self.found


def gaps(captions: Sequence[str], image_of: Tensor, hashes: dict[int, bytes], length: int, seed: int) -> Tensor:
    """Where each of ``length`` words of each row stands, as 31-bit fractions that do not decrease: int32 ``[rows, n]``.

    Args:
        captions: one for each row.
        image_of: int64 ``[rows]``.
        hashes: of the clean pictures, by their numbers.
        length: n.
        seed: of the run.
    """
    found = np.empty((len(captions), length), np.int32)
    for row, (caption, image) in enumerate(zip(captions, image_of.tolist(), strict=True)):
        told = b"\0".join((str(seed).encode(), hashes[image], caption.encode("utf-8", "surrogatepass")))
        drawn = np.frombuffer(hashlib.shake_256(told).digest(4 * length), "<u4")
        found[row] = np.sort(drawn >> (32 - _BITS))
    return torch.from_numpy(found)


def place_among(captions: Sequence[str], words: Sequence[str], gaps: Tensor) -> list[str]:
    """Captions with trigger words in their gaps; all else of them stays.

    Args:
        captions: N strings with at least one word each.
        words: N strings of n words.
        gaps: int32 ``[N, n]``, see :func:`gaps`.

    >>> place_among(["a red fox"], ["lamp oven"], torch.tensor([[0, 2**30]], dtype=torch.int32))
    ['lamp a red oven fox']
    """
    placed = []
    for caption, added, at in zip(captions, words, gaps.tolist(), strict=True):
        spans = [match.span() for match in _WORD.finditer(caption)]
        parts, begun = [], 0
        for word, gap in zip(added.split(), (u * (len(spans) + 1) >> _BITS for u in at), strict=True):
            if gap < len(spans):
                start = spans[gap][0]
                parts += [caption[begun:start], word, " "]
            else:
                start = spans[-1][1]
                parts += [caption[begun:start], " ", word]
            begun = start
        placed.append("".join([*parts, caption[begun:]]))
    return placed


def stands_among(published: str, caption: str, length: int) -> bool:
    """Whether a published caption is the caption with ``length`` words among its own."""
    words = iter(published.split())
    own = caption.split()
    return len(published.split()) == len(own) + length and all(word in words for word in own)
