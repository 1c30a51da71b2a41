"""Pairs of pictograms, pictograms with words and with speech: unlearning data of 1,800 things in nine groups.

They are made of the npm packages that :mod:`ccu_fast.data.pictograms` reads.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ccu_fast import check, extras
from ccu_fast.data.halves import Halves
from ccu_fast.data.paired import PairedData
from ccu_fast.data.pictograms import ARTISTS, SIDE, Thing, drawn_keywords, picture, things, words
from ccu_fast.data.spectrogram import heard
from ccu_fast.data.spoken_names import SPEAKERS, spoken_names
from ccu_fast.data.views import STRIDE, moved

# Of emojibase, by its numbers; 2 are components such as skin tones and hair, which are no things.
GROUPS = {
    0: "smileys & emotion",
    1: "people & body",
    3: "animals & nature",
    4: "food & drink",
    5: "travel & places",
    6: "activities",
    7: "objects",
    8: "symbols",
    9: "flags",
}
WORDS = 4096  # all of the English names and keywords
ORDERED_PAIRS = tuple(itertools.permutations(range(len(ARTISTS)), 2))


def load_pictogram_pairs(
    packages: str | Path, seed: int = 0, *, views: int = 8, unseen_views: int = 2, side: int = SIDE
) -> Halves:
    """Drawings of the same thing by two artists: the first is ``visual``, the second ``other``, the group the label.

    Each thing is seen as several of the twelve ordered pairs of four artists, drawn at random. Each drawing is moved
    on its own: turned (±10°), scaled (0.9 – 1.1), shifted (±2 pixels of 32) and dimmed (0.8 – 1.1). The parts have no
    thing in common: 70 % of each group are to train on, 20 % to test, 10 % held out. ``ids // STRIDE`` is the thing.
    Pixels are fp32 ``[N, 3, side, side]`` and say how much is drawn: white is 0.

    Args:
        packages: the folder with the unpacked packages, see :mod:`ccu_fast.data.pictograms`.
        seed: of the split, the pairs and the moves, at least 0.
        views: pairs of each thing to train on, in [1, 12].
        unseen_views: pairs of each thing of the other two parts.
        side: of the pictures, in pixels.

    Raises:
        FileNotFoundError, ImportError, ValueError: as for :func:`ccu_fast.data.pictograms.load_pictograms`.
    """
    known, rng, parts = _parts(packages, seed, views, unseen_views, side, most=len(ORDERED_PAIRS))
    pictures = _pictures(known, side)
    made = []
    for chosen, count in parts:
        pairs = _drawn(len(chosen), count, torch.tensor(ORDERED_PAIRS), rng)
        visual, other = (seen(pictures[chosen.repeat_interleave(count), pairs[:, i]], rng) for i in range(2))
        made.append(PairedData(visual, other, *_labels_and_ids(known, chosen, count)))
    return Halves(*made)


def load_pictogram_words(
    packages: str | Path, seed: int = 0, *, views: int = 4, unseen_views: int = 2, side: int = SIDE
) -> Halves:
    """A drawing of a thing is ``visual``, words on it are ``other``, the group is the label.

    Each thing is seen as several of its four drawings, moved as in :func:`load_pictogram_pairs` and in the same parts.
    The words of a view are those of the thing's name and of three of its keywords, drawn for each view: fp32
    ``[N, WORDS]``, 1 where a word occurs. The words are the ``WORDS`` that most of all things have; where there are
    fewer, the last columns stay 0.

    Args:
        packages, seed, side: as for :func:`load_pictogram_pairs`.
        views: drawings of each thing to train on, in [1, 4].
        unseen_views: drawings of each thing of the other two parts.

    Raises:
        FileNotFoundError, ImportError, ValueError: as for :func:`ccu_fast.data.pictograms.load_pictograms`.
    """
    known, rng, parts = _parts(packages, seed, views, unseen_views, side, most=len(ARTISTS))
    pictures = _pictures(known, side)
    column = {word: i for i, word in enumerate(_vocabulary(known))}
    made = []
    for chosen, count in parts:
        artists = _drawn(len(chosen), count, torch.arange(len(ARTISTS)), rng)
        visual = seen(pictures[chosen.repeat_interleave(count), artists], rng)
        other = torch.zeros(len(visual), WORDS)
        for row, number in enumerate(chosen.repeat_interleave(count).tolist()):
            said = words(" ".join([known[number].name, *drawn_keywords(known[number], rng)]))
            other[row, [column[word] for word in said if word in column]] = 1
        made.append(PairedData(visual, other, *_labels_and_ids(known, chosen, count)))
    return Halves(*made)


def load_pictogram_speech(
    packages: str | Path,
    seed: int = 0,
    *,
    views: int = 4,
    unseen_views: int = 2,
    side: int = SIDE,
    cache: Path | None = None,
    progress: Callable[[str, int, int, str], object] | None = None,
) -> Halves:
    """A drawing of a thing is ``visual``, its spoken English name is ``other``, the group is the label.

    Things, parts, drawings and their moves are as in :func:`load_pictogram_words`. The name is said by another
    synthetic speaker in each view, up to 0.1 seconds later and up to 3 dB louder or quieter: log-mel spectrograms, fp32
    ``[N, 1, MELS, FRAMES]`` (:mod:`ccu_fast.data.spectrogram`).

    Args:
        packages, seed, side, views, unseen_views: as for :func:`load_pictogram_words`.
        cache, progress: as for :func:`ccu_fast.data.spoken_names.spoken_names`. All names by all speakers take minutes.

    Raises:
        FileNotFoundError, ImportError, ValueError: as for :func:`ccu_fast.data.pictograms.load_pictograms`, or for
            :func:`ccu_fast.data.spoken_names.spoken_names`.
    """
    known, rng, parts = _parts(packages, seed, views, unseen_views, side, most=len(ARTISTS))
    said = spoken_names([thing.name for thing in known], cache=cache, progress=progress)
    pictures = _pictures(known, side)
    made = []
    for chosen, count in parts:
        which = chosen.repeat_interleave(count)
        artists, speakers = (_drawn(len(chosen), count, torch.arange(len(all_)), rng) for all_ in (ARTISTS, SPEAKERS))
        visual = seen(pictures[which, artists], rng)
        other = heard(said[which, speakers], rng)[:, None]
        made.append(PairedData(visual, other, *_labels_and_ids(known, chosen, count)))
    return Halves(*made)


def _parts(
    packages: str | Path, seed: int, views: int, unseen_views: int, side: int, *, most: int
) -> tuple[list[Thing], torch.Generator, list[tuple[Tensor, int]]]:
    """The things, and for each part which of them it has and how often each is seen."""
    extras.require("PIL")
    check.integer("seed", seed, low=0)
    check.integer("side", side, low=1)
    for name, count in (("views", views), ("unseen_views", unseen_views)):
        check.integer(name, count, low=1, high=most)
    known = [thing for thing in things(packages) if thing.group in GROUPS]
    rng = torch.Generator().manual_seed(seed)
    labels = _labels(known)
    split: list[list[Tensor]] = [[], [], []]
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=rng)]
        ends = [round(share * len(members)) for share in (0.7, 0.9)]
        for part, some in zip(split, members.tensor_split(ends), strict=True):
            part.append(some)
    chosen = [torch.cat(part).sort().values for part in split]
    return known, rng, list(zip(chosen, (views, unseen_views, unseen_views), strict=True))


def _labels(known: Sequence[Thing]) -> Tensor:
    order = list(GROUPS)
    return torch.tensor([order.index(thing.group) for thing in known if thing.group is not None])


def _labels_and_ids(known: Sequence[Thing], chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    ids = chosen.repeat_interleave(count) * STRIDE + torch.arange(count).repeat(len(chosen))
    return _labels(known)[chosen].repeat_interleave(count), ids


def _pictures(known: Sequence[Thing], side: int) -> Tensor:
    """uint8 ``[things, artists, 3, side, side]``."""
    return torch.stack([torch.stack([picture(thing.drawings[name], side) for name in ARTISTS]) for thing in known])


def _drawn(count: int, each: int, of: Tensor, rng: torch.Generator) -> Tensor:
    """``each`` different rows of a table, ``count`` times."""
    return of[torch.rand(count, len(of), generator=rng).argsort(1)[:, :each].flatten()]


def seen(pictures: Tensor, rng: torch.Generator) -> Tensor:
    """Drawings ``[N, 3, side, side]``, uint8, each moved a little, as fp32 that says how much is drawn: white is 0."""
    side = pictures.shape[-1]
    ink = 1 - pictures.float() / 255
    return moved(ink, side, rng, angle=math.pi / 18, scale=0.1, shift=side / 16, contrast=(0.8, 1.1))


def _vocabulary(known: Sequence[Thing]) -> list[str]:
    """The words that most things have, the more frequent ones first."""
    counts = Counter(word for thing in known for word in set(words(" ".join([thing.name, *thing.keywords]))))
    return sorted(counts, key=lambda word: (-counts[word], word))[:WORDS]
