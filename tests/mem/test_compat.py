"""compat against a plain transcription of the authors' algorithm, in float64: the same triggers, the same noise."""

from __future__ import annotations

import pytest
import torch

from ccu_fast.data.strips import load_strips
from ccu_fast.mem import Method, Protection, Settings, WordTokenizer
from ccu_fast.mem.source import TensorSource
from ccu_fast.mem.surrogate import fresh, generator
from ccu_fast.models.dual_encoder import SmallDualEncoder
from tests.support import mem_transcription as plain

TOKENIZER = WordTokenizer.for_strips()
SETTINGS = Settings(
    eps=2,
    step=1,
    pgd_steps=3,
    rounds=3,
    trigger_rounds=2,
    trigger_words=None,
    candidates=5,
    surrogate_steps=5,
    restart=0,
    batch=8,
    lr=1e-3,
    weight_decay=0.2,
    beta2=0.999,
    compat=True,
)


def small() -> SmallDualEncoder:
    return SmallDualEncoder(len(TOKENIZER), TOKENIZER.eot, width=32, dim=16).double()


@pytest.mark.parametrize("length", [0, 1, 3])
def test_compat_is_the_authors_algorithm_step_for_step(length: int) -> None:
    strips, _ = load_strips(21, 1, seed=4)
    method = Method.parse(f"mem-{length}" if length else "em")
    run = Protection(
        TensorSource(strips.images, strips.captions), TOKENIZER, small, method=method, settings=SETTINGS, seed=5
    )
    first = int(run.triggers[0, 0]) if length else 0
    for i in range(run.rounds):
        run.round(i)

    noise, triggers = plain.protect(
        fresh(small, 5, "surrogate 0"),
        strips.images.double() / 255,
        TOKENIZER.encode(strips.captions),
        first,
        length,
        SETTINGS,
        generator(5, "generate"),
        context=32,
        eot=TOKENIZER.eot,
    )
    assert torch.equal(run.triggers, triggers)
    assert torch.equal(run.store.gather(torch.arange(21), dtype=torch.int8).double(), (noise * 255).round())
    # All three decisions were made: words changed, and noise reached its limit.
    assert not length or int((triggers != first).any(1).sum()) > 8
    assert int((noise * 255).round().abs().max()) == 2


def test_what_is_published_is_valid_though_the_noise_is_not_and_the_remainder_stays_clean() -> None:
    strips, _ = load_strips(21, 1, seed=4)
    run = Protection(
        TensorSource(strips.images, strips.captions),
        TOKENIZER,
        small,
        method=Method.parse("mem"),
        settings=SETTINGS,
        seed=5,
    )
    run.round(0)
    noise = run.store.gather(torch.arange(21), dtype=torch.int8).short()
    total = strips.images.short() + noise
    assert total.min() < 0
    published = run.published_images(torch.arange(21))
    assert torch.equal(published.short(), total.clamp(0, 255))
    assert not noise[16:].any()  # 21 rows, batches of 8: the authors leave 5 unprotected
    assert noise[:16].flatten(1).any(1).all()


def test_compat_says_what_it_cannot_do() -> None:
    strips, _ = load_strips(5, 1)
    source = TensorSource(strips.images, strips.captions)
    with pytest.raises(ValueError, match="batch: expected at most the 5 rows"):
        Protection(source, TOKENIZER, small, method=Method.parse("mem"), settings=SETTINGS)
    with pytest.raises(ValueError, match="method: expected clean, em, mem or trigger"):
        Protection(source, TOKENIZER, small, method=Method.parse("uap"), settings=SETTINGS)
