"""What cannot be unlearned is refused in one sentence, and what looks odd but can be is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.models.fusion import FusionModel
from ccu_fast.unlearn import Budget, HeldOut, UnlearnConfig, unlearn
from ccu_fast.unlearn.parameters import salient
from tests.support.toy_unlearn import TwoTowers, make_model, toy, weights

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = UnlearnConfig(forget="instances", budget=Budget(steps=2, batch=8))
DATA = toy(40)
SETS = DATA[DATA.ids < 6], DATA[DATA.ids >= 6]
NEW = toy(12, seed=5)


def new(visual: Tensor = NEW.visual, labels: Tensor | None = NEW.labels) -> PairedData:
    return PairedData(visual, NEW.other, labels, NEW.ids + 1000)  # type: ignore[arg-type]


class FusedOnly(nn.Module):
    """A model whose one head sees both modalities."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()

    def embed_visual(self, visual: Tensor) -> Tensor:
        return self.inner.embed_visual(visual)

    def embed_other(self, other: Tensor) -> Tensor:
        return self.inner.embed_other(other)

    def classify_fused(self, visual: Tensor, other: Tensor) -> Tensor:
        return self.inner.classify_fused(visual, other)


class ReadyOther(nn.Module):
    """A model whose other embeddings come ready."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(DATA.visual.shape[1], DATA.other.shape[1])

    def embed_visual(self, visual: Tensor) -> Tensor:
        return F.normalize(self.tower(visual), dim=-1)

    def embed_other(self, other: Tensor) -> Tensor:
        return F.normalize(other, dim=-1)


@pytest.mark.parametrize("forget", ["instances", "pairs"])
def test_embeddings_of_no_parameter_are_kept(forget: str) -> None:
    model = ReadyOther()
    clean = unlearn(model, *SETS, replace(SHORT, forget=forget))
    assert not torch.equal(clean.tower.weight, model.tower.weight)


@pytest.mark.parametrize(
    ("unseen", "message"),
    [
        (new(NEW.visual[:, :-1]), r"unseen: expected visual inputs like those of forget, float32 \[N, \d+\], got"),
        (new(NEW.visual.double()), r"unseen: expected visual inputs like those of forget, .*, got float64"),
        (new(labels=NEW.labels + 9), "unseen: expected classes of forget and retain, got class"),
    ],
)
def test_unseen_items_of_another_kind(unseen: PairedData, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unlearn(make_model(), *SETS, SHORT, unseen=unseen)


def test_unseen_items_that_are_views_of_a_thing_to_forget() -> None:
    near = PairedData(NEW.visual, NEW.other, NEW.labels, NEW.ids * 100 + 1)  # ids of their own, but for group=100
    assert not torch.isin(near.ids[1:], DATA.ids).any()
    fresh = near[near.ids > 1]
    unlearn(make_model(), *SETS, SHORT, unseen=fresh)
    forget, retain = (PairedData(part.visual, part.other, part.labels, part.ids * 100) for part in SETS)
    with pytest.raises(
        ValueError, match=r"unseen: expected no item of a thing of forget, got 5 of them \(first id 101\)"
    ):
        unlearn(make_model(), forget, retain, replace(SHORT, group=100), unseen=fresh)
    unlearn(make_model(), forget, retain, SHORT, unseen=fresh)


@pytest.mark.parametrize("side", ["visual", "other"])
def test_unseen_items_with_a_gap(side: str) -> None:
    inputs = {"visual": NEW.visual.clone(), "other": NEW.other.clone()}
    inputs[side][3, 1] = torch.nan
    inputs[side][7, 0] = torch.inf
    gap = PairedData(**inputs, labels=NEW.labels, ids=NEW.ids + 1000)
    message = rf"unseen: expected finite numbers as {side}, got NaN or infinity in 2 items \(first id 1003\)"
    with pytest.raises(ValueError, match=message):
        unlearn(make_model(), *SETS, SHORT, unseen=gap)


class Ids(nn.Module):
    """A model whose visual inputs are token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.other = nn.Embedding(9, 6), nn.Linear(DATA.other.shape[1], 6)

    def embed_visual(self, visual: Tensor) -> Tensor:
        return F.normalize(self.visual(visual).mean(1), dim=-1)

    def embed_other(self, other: Tensor) -> Tensor:
        return F.normalize(self.other(other), dim=-1)


def test_token_ids_have_no_neighbours() -> None:
    parts = [PairedData(part.ids[:, None] % 9, part.other, part.labels, part.ids) for part in (*SETS, new())]
    config = replace(SHORT, neighbours=0.5)
    message = "neighbours: expected 0 for visual inputs of int64, which have no nearness, got 0.5"
    with pytest.raises(ValueError, match=message):
        unlearn(Ids(), *parts[:2], config, unseen=parts[2])
    for weight in (None, 0.0):
        unlearn(Ids(), *parts[:2], replace(SHORT, neighbours=weight), unseen=parts[2])


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (Ids, {}, "unseen: expected items never trained on, because visual inputs of int64 cannot be blended"),
        (make_model, {"group": 1000}, "retain: expected items of at least two things, got one"),
        (make_model, {"trainable": ("tower.*",)}, "trainable: expected patterns of parameter names"),
        (make_model, {"trainable": ("other_*",)}, 'keep: expected keep="trained"'),
    ],
)
def test_what_no_run_can_do_is_refused_before_any_is_begun(
    model: Any, config: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget, retain = SETS
    if model is Ids:
        forget, retain = (PairedData(part.ids[:, None] % 9, part.other, part.labels, part.ids) for part in SETS)
    monkeypatch.setattr("ccu_fast.unlearn.method.run", lambda *_, **__: pytest.fail("the work began"))
    with pytest.raises(ValueError, match=message):
        unlearn(model(), forget, retain, replace(SHORT, **config))


@pytest.mark.parametrize(
    ("model", "held_out", "error", "message"),
    [
        (make_model, NEW, TypeError, "held_out: expected a HeldOut, got PairedData"),
        (make_model, HeldOut(5, 0.5), TypeError, "held_out: expected a PairedData, got int"),  # type: ignore[arg-type]
        (make_model, HeldOut(new(labels=None), 0.5), ValueError, "held_out: expected labels as in forget, got none"),
        (make_model, HeldOut(new(NEW.visual[:, :-1]), 0.5), ValueError, "held_out: expected visual inputs like"),
        (FusedOnly, HeldOut(new(), 0.5), ValueError, "held_out: expected None for a model with heads but none for"),
    ],
)
def test_held_out_items_that_cannot_tell_when_to_stop(model: Any, held_out: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        unlearn(model(), *SETS, replace(SHORT, early_stop=True), held_out=held_out)


def test_labels_that_the_heads_lack_are_refused_for_pairs_too() -> None:
    forget, retain = (PairedData(part.visual, part.other, part.labels + 5, part.ids) for part in SETS)
    with pytest.raises(ValueError, match=r"model: expected .* logits from classify_visual"):
        unlearn(make_model(), forget, retain, replace(SHORT, forget="pairs"))


def test_a_head_of_one_class() -> None:
    parts = [PairedData(part.visual, part.other, torch.zeros_like(part.labels), part.ids) for part in SETS]
    model = FusionModel(DATA.visual.shape[1], DATA.other.shape[1], classes=1)
    with pytest.raises(ValueError, match=r"model: expected \[N, 2 or more\] logits from classify_visual"):
        unlearn(model, *parts, SHORT)


def test_pairs_need_another_thing_to_be_told_from() -> None:
    config = replace(SHORT, forget="pairs", group=100)
    bare = [PairedData(part.visual, part.other, ids=part.ids) for part in SETS]
    with pytest.raises(ValueError, match="retain: expected items of another thing too"):
        unlearn(TwoTowers(), *bare, config, unseen=new(labels=None))


def test_dampening_leaves_weights_alone_that_may_not_change() -> None:
    model = make_model()
    forget, retain = DATA[DATA.labels == 1], DATA[DATA.labels != 1]
    mask = salient(model, forget, 0.1)
    clean = unlearn(model, forget, retain, replace(SHORT, forget="class", saliency=0.1, dampen=1.01))
    new = dict(clean.named_parameters())
    assert all(torch.equal(new[name][~mask[name]], old[~mask[name]]) for name, old in model.named_parameters())
    assert not torch.equal(weights(clean), weights(model))


def test_pairs_of_which_only_some_have_labels() -> None:
    forget, retain = SETS
    bare = PairedData(retain.visual, retain.other, ids=retain.ids)
    with pytest.raises(ValueError, match="retain: expected labels as in forget, got none"):
        unlearn(make_model(), forget, bare, replace(SHORT, forget="pairs"))


class WholeOther(nn.Module):
    """A model that is called for the other modality, with a buffer of its own and a parameter of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(DATA.visual.shape[1], 6), nn.BatchNorm1d(6))
        self.other = nn.Linear(DATA.other.shape[1], 6)
        self.levels = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
        self.register_buffer("size", torch.ones(6))

    def forward(self, other: Tensor) -> Tensor:
        return F.normalize(self.other(other) * self.size, dim=-1)

    def embed_visual(self, visual: Tensor) -> Tensor:
        return F.normalize(self.visual(visual), dim=-1)

    def embed_other(self, other: Tensor) -> Tensor:
        return self(other)


def test_what_is_kept_of_a_layer_is_not_kept_of_its_parts() -> None:
    model = WholeOther()
    clean = unlearn(model, *SETS, replace(SHORT, forget="pairs"))
    assert not torch.equal(clean.visual[1].running_mean, model.visual[1].running_mean)
    assert torch.equal(clean.embed_other(DATA.other), model.embed_other(DATA.other))
