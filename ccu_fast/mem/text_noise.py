"""Noise that a caption's words make, without a surrogate and without a gradient (``text-noise``).

Every word has a pattern of its own, P_w in {−1, 1}, of squares of 2×2 values. A picture with the words W gets::

    noise = eps · sign(Σ_w √(p_w (1 − p_w)) ([w ∈ W] − p_w) P_w),    p_w the share of pictures with the word

so words that tell many pictures apart are the strongest, and a model finds a caption's words in the noise before it
finds them in the picture. Patterns are drawn from a hash of the clean pictures: drawn from the seed, which a manifest
tells, anybody could take the noise away again.

Source: that noise may be a function of the text, T2UE (arXiv 2508.03091), whose generator is a network trained against
a surrogate. Patterns that nobody trained are this project's; benchmarks/protection has what they do.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccu_fast.runs.progress import Progress, silent

_WORD = re.compile(r"\w+")
_SQUARE = 2  # values: finer patterns are lost when a picture is made smaller
_CHUNK = 256


class TextNoise:
    """The noise of some pictures of a dataset.

    Args:
        captions: as they are published, one string for each row.
        image_of: int64 ``[rows]``.
        n_images: how many pictures there are.
        read: int64 ``[k]`` image numbers → uint8 ``[k, C, H, W]``, the clean ones, for the hash.
        gather: where processes share a dataset: one's object → those of all.
        progress: called as ``progress(stage, done, total, note)`` while pictures are read.
    """

    def __init__(
        self,
        captions: Sequence[str],
        image_of: Tensor,
        n_images: int,
        read: Callable[[Tensor], Tensor],
        gather: Callable[[Any], list[Any]] | None = None,
        progress: Progress = silent,
    ) -> None:
        self._words: list[set[str]] = [set() for _ in range(n_images)]
        for caption, image in zip(captions, image_of.tolist(), strict=True):
            self._words[image].update(_WORD.findall(caption.lower()))
        counted = Counter(word for words in self._words for word in words)
        digest = hashlib.sha256()
        for part in torch.arange(n_images).split(_CHUNK):
            progress("hashing pictures", int(part[0]), n_images, "")
            digest.update(read(part).cpu().contiguous().numpy().tobytes())
        progress("hashing pictures", n_images, n_images, "")
        told = (digest.digest(), counted, n_images)
        parts = [told] if gather is None else gather(told)
        self._key = hashlib.sha256(b"".join(key for key, _, _ in parts)).digest()
        everywhere = sum((words for _, words, _ in parts), Counter())
        total = sum(n for _, _, n in parts)
        self._share = {word: count / total for word, count in sorted(everywhere.items())}

    def _weighted(self, word: str, values: int) -> np.ndarray:
        share = self._share[word]
        drawn = hashlib.shake_256(self._key + word.encode("utf-8", "surrogatepass")).digest(-(-values // 8))
        bits = np.unpackbits(np.frombuffer(drawn, np.uint8), count=values)
        return np.float32((share * (1 - share)) ** 0.5) * (2 * bits.astype(np.float32) - 1)

    def of_all(self, shape: Sequence[int], eps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``(int64 [k], int8 [k, C, H, W])`` in turn: image numbers and their noise.

        Args:
            shape: (C, H, W) of one picture's noise.
            eps: in 1/255.
        """
        channels, height, width = shape
        coarse = (channels, -(-height // _SQUARE), -(-width // _SQUARE))
        values = int(np.prod(coarse))
        mean = np.zeros(values, np.float32)
        for word, share in self._share.items():
            mean += np.float32(share) * self._weighted(word, values)
        for part in torch.arange(len(self._words)).split(_CHUNK):
            signs = np.empty((len(part), *coarse), np.int8)
            for at, image in enumerate(part.tolist()):
                # In one order: sums are rounded, and a set's differs from one process to the next.
                total = sum((self._weighted(word, values) for word in sorted(self._words[image])), -mean)
                signs[at] = np.sign(total).reshape(coarse)
            noise = torch.from_numpy(eps * signs)
            for dim in (2, 3):
                noise = noise.repeat_interleave(_SQUARE, dim)
            yield part, noise[:, :, :height, :width]
