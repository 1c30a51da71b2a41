"""What an unseen item would be to a model: log-odds, levels, stand-ins, nearness."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.models.fusion import FusionModel
from ccu_fast.unlearn import Budget, UnlearnConfig, unlearn, unseen
from ccu_fast.unlearn.loop import Batch, embed
from ccu_fast.unlearn.method import CcuStep
from ccu_fast.unlearn.study.tasks import TrainConfig
from ccu_fast.unlearn.study.train import train
from ccu_fast.unlearn.unseen import Levels, class_log_odds, comparable, nearest, sample, stand_ins
from tests.support import toy_unlearn
from tests.support.toy_unlearn import CLASSES, INPUTS, TwoTowers, pairs, toy, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def at(data: PairedData, first: int) -> PairedData:
    return PairedData(data.visual, data.other, data.labels if data.labelled else None, data.ids + first)


NEW = at(toy(40, seed=3), 1000)


@pytest.fixture(scope="module")
def model() -> FusionModel:
    return copy.deepcopy(toy_unlearn.trained()).eval().requires_grad_(False)


class TestLogOdds:
    def test_equal_the_log_of_p_over_the_rest(self) -> None:
        g = torch.Generator().manual_seed(0)
        logits = (3 * torch.randn(50, 7, dtype=torch.float64, generator=g)).requires_grad_()
        labels = torch.randint(7, (50,), generator=g)
        p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
        plain, ours = (p / (1 - p)).log(), class_log_odds(logits, labels)
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(*(torch.autograd.grad(v.sum(), logits)[0] for v in (ours, plain)))

    def test_are_finite_where_p_rounds_to_one(self) -> None:
        logits = torch.tensor([[200.0, 0.0, 0.0], [-200.0, 0.0, 0.0]], requires_grad=True)
        ours = class_log_odds(logits, torch.zeros(2, dtype=torch.long))
        torch.testing.assert_close(ours.detach(), torch.tensor([200.0, -200.0]) - np.log(2.0).item())
        (gradient,) = torch.autograd.grad(ours.sum(), logits)
        torch.testing.assert_close(gradient, torch.tensor([[1, -0.5, -0.5]] * 2))


def plain_levels(of_forget: Tensor, fresh: Tensor) -> Tensor:
    """By numpy: a tie, an item's with itself too, counts as half below."""
    a = of_forget.detach().double().numpy()
    share = ((a[None] < a[:, None]).sum(1) + (a[None] <= a[:, None]).sum(1)) / (2 * a.size)
    return torch.from_numpy(np.quantile(fresh.detach().double().numpy(), share))


def levels_of(
    model: nn.Module, forget: PairedData, retain: PairedData, fresh: PairedData | None, group: int = 1
) -> Levels:
    return Levels(model, forget, retain, *embed(model, forget), fresh, group=group, seed=0)


def all_of(levels: Levels, model: nn.Module) -> Tensor:
    return levels.of(model, torch.arange(len(levels.rank)))


class TestLevels:
    def test_are_quantiles_of_unseen_items_at_the_ranks_among_the_items_to_forget(self, model: FusionModel) -> None:
        forget, retain = toy_unlearn.split("instances")
        levels = levels_of(model, forget, retain, NEW)
        found = [class_log_odds(model.classify_visual(model.embed_visual(d.visual)), d.labels) for d in (forget, NEW)]
        expected = plain_levels(*found)
        torch.testing.assert_close(all_of(levels, model), expected.float(), rtol=1e-5, atol=1e-5)
        rows = torch.tensor([4, 0, 9])
        torch.testing.assert_close(levels.of(model, rows), expected[rows].float(), rtol=1e-5, atol=1e-5)
        assert not levels.of(model, rows).requires_grad

    def test_of_equal_items_are_equal(self, model: FusionModel) -> None:
        class Told(Levels):
            """The log-odds are the first number of the input: equal ones are so to the bit."""

            def log_odds(self, model: Any, visual: Tensor, other: Tensor, data: PairedData) -> Tensor:
                return data.visual[:, 0]

        forget, retain = toy_unlearn.split("instances")
        twice = torch.cat([torch.arange(8), torch.tensor([3, 5])])
        forget = PairedData(forget.visual[twice], forget.other[twice], forget.labels[twice])
        levels = Told(model, forget, retain, *embed(model, forget), NEW, group=1, seed=0)
        expected = plain_levels(forget.visual[:, 0], NEW.visual[:, 0])
        assert expected[3] == expected[8] and expected[5] == expected[9] and expected.unique().numel() == 8
        torch.testing.assert_close(all_of(levels, model), expected.float(), rtol=1e-5, atol=1e-5)

    def test_move_with_the_model_unless_they_are_of_stand_ins(self, model: FusionModel) -> None:
        forget, retain = toy_unlearn.split("instances")
        changed = copy.deepcopy(model).train()
        with torch.no_grad():
            changed.visual_head.weight.mul_(0.3)
            changed.visual_tower[0].weight.mul_(0.7)
        rows = torch.arange(len(forget))
        live, still = (levels_of(model, forget, retain, u) for u in (NEW, None))
        assert torch.equal(still.of(changed, rows), still.of(model, rows))
        assert torch.equal(still.of(model, rows), still.at_start.double().quantile(still.rank).float())
        fresh = class_log_odds(changed.classify_visual(changed.embed_visual(NEW.visual)), NEW.labels).detach()
        expected = torch.from_numpy(np.quantile(fresh.double().numpy(), live.rank.numpy()))
        torch.testing.assert_close(live.of(changed, rows), expected.float(), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(live.of(changed, rows), live.of(model, rows), atol=0.1)
        assert changed.training

    def test_are_of_the_dtype_of_the_model(self, model: FusionModel) -> None:
        double = copy.deepcopy(model).double()
        sets = [toy_unlearn.double(part) for part in (*toy_unlearn.split("instances"), NEW)]
        for new in (sets[2], None):
            levels = levels_of(double, *sets[:2], new)
            assert levels.at_start.dtype == levels.of(double, torch.arange(3)).dtype == torch.float64

    @pytest.mark.parametrize("group", [1, 4])
    def test_pairs_are_told_from_the_partners_of_other_things(self, group: int) -> None:
        model = toy_unlearn.trained_on_pairs()
        data, fresh = pairs(), pairs(seed=5, first=1000)
        gone = torch.arange(80) % (2 * group) == 0  # with groups, views of a thing are in both sets
        forget, retain = data[gone], data[~gone]
        levels = levels_of(model, forget, retain, fresh, group)
        assert not levels.by_class
        found = []
        for part in (forget, retain, fresh):
            visual, other = embed(model, part)
            keys = embed(model, retain)[1]
            s = model.scale * visual @ keys.T
            same = part.ids[:, None] // group == retain.ids[None] // group
            own = model.scale * (visual * other).sum(1)
            found.append(own - s.masked_fill(same, -torch.inf).logsumexp(1))
            torch.testing.assert_close(levels.log_odds(model, visual, other, part), found[-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            all_of(levels, model), plain_levels(found[0], found[2]).float(), rtol=1e-3, atol=1e-2
        )

    def test_a_ceiling_is_one_quantile_for_all_that_moves_with_the_model(self) -> None:
        model, data, fresh = toy_unlearn.trained_on_pairs(), pairs(), pairs(seed=5, first=1000)
        forget, retain = data[:20], data[20:]
        levels = Levels(model, forget, retain, *embed(model, forget), fresh, group=1, seed=0, ceiling=0.3)
        now = levels.log_odds(model, *embed(model, fresh), fresh)
        found = all_of(levels, model)
        assert found.unique().numel() == 1
        torch.testing.assert_close(found[0].double(), now.double().quantile(0.3), rtol=1e-4, atol=1e-4)

    def test_a_class_has_none(self) -> None:
        with pytest.raises(ValueError, match=r"ceiling: expected none for a class, .* got 0.4"):
            UnlearnConfig(ceiling=0.4)

    def test_what_is_below_a_ceiling_is_pulled_up_weakly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, data, fresh = toy_unlearn.trained_on_pairs(), pairs(), pairs(seed=5, first=1000)
        forget, retain = data[:20], data[20:]
        changed = copy.deepcopy(model).requires_grad_(True)
        batch = Batch(forget, retain, torch.arange(20), torch.arange(len(retain)), 0, 1)
        alone = UnlearnConfig(forget="pairs", retention=0, separation=0, task=0)

        def pull(ceiling: float | None) -> Tensor:
            step = CcuStep(replace(alone, ceiling=ceiling), model, forget, retain, 0, unseen=fresh)
            changed.zero_grad()
            step(changed, batch).backward()
            return torch.cat([p.grad.flatten() for p in changed.visual.parameters() if p.grad is not None])

        own = levels_of(model, forget, retain, fresh).log_odds(model, *embed(model, forget), forget)
        for far, weight in ((float(own.min()) - 1, 1.0), (float(own.max()) + 1, 0.2)):
            with monkeypatch.context() as patch:
                patch.setattr(Levels, "of", lambda self, model, rows, far=far: torch.full((len(rows),), far))
                expected = pull(None)
                assert expected.any()
                torch.testing.assert_close(pull(0.5), weight * expected)

    def test_partners_and_samples_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("UNSEEN", "PARTNERS"):
            monkeypatch.setattr(unseen, name, 7)
        data = pairs()
        levels = levels_of(toy_unlearn.trained_on_pairs(), data[:5], data[5:], pairs(seed=5, first=99))
        assert len(levels.keys) == len(levels.key_ids) == len(levels.unseen) == 7
        assert len(levels.rank) == 5

    def test_a_gradient_reaches_the_visual_tower_only(self) -> None:
        model, data = copy.deepcopy(toy_unlearn.trained_on_pairs()), pairs()
        levels = levels_of(model, data[:5], data[5:], None)
        other = model.embed_other(data[:5].other).detach()
        levels.log_odds(model, model.embed_visual(data[:5].visual), other, data[:5]).sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.visual.parameters())
        assert all(p.grad is None for p in model.other.parameters())


class TestStandIns:
    def test_are_halfway_to_the_nearest_of_another_thing(self) -> None:
        data = at(toy(30), 50)
        made = stand_ins(data, 11, group=5, seed=2)
        some = sample(data, 11, 2)
        assert len(made) == 11 and torch.equal(made.ids, some.ids)
        assert torch.equal(made.other, some.other) and torch.equal(made.labels, some.labels)
        z = F.normalize(data.visual - data.visual.mean(0), dim=1)
        for i in range(11):
            own = int(data.ids.tolist().index(some.ids[i]))
            s = z[own] @ z.T
            s[data.ids // 5 == some.ids[i] // 5] = -2
            torch.testing.assert_close(made.visual[i], (data.visual[own] + data.visual[s.argmax()]) / 2)
        assert torch.equal(made.visual, stand_ins(data, 11, group=5, seed=2).visual)
        assert not torch.equal(made.ids, stand_ins(data, 11, group=5, seed=3).ids)
        assert torch.equal(data.visual, toy(30).visual)  # the items themselves are not touched

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float64])
    def test_keep_their_dtype(self, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(0)
        pictures = torch.randint(256, (12, 3, 4, 4), generator=g).to(dtype)
        made = stand_ins(PairedData(pictures, torch.zeros(12, 2)), 12, group=1, seed=0)
        assert made.visual.dtype == dtype and made.visual.shape == pictures.shape
        assert not torch.equal(made.visual, pictures)
        far = nearest(pictures, pictures, torch.arange(12), torch.arange(12))
        mean = (pictures.double() + pictures[far].double()) / 2
        assert (made.visual.double() - mean).abs().max() <= 0.5

    def test_bad_input_is_named(self) -> None:
        words = torch.randint(9, (12, 4))
        assert comparable(words.byte()) and comparable(words.half()) and not comparable(words)
        message = r"unseen: expected items never trained on, because visual inputs of int64 cannot be blended"
        with pytest.raises(ValueError, match=message):
            stand_ins(PairedData(words, torch.zeros(12, 2)), 4, group=1, seed=0)
        with pytest.raises(ValueError, match="retain: expected items of at least two things, got one"):
            stand_ins(toy(12), 4, group=12, seed=0)

        class Words(TwoTowers):
            def embed_visual(self, visual: Tensor) -> Tensor:
                return super().embed_visual(visual.float())

        data = pairs()
        data = PairedData(data.visual.mul(10).long(), data.other)
        config = UnlearnConfig(forget="pairs", budget=Budget(steps=2))
        with pytest.raises(ValueError, match=message):
            unlearn(Words(), data[:9], data[9:60], config)
        assert unlearn(Words(), data[:9], data[9:60], config, unseen=data[60:]) is not None


class TestNearest:
    @pytest.mark.parametrize("things", [False, True])
    def test_equals_brute_force(self, things: bool) -> None:
        g = torch.Generator().manual_seed(1)
        x, y = torch.randn(9, 2, 3, 4, generator=g) + 5, torch.randn(15, 2, 3, 4, generator=g) + 5
        thing, of_y = torch.arange(9) % 3, torch.arange(15) % 3
        mean = y.mean(0)
        expected = []
        for i in range(9):
            a = (x[i] - mean).flatten()
            best = [
                -2.0
                if things and thing[i] == of_y[j]
                else float(F.cosine_similarity(a, (y[j] - mean).flatten(), dim=0))
                for j in range(15)
            ]
            expected.append(int(np.argmax(best)))
        assert nearest(x, y, *((thing, of_y) if things else ())).tolist() == expected
        assert nearest(x.mul(10).add(500).byte(), y.mul(10).add(500).byte()).shape == (9,)

    def test_of_wide_inputs_evenly_spread_numbers_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(unseen, "FEATURES", 3)
        g = torch.Generator().manual_seed(1)
        x, y = torch.randn(9, 11, generator=g), torch.randn(15, 11, generator=g)
        a, b = (z[:, [0, 5, 10]] - y[:, [0, 5, 10]].mean(0) for z in (x, y))
        expected = F.cosine_similarity(a[:, None], b[None], dim=2).argmax(1)
        assert torch.equal(nearest(x, y), expected)

    def test_inputs_are_of_one_shape(self) -> None:
        with pytest.raises(ValueError, match="y: expected shape"):
            nearest(torch.zeros(2, 3), torch.zeros(2, 4))


def test_a_sample_is_the_same_for_the_same_seed_and_in_order() -> None:
    data, state = toy(50), torch.random.get_rng_state()
    one, two, other = (sample(data, 12, seed) for seed in (3, 3, 4))
    assert torch.equal(one.ids, two.ids) and not torch.equal(one.ids, other.ids)
    assert len(one.ids.unique()) == 12 and bool((one.ids.diff() > 0).all())
    assert torch.equal(one.visual, data.visual[one.ids])
    assert torch.equal(sample(data, 99, 3).ids, data.ids)
    assert torch.equal(torch.random.get_rng_state(), state)


class TestTheEnd:
    def test_a_forgotten_pair_is_as_likely_as_an_unseen_one(self) -> None:
        model, data, fresh = toy_unlearn.trained_on_pairs(), pairs(), pairs(200, seed=5, first=1000)
        gone = torch.arange(80) % 5 == 0
        forget, retain = data[gone], data[~gone]
        config = UnlearnConfig(forget="pairs", budget=Budget(steps=80, learning_rate=5e-3, batch=40))
        clean = unlearn(model, forget, retain, config, unseen=fresh[:100])

        def mean(m: nn.Module, part: PairedData) -> float:
            return levels.log_odds(m, *embed(m, part), part).mean().item()

        levels = levels_of(model, forget, retain, fresh[:100])
        new = fresh[100:]  # nor were these seen by the unlearning
        before = mean(model, forget) - mean(model, new)
        after = mean(clean, forget) - mean(clean, new)
        assert before > 5
        assert abs(after) < 0.3 * before

    def test_a_forgotten_instance_is_as_sure_as_an_unseen_one(self) -> None:
        # Labels that only memory can know.
        g = torch.Generator().manual_seed(0)
        labels = torch.randint(CLASSES, (360,), generator=g)
        data = PairedData(*torch.randn(2, 360, INPUTS, generator=g), labels)
        known, fresh, new = data[:60], data[60:160], data[160:]

        def make() -> FusionModel:
            return FusionModel(INPUTS, INPUTS, CLASSES, hidden=64, embedding=16)

        model = train(make, known, TrainConfig(epochs=150, batch=20, learning_rate=1e-2)).model
        forget, retain = known[:15], known[15:]
        clean = unlearn(model, forget, retain, UnlearnConfig(forget="instances"), unseen=fresh)

        def middle(m: FusionModel, part: PairedData) -> float:
            return class_log_odds(m.classify_visual(m.embed_visual(part.visual)), part.labels).median().item()

        sure, unsure = (middle(model, part) - middle(model, new) for part in (forget, retain))
        assert min(sure, unsure) > 4
        after = middle(clean, forget) - middle(clean, new)
        assert -0.25 * sure < after < 0.5 * sure
        assert middle(clean, retain) - middle(clean, new) > 0.5 * unsure


class TestCheck:
    def test_bad_unseen_items_are_named(self, model: FusionModel) -> None:
        model = copy.deepcopy(model).requires_grad_(True)
        forget, retain = toy_unlearn.split("instances")
        config = UnlearnConfig(forget="instances", budget=Budget(steps=2))
        unlabelled = PairedData(NEW.visual, NEW.other, ids=NEW.ids)
        for error, message, given in (
            (ValueError, r"unseen: expected no item of forget, got 12 of them \(first id 0\)", toy(12, seed=1)),
            (ValueError, r"unseen: expected no item of retain, got 3 of them \(first id 20\)", at(toy(3, seed=1), 20)),
            (ValueError, r"unseen: expected labels as in forget, got none", unlabelled),
            (ValueError, r"unseen: expected at least one item", NEW[:0]),
            (TypeError, r"unseen: expected a PairedData, got Tensor", NEW.visual),
        ):
            with pytest.raises(error, match=message):
                unlearn(model, forget, retain, config, unseen=given)
        pair = [PairedData(d.visual, d.other, ids=d.ids) for d in (forget, retain)]
        with pytest.raises(ValueError, match=r"unseen: expected no labels as in forget, got some"):
            unlearn(TwoTowers(), *pair, replace(config, forget="pairs"), unseen=NEW)
        one, two = (unlearn(model, forget, retain, config, unseen=u) for u in (NEW, None))
        assert not torch.equal(weights(one), weights(two))
