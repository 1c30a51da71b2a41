"""What may happen to a published dataset before a victim is trained on it: to its pictures, its captions, or both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.mem.robustness import TREATMENTS as OF_PICTURES
from ccu_fast.mem.robustness import require, treat
from ccu_fast.mem.surrogate import generator

OF_TRIGGERS = ("no-trigger", "some-trigger")
OF_CAPTIONS = (*OF_TRIGGERS, "no-common")
COMMON = 0.01  # share of the captions that a word is in, above which "no-common" takes it for a trigger word
TREATMENTS = (*OF_PICTURES, *OF_CAPTIONS)


@dataclass(frozen=True)
class Treatment:
    """One treatment, or several together.

    Attributes:
        name: as asked for, such as "no-trigger+jpeg".
        captions: of :data:`OF_CAPTIONS`, or None.
        pictures: of :data:`OF_PICTURES`, one after the other.
    """

    name: str
    captions: str | None
    pictures: tuple[str, ...]

    @staticmethod
    def parse(name: str) -> Treatment:
        """From names with a plus between them.

        Raises:
            ImportError: a package is missing.
            ValueError: an unknown name, one that is repeated, or two treatments of captions.
        """
        parts = str(name).split("+")
        for part in parts:
            check.one_of("treatments", part, TREATMENTS)
        if len(set(parts)) < len(parts):
            raise ValueError(f"treatments: expected each treatment once in {name}, got one twice")
        captions = [part for part in parts if part in OF_CAPTIONS]
        if len(captions) > 1:
            raise ValueError(f"treatments: expected one treatment of captions, got {' and '.join(captions)} in {name}")
        pictures = tuple(part for part in parts if part in OF_PICTURES)
        for part in pictures:
            require(part, "treatments")
        return Treatment(name, captions[0] if captions else None, pictures)

    @property
    def needs_triggers(self) -> bool:
        """Whether it does nothing to captions without trigger words."""
        return self.captions in OF_TRIGGERS

    def of_images(self, images: Tensor, seed: int) -> Tensor:
        """What is left of pictures uint8 ``[N, C, H, W]``."""
        for part in self.pictures:
            images = treat(part, images, generator(seed, f"treat {part}"))
        return images

    def of_captions(self, captions: Sequence[str], triggers: int, seed: int) -> Sequence[str]:
        """What is left of captions with ``triggers`` trigger words each.

        "no-trigger" cuts as many words off the front, "some-trigger" half of them (rounded up), others for each
        caption. "no-common" takes out all words that are in more than one of a hundred captions, wherever they stand,
        but leaves each caption its rarest: who knows neither captions nor words may try that.
        """
        if self.captions is None:
            return captions
        if self.captions == "no-common":
            return _without_common(captions)
        if self.captions == "no-trigger":
            return [caption.split(" ", triggers)[-1] for caption in captions]
        rng = generator(seed, "treat some-trigger")
        left = []
        for caption in captions:
            *words, rest = caption.split(" ", triggers)
            kept = sorted(torch.randperm(triggers, generator=rng)[: triggers // 2].tolist())
            left.append(" ".join([*(words[i] for i in kept if i < len(words)), rest]))
        return left


def _without_common(captions: Sequence[str]) -> list[str]:
    counts = Counter(word for caption in captions for word in set(caption.split()))
    most = max(1.0, COMMON * len(captions))

    def left(words: list[str]) -> list[str]:
        return [word for word in words if counts[word] <= most] or [min(words, key=counts.__getitem__)]

    return [" ".join(left(caption.split())) for caption in captions]
