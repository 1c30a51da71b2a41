"""Two towers the other way around: captions forget, pictures stay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ccu_fast
from ccu_fast.models.swapped import Swapped
from ccu_fast.unlearn import method
from ccu_fast.unlearn.config import Budget, UnlearnConfig
from tests.support.toy_unlearn import TwoTowers, pairs, trained_on_pairs

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_other_modality_forgets_and_the_visual_one_is_kept_to_the_bit() -> None:
    data, unseen = pairs().swapped(), pairs(seed=1, first=1000).swapped()
    assert torch.equal(data.visual, pairs().other) and torch.equal(data.other, pairs().visual)
    assert torch.equal(data.swapped().visual, pairs().visual) and torch.equal(data.ids, pairs().ids)
    model = Swapped(trained_on_pairs())
    assert model.scale == trained_on_pairs().scale
    gone = data.ids < 10
    config = UnlearnConfig(forget="pairs", budget=Budget(steps=5))
    clean = ccu_fast.unlearn(model, data[gone], data[~gone], config, unseen=unseen)
    before, after = trained_on_pairs(), clean.model
    assert isinstance(after, TwoTowers)
    x = pairs()
    assert torch.equal(before.embed_visual(x.visual), after.embed_visual(x.visual))
    assert not torch.allclose(before.embed_other(x.other), after.embed_other(x.other), atol=1e-3)


def test_a_loss_without_weight_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> torch.Tensor:
        raise AssertionError

    monkeypatch.setattr(method, "task_loss", refused)
    data = pairs()
    gone = data.ids < 10
    config = UnlearnConfig(forget="pairs", task=0, budget=Budget(steps=2))
    ccu_fast.unlearn(trained_on_pairs(), data[gone], data[~gone], config, unseen=pairs(seed=1, first=1000))


def test_what_is_no_such_model_is_refused() -> None:
    with pytest.raises(TypeError, match="model: expected embed_visual and embed_other, got a Linear without embed_vis"):
        Swapped(nn.Linear(2, 2))
    with pytest.raises(AttributeError, match="nothing"):
        Swapped(trained_on_pairs()).nothing  # noqa: B018
