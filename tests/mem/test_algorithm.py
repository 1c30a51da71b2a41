"""MEM: triggers, noise, generator, victim and the whole experiment at a tiny size."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ccu_fast import TokenTable, info_nce
from ccu_fast.data.strips import StripSet, load_strips
from ccu_fast.mem import triggers as triggers_of
from ccu_fast.mem.config import Method, Settings
from ccu_fast.mem.noise import pgd, random_noise, within_pixels
from ccu_fast.mem.protection import Protected, protect
from ccu_fast.mem.study import STRANGERS, run_digit_strips
from ccu_fast.mem.surrogate import batches, fresh, frozen, generator, optimizer_for, pixels
from ccu_fast.mem.tokenizer import NEUTRAL, SPECIAL, WordTokenizer
from ccu_fast.mem.triggers import encode_many, improve_triggers, insert_triggers, random_triggers, trim
from ccu_fast.mem.victim import Recipe, train_victim
from ccu_fast.models.dual_encoder import SmallDualEncoder

TOKENIZER = WordTokenizer.for_strips()
FACTORY = partial(SmallDualEncoder, len(TOKENIZER), TOKENIZER.eot, width=32, dim=32)
TINY = Settings(rounds=2, trigger_rounds=1, surrogate_steps=3, pgd_steps=2, candidates=3, batch=16)


@pytest.fixture(scope="module")
def strips() -> StripSet:
    return load_strips(33, 8)[0]


def loss_of(model: SmallDualEncoder, images: Tensor, tokens: Tensor) -> float:
    with torch.no_grad():
        return info_nce(model.encode_image(images), model.encode_text(tokens), scale=model.scale).item()


def add_noise(images: Tensor, noise: Tensor) -> Tensor:
    """uint8 + int8 → uint8; no pixel may leave 0..255."""
    total = images.short() + noise.short()
    assert total.min() >= 0 and total.max() <= 255
    return total.to(torch.uint8)


class TestTokenizer:
    def test_vocabulary(self) -> None:
        assert len(NEUTRAL) == len(set(NEUTRAL)) >= 380
        assert len(TOKENIZER.trigger_ids) == len(NEUTRAL)
        assert TOKENIZER.allowed().sum() == len(NEUTRAL)
        assert not TOKENIZER.allowed()[: len(SPECIAL)].any()

    def test_every_word_survives_decode_and_encode_beside_every_kind_of_neighbour(self) -> None:
        ids = torch.arange(len(SPECIAL), len(TOKENIZER))
        for shift in (1, 57):
            tokens = torch.stack([torch.full_like(ids, 1), ids, ids.roll(shift), torch.full_like(ids, 2)], 1)
            assert torch.equal(TOKENIZER.encode(TOKENIZER.decode(tokens)), tokens)

    def test_padding_and_trim(self) -> None:
        tokens = TOKENIZER.encode(["zero one", "a photo of the digits"])
        assert tokens.shape == (2, 7)
        assert tokens[0, 3] == TOKENIZER.eot
        assert (tokens[0, 4:] == TOKENIZER.pad).all()
        assert trim(tokens[:1], TOKENIZER.eot).shape == (1, 4)
        assert TOKENIZER.decode(tokens) == ["zero one", "a photo of the digits"]

    @pytest.mark.parametrize(
        ("captions", "error", "message"),
        [
            ("zero one", TypeError, "captions: expected a sequence"),
            (["zero", "  "], ValueError, "index 1"),
            (["a photo of xylophone"], ValueError, "'xylophone'"),
            (["a <eot> zero"], ValueError, "'<eot>'"),
        ],
    )
    def test_bad_captions(self, captions: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            TOKENIZER.encode(captions)

    @pytest.mark.parametrize(
        ("words", "triggers"), [(["a", "a"], []), (["a b"], []), ([""], []), (["a"], ["b"]), (["<pad>"], [])]
    )
    def test_bad_vocabulary(self, words: list[str], triggers: list[str]) -> None:
        with pytest.raises(ValueError, match="expected"):
            WordTokenizer(words, triggers)


class TestNoise:
    @pytest.mark.parametrize("eps", [1, 8])
    def test_minimising_stays_within_its_limits_and_lowers_the_loss(self, strips: StripSet, eps: int) -> None:
        model = fresh(FACTORY, 0, "test")
        tokens = TOKENIZER.encode(strips.captions)
        text = model.encode_text(tokens)
        start = torch.zeros_like(strips.images, dtype=torch.int8)
        noise = pgd(model, strips.images, start, text, eps=eps, step=1, steps=12)[0]
        assert noise.dtype == torch.int8
        assert noise.short().abs().max() == eps
        protected = add_noise(strips.images, noise)  # raises if a pixel left 0..255
        assert torch.equal(protected.short() - strips.images.short(), noise.short())
        before, after = (loss_of(model, pixels(x), tokens) for x in (strips.images, protected))
        assert after < before - 0.01 * eps

    def test_each_step_may_have_its_own_text(self, strips: StripSet) -> None:
        model = fresh(FACTORY, 0, "test")
        text = model.encode_text(TOKENIZER.encode(strips.captions))
        start = torch.zeros_like(strips.images, dtype=torch.int8)
        same = pgd(model, strips.images, start, text, eps=4, step=1, steps=3)[0]
        listed = pgd(model, strips.images, start, text.expand(3, -1, -1), eps=4, step=1, steps=3)[0]
        assert torch.equal(same, listed)

    def test_the_features_that_come_back_are_of_the_noise_before_the_last_step(self, strips: StripSet) -> None:
        model = fresh(FACTORY, 0, "test")
        text = model.encode_text(TOKENIZER.encode(strips.captions))
        start = torch.zeros_like(strips.images, dtype=torch.int8)
        before, _ = pgd(model, strips.images, start, text, eps=4, step=1, steps=2)
        _, image = pgd(model, strips.images, start, text, eps=4, step=1, steps=3)
        assert image is not None and not image.requires_grad
        assert torch.equal(image, model.encode_image(pixels(add_noise(strips.images, before))))
        assert pgd(model, strips.images, start, text, eps=4, step=1, steps=0)[1] is None

    def test_no_step_and_no_budget_change_nothing(self, strips: StripSet) -> None:
        model = fresh(FACTORY, 0, "test")
        text = model.encode_text(TOKENIZER.encode(strips.captions))
        start = within_pixels(strips.images, random_noise(strips.images.shape, 3, generator(0, "n")))
        assert torch.equal(pgd(model, strips.images, start, text, eps=3, step=1, steps=0)[0], start)
        zero = torch.zeros_like(start)
        assert torch.equal(pgd(model, strips.images, zero, text, eps=0, step=1, steps=2)[0], zero)

    def test_random_noise_fills_its_range_and_gives_valid_pixels(self, strips: StripSet) -> None:
        noise = within_pixels(strips.images, random_noise(strips.images.shape, 8, generator(0, "n")))
        add_noise(strips.images, noise)
        assert noise.min() == -8
        assert noise.max() == 8

    def test_frozen_gives_back_what_it_took(self) -> None:
        model = fresh(FACTORY, 0, "test")
        model.log_scale.requires_grad_(False)
        with pytest.raises(KeyboardInterrupt), frozen(model):
            assert not any(p.requires_grad for p in model.parameters())
            raise KeyboardInterrupt
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["log_scale"]

    def test_an_optimiser_step_makes_no_copy_of_a_weight(self) -> None:
        """One operator for all weights of a group, whatever their number."""
        model = fresh(FACTORY, 0, "test")
        optimizer = optimizer_for(model, 1e-3, 0.2)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()  # creates the moments
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts["aten::_fused_adamw_"] == 2
        assert not counts.keys() & {"aten::addcmul_", "aten::sqrt", "aten::lerp_", "aten::addcdiv_"}


class TestTriggers:
    def test_many_captions_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = fresh(FACTORY, 1, "test").double()
        words = TOKENIZER.decode(TOKENIZER.trigger_ids[:40][None])[0].split()
        tokens = TOKENIZER.encode([" ".join(words[i : i + 1 + i * 7 % 5]) for i in range(23)])
        whole = model.encode_text(tokens)
        widths: list[tuple[int, ...]] = []
        encode = model.encode_text
        monkeypatch.setattr(model, "encode_text", lambda ids: widths.append(tuple(ids.shape)) or encode(ids))
        monkeypatch.setattr(triggers_of, "_PART_BYTES", 30 * 4 * model.embedding_matrix.shape[1] * 8)
        assert torch.allclose(encode_many(model, tokens, TOKENIZER.eot), whole, rtol=1e-12, atol=1e-12)
        assert len(widths) > 1 and sum(rows for rows, _ in widths) == 23
        assert all(rows == 1 or rows * length <= 30 for rows, length in widths)
        assert len({length for _, length in widths}) > 1

    def improve(self, strips: StripSet, length: int, **options: Any) -> tuple[SmallDualEncoder, Tensor, Tensor, Tensor]:
        model = fresh(FACTORY, 1, "test")
        captions = TOKENIZER.encode(strips.captions)
        start = random_triggers(len(strips), length, TOKENIZER.trigger_ids[None], generator(0, "t"))
        tokens = insert_triggers(captions, start, TOKENIZER)
        with torch.no_grad():
            image = model.encode_image(pixels(strips.images))
        options = {"allowed": TOKENIZER.allowed(), "candidates": 6} | options
        tables = [TokenTable(model.embedding_matrix.detach(), allowed=options.pop("allowed"))]
        triggers, losses = improve_triggers(model, image, tokens, length, tables=tables, eot=TOKENIZER.eot, **options)
        assert all(p.requires_grad and p.grad is None for p in model.parameters())
        return model, tokens, insert_triggers(captions, triggers, TOKENIZER), losses

    def test_loss_never_rises_and_is_the_loss_of_what_is_returned(self, strips: StripSet) -> None:
        model, before, after, losses = self.improve(strips, 3)
        assert losses.shape == (4,)
        assert (losses.diff() <= 0).all()
        assert losses[-1] < losses[0] - 0.01
        images = pixels(strips.images)
        assert losses[0].item() == pytest.approx(loss_of(model, images, before), rel=1e-5)
        assert losses[-1].item() == pytest.approx(loss_of(model, images, after), rel=1e-5)
        assert TOKENIZER.allowed()[after[:, 1:4]].all()
        assert torch.equal(after[:, 4:], before[:, 4:])

    def test_each_row_gets_its_own_best_word(self, strips: StripSet) -> None:
        allowed = torch.zeros(len(TOKENIZER), dtype=torch.bool)
        words = TOKENIZER.trigger_ids[::40]
        allowed[words] = True
        model, before, after, losses = self.improve(strips, 1, allowed=allowed, candidates=len(words))
        assert losses[1] < losses[0]
        images = pixels(strips.images)
        for row in range(0, len(strips), 5):
            options = torch.cat([before[row, 1:2], words])
            trials = []
            for word in options:
                tokens = before.clone()
                tokens[row, 1] = word
                trials.append(loss_of(model, images, tokens))
            chosen = trials[options.tolist().index(after[row, 1].item())]
            assert chosen <= trials[0]
            assert chosen <= min(trials) + 1e-6

    def test_triggers_survive_decode_and_encode_in_their_captions(self, strips: StripSet) -> None:
        _, _, after, _ = self.improve(strips, 2)
        assert torch.equal(TOKENIZER.encode(TOKENIZER.decode(after)), after)


class TestProtect:
    def run(self, strips: StripSet, name: str, seed: int = 0, **changes: Any) -> Protected:
        method, settings = Method.parse(name), replace(TINY, **changes)
        return protect(strips.images, strips.captions, TOKENIZER, FACTORY, method=method, settings=settings, seed=seed)

    @pytest.mark.parametrize(
        "name",
        ["clean", "random", "random-2", "text-noise", "em", "mem", "mem-5", "trigger-1", "uap", "tap", "tap-targeted"],
    )
    def test_what_each_method_changes(self, strips: StripSet, name: str) -> None:
        made = self.run(strips, name)
        method = Method.parse(name)
        assert made.triggers.shape == (33, method.triggers)
        assert torch.equal(made.images, add_noise(strips.images, made.noise))
        size = int(made.noise.short().abs().max())
        # Two rounds of two steps of 1/255 are all that noise can have moved; a universal one moves with every batch.
        assert size == {"none": 0, "random": 8, "words": 8, "universal": 8}.get(method.noise, 4)
        for published, caption in zip(made.captions, strips.captions, strict=True):
            words = published.split()
            assert " ".join(words[method.triggers :]) == caption
            assert set(words[: method.triggers]) <= set(NEUTRAL)
        expected = insert_triggers(TOKENIZER.encode(strips.captions), made.triggers, TOKENIZER)
        assert torch.equal(TOKENIZER.encode(made.captions), expected)
        assert len(made.losses["surrogate"]) == (0 if not method.generates else 1 if method.attacks_clean_model else 2)
        assert len(made.losses["triggers"]) == (1 if method.generates and method.triggers else 0)

    def test_noise_passes_lower_the_surrogates_loss(self, strips: StripSet) -> None:
        steps = self.run(strips, "em", pgd_steps=6, surrogate_steps=1)
        none = self.run(strips, "em", pgd_steps=0, surrogate_steps=1)
        assert steps.losses["noise"][0] < none.losses["noise"][0] - 0.05

    def test_every_row_is_protected(self, strips: StripSet) -> None:
        # 33 rows in batches of 16 leave one over, which InfoNCE alone could not move.
        assert (self.run(strips, "em").noise.flatten(1).abs().amax(1) > 0).all()

    def test_deterministic_and_without_side_effects(self, strips: StripSet) -> None:
        state = torch.get_rng_state()
        a, b, c = self.run(strips, "mem"), self.run(strips, "mem"), self.run(strips, "mem", seed=1)
        assert torch.equal(state, torch.get_rng_state())
        assert torch.equal(a.noise, b.noise)
        assert a.captions == b.captions
        assert a.losses == b.losses
        assert not torch.equal(a.noise, c.noise)
        assert a.captions != c.captions

    def test_restart_makes_a_new_surrogate(self, strips: StripSet) -> None:
        a, b = self.run(strips, "em", restart=1), self.run(strips, "em")
        assert a.losses["surrogate"][0] == b.losses["surrogate"][0]
        assert a.losses["surrogate"][1] != b.losses["surrogate"][1]

    def test_bad_input(self, strips: StripSet) -> None:
        common = {"method": Method.parse("mem"), "settings": TINY}
        with pytest.raises(ValueError, match="captions: expected 33 strings"):
            protect(strips.images, strips.captions[:5], TOKENIZER, FACTORY, **common)
        with pytest.raises(TypeError, match="images: expected dtype uint8"):
            protect(pixels(strips.images), strips.captions, TOKENIZER, FACTORY, **common)
        with pytest.raises(ValueError, match="images: expected at least 2"):
            protect(strips.images[:1], strips.captions[:1], TOKENIZER, FACTORY, **common)
        few = WordTokenizer([*dict.fromkeys(" ".join(strips.captions).split()), "acorn"], triggers=["acorn"])
        with pytest.raises(ValueError, match="at least 3 trigger words"):
            protect(strips.images, strips.captions, few, FACTORY, **common)

    @pytest.mark.parametrize("name", ["mem-0", "mem-", "clean-2", "em-3", "tap-3", "", None, "mem-100"])
    def test_unknown_method(self, name: Any) -> None:
        with pytest.raises(ValueError, match="method: expected"):
            Method.parse(name)

    @pytest.mark.parametrize(
        "settings",
        [{"eps": -1}, {"eps": 128}, {"step": 0}, {"rounds": 0}, {"shuffle": 1.5}, {"lr": float("nan")}, {"batch": 1}],
    )
    def test_bad_settings(self, settings: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(settings))):
            Settings(**settings)


class TestVictim:
    def test_learns_its_training_data_and_depends_on_the_seed_alone(self, strips: StripSet) -> None:
        tokens = TOKENIZER.encode(strips.captions)
        seen = []

        def train(seed: int, epochs: int, **options: Any) -> Any:
            return train_victim(
                strips.images,
                tokens,
                FACTORY,
                lambda m: {"scale": m.scale.item()},
                eot=TOKENIZER.eot,
                recipe=Recipe(epochs=epochs, batch=11),
                seed=seed,
                **options,
            )

        long = train(0, 30, progress=lambda *call: seen.append(call))
        assert len(long.curve) == len(long.train_loss) == 30
        assert long.train_loss[-1] < 0.5 * long.train_loss[0]
        a, b, c = train(0, 4), train(0, 4), train(1, 4)
        assert (a.train_loss, a.curve) == (b.train_loss, b.curve)
        assert a.train_loss != c.train_loss
        assert [call[:3] for call in seen] == [("victim", i, 30) for i in range(31)]

    def test_bad_input(self, strips: StripSet) -> None:
        with pytest.raises(ValueError, match="tokens: expected one row for each"):
            train_victim(strips.images, torch.ones(3, 4, dtype=torch.int64), FACTORY, lambda m: {}, eot=2)
        with pytest.raises(ValueError, match="epochs"):
            Recipe(epochs=0)

    @pytest.mark.parametrize(("n", "sizes"), [(33, [16, 17]), (34, [16, 16, 2]), (5, [5]), (16, [16]), (17, [17])])
    def test_batches_leave_nobody_alone_and_nobody_out(self, n: int, sizes: list[int]) -> None:
        parts = batches(n, 16, generator(0, "b"))
        assert [len(p) for p in parts] == sizes
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(n))


def test_the_experiment_twice_is_the_same_and_is_json(tmp_path: Any) -> None:
    tiny = {
        "methods": ("clean", "random", "em", "mem-2"),
        "settings": TINY,
        "recipe": Recipe(epochs=2, batch=16),
        "n_train": 33,
        "n_test": 12,
        "width": 32,
    }
    calls: list[tuple[str, int, int, str]] = []
    state = torch.get_rng_state()
    first = run_digit_strips(0, progress=lambda *call: calls.append(call), out=tmp_path / "out", **tiny)
    assert torch.equal(state, torch.get_rng_state())
    text = json.dumps(first, allow_nan=False)
    assert text == json.dumps(run_digit_strips(0, **tiny))
    another = run_digit_strips(1, **{**tiny, "methods": ("clean", "mem-2")})["methods"]
    assert all(another[name] != first["methods"][name] for name in another)

    assert list(first["methods"]) == ["clean", "random", "em", "mem-2"]
    for name, m in first["methods"].items():
        assert m["last"]["epoch"] == len(m["curve"]) == len(m["train_loss"]) == 2
        assert m["best"]["i2t_r1"] + m["best"]["t2i_r1"] >= m["last"]["i2t_r1"] + m["last"]["t2i_r1"]
        assert (m["prefixed"] is None) == (name != "mem-2")
        assert m["transfer"] == {}
        assert m["robustness"] == {}
        assert m["noise"]["eps_255"] == {"clean": 0, "random": 8}.get(name, 4)
        example = m["examples"][0]
        total = torch.tensor(example["clean"]) + torch.tensor(example["noise"])
        assert torch.equal(total, torch.tensor(example["protected"]))
        assert example["published"].endswith(example["caption"])
        assert (tmp_path / "out" / name / "captions.csv").exists()
    stages = dict.fromkeys(call[0] for call in calls)
    assert list(stages) == [
        "victim of clean",
        "victim of random",
        "protecting, em",
        "victim of em",
        "protecting, mem-2",
        "victim of mem-2",
    ]
    for stage in stages:
        done = [(d, t) for s, d, t, _ in calls if s == stage]
        assert done == [(i, done[0][1]) for i in range(done[0][1] + 1)]


def test_transfer_and_robustness_are_victims_of_their_own() -> None:
    tiny = {"settings": TINY, "recipe": Recipe(epochs=1, batch=16), "n_train": 33, "n_test": 12, "width": 32}
    result = run_digit_strips(0, ("mem-1",), transfer=STRANGERS, treatments=("blur", "no-trigger"), **tiny)
    measured = result["methods"]["mem-1"]
    assert list(measured["robustness"]) == ["blur", "no-trigger"]
    assert list(measured["transfer"]) == list(STRANGERS)
    for other in (*measured["transfer"].values(), *measured["robustness"].values()):
        assert other["last"]["epoch"] == other["best"]["epoch"] == 1
        assert other["last"]["i2t_medr"] >= 1
    with pytest.raises(ValueError, match="treatments"):
        run_digit_strips(0, ("mem-1",), treatments=("sharpen",), **tiny)
    with pytest.raises(ValueError, match="transfer"):
        run_digit_strips(0, ("mem-1",), transfer=("taller",), **tiny)


def test_the_experiment_refuses_bad_methods() -> None:
    with pytest.raises(ValueError, match="method: expected"):
        run_digit_strips(methods=("clean", "nonsense"))
    with pytest.raises(ValueError, match="methods: expected each method once"):
        run_digit_strips(methods=("em", "em"))
