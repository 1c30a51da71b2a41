"""Pairs of pictograms, pictograms with words and with speech, from packages of the same form as the real ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ccu_fast.data import pictogram_pairs, pictograms
from ccu_fast.data.halves import Halves
from ccu_fast.data.pictogram_pairs import (
    GROUPS,
    WORDS,
    load_pictogram_pairs,
    load_pictogram_speech,
    load_pictogram_words,
)
from ccu_fast.data.pictograms import ARTISTS
from ccu_fast.data.spectrogram import FRAMES, MELS
from ccu_fast.data.spoken_names import SPEAKERS
from ccu_fast.data.views import STRIDE
from tests.support.pictogram_packages import write_packages

# Facebook has not drawn the fifth, and the third of every ten is a component.
KNOWN = [i for i in range(70) if i != 4 and i % 10 != 2]
Load = Callable[..., Halves]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packages(tmp_path_factory.mktemp("packages"), things=70)


@pytest.fixture
def packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pictograms, "_check_contents", lambda *_: None)
    monkeypatch.setattr(pictogram_pairs, "spoken_names", said)
    return folder


def said(names: list[str], **_: object) -> Tensor:
    """In place of speech: a name's number is how high its only sound is, its speaker's how long."""
    mels = torch.zeros(len(names), len(SPEAKERS), MELS, FRAMES)
    for i, name in enumerate(names):
        for k in range(len(SPEAKERS)):
            mels[i, k, int(name.removeprefix("Thing ").removesuffix("!")) % MELS, : 20 + 3 * k] = 2
    return mels


@pytest.mark.parametrize(
    ("load", "views"), [(load_pictogram_pairs, 8), (load_pictogram_words, 4), (load_pictogram_speech, 4)]
)
def test_a_thing_is_in_one_part_with_all_its_views(packages: Path, load: Load, views: int) -> None:
    halves = load(packages, side=8)
    seen = []
    for part, count in ((halves.train, views), (halves.test, 2), (halves.held_out, 2)):
        things, times = torch.unique(part.ids // STRIDE, return_counts=True)
        assert set(times.tolist()) == {count} and int((part.ids % STRIDE).max()) == count - 1
        groups = [list(GROUPS).index(KNOWN[thing] % 10) for thing in (part.ids // STRIDE).tolist()]
        assert part.labels.tolist() == groups
        assert part.visual.shape == (len(part), 3, 8, 8) and part.visual.dtype == torch.float32
        seen += things.tolist()
    assert sorted(seen) == list(range(len(KNOWN)))
    # 70 %, 20 % and 10 % of each of the nine groups: of six or seven things.
    assert [len(part) for part in (halves.train, halves.test, halves.held_out)] == [views * 44, 2 * 9, 2 * 9]


@pytest.mark.parametrize("load", [load_pictogram_pairs, load_pictogram_words, load_pictogram_speech])
def test_the_same_seed_is_the_same(packages: Path, load: Load) -> None:
    one, again, other = (load(packages, seed, views=2, unseen_views=1, side=8) for seed in (3, 3, 4))
    for first, second in zip(vars(one).values(), vars(again).values(), strict=True):
        assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in vars(first))
    assert not torch.equal(one.train.ids, other.train.ids)


def test_a_pair_is_one_thing_by_two_artists_in_every_order(packages: Path) -> None:
    data = load_pictogram_pairs(packages, views=12, side=16).train
    for ink in (data.visual, data.other):
        assert ink[:, :, 13:].abs().max() < 1e-6  # transparent below: nothing is drawn
        assert 0.5 < ink[:, :, 4, 8].amax() <= 1.1
    by_length = sorted(map(len, ARTISTS))
    for thing in torch.unique(data.ids // STRIDE).tolist():
        red = 1 - 40 * KNOWN[thing] % 256 / 255
        if red < 0.1:
            continue
        pairs = set()
        for visual, other in zip(*(x[data.ids // STRIDE == thing] for x in (data.visual, data.other)), strict=True):
            blue = [255 * (1 - float(x[2, 4, 8] / x[0, 4, 8]) * red) for x in (visual, other)]
            artists = [by_length.index(round(value / 10)) for value in blue]
            assert artists[0] != artists[1]
            pairs.add(tuple(artists))
        assert len(pairs) == 12


def test_words_are_of_the_name_and_three_keywords(packages: Path) -> None:
    halves = load_pictogram_words(packages, side=8)
    for part in vars(halves).values():
        assert part.other.shape == (len(part), WORDS) and part.other.dtype == torch.float32
        assert part.other[:, 0].eq(1).all()  # "thing" is the most frequent one
        assert part.other.sum(1).eq(5).all()
        assert part.other[:, 1 + 5 * len(KNOWN) :].eq(0).all()  # there are no more words
    said = halves.train.other
    assert any(not torch.equal(said[i], said[i + 1]) for i in range(3))  # keywords are drawn for each view
    same = halves.train.ids // STRIDE
    shared = said @ said.T
    assert shared[same[:, None] == same].min() >= 4 and shared[same[:, None] != same].eq(1).all()


def test_speech_is_the_thing_s_name_by_several_speakers(packages: Path) -> None:
    halves = load_pictogram_speech(packages, side=8)
    words_ = load_pictogram_words(packages, side=8)
    for part, with_words in zip(vars(halves).values(), vars(words_).values(), strict=True):
        assert torch.equal(part.ids, with_words.ids)  # the same parts
        assert part.other.shape == (len(part), 1, MELS, FRAMES) and part.other.dtype == torch.float32
        sounds = part.other[:, 0] > 1
        assert sounds.any(2).float().argmax(1).tolist() == [KNOWN[i] % MELS for i in (part.ids // STRIDE).tolist()]
        assert sounds.any(2).sum(1).eq(1).all()
        speakers = ((sounds.sum((1, 2)) - 20) // 3).view(-1, 4 if part is halves.train else 2)
        assert all(len(set(row)) == len(row) for row in speakers.tolist())  # another one in each view
        assert part is not halves.train or speakers.unique().tolist() == list(range(len(SPEAKERS)))


@pytest.mark.parametrize(
    ("load", "options", "message"),
    [
        (load_pictogram_pairs, {"views": 13}, "views: expected"),
        (load_pictogram_words, {"views": 5}, "views: expected"),
        (load_pictogram_words, {"unseen_views": 0}, "unseen_views: expected"),
        (load_pictogram_speech, {"views": 5}, "views: expected"),
        (load_pictogram_pairs, {"seed": -1}, "seed: expected"),
        (load_pictogram_pairs, {"side": 0}, "side: expected"),
    ],
)
def test_bad_arguments_are_named(packages: Path, load: Load, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(packages, **options)


@pytest.mark.skipif("CCU_FAST_PACKAGES" not in os.environ, reason="CCU_FAST_PACKAGES: no folder of npm packages")
def test_the_real_packages() -> None:
    pairs = load_pictogram_pairs(os.environ["CCU_FAST_PACKAGES"])
    assert [len(part) for part in vars(pairs).values()] == [10368, 738, 374]
    assert len(pairs.train.labels.bincount()) == len(GROUPS)
    said = load_pictogram_words(os.environ["CCU_FAST_PACKAGES"])
    assert len(said.train) == 5184 and said.train.other.sum(1).min() > 0
