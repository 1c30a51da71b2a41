"""pictograms, from packages of the same form as the real ones; the real ones are read where CCU_FAST_PACKAGES is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ccu_fast.data import pictograms
from ccu_fast.data.captions import list_pairs
from ccu_fast.data.pictograms import ARTISTS, load_pictograms, write_pictograms
from tests.support.pictogram_packages import write_packages


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pictograms, "_check_contents", lambda *_: None)
    return write_packages(tmp_path / "packages")


def test_drawings_stand_on_white_and_every_caption_is_of_its_thing(packages: Path) -> None:
    train, test = load_pictograms(packages, n_things=5, n_test=3, side=16)
    assert (len(train), len(test)) == (10, 3)
    assert train.images.shape == (10, 3, 16, 16) and train.images.dtype == torch.uint8
    assert train.things.tolist() == [*range(5), *range(5)] and test.things.tolist() == [0, 1, 2]
    assert train.images[:, :, 12:].eq(255).all()  # transparent below
    for part in (train, test):
        for image, caption in zip(part.images, part.captions, strict=True):
            _, number, _, group, *tags = caption.split()
            assert int(image[0, 2, 2]) == 40 * int(number)
            assert group == str(int(number) % 2)
            assert len(set(tags)) == 3 and all(tag.startswith(f"tag{number}") for tag in tags)
    # All things but the one that the tester has not drawn, in a random order; keywords differ between the artists.
    assert {caption.split()[1] for caption in train.captions} == {"0", "1", "2", "3", "5"}
    assert train.captions[:5] != train.captions[5:]


def test_the_same_seed_is_the_same_and_tones_are_things_of_their_own(packages: Path) -> None:
    first, _ = load_pictograms(packages, n_things=5, n_test=1)
    again, _ = load_pictograms(packages, n_things=5, n_test=1)
    other, _ = load_pictograms(packages, n_things=5, n_test=1, seed=1)
    assert first.captions == again.captions and torch.equal(first.images, again.images)
    assert first.captions != other.captions
    toned, _ = load_pictograms(packages, n_things=7, n_test=1, tones=True)
    assert sum("1f3f" in caption for caption in toned.captions) == 4


def test_they_are_written_as_datasets_of_pairs(packages: Path, tmp_path: Path) -> None:
    out = write_pictograms(tmp_path / "out", packages, n_things=5, n_test=3)
    train, _ = load_pictograms(packages, n_things=5, n_test=3)
    listing = list_pairs(out / "train.csv").whole()
    assert listing.captions == train.captions and listing.n_images == 10
    with pytest.raises(FileExistsError):
        write_pictograms(out, packages, n_things=5, n_test=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"artists": ()}, "artists: expected different ones"),
        ({"artists": ("google", "google")}, "artists: expected different ones"),
        ({"artists": ("google", "facebook")}, "artists: expected different ones, and not test_artist"),
        ({"artists": ("rembrandt",)}, "artists: expected one of"),
        ({"test_artist": "rembrandt"}, "test_artist: expected one of"),
        ({"language": "la"}, "language: expected one of"),
        ({"n_things": 6}, "n_things: expected at least n_test 3 and at most the 5"),
        ({"n_things": 2}, "n_things: expected at least n_test 3"),
        ({"side": 0}, "side: expected"),
    ],
)
def test_bad_arguments_are_named(packages: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_pictograms(packages, **{"n_things": 5, "n_test": 3, **options})


def test_other_contents_than_those_of_the_stated_version_are_refused(tmp_path: Path) -> None:
    folder = write_packages(tmp_path / "packages")
    with pytest.raises(ValueError, match="packages: expected the files of the version named in"):
        load_pictograms(folder)
    with pytest.raises(
        FileNotFoundError, match=r"packages: expected the unpacked npm packages, got no .*messages.json"
    ):
        (folder / "emojibase-data" / "en" / "messages.json").unlink()
        load_pictograms(folder)


@pytest.mark.skipif("CCU_FAST_PACKAGES" not in os.environ, reason="CCU_FAST_PACKAGES: no folder of npm packages")
@pytest.mark.parametrize("language", pictograms.LANGUAGES)
def test_the_real_packages(language: str) -> None:
    train, test = load_pictograms(
        os.environ["CCU_FAST_PACKAGES"],
        n_things=3500,
        n_test=400,
        artists=tuple(ARTISTS)[:3],
        test_artist="apple",
        language=language,
        tones=True,
    )
    assert (len(train), len(test)) == (10500, 400)
    assert len(set(test.captions)) > 390 and all(train.captions)
