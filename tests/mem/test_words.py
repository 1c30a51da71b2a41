"""Which words triggers are made of, and how they tell what pictures look like."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from ccu_fast.data.strips import load_strips
from ccu_fast.mem import words as words_module
from ccu_fast.mem.config import Method, Settings
from ccu_fast.mem.look import Codebook, coarse
from ccu_fast.mem.protection import Protection
from ccu_fast.mem.source import TensorSource
from ccu_fast.mem.surrogate import generator
from ccu_fast.mem.tokenizer import NEUTRAL, WordTokenizer
from ccu_fast.mem.triggers import random_triggers
from ccu_fast.mem.words import alphabet, words_of_the_look
from ccu_fast.models.dual_encoder import SmallDualEncoder

MEM = Method.parse("mem-3")
SETTINGS = Settings(trigger_words=8, candidates=4)
COLOURS = ("red", "green", "blue")


def coloured(n: int) -> torch.Tensor:
    """Pictures of three colours with some noise; which is i mod 3."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 40, (n, 3, 16, 16), generator=rng, dtype=torch.uint8)
    images[torch.arange(n), torch.arange(n) % 3] += 180
    return images


def test_a_word_tells_the_colour_of_the_picture() -> None:
    images = coloured(60)
    codes = Codebook.fit(coarse(images), 1, 3, generator(0, "look")).codes(coarse(images))[:, 0]
    colour = torch.arange(60) % 3
    assert {tuple(codes[colour == c].unique().tolist()) for c in range(3)} == {(0,), (1,), (2,)}


@pytest.mark.parametrize(("shape", "features"), [((3, 32, 32), 192), ((1, 16, 64), 64), ((3, 4, 400), 192)])
def test_a_coarse_picture_has_about_as_many_cells_whatever_its_form(shape: tuple[int, ...], features: int) -> None:
    images = torch.full((2, *shape), 7, dtype=torch.uint8)
    assert coarse(images).shape == (2, features) and coarse(images).eq(7).all()


@pytest.mark.parametrize("n", [2, 3, 40])
def test_few_or_equal_pictures_have_codes_as_well(n: int) -> None:
    features = coarse(torch.full((n, 1, 8, 8), 3, dtype=torch.uint8))
    codes = Codebook.fit(features, 5, 16, generator(0, "look")).codes(features)
    assert codes.shape == (n, 5) and codes.eq(codes[0]).all()


def test_equal_pictures_have_equal_codes_whatever_their_directions_leave() -> None:
    # Flat pictures differ in one direction; rounding makes others.
    shades = torch.randint(0, 200, (300,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    features = coarse(shades[:, None, None, None].expand(300, 3, 32, 32).contiguous())
    codes = Codebook.fit(features, 5, 8, generator(0, "look")).codes(features)
    assert all(len(codes[shades == shade].unique(dim=0)) == 1 for shade in shades.unique())
    assert len(codes.unique(dim=0)) > 4


def test_codes_do_not_depend_on_how_many_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    features = coarse(coloured(50))
    book = Codebook.fit(features, 3, 4, generator(0, "look"))
    whole = book.codes(features)
    monkeypatch.setattr("ccu_fast.mem.look._CHUNK", 7)
    assert torch.equal(book.codes(features), whole)


def test_more_words_than_directions_begin_again() -> None:
    features = coarse(coloured(50))[:, :6]
    codes = Codebook.fit(features, 4, 4, generator(0, "look")).codes(features)
    assert codes.shape == (50, 4)


def test_processes_make_one_codebook() -> None:
    images, ids = coloured(60), torch.arange(100, 106).view(2, 3)
    parts = [images[:20], images[20:]]
    features = [coarse(part) for part in parts]
    found = [words_of_the_look(part.__getitem__, len(part), ids, 0, lambda mine: features) for part in parts]
    alone = words_of_the_look(images.__getitem__, 60, ids, 0)
    # The same pictures in the same order make the same codebook.
    assert torch.equal(torch.cat(found), alone)


def test_words_of_captions_are_neither_rare_nor_everywhere() -> None:
    captions = [f"a drawing of w{i // 4} x{i // 10} only{i}" for i in range(100)]
    tokenizer = WordTokenizer.for_captions(captions)
    tokens = tokenizer.encode(captions)
    settings = replace(SETTINGS, trigger_words=8, words="captions")
    ids = alphabet(tokenizer, tokens, Method.parse("mem-2"), settings, 0)
    assert ids.shape == (2, 8) and len(ids.unique()) == 16
    words = tokenizer.decode(ids.view(-1, 1))
    # In 4 of 100: w0, …; x0 is in 10 of 100, and the words of the prompt in all.
    assert all(word.startswith("w") for word in words)
    every = alphabet(tokenizer, tokens, Method.parse("mem-12"), settings, 0)
    assert Counter(word[0] for word in tokenizer.decode(every.view(-1, 1)))["w"] == 25
    assert not {"a", "drawing", "of", "x0"} & set(tokenizer.decode(every.view(-1, 1)))
    everyday = alphabet(tokenizer, tokens, MEM, replace(settings, words="everyday"), 0)
    assert set(tokenizer.decode(everyday.view(-1, 1))) <= set(NEUTRAL)


def test_words_are_counted_in_captions_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = [f"one word{i % 7} word{i % 3} word{i % 3} last{i % 50}" for i in range(100)]
    tokenizer = WordTokenizer.for_captions(captions)
    settings = replace(SETTINGS, trigger_words=None)

    def found() -> torch.Tensor:
        return alphabet(tokenizer, tokenizer.encode(captions), MEM, settings, 0)

    whole = found()
    monkeypatch.setattr(words_module, "_COUNTED", 7)
    assert torch.equal(found(), whole)


def test_too_few_words_are_told() -> None:
    tokenizer = WordTokenizer(["one", "two", "six"], triggers=["six"])
    tokens = tokenizer.encode(["one two"] * 30)
    searched = replace(SETTINGS, trigger_rounds=1)
    with pytest.raises(
        ValueError, match=r"tokenizer: expected at least 4 trigger words for each of 3 alphabets, got 1 in all"
    ):
        alphabet(tokenizer, tokens, MEM, searched, 0)
    with pytest.raises(ValueError, match="tokenizer: expected at least 1 trigger words for each of 3 alphabets"):
        alphabet(tokenizer, tokens, MEM, SETTINGS, 0)
    with pytest.raises(ValueError, match="trigger_words: expected at least as many as candidates, 4, got 3"):
        alphabet(WordTokenizer.for_strips(), tokens, MEM, replace(searched, trigger_words=3), 0)
    with pytest.raises(ValueError, match="method: expected triggers that leave room"):
        alphabet(WordTokenizer.for_strips(), tokens, Method.parse("mem-30"), replace(SETTINGS, first="random"), 0)


def test_random_words_are_of_their_position() -> None:
    ids = torch.arange(12).view(3, 4)
    drawn = random_triggers(200, 3, ids, generator(0, "draw"))
    assert all(set(drawn[:, p].tolist()) == set(ids[p].tolist()) for p in range(3))


@pytest.mark.usefixtures("one_thread")
def test_a_run_keeps_each_word_in_its_own_alphabet() -> None:
    strips, _ = load_strips(24, 2, seed=0)
    tokenizer = WordTokenizer.for_strips()
    source = TensorSource(strips.images, strips.captions)
    factory = partial(SmallDualEncoder, len(tokenizer), tokenizer.eot, width=32, dim=32)
    settings = replace(SETTINGS, rounds=2, trigger_rounds=2, surrogate_steps=2, pgd_steps=1, batch=8)
    run = Protection(source, tokenizer, factory, method=MEM, settings=settings)
    first = run.triggers.clone()
    for index in range(2):
        run.round(index)
    assert not torch.equal(first, run.triggers)
    for position in range(3):
        assert torch.isin(run.triggers[:, position], run.alphabet[position]).all()
    again = Protection(source, tokenizer, factory, method=MEM, settings=settings)
    assert torch.equal(again.triggers, first)
    # Rows of one picture begin alike; the control does not look at it.
    shared = TensorSource(strips.images[:12], strips.captions, torch.arange(24) // 2)
    rows = Protection(shared, tokenizer, factory, method=MEM, settings=settings).triggers
    assert torch.equal(rows[::2], rows[1::2])
    control = Protection(shared, tokenizer, factory, method=Method.parse("random-3"), settings=settings).triggers
    assert not torch.equal(control[::2], control[1::2])


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_does_not_look_again() -> None:
    strips, _ = load_strips(12, 2, seed=0)
    seen: list[int] = []

    class Source(TensorSource):
        def images(self, index: torch.Tensor) -> torch.Tensor:
            seen.append(len(index))
            return super().images(index)

    source = Source(strips.images, strips.captions)
    stages: list[tuple[str, int, int]] = []

    def make(**options: Any) -> Protection:
        words = WordTokenizer.for_strips()
        method = Method.parse("trigger-3")
        return Protection(source, words, lambda: None, method=method, settings=SETTINGS, **options)  # type: ignore[arg-type, return-value]

    first = make(progress=lambda stage, done, total, _: stages.append((stage, done, total)))
    assert first.rounds == 0 and seen == [12]
    assert stages == [
        ("preparing captions and words", 0, 1),
        ("looking at pictures", 0, 12),
        ("looking at pictures", 12, 12),
        ("choosing trigger words", 0, 1),
    ]
    again = make(resumed=True)
    again.load_state_dict(first.state_dict())
    assert seen == [12] and torch.equal(again.triggers, first.triggers)
