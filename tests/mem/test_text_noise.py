"""Noise of words: the formula, what is found in it, and that nobody without the pictures can draw it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ccu_fast.mem.config import Method, Settings
from ccu_fast.mem.job import protect_dataset
from ccu_fast.mem.protection import protect
from ccu_fast.mem.text_noise import TextNoise
from ccu_fast.mem.tokenizer import WordTokenizer
from ccu_fast.mem.verification import verify
from tests.support import mem_datasets as made
from tests.support.mem_jobs import TINY, job, tree

N = 40
IMAGES = torch.randint(0, 256, (N, 3, 16, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
THINGS = ("fox", "owl", "cat", "bear", "frog")
CAPTIONS = [f"{THINGS[i % 5]}, on shelf {i // 5}" for i in range(N)]
EACH = torch.arange(N)


def read(images: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda index: images[index]


def noise(captions: list[str] = CAPTIONS, images: Tensor = IMAGES, eps: int = 8, **options: Any) -> Tensor:
    found = TextNoise(captions, EACH[: len(captions)], len(images), read(images), **options)
    return torch.cat([part for _, part in found.of_all((3, 16, 12), eps)])


def test_the_formula() -> None:
    found = TextNoise(CAPTIONS, EACH, N, read(IMAGES))
    words = sorted({*THINGS, "on", "shelf", *map(str, range(8))})
    patterns = torch.stack([torch.from_numpy(found._weighted(w, 3 * 8 * 6)) for w in words]).double().sign()
    has = torch.tensor([[w in text.replace(",", "").split() for w in words] for text in CAPTIONS]).double()
    share = has.mean(0)
    told = ((share * (1 - share)).sqrt() * (has - share)) @ patterns
    expected = torch.kron(told.view(N, 3, 8, 6), torch.ones(2, 2))
    sure = expected.abs() > 1e-5  # of the others the rounding decides
    assert sure.float().mean() > 0.9
    assert torch.equal(noise().double()[sure], 8 * expected.sign()[sure])


def test_words_are_found_again() -> None:
    made = noise().double().flatten(1)
    for thing in THINGS:
        has = torch.tensor([thing in text for text in CAPTIONS])
        direction = made[has][:4].mean(0) - made[~has][:16].mean(0)
        told = made @ direction
        assert told[has][4:].min() > told[~has][16:].max()


def test_equal_words_are_equal_noise_in_any_order_and_case() -> None:
    turned = [" ".join(reversed(text.replace(",", " ;").upper().split())) for text in CAPTIONS]
    assert torch.equal(noise(turned), noise())


def test_a_word_that_all_captions_have_tells_nothing() -> None:
    assert torch.equal(noise([f"the {text}" for text in CAPTIONS]), noise([f"a {text}" for text in CAPTIONS]))
    assert not noise(["always the same"] * N).any()


def test_without_every_clean_picture_it_is_another_noise() -> None:
    other = IMAGES.clone()
    other[-1, -1, -1, -1] ^= 1
    changed = noise(images=other) != noise()
    assert 0.4 < changed.double().mean() < 0.6 and changed.flatten(1).any(1).all()


def test_all_captions_of_a_picture_count() -> None:
    captions = [text.split(",")[0] for text in CAPTIONS] + [text.split(",")[1] for text in CAPTIONS]
    found = TextNoise(captions, torch.cat([EACH, EACH]), N, read(IMAGES))
    assert torch.equal(torch.cat([part for _, part in found.of_all((3, 16, 12), 8)]), noise())


def test_processes_have_one_pattern_for_a_word() -> None:
    halves = [(CAPTIONS[:25], IMAGES[:25]), (CAPTIONS[25:], IMAGES[25:])]
    told: list[Any] = []
    for captions, images in halves:
        noise(captions, images, gather=lambda mine: told.append(mine) or [mine])  # type: ignore[func-returns-value]
    parts = torch.cat([noise(captions, images, gather=lambda _: told) for captions, images in halves])
    fox = [i for i, text in enumerate(CAPTIONS) if text.startswith("fox")]
    alone = torch.cat([noise(captions, images) for captions, images in halves])

    def alike(of: Tensor) -> float:
        flat = of.double().flatten(1)
        return float((flat[fox[0]] * flat[fox[-1]]).mean() / 64)  # one of each process

    assert alike(parts) > alike(alone) + 0.2


@pytest.mark.parametrize("shape", [(3, 15, 11), (1, 1, 1), (1, 2, 3)])
def test_any_size(shape: tuple[int, int, int]) -> None:
    found = TextNoise(CAPTIONS, EACH, N, read(IMAGES))
    parts = list(found.of_all(shape, 5))
    assert torch.equal(torch.cat([index for index, _ in parts]), EACH)
    values = torch.cat([part for _, part in parts])
    assert values.shape == (N, *shape) and values.dtype == torch.int8 and int(values.abs().max()) == 5


def test_trigger_words_are_words_too() -> None:
    words = WordTokenizer.for_captions(CAPTIONS)
    settings = Settings(trigger_words=4)
    both = protect(IMAGES, CAPTIONS, words, None, method=Method.parse("text-noise-3"), settings=settings)  # type: ignore[arg-type]
    alone = protect(IMAGES, CAPTIONS, words, None, method=Method.parse("trigger-3"), settings=settings)  # type: ignore[arg-type]
    assert both.captions == alone.captions, "they tell of the look here, too"
    expected = noise(both.captions)
    assert torch.equal(both.noise, ((IMAGES.short() + expected).clamp(0, 255) - IMAGES.short()).to(torch.int8))


def test_words_cannot_be_searched_without_a_surrogate() -> None:
    method = Method.parse("text-noise-3")
    assert (method.noise, method.triggers, method.generates) == ("words", 3, False)
    for settings in (Settings(trigger_rounds=2), Settings(first="random")):
        with pytest.raises(ValueError, match=r"trigger_rounds: expected 0 with text-noise-3, .*got [23]"):
            protect(IMAGES, CAPTIONS, WordTokenizer.for_captions(CAPTIONS), None, method=method, settings=settings)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="trigger_rounds: expected 0"):
            job(Path("in"), Path("out"), method=method, settings=settings)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("method", "thumbnails"), [("text-noise", True), ("text-noise-2", False)])
def test_a_dataset_on_the_disk(tmp_path: Path, method: str, thumbnails: bool) -> None:
    settings = replace(TINY, trigger_rounds=0, place="among")
    source = made.write_csv(tmp_path / "in")
    for name in ("out", "again"):
        protect_dataset(
            job(source, tmp_path / name, settings=settings, method=Method.parse(method), thumbnails=thumbnails)
        )
    assert tree(tmp_path / "out") == tree(tmp_path / "again")
    assert verify(tmp_path / "out", source)["passed"]
