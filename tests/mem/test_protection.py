"""The resumable engine: stop anywhere between batches, several captions an image, what the variants change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from ccu_fast import NoiseStore
from ccu_fast.data.strips import load_strips
from ccu_fast.mem import Execution, Method, Protection, Settings, WordTokenizer
from ccu_fast.mem.source import TensorSource
from ccu_fast.models.dual_encoder import SmallDualEncoder

TOKENIZER = WordTokenizer.for_strips()
FACTORY = partial(SmallDualEncoder, len(TOKENIZER), TOKENIZER.eot, width=32, dim=32)
TINY = Settings(rounds=3, trigger_rounds=2, surrogate_steps=3, pgd_steps=2, candidates=3, batch=16, restart=2)
STRIPS, _ = load_strips(20, 1)
# 20 images, every other one with two captions.
OWNER = torch.cat([torch.arange(20), torch.arange(0, 20, 2)])
CAPTIONS = [*STRIPS.captions, *(f"the photo of {c.split(maxsplit=4)[4]}" for c in STRIPS.captions[::2])]


def make(name: str = "mem-2", settings: Settings = TINY, **options: Any) -> Protection:
    captions = [c.replace("the photo", "a photo") for c in CAPTIONS]
    return Protection(
        TensorSource(STRIPS.images, captions, OWNER),
        TOKENIZER,
        FACTORY,
        method=Method.parse(name),
        settings=settings,
        **options,
    )


def everything(run: Protection) -> tuple[torch.Tensor, list[str], dict[str, list[float]]]:
    return run.published_images(torch.arange(20)), run.published_captions(torch.arange(30)), run.losses


@pytest.mark.parametrize(
    ("name", "stop"),
    [("mem-2", 0), ("mem-2", 1), ("mem-2", 2), ("em", 1), ("trigger-1", 1), ("uap", 1), ("tap", 1), ("random-2", 0)],
)
def test_a_run_that_stopped_goes_on_to_the_same_bits(name: str, stop: int) -> None:
    whole, first = make(name), make(name)
    for i in range(whole.rounds):
        whole.round(i)
    for i in range(min(stop, first.rounds)):
        first.round(i)
    state, noise = first.state_dict(), first.store.data.clone()
    if first.next_round < first.rounds:
        first.round(first.next_round)  # what is lost with the process must not show in the state
    store = NoiseStore(len(noise), STRIPS.images.shape[1:])
    store.data.copy_(noise)
    second = make(name, noise_store=store)
    second.load_state_dict(state)
    for i in range(second.next_round, second.rounds):
        second.round(i)
    for a, b in zip(everything(whole), everything(second), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


VARIANTS = {"mem-2": TINY, "em": TINY, "trigger-1": TINY, "uap": TINY, "tap": TINY}
VARIANTS["compat"] = replace(TINY, compat=True, batch=8, trigger_words=None)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_stops_and_goes_on_after_any_batch(name: str) -> None:
    """Of every batch the state is taken; one in a few goes on in a new run, with the noise of that time."""

    def begin(store: NoiseStore | None = None) -> Protection:
        if name != "compat":
            return make(name, VARIANTS[name], noise_store=store)
        source = TensorSource(STRIPS.images, STRIPS.captions)
        method = Method.parse("mem-2")
        return Protection(source, TOKENIZER, FACTORY, method=method, settings=VARIANTS[name], noise_store=store)

    def end(run: Protection) -> list[Any]:
        while run.next_round < run.rounds:
            run.advance()
        return [run.store.data, run.triggers, run.losses]

    rounds = begin()
    for i in range(rounds.rounds):
        rounds.round(i)
    whole, stops = begin(), []
    total = sum(sum(whole.phases(i).values()) for i in range(whole.rounds))
    for _ in range(total):
        stops.append((whole.state_dict(), whole.store.data.clone()))
        whole.advance()
    assert whole.next_round == whole.rounds
    with pytest.raises(ValueError, match="rounds: expected one that is not done"):
        whole.advance()
    for state, noise in [stops[0], *stops[1::3]]:
        store = NoiseStore(len(noise), STRIPS.images.shape[1:])
        store.data.copy_(noise)
        second = begin(store)
        second.load_state_dict(state)
        for a, b, c in zip(end(second), end(whole), end(rounds), strict=True):
            assert torch.equal(a, b) and torch.equal(a, c) if isinstance(a, torch.Tensor) else a == b == c


def test_rounds_come_in_order() -> None:
    run = make()
    with pytest.raises(ValueError, match="expected the next round, 0 of 3, got 1"):
        run.round(1)
    assert make("clean").rounds == make("random").rounds == 0


def test_one_noise_for_an_image_and_a_trigger_for_each_of_its_captions() -> None:
    run = make()
    for i in range(3):
        run.round(i)
    assert run.store.rows == 20
    assert run.triggers.shape == (30, 2)
    assert (run.triggers[:10] != run.triggers[20:]).any()
    assert run.store.data.flatten(1).any(1).all()
    read = run.tokenizer.encode(run.published_captions(torch.arange(30)))
    assert torch.equal(read[:, 1:3], run.triggers)


def test_one_universal_noise() -> None:
    run = make("uap")
    run.round(0)
    noise = run.store.data.short()
    assert noise.shape[0] == 1
    assert 0 < noise.abs().max() <= TINY.eps
    published = run.published_images(torch.arange(20)).short()
    assert torch.equal(published, (STRIPS.images.short() + noise).clamp(0, 255))


def test_adversarial_noise_raises_the_loss_of_a_clean_model_and_error_minimising_noise_lowers_it() -> None:
    settings = replace(TINY, rounds=2, surrogate_steps=40, pgd_steps=7, restart=0)  # the loss told is that after six
    losses = {}
    for name in ("tap", "tap-targeted", "em"):
        run = make(name, settings)
        run.round(0)
        losses[name] = run.losses["noise"][0]
        if name != "em":
            assert len(run.losses["surrogate"]) == 1
    assert losses["tap"] > 2 * losses["em"]
    assert losses["tap-targeted"] > 2 * losses["em"]


@pytest.mark.parametrize(("name", "passes"), [("em", 2), ("tap-targeted", 2), ("trigger-1", 1)])
def test_a_noise_pass_runs_the_image_tower_once_a_step(name: str, passes: int) -> None:
    """The loss that is told is that of the last step, or of a pass where there is no step."""
    run = make(name)
    worker = run.worker
    worker.renew("surrogate 0")
    inner, calls = worker.encode_image, []
    worker.encode_image = lambda shown: (calls.append(len(shown)), inner(shown))[1]  # type: ignore[func-returns-value]
    for _ in worker.through(worker.begin("noise", 2)):
        pass
    assert calls == [16] * passes + [4] * passes
    assert len(run.losses["noise"]) == 1


def test_shards_start_from_the_same_surrogate_and_average_its_gradients() -> None:
    seen: list[list[torch.Tensor]] = []

    def average(parameters: Iterable[nn.Parameter]) -> None:
        seen.append([p.grad.clone() for p in parameters if p.grad is not None])

    runs = [make(shard=i, average=average) for i in (0, 1)]
    for run in runs:
        run.worker.renew("surrogate 0")
    a, b = (list(run.worker.surrogate.parameters()) for run in runs)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert torch.equal(runs[0].alphabet, runs[1].alphabet)
    # These begin with the words of the same pictures, and go on in orders of their own.
    assert torch.equal(runs[0].triggers, runs[1].triggers)
    assert not torch.equal(runs[0].worker.rng.get_state(), runs[1].worker.rng.get_state())
    runs[1].round(0)
    assert len(seen) == TINY.surrogate_steps


def test_execution_changes_rounding_alone() -> None:
    plain, other = make("em"), make("em", execution=Execution(autocast=torch.bfloat16, channels_last=True))
    for run in (plain, other):
        run.round(0)
    assert other.losses["noise"][0] == pytest.approx(plain.losses["noise"][0], rel=0.05)
    with pytest.raises(ValueError, match="autocast"):
        Execution(autocast=torch.float32)
    with pytest.raises(ValueError, match="compile"):
        Execution(compile="fast")


def test_a_compiled_image_tower() -> None:
    """Tests not the compiler, but that the run passes the tower to it and uses the result."""
    plain, other = make("mem"), make("mem", execution=Execution(compile="default"))
    with pytest.MonkeyPatch.context() as patch:
        made: list[dict[str, Any]] = []
        real = torch.compile

        def compile(function: Any, **options: Any) -> Any:
            made.append(options)
            return real(function, backend="aot_eager", dynamic=options["dynamic"])

        patch.setattr(torch, "compile", compile)
        for run in (plain, other):
            run.round(0)
    assert made == [{"mode": "default", "dynamic": False}]
    assert other.losses["noise"][0] == pytest.approx(plain.losses["noise"][0], rel=1e-3)


def test_captions_that_fill_the_context_keep_their_end() -> None:
    tokenizer = WordTokenizer(["a", *(f"w{i}" for i in range(8))], [f"w{i}" for i in range(8)], context=6)
    captions = ["a", "a a a", "a a a a a a a a"] * 3
    run = Protection(
        TensorSource(STRIPS.images[:9], captions),
        tokenizer,
        partial(SmallDualEncoder, len(tokenizer), tokenizer.eot, width=32),
        method=Method.parse("mem-2"),
        settings=TINY,
    )
    run.round(0)
    published = run.published_captions(torch.arange(9))
    assert all(p.endswith(c) for p, c in zip(published, captions, strict=True))
    read = tokenizer.encode(published)
    assert read.shape == (9, 6)
    assert (read == tokenizer.eot).sum(1).eq(1).all()
    with pytest.raises(ValueError, match="room for a caption in 6"):
        Protection(run.source, tokenizer, FACTORY, method=Method.parse("mem-4"), settings=TINY)


@pytest.mark.parametrize("compat", [False, True])
def test_an_embedding_taller_than_the_vocabulary_gives_no_triggers_without_a_word(compat: bool) -> None:
    """As checkpoints have it whose rows were padded to a round number; the padding would be chosen first."""

    def padded() -> SmallDualEncoder:
        model = SmallDualEncoder(len(TOKENIZER) + 40, TOKENIZER.eot, width=32, dim=32)
        with torch.no_grad():
            model.embedding_matrix[len(TOKENIZER) :] *= 1000
        return model

    settings = replace(TINY, compat=compat, restart=0, **({"trigger_words": None} if compat else {}))
    run = Protection(
        TensorSource(STRIPS.images, STRIPS.captions), TOKENIZER, padded, method=Method.parse("mem-2"), settings=settings
    )
    before = run.triggers.clone()
    run.round(0)
    assert (run.triggers != before).any()
    assert int(run.triggers.max()) < len(TOKENIZER)
    assert len(run.published_captions(torch.arange(len(STRIPS.captions)))) == len(STRIPS.captions)


def test_a_loss_that_is_not_finite_is_no_protection() -> None:
    class Broken(SmallDualEncoder):
        def encode_image(self, images: torch.Tensor) -> torch.Tensor:
            return super().encode_image(images) * float("nan")

    run = make()
    run.worker.factory = partial(Broken, len(TOKENIZER), TOKENIZER.eot, width=32, dim=32)
    with pytest.raises(FloatingPointError, match="nothing was protected"):
        run.round(0)


def test_a_foreign_noise_store_is_refused() -> None:
    with pytest.raises(ValueError, match="noise_store: expected int8 with 20 rows"):
        make(noise_store=NoiseStore(19, STRIPS.images.shape[1:]))
