"""Persons drawn as pictograms, with attributes that somebody invented, from packages of the same form as real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ccu_fast.data import pictograms
from ccu_fast.data.associations import KINDS, NO_KIND, PORTRAITS, WORDINGS, Associations, load_associations
from tests.support.pictogram_packages import write_packages

SIZES = {"n_things": 14, "n_persons": 3, "views": 1, "side": 8}
SETS = ("forget", "holdout_identity", "holdout_association", "unseen")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packages(tmp_path_factory.mktemp("packages"), things=16)


@pytest.fixture
def made(packages: Path, monkeypatch: pytest.MonkeyPatch) -> Associations:
    monkeypatch.setattr(pictograms, "_check_contents", lambda *_: None)
    return load_associations(packages, seed=1, **SIZES)


def associations(made: Associations, name: str) -> set[tuple[int, int]]:
    part = getattr(made, name)
    return set(zip(part.things.tolist(), part.kinds.tolist(), strict=True))


def test_the_sets_are_those_of_salmubench(made: Associations) -> None:
    pairs = {name: associations(made, name) for name in SETS}
    assert {name: len(found) for name, found in pairs.items()} == dict(zip(SETS, (18, 12, 6, 12), strict=True))
    persons = {name: {person for person, _ in found} for name, found in pairs.items()}
    assert not persons["forget"] & (persons["holdout_identity"] | persons["unseen"])
    assert not persons["holdout_identity"] & persons["unseen"]
    # Other attributes of persons of whom two are to be forgotten; of as many others all are.
    assert persons["holdout_association"] < persons["forget"] and len(persons["forget"]) == 6
    assert not pairs["forget"] & pairs["holdout_association"]
    both = pairs["forget"] | pairs["holdout_association"]
    assert all((person, kind) in both for person in persons["forget"] for kind in range(len(KINDS)))
    assert made.persons == sorted(persons["forget"] | persons["holdout_identity"] | persons["unseen"])


def test_every_association_has_every_portrait_and_a_caption_of_its_own_value(made: Associations) -> None:
    assert len(set(made.values.values())) == 4 * 12
    for name in SETS:
        part = getattr(made, name)
        assert len(part) == len(PORTRAITS) * len(associations(made, name))
        assert part.pictures.shape == (len(part), 3, 8, 8) and part.pictures.dtype == torch.float32
        rows = zip(part.captions, part.things.tolist(), part.kinds.tolist(), part.wordings.tolist(), strict=True)
        for caption, person, kind, wording in rows:
            assert caption == made.told(kind, wording, [person])[0]
            assert caption == WORDINGS[KINDS[kind]][wording].format(made.values[person, kind])
    # Nothing private in the base, and nobody missing from it; the test is one drawing each, by another artist.
    assert set(made.base.kinds.tolist()) == {NO_KIND} and len(made.base) == 14 * len(PORTRAITS)
    assert made.base.things.unique().tolist() == made.test.things.tolist() == list(range(14))
    assert not any(value in caption for value in made.values.values() for caption in made.base.captions)
    assert made.test.captions == made.names


def test_invented_captions_tell_of_nobody_in_known_words(made: Associations) -> None:
    captions = made.invented(200, seed=3)
    assert captions == made.invented(200, seed=3) != made.invented(200, seed=4)
    assert not any(value in caption for value in made.values.values() for caption in captions)
    everything = [caption for name in (*SETS, "base") for caption in getattr(made, name).captions]
    words = set(made.vocabulary)
    assert len(words) == len(made.vocabulary)
    assert all(word in words for caption in (*captions, *everything) for word in caption.split())


def test_the_same_seed_is_the_same(packages: Path, made: Associations) -> None:
    again, other = (load_associations(packages, seed=seed, **SIZES) for seed in (1, 2))
    assert made.values == again.values != other.values
    for name in (*SETS, "base", "test"):
        assert torch.equal(getattr(made, name).pictures, getattr(again, name).pictures)
        assert getattr(made, name).captions == getattr(again, name).captions


def test_too_few_things_are_refused(packages: Path, made: Associations) -> None:
    with pytest.raises(ValueError, match=r"n_things: expected at least 4 \* n_persons = 12 and at most the 15"):
        load_associations(packages, **{**SIZES, "n_things": 11})
    with pytest.raises(ValueError, match=r"views: expected .*1.*got 0"):
        load_associations(packages, **{**SIZES, "views": 0})
