"""Membership from text alone: found where members are planted, at chance where nothing was learned."""

from __future__ import annotations

import copy
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_score, recall_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.models.clip import OpenClipEncoder, TransformersClipEncoder
from ccu_fast.models.dual_encoder import SmallDualEncoder
from ccu_fast.unlearn.audit import TextMembership, gibberish_of, text_features, text_membership, told_apart
from ccu_fast.unlearn.audit.text_membership import _judged
from ccu_fast.unlearn.study.tasks import TrainConfig
from ccu_fast.unlearn.study.train import train
from tests.support import torchvision_stub
from tests.support.presence import absent
from tests.support.toy_unlearn import INPUTS, TwoTowers, make_model, toy, weights

MEMBERS, STRANGERS, GIBBERISH, PIXELS = 24, 24, 80, 16
NAMES = MEMBERS + STRANGERS + GIBBERISH


class Faces(TwoTowers):
    """Names, each a word of its own, and pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.other = (
            nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 32)) for inputs in (PIXELS, NAMES)
        )
        self.scale = 20.0


@cache
def knows_members() -> Faces:
    """Trained on the first names with a picture each; not to be changed."""
    pictures = torch.rand(MEMBERS, PIXELS, generator=torch.Generator().manual_seed(0))
    data = PairedData(pictures, torch.eye(NAMES)[:MEMBERS])
    model = train(Faces, data, TrainConfig(epochs=100, batch=MEMBERS, learning_rate=1e-2)).model
    assert isinstance(model, Faces)
    return model


def knows_nothing() -> Faces:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Faces().eval()


def starts(count: int, *shape: int, seed: int = 3) -> Tensor:
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def asked(model: Faces, **more: Any) -> TextMembership:
    """What text says of members and strangers, in this order."""
    texts, gibberish = torch.eye(NAMES).split([MEMBERS + STRANGERS, GIBBERISH])
    return text_membership(model, texts, gibberish, starts(4, PIXELS), **{"steps": 40, **more})


WHO = torch.arange(MEMBERS + STRANGERS) < MEMBERS


class TestPlanted:
    def test_members_are_found_by_name_alone(self) -> None:
        found = told_apart(asked(knows_members()), WHO)
        assert found["recall"] >= 0.9 and found["precision"] >= 0.85 and found["false_alarms"] <= 0.15  # type: ignore[operator]
        assert min(found["auc"], found["similarity_auc"]) > 0.95  # type: ignore[type-var, operator]

    def test_a_model_that_was_never_trained_tells_nothing(self) -> None:
        found = told_apart(asked(knows_nothing()), WHO)
        assert abs(found["recall"] - found["false_alarms"]) <= 0.15  # type: ignore[operator]
        assert abs(found["auc"] - 0.5) < 0.2 and abs(found["similarity_auc"] - 0.5) < 0.2  # type: ignore[operator]

    def test_the_same_call_says_the_same_and_leaves_the_model_as_it_was(self) -> None:
        model = copy.deepcopy(knows_members()).train()
        before = weights(model)
        one, two = asked(model), asked(model)
        for name in ("similarity", "spread", "votes", "score"):
            assert torch.equal(getattr(one, name), getattr(two, name))
        assert torch.equal(weights(model), before) and model.training and all(m.training for m in model.modules())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Spy(TwoTowers):
    """Remembers what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Tensor] = []

    def embed_visual(self, visual: Tensor) -> Tensor:
        self.shown.append(visual.detach().clone())
        return super().embed_visual(visual)


class TestFeatures:
    def test_they_are_those_of_a_search_one_by_one(self) -> None:
        torch.manual_seed(0)
        model = TwoTowers().double()
        texts, begin = toy(3).other.double(), starts(3, INPUTS).double()
        expected = []
        for text in texts:
            t, ends = model.embed_other(text[None])[0].detach(), []
            for start in begin:
                x = start.clone().requires_grad_()
                moved = torch.optim.Adam([x], lr=0.1)
                for _ in range(7):
                    moved.zero_grad()
                    (-(model.embed_visual(x[None])[0] @ t)).backward()
                    moved.step()
                    x.data.clamp_(0, 1)
                ends.append(model.embed_visual(x[None])[0].detach())
            z = torch.stack(ends)
            expected.append(torch.stack([(z @ t).mean(), (z - z.mean(0)).norm(dim=1).mean()]))
        for chunk in (1, 3, 7, 1000):
            found = text_features(model, texts, begin, steps=7, rate=0.1, chunk=chunk)
            torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-12)

    def test_memory_is_that_of_a_chunk_and_inputs_stay_in_bounds(self) -> None:
        model, done = Spy(), []
        texts, begin = toy(50).other, starts(4, INPUTS)
        text_features(
            model, texts, begin, steps=3, rate=1.0, bounds=(0.2, 0.6), chunk=19, progress=lambda *a: done.append(a)
        )
        assert {len(x) for x in model.shown} == {16, 8} and len(
            model.shown
        ) == 13 * 4  # 13 chunks of 4 texts, the end too
        for first, later in zip(model.shown[::4], model.shown[1::4], strict=True):
            assert torch.equal(first, begin.repeat(len(first) // 4, 1))
            assert later.min() >= 0.2 and later.max() <= 0.6
        assert done[-1][:3] == ("text membership", 200, 200)
        free = Spy()
        text_features(free, texts, begin, steps=3, rate=1.0, bounds=None)
        assert free.shown[-1].max() > 1

    def test_progress_is_of_gibberish_and_texts_together(self) -> None:
        told: list[int] = []
        totals = set()

        def progress(stage: str, done: int, total: int, note: str) -> None:
            told.append(done)
            totals.add(total)

        text_membership(
            make_model(), toy(6).other, toy(50).other, starts(2, INPUTS), steps=1, chunk=20, progress=progress
        )
        assert told == [20, 40, 60, 80, 100, 112] and totals == {112}

    def test_searching_brings_the_similarity_up(self) -> None:
        model = knows_members()
        short, long = (text_features(model, torch.eye(NAMES), starts(4, PIXELS), steps=n)[:, 0] for n in (1, 20))
        assert float((long - short).min()) > 0.05

    def test_half_precision_moves_inputs_in_fp32(self) -> None:
        # A bf16 input of 1 would stay where it is at steps of 0.001, less than half a unit in its last place.
        torch.manual_seed(0)
        model, text, begin = TwoTowers(), toy(2).other, torch.ones(2, INPUTS)
        gained = {}
        for dtype in (torch.float32, torch.bfloat16):
            given = model.to(dtype), text.to(dtype), begin.to(dtype)
            near, far = (text_features(*given, steps=steps, rate=1e-3, bounds=None)[:, 0] for steps in (1, 300))
            gained[dtype] = far - near
        assert gained[torch.float32].min() > 0.03 and (gained[torch.bfloat16] > gained[torch.float32] / 2).all()


class TestVotes:
    def test_a_text_unlike_gibberish_is_flagged_and_gibberish_is_not(self) -> None:
        """The model passes inputs on, so that what is asked for decides the features."""

        class Plain(nn.Module):
            def embed_visual(self, visual: Tensor) -> Tensor:
                return F.normalize(visual, dim=-1)

            embed_other = embed_visual

        rng = torch.Generator().manual_seed(0)
        gibberish, more = torch.cat([torch.randn(250, 8, generator=rng), torch.ones(250, 1)], 1).split([200, 50])
        plain = torch.zeros(10, 9)
        plain[:, -1] = -1  # outside what the search may reach
        found = text_membership(Plain(), torch.cat([more, plain]), gibberish, starts(3, 9), bounds=(0.1, 1))  # type: ignore[arg-type]
        assert found.votes.shape == (60, 4) and bool(found.flags[50:].all()) and found.flags[:50].double().mean() < 0.2
        assert (
            found.score[50:].min() > found.score[:50].quantile(0.9) and 0 < found.score.min() <= found.score.max() < 1
        )

    def test_contamination_is_the_share_of_gibberish_that_each_calls_an_anomaly(self) -> None:
        features = np.random.default_rng(0).normal(size=(400, 2))
        for share in (0.05, 0.3):
            votes, _ = _judged(features, features, share, 0)
            assert np.abs(votes.mean(0) - share).max() < 0.08

    def test_units_of_the_features_do_not_matter_and_equal_texts_rank_alike(self) -> None:
        rng = np.random.default_rng(0)
        known, asked = rng.normal(size=(100, 2)), 2 * rng.normal(size=(60, 2))
        one, other = (
            _judged(x * np.array(unit), y * np.array(unit), 0.1, 0)
            for unit in ((1, 1), (1, 64))
            for x, y in [(known, asked)]
        )
        assert 0 < one[0].mean() < 1 and np.array_equal(one[0], other[0])
        np.testing.assert_allclose(one[1], other[1], atol=0.02)
        assert _judged(known, np.ones((7, 2)), 0.1, 0)[1].tolist() == [0.5] * 7

    def test_most_detectors_decide(self) -> None:
        votes = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
        none = torch.zeros(4, dtype=torch.float64)
        assert TextMembership(none, none, votes, none).flags.tolist() == [True, False, False, True]

    def test_figures_are_scikit_learn_s(self) -> None:
        rng = np.random.default_rng(0)
        votes, who = rng.random((80, 4)) < 0.6, rng.random(80) < 0.4
        score, similarity = rng.random(80).round(1), rng.random(80)
        found = TextMembership(*map(torch.from_numpy, (similarity, similarity, votes, score)))
        flags, said = found.flags.numpy(), told_apart(found, torch.from_numpy(who))
        assert said == pytest.approx(
            {
                "precision": precision_score(who, flags),
                "recall": recall_score(who, flags),
                "false_alarms": flags[~who].mean(),
                "auc": roc_auc_score(who, score),
                "similarity_auc": roc_auc_score(who, similarity),
            }
        )
        nobody = TextMembership(found.similarity, found.spread, torch.zeros_like(found.votes), found.score)
        assert told_apart(nobody, torch.from_numpy(who))["precision"] is None


class TestGibberish:
    def test_every_feature_keeps_its_values_and_loses_the_others(self) -> None:
        first = torch.rand(500, generator=torch.Generator().manual_seed(0))
        items = torch.stack([first, first + 5], 1)[:, :, None]
        made = gibberish_of(items, 4000, seed=1)
        assert made.shape == (4000, 2, 1) and made.dtype == items.dtype
        for column in range(2):
            assert torch.isin(made[:, column], items[:, column]).all()
            torch.testing.assert_close(made[:, column].mean(), items[:, column].mean(), rtol=0, atol=0.03)
        assert abs(float(torch.corrcoef(made[:, :, 0].T)[0, 1])) < 0.06
        assert torch.equal(made, gibberish_of(items, 4000, seed=1))
        assert not torch.equal(made, gibberish_of(items, 4000, seed=2))

    def test_a_tokeniser_gets_random_strings(self) -> None:
        heard: list[str] = []

        def tokens(captions: list[str]) -> Tensor:
            heard.extend(captions)
            return torch.tensor([[len(caption)] for caption in captions])

        assert len(gibberish_of(tokens, 300)) == 300 and len(set(heard)) > 295
        words = [caption.split(" ") for caption in heard]
        assert {len(some) for some in words} == {1, 2, 3}
        assert {len(word) for some in words for word in some} == set(range(3, 10))
        assert set("".join(word for some in words for word in some)) == set("abcdefghijklmnopqrstuvwxyz")


@pytest.mark.parametrize("kind", ["open_clip", "transformers", "dual_encoder"])
def test_token_ids_and_pictures_of_a_clip(kind: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, side = clip(kind)
    rng = torch.Generator().manual_seed(0)

    def ids(count: int, length: int) -> Tensor:
        tokens = torch.randint(1, 40, (count, length), generator=rng)
        tokens[:, -1] = 49
        return tokens

    found = text_membership(model, ids(6, 8), ids(40, 7), starts(2, 3, *side), steps=2, chunk=32)
    assert found.votes.shape == (6, 4) and bool(found.similarity.isfinite().all())


def clip(kind: str) -> tuple[Any, tuple[int, int]]:
    if kind == "dual_encoder":
        return SmallDualEncoder(50, 49, channels=3, width=32, text_depth=1, dim=16), (16, 64)
    try:
        if kind == "open_clip":
            torchvision_stub.install()
            import open_clip

            vision = {"image_size": 16, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8}
            text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
            return OpenClipEncoder(open_clip.CLIP(16, vision, text)), (16, 16)  # type: ignore[arg-type]
        import transformers
    except ImportError:
        absent(kind, "not installed")
    from tests.support.transformers_models import clip as small

    return TransformersClipEncoder(small(transformers)[0]), (16, 16)


def bad(name: str) -> tuple[dict[str, Any], str]:
    nan = toy(50).other.index_fill(0, torch.tensor(2), torch.nan)
    return {
        "no text": ({"texts": toy(50).other[:0]}, r"texts: expected at least one text \[N, ...\], got shape \[0, 5\]"),
        "NaN": ({"texts": nan}, r"texts: expected finite values, got nan at index \[2, 0\]"),
        "NaN gibberish": ({"gibberish": nan}, r"gibberish: expected finite values, got nan"),
        "little": ({"gibberish": toy(39).other}, "gibberish: expected at least 40 texts, .* got 39"),
        "other form": ({"gibberish": torch.rand(50, 4)}, r"gibberish: expected shape \[1, 5\], got \[1, 4\]"),
        "other dtype": ({"gibberish": toy(50).other.double()}, "gibberish: expected dtype torch.float32"),
        "one gibberish": ({"gibberish": torch.ones(50, 5)}, "gibberish: expected texts that differ, got a similarity"),
        "one start": ({"starts": torch.rand(1, 5)}, "starts: expected at least 2 visual inputs, got 1"),
        "ints": ({"starts": torch.ones(2, 5, dtype=torch.uint8)}, "starts: expected dtype float16 or .*, got torch.ui"),
        "NaN start": ({"starts": torch.full((2, 5), torch.nan)}, "starts: expected finite values, got nan"),
        "steps": ({"steps": 0}, "steps: expected an int at least 1, got 0"),
        "rate": ({"rate": 0.0}, "rate: expected a finite number in"),
        "bounds": ({"bounds": (1.0, 0.0)}, r"bounds: expected the lower one first, got \(1.0, 0.0\)"),
        "share": ({"contamination": 0.6}, r"contamination: expected a finite number in \[0.001, 0.5\], got 0.6"),
        "chunk": ({"chunk": 0}, "chunk: expected an int at least 1, got 0"),
        "no towers": ({"model": nn.Linear(5, 5)}, "model: expected the methods embed_visual .* got a Linear without"),
        "two spaces": (
            {"model": Apart()},
            r"model: expected embed_visual and embed_other to share one space .*, 1\] and",
        ),
        "NaN model": ({"model": broken()}, "model: expected finite embeddings, got NaN or infinity"),
    }[name]


class Apart(TwoTowers):
    """Its visual embeddings, one number wide, would broadcast."""

    def embed_visual(self, visual: Tensor) -> Tensor:
        return super().embed_visual(visual)[:, :1]


def broken() -> nn.Module:
    model = make_model()
    nn.init.constant_(model.projector.bias, torch.nan)
    return model


NAMES_OF_BAD = (
    *("no text", "NaN", "NaN gibberish", "little", "other form", "other dtype", "one gibberish", "one start", "ints"),
    *("NaN start", "steps", "rate", "bounds", "share", "chunk", "no towers", "two spaces", "NaN model"),
)


@pytest.mark.parametrize("name", NAMES_OF_BAD)
def test_what_cannot_be_is_refused(name: str) -> None:
    change, message = bad(name)
    given = {"model": make_model(), "texts": toy(6).other, "gibberish": toy(50).other, "starts": starts(2, INPUTS)}
    with pytest.raises((TypeError, ValueError), match=message):
        text_membership(**{**given, "steps": 2, **change})


def test_gibberish_and_figures_are_refused_too() -> None:
    with pytest.raises(TypeError, match="texts: expected floating-point items or a tokeniser for token ids, got"):
        gibberish_of(torch.ones(4, 3, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match="texts: expected at least 2 items, got 1"):
        gibberish_of(torch.ones(1, 3), 5)
    with pytest.raises(ValueError, match="count: expected an int at least 1, got 0"):
        gibberish_of(torch.ones(4, 3), 0)
    none = torch.zeros(3, dtype=torch.float64)
    found = TextMembership(none, none, torch.zeros(3, 4, dtype=torch.bool), none)
    with pytest.raises(ValueError, match="members: expected members and others, got 3 of 3"):
        told_apart(found, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"members: expected shape \[3\], got \[2\]"):
        told_apart(found, torch.tensor([True, False]))


def test_scikit_learn_is_asked_for_before_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    model = Spy()
    with pytest.raises(ImportError, match=r"scikit-learn is needed .*pip install"):
        text_membership(model, toy(6).other, toy(50).other, starts(2, INPUTS))
    assert not model.shown
