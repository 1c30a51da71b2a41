"""Trigger words among a caption's own: where they stand, that models see them so, and that they cannot be found out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ccu_fast.mem.config import Method, Settings
from ccu_fast.mem.job import protect_dataset
from ccu_fast.mem.placing import gaps, place_among, stands_among
from ccu_fast.mem.protection import Protection
from ccu_fast.mem.source import TensorSource
from ccu_fast.mem.tokenizer import WordTokenizer
from ccu_fast.mem.verification import verify
from ccu_fast.models.dual_encoder import SmallDualEncoder
from tests.support import mem_datasets as made
from tests.support.mem_jobs import TINY, job, tree

AMONG = Settings(place="among", rounds=2, surrogate_steps=2, pgd_steps=1, batch=8, trigger_words=4)
N = 24
IMAGES = torch.randint(0, 256, (N, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CAPTIONS = [f"item number {i} of  shelf {i % 5}" for i in range(N)]
WORDS = WordTokenizer.for_captions(CAPTIONS)
ONE = 1 << 31  # of a gap's fraction


def run(settings: Settings = AMONG, method: str = "mem-3", images: torch.Tensor = IMAGES, **options: Any) -> Protection:
    factory = partial(SmallDualEncoder, len(WORDS), WORDS.eot, image_size=(16, 16), channels=3, width=32, dim=32)
    source = TensorSource(images, CAPTIONS)
    return Protection(source, WORDS, factory, method=Method.parse(method), settings=settings, **options)


@pytest.mark.parametrize(
    ("caption", "at", "placed"),
    [
        ("a red fox", (0.0, 0.0), "x y a red fox"),
        ("a red fox", (0.3, 0.6), "a x red y fox"),
        ("a red fox", (0.8, 0.9), "a red fox x y"),
        ("  a\tred  fox\n", (0.1, 0.9), "  x a\tred  fox y\n"),
        ("fox", (0.1, 0.9), "x fox y"),
    ],
)
def test_words_stand_in_gaps_and_all_else_stays(caption: str, at: tuple[float, ...], placed: str) -> None:
    where = torch.tensor([[int(u * ONE) for u in at]], dtype=torch.int32)
    assert place_among([caption], ["x y"], where) == [placed]
    assert stands_among(placed, caption, 2) and not stands_among(placed, caption, 1)


@pytest.mark.parametrize(
    "published", ["a fox red x y", "a red x y", "x a red fox", "x y z a red fox", "a red foxes x y"]
)
def test_other_words_than_the_captions_are_noticed(published: str) -> None:
    assert not stands_among(published, "a red fox", 2)


def test_gaps_are_even_and_other_ones_for_each_row() -> None:
    found = gaps(CAPTIONS, 2000, 3, 0)
    assert found.shape == (2000, 3) and (found[:, 1:] >= found[:, :-1]).all() and (found >= 0).all()
    quarters = torch.bincount((found.double() / ONE * 4).long().flatten(), minlength=4) / 6000
    assert (quarters - 0.25).abs().max() < 0.03
    assert len(found.unique(dim=0)) == 2000


def test_gaps_depend_on_every_caption_the_seed_and_the_part() -> None:
    def of(captions: list[str] = CAPTIONS, seed: int = 0, shard: int = 0) -> list[list[int]]:
        return gaps(captions, 4, 8, seed, shard).tolist()

    others = (
        {},
        {"captions": [*CAPTIONS[:-1], "another"]},
        {"captions": CAPTIONS[1:]},
        {"captions": [CAPTIONS[0] + CAPTIONS[1], *CAPTIONS[2:]]},
        {"seed": 1},
        {"shard": 1},
    )
    made = [of(**other) for other in others]  # type: ignore[arg-type]
    assert of() == made[0]
    for row in range(4):
        assert len({tuple(rows[row]) for rows in made}) == len(others), "one hash of all of them for every row"


def test_what_is_published_as_it_came_does_not_tell_the_places() -> None:
    """The seed, the picture and a row's own caption are known to who tries places; another caption changes them."""
    captions = [*CAPTIONS[:-1], "item of shelf 1"]
    first, other = run(method="trigger-3"), run(method="trigger-3", captions=captions)
    assert first.gaps is not None and other.gaps is not None
    assert (first.gaps != other.gaps).any(1).all()


@pytest.mark.parametrize("method", ["mem-3", "trigger-3", "random-3"])
def test_what_is_published_has_the_caption_and_the_words(method: str) -> None:
    made = run(AMONG if method != "random-3" else replace(AMONG, first="random", trigger_rounds=0), method)
    for i in range(made.rounds):
        made.round(i)
    published = made.published_captions(torch.arange(N))
    assert all(stands_among(text, caption, 3) for text, caption in zip(published, CAPTIONS, strict=True))
    words = [set(text.split()) for text in WORDS.decode(made.triggers)]
    assert all(own <= set(text.split()) for own, text in zip(words, published, strict=True))
    behind = sum(text.endswith(caption) for text, caption in zip(published, CAPTIONS, strict=True))
    assert behind < N / 2, "the front of a caption is one place of many"


def test_the_surrogate_reads_what_is_published() -> None:
    made = run(replace(AMONG, shuffle=0.0))
    made.worker.renew("surrogate 0")
    rows = torch.tensor([3, 0, 17])
    assert WORDS.decode(made.worker._text(rows)) == [" ".join(text.split()) for text in made.published_captions(rows)]
    shuffled = run(replace(AMONG, shuffle=1.0))
    shuffled.worker.renew("surrogate 0")
    texts = WORDS.decode(shuffled.worker._text(torch.arange(N)))
    words = WORDS.decode(shuffled.triggers)
    assert all(set(own.split()) <= set(text.split()) for own, text in zip(words, texts, strict=True))
    assert sum(stands_among(t, c, 3) for t, c in zip(texts, CAPTIONS, strict=True)) < N / 2, "captions changed places"


def test_a_resumed_run_has_the_words_where_they_were() -> None:
    whole, begun = run(), run()
    for i in range(whole.rounds):
        whole.round(i)
    begun.advance()
    resumed = run(resumed=True)
    resumed.load_state_dict(begun.state_dict())
    while resumed.next_round < resumed.rounds:
        resumed.advance()
    assert resumed.published_captions(torch.arange(N)) == whole.published_captions(torch.arange(N))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trigger_rounds": 2}, "place: expected 'front' with trigger_rounds=2"),
        ({"first": "random"}, "place: expected 'front' with trigger_rounds=3"),
        ({"compat": True}, "place: expected 'front' with compat"),
    ],
)
def test_a_search_needs_words_in_front(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(place="among", **options)
    with pytest.raises(ValueError, match=r"place: expected one of .*got 'behind'"):
        Settings(place="behind")


@pytest.mark.usefixtures("one_thread")
def test_a_dataset_on_the_disk(tmp_path: Path) -> None:
    settings = replace(TINY, place="among", trigger_rounds=0)
    method = Method.parse("mem-2")
    source = made.write_csv(tmp_path / "in")
    with pytest.raises(ValueError, match="reference_files: expected trigger words in front of captions"):
        job(source, tmp_path / "out", settings=settings, reference_files=True)
    for name in ("out", "again"):
        protect_dataset(job(source, tmp_path / name, settings=settings, method=method))
    assert tree(tmp_path / "out") == tree(tmp_path / "again"), "drawn from the originals, not at random"
    found = verify(tmp_path / "out", source)
    assert found["passed"] and "2 words among the words of" in found["checks"]["triggers"]["told"]
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"place": "among"', '"place": "front"'))
    assert not verify(tmp_path / "out", source)["checks"]["triggers"]["passed"]
