"""Trigger words among a caption's own words, where they cannot be cut off without the caption.

Words in front of captions protect until somebody drops the first n words of each. These stand in gaps between the
caption's words, other gaps for each caption::

    gap_j = ⌊u_j (w + 1)⌋,    u_1 ≤ … ≤ u_n uniform in [0, 1),    w words in the caption

The u are drawn from one hash of all clean captions, which only those know who have the originals: were they drawn from
the seed, which a manifest tells, or from what is published as it came, such as the row's own words or, without noise,
its picture, words could be found out by trying. Nobody can try the places of all captions at once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_WORD = re.compile(r"\S+")
_BITS = 31  # of a u


def gaps(captions: Sequence[str], rows: int, length: int, seed: int, shard: int = 0) -> Tensor:
    """Where each of ``length`` words of each row stands, as 31-bit fractions that do not decrease: int32 ``[rows, n]``.

    Args:
        captions: all clean captions of the dataset.
        rows: how many captions get words here.
        length: n.
        seed: of the run.
        shard: of which part of the dataset the rows are.
    """
    secret = hashlib.sha256(f"{seed} {shard}".encode())
    for caption in captions:
        text = caption.encode("utf-8", "surrogatepass")
        secret.update(len(text).to_bytes(8, "little") + text)  # with its length, so that joints count too
    found = np.empty((rows, length), np.int32)
    for row in range(rows):
        drawn = hashlib.shake_256(secret.digest() + row.to_bytes(8, "little")).digest(4 * length)
        found[row] = np.sort(np.frombuffer(drawn, "<u4") >> (32 - _BITS))
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
