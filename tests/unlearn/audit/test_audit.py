"""The audit: every metric where the right answer is known."""

from __future__ import annotations

import copy
import json
import math
from typing import ClassVar

import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.models.fusion import FusionModel
from ccu_fast.unlearn.audit import (
    auc,
    audit,
    average_gap,
    gaps,
    linear_probe,
    mean_figures,
    membership_auc,
    modified_entropy,
    over_seeds,
    recall,
    relearn_steps,
    worst_gap,
)
from ccu_fast.unlearn.audit.membership import confidence
from ccu_fast.unlearn.loop import answers
from tests.support.toy_unlearn import CLASSES, GONE, TwoTowers, make_model, split, toy, trained, weights


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TestMembership:
    def test_curves(self) -> None:
        one, two = normal(300, seed=1) + 0.7, normal(200, seed=2).round()  # rounded: ties
        truth, scores = [1] * 300 + [0] * 200, torch.cat([one.round(), two])
        assert auc(one.round(), two) == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
        assert auc(one, one) == 0.5 and auc(one + 10, two) == 1 and auc(one - 10, two) == 0
        assert auc(normal(40_000, seed=3) + 1, normal(40_000, seed=4)) == pytest.approx(
            norm.cdf(1 / math.sqrt(2)), abs=0.01
        )

    def test_modified_entropy_is_its_formula_and_not_the_common_slip(self) -> None:
        logits, labels = 3 * normal(50, 6), torch.arange(50) % 6
        p = logits.softmax(1)
        own = F.one_hot(labels, 6).bool()
        right = -((1 - p) * p.log())[own] - (p * (1 - p).log()).masked_fill(own, 0).sum(1)
        slip = -((1 - p) * p.log())[own] - (p * p.log()).masked_fill(own, 0).sum(1)
        ours = modified_entropy(logits, labels)
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(ours, slip, rtol=0.05)

    def test_modified_entropy_falls_with_the_true_probability_and_never_breaks(self) -> None:
        sure = torch.tensor([[40.0, 0.0, 0.0], [800.0, -800.0, 0.0]])
        right, wrong = modified_entropy(sure, torch.tensor([0, 0])), modified_entropy(sure, torch.tensor([1, 1]))
        assert torch.isfinite(right).all() and torch.isfinite(wrong).all()
        assert (right < 1e-10).all() and (wrong > 70).all()
        # p_y from 0 to 1, the rest shared out evenly: the score must fall all the way.
        p = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
        logits = torch.stack([p, (1 - p) / 2, (1 - p) / 2], 1).log()
        assert (modified_entropy(logits, torch.zeros(200, dtype=torch.long)).diff() < 0).all()
        with pytest.raises(ValueError, match="labels"):
            modified_entropy(sure, torch.tensor([0]))

    def test_both_attacks_see_what_was_memorised_and_nothing_else(self) -> None:
        data = toy()
        wrong = PairedData(data.visual, data.other, (data.labels + 1) % CLASSES)
        for attack in ("confidence", "entropy"):
            assert membership_auc(trained(), data, wrong, attack=attack) > 0.95
            assert membership_auc(trained(), data, data, attack=attack) == 0.5
        with pytest.raises(ValueError, match="attack"):
            membership_auc(trained(), data, data, attack="guess")

    def test_confidence_is_the_log_odds(self) -> None:
        data = toy()
        p = trained().classify_visual(trained().embed_visual(data.visual)).double().softmax(1)
        own = p[torch.arange(len(data)), data.labels]
        torch.testing.assert_close(
            confidence(answers(trained(), data)), own.log() - (1 - own).log(), rtol=1e-6, atol=1e-6
        )

    def test_pairs_are_attacked_by_their_cosine(self) -> None:
        torch.manual_seed(0)
        model, data = TwoTowers(), toy()
        pairs = PairedData(data.visual, data.other)
        cosine = F.cosine_similarity(model.embed_visual(data.visual), model.embed_other(data.other))
        torch.testing.assert_close(confidence(answers(model, pairs)), cosine.double(), rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="'entropy'"):
            membership_auc(model, pairs, pairs, attack="entropy")


class Fixed(nn.Module):
    """A model with heads whose visual embedding is whatever it is given."""

    def __init__(self, inner: FusionModel, blind_to: int | None = None) -> None:
        super().__init__()
        self.inner, self.blind_to = inner, blind_to

    def embed_visual(self, visual: Tensor) -> Tensor:
        if self.blind_to is None:
            return visual
        # Everything of that class lands where class 0 is: nothing a probe could find.
        label = visual[:, -1:]
        return torch.where(label == self.blind_to, visual[:1].expand_as(visual) * 0, visual)

    def embed_other(self, other: Tensor) -> Tensor:
        return other


class TestProbe:
    def parts(self, noise: float = 0.1) -> dict[str, PairedData]:
        """Embeddings one-hot in the class plus noise; class 1 is forgotten."""

        def some(items: int, seed: int) -> PairedData:
            labels = torch.arange(items) % CLASSES
            z = F.one_hot(labels, CLASSES).float() + noise * normal(items, CLASSES, seed=seed).float()
            return PairedData(z, z, labels, torch.arange(items) + 1000 * seed)

        train, test = some(120, 1), some(80, 2)
        gone, gone_test = train.labels == GONE, test.labels == GONE
        return {
            "forget": train[gone], "retain": train[~gone],
            "retain_test": test[~gone_test], "forget_test": test[gone_test],
        }  # fmt: skip

    def test_finds_what_the_features_hold_whatever_the_heads_say(self) -> None:
        found = linear_probe(Fixed(make_model()), **self.parts())
        assert found == {"forget": 1.0, "forget_vs_rest": 1.0, "retain": 1.0}
        # A head that never names the class changes nothing: the probe looks below it.
        head_only = copy.deepcopy(trained())
        with torch.no_grad():
            head_only.visual_head.bias[GONE] = -1e3
        data = toy()
        gone = data.labels == GONE
        call = {"forget": data[gone], "retain": data[~gone], "retain_test": data[~gone], "forget_test": data[gone]}
        assert linear_probe(head_only, **call) == linear_probe(trained(), **call)
        assert linear_probe(head_only, **call)["forget"] > 0.9

    def test_finds_nothing_in_noise(self) -> None:
        parts = self.parts()
        noise = {
            name: PairedData(normal(len(d), 3, seed=len(d)).float(), d.other, d.labels) for name, d in parts.items()
        }
        found = linear_probe(Fixed(make_model()), **noise)
        assert found["forget"] < 0.5 and 0.3 < found["forget_vs_rest"] < 0.7

    def test_instances_are_judged_by_a_probe_that_never_saw_them(self) -> None:
        parts = self.parts()
        data = PairedData(
            *(torch.cat([getattr(parts[n], k) for n in ("forget", "retain")]) for k in ("visual", "other", "labels"))
        )
        gone = torch.arange(len(data)) % 10 == 0
        flipped = PairedData(data.visual, data.other, torch.where(gone, (data.labels + 1) % CLASSES, data.labels))
        found = linear_probe(Fixed(make_model()), forget=flipped[gone], retain=flipped[~gone], retain_test=data)
        assert found == {"forget": 0.0, "forget_vs_rest": None, "retain": 1.0}

    def test_is_deterministic_and_leaves_the_model_alone(self) -> None:
        before = weights(trained())
        data = toy()
        call = {"forget": data[data.labels == GONE], "retain": data[data.labels != GONE], "retain_test": data}
        assert linear_probe(trained(), **call) == linear_probe(trained(), **call)
        assert torch.equal(weights(trained()), before)


class Scales(nn.Module):
    """Two classes on a pair of scales: logits (0, w · x). On x = (1, 0) forgetting and relearning move w[0] alone."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([weight, -50.0]))

    def embed_visual(self, x: Tensor) -> Tensor:
        return x

    def embed_other(self, x: Tensor) -> Tensor:
        return x

    def classify_visual(self, x: Tensor) -> Tensor:
        return torch.stack([torch.zeros(len(x)), x @ self.w], 1)


class TestRelearning:
    def test_counts_the_steps_of_a_way_one_can_measure(self) -> None:
        x = torch.eye(2).repeat_interleave(4, 0)
        forget = PairedData(x[:4], x[:4], torch.ones(4, dtype=torch.long))
        retain = PairedData(x[4:], x[4:], torch.zeros(4, dtype=torch.long), torch.arange(4) + 4)
        steps = [relearn_steps(Scales(w), forget, retain, learning_rate=0.01) for w in (0.5, -0.5, -1.0, -2.0)]
        # An Adam step is at most the learning rate long, and nearly so while the gradient hardly changes.
        assert steps[0] == 0
        for found, way in zip(steps[1:], (0.5, 1.0, 2.0), strict=True):
            assert way / 0.01 <= found <= 1.15 * way / 0.01

    def test_is_deterministic_and_changes_nothing(self) -> None:
        forget, retain = split()
        before = weights(trained())
        assert relearn_steps(trained(), forget, retain) == 0  # nothing was forgotten
        assert torch.equal(weights(trained()), before)
        torch.manual_seed(0)
        model = make_model().requires_grad_(False)
        one, two = (relearn_steps(model, forget, retain, learning_rate=1e-3, seed=4, batch=8) for _ in range(2))
        assert 0 < one == two < 1000
        assert not any(p.requires_grad for p in model.parameters())

    def test_stops_at_the_end_of_its_steps(self) -> None:
        forget, retain = split()
        torch.manual_seed(0)
        model = make_model()
        assert relearn_steps(model, forget, retain, level=1.0, learning_rate=1e-9, max_steps=7) == 7
        with pytest.raises(ValueError, match="level"):
            relearn_steps(model, forget, retain, level=0.0)
        with pytest.raises(ValueError, match="max_steps"):
            relearn_steps(model, forget, retain, max_steps=0)


class TestRetrieval:
    def pairs(self, visual: Tensor, other: Tensor, first: int = 0) -> PairedData:
        return PairedData(visual, other, ids=torch.arange(len(visual)) + first)

    def test_counts_places_in_both_directions(self) -> None:
        z = torch.eye(4)
        #        i0 finds t0 first; i1 finds t0 before t1; i2 has two before its own; i3 is right
        visual = torch.tensor([[1, 0, 0, 0], [2, 1, 0, 0], [3, 2, 1, 0], [0, 0, 0, 1]]).float()
        found = recall(Fixed(make_model()), self.pairs(visual, z), ks=(1, 2, 3))
        assert [found[f"i2t@{k}"] for k in (1, 2, 3)] == [0.5, 0.75, 1.0]
        # t0 has i2 and i1 before i0; t1 has i2 before i1; t2 and t3 are right
        assert [found[f"t2i@{k}"] for k in (1, 2, 3)] == [0.5, 0.75, 1.0]

    def test_one_point_for_everything_finds_nothing(self) -> None:
        same = torch.ones(20, 3)
        found = recall(Fixed(make_model()), self.pairs(same, same), ks=(1, 5, 20))
        assert found == {"i2t@1": 0, "i2t@5": 0, "i2t@20": 1, "t2i@1": 0, "t2i@5": 0, "t2i@20": 1}

    def test_the_candidates_decide_how_hard_it_is(self) -> None:
        z = F.normalize(normal(300, 8).float(), dim=1)
        noisy = F.normalize(z + 0.4 * normal(300, 8, seed=1).float(), dim=1)
        everyone = self.pairs(z, noisy)
        few = everyone[torch.arange(10)]
        model = Fixed(make_model())
        assert recall(model, few)["i2t@1"] > recall(model, few, among=everyone)["i2t@1"]
        ranks = (z @ noisy.T).argsort(1, descending=True)
        by_hand = (ranks[:10, :5] == torch.arange(10)[:, None]).any(1).double().mean().item()
        assert recall(model, few, among=everyone)["i2t@5"] == pytest.approx(by_hand)
        with pytest.raises(ValueError, match="id 0"):
            recall(model, few, among=everyone[torch.arange(5, 50)])


class TestSummaries:
    GOLD: ClassVar = {
        "visual": {"forget_train": 0.0, "forget_test": 0.0, "retain_train": 1.0, "retain_test": 0.9},
        "other": {"forget_train": 1.0, "forget_test": 0.9, "retain_train": 1.0, "retain_test": 0.9},
        "fused": {"forget_train": 0.0, "forget_test": 0.0, "retain_train": 1.0, "retain_test": 1.0},
        "mia_auc": 0.5,
    }

    def test_average_gap_is_in_points_over_thirteen_figures(self) -> None:
        assert average_gap(self.GOLD, self.GOLD) == 0
        off = copy.deepcopy(self.GOLD)
        off["visual"]["forget_train"] = 0.13
        assert average_gap(off, self.GOLD) == pytest.approx(1.0)
        off["mia_auc"] = 0.37
        assert average_gap(off, self.GOLD) == pytest.approx(2.0)
        off["fused"]["retain_test"] = 0.87  # below counts as above does
        assert average_gap(off, self.GOLD) == pytest.approx(3.0)
        instances = copy.deepcopy(self.GOLD)
        for modality in ("visual", "other", "fused"):
            instances[modality]["forget_test"] = None
        off = copy.deepcopy(instances)
        off["other"]["forget_train"] = 0.9
        assert average_gap(off, instances) == pytest.approx(1.0)
        with pytest.raises(ValueError, match="a figure that gold has too"):
            average_gap({}, self.GOLD)

    def test_the_worst_gap_is_not_averaged_away(self) -> None:
        off = copy.deepcopy(self.GOLD)
        assert worst_gap(off, self.GOLD)[0] == 0
        off["mia_auc"] = 0.55
        assert worst_gap(off, self.GOLD) == (pytest.approx(5.0), "mia_auc")
        off["visual"]["retain_test"] = 0.82  # below gold: the larger difference, whatever its sign
        assert worst_gap(off, self.GOLD) == (pytest.approx(8.0), "visual retain_test")
        assert average_gap(off, self.GOLD) == pytest.approx(1.0)
        with pytest.raises(ValueError, match="a figure that gold has too"):
            worst_gap({}, self.GOLD)

    def test_gaps_are_signed_and_leave_out_what_one_lacks(self) -> None:
        off = copy.deepcopy(self.GOLD)
        off["visual"]["retain_test"], off["other"]["forget_train"], off["mia_auc"] = 0.8, None, 0.75
        found = gaps(off, self.GOLD)
        assert len(found) == 12 and "other forget_train" not in found
        assert found.pop("visual retain_test") == pytest.approx(-10)
        assert found.pop("mia_auc") == pytest.approx(25)
        assert set(found.values()) == {0.0}

    def test_means_are_of_the_figures_alone(self) -> None:
        one, two = copy.deepcopy(self.GOLD), copy.deepcopy(self.GOLD)
        one["visual"]["forget_train"], two["visual"]["forget_train"] = 0.2, 0.4
        one["mia_auc"], two["fused"]["forget_test"], two["label"] = 0.7, None, "CCU"
        found = mean_figures([one, two])
        assert found["visual"]["forget_train"] == pytest.approx(0.3) and found["mia_auc"] == pytest.approx(0.6)
        assert found["fused"]["forget_test"] is None and set(found) == {"visual", "other", "fused", "mia_auc"}

    def test_over_seeds_leaves_out_what_each_seed_says_in_its_own_words(self) -> None:
        reports = [
            {
                "average_gap": 1.0,
                "worst_gap": {"points": 3.0, "figure": name},
                "verdict": {"kind": "passed", "text": name},
            }
            for name in ("mia_auc", "visual forget_train")
        ]
        assert over_seeds(reports) == {"average_gap": {"mean": 1.0, "spread": 0.0, "seeds": 2}}

    def test_over_seeds(self) -> None:
        reports = [{"a": {"x": 1.0, "none": None}, "label": "CCU"}, {"a": {"x": 3.0, "none": None}, "label": "CCU"}]
        whole = over_seeds(reports)
        assert whole == {
            "a": {"x": {"mean": 2.0, "spread": pytest.approx(math.sqrt(2)), "seeds": 2}, "none": None},
            "label": "CCU",
        }
        assert over_seeds(reports[:1])["a"]["x"] == {"mean": 1.0, "spread": None, "seeds": 1}
        json.dumps(over_seeds(reports[:1]), allow_nan=False)
        for broken in ([{"a": 1.0}, {"b": 1.0}], [{"a": 1.0}, {"a": None}], [{"a": "x"}, {"a": "y"}], []):
            with pytest.raises(ValueError, match="reports"):
                over_seeds(broken)


class TestWhole:
    def test_a_classifier(self) -> None:
        data = toy()
        gone = data.labels == GONE
        result = audit(
            trained(),
            forget=data[gone],
            retain=data[~gone],
            retain_test=data[~gone],
            forget_test=data[gone],
            deep=True,
        )
        json.dumps(result, allow_nan=False)
        assert result["mia_auc"] == result["mia_entropy_auc"] == 0.5  # the same items
        assert result["relearn_steps"] == 0 and result["probe"]["forget"] > 0.9
        assert "retrieval" not in result
        quick = audit(trained(), forget=data[gone], retain=data[~gone], retain_test=data[~gone])
        assert "probe" not in quick and quick["fused"]["forget_test"] is None
        assert quick["visual"]["retain_test"] == result["visual"]["retain_test"] > 0.95

    @pytest.mark.parametrize("empty", ["forget", "retain", "retain_test", "forget_test"])
    def test_an_empty_set_is_named(self, empty: str) -> None:
        data = toy()
        parts = dict.fromkeys(("forget", "retain", "retain_test", "forget_test"), data)
        with pytest.raises(ValueError, match=f"^{empty}: expected at least one item, got none"):
            audit(trained(), **{**parts, empty: data[data.labels < 0]})

    def test_pairs_without_labels(self) -> None:
        torch.manual_seed(0)
        data = toy()
        pairs = PairedData(data.visual, data.other)
        forget, retain = pairs[torch.arange(20)], pairs[torch.arange(20, 60)]
        model = TwoTowers()
        result = audit(model, forget=forget, retain=retain, retain_test=retain)
        json.dumps(result, allow_nan=False)
        assert result["mia_entropy_auc"] is None and "fused" not in result
        found = result["retrieval"]
        # Every input is there once, so that the partner is the pair's own half: recall finds the same.
        assert found["forget"] == recall(model, forget, among=pairs) != found["retain"]
        assert found["retain"] == recall(model, retain, among=pairs) and set(found) == {
            "forget",
            "retain",
            "retain_test",
        }
        assert found["retain_test"] == recall(model, retain)
        assert result["visual"]["forget_train"] == found["forget"]["i2t@1"]
        assert result["other"]["retain_test"] == found["retain_test"]["t2i@1"]

    def test_a_caption_of_two_pictures_is_right_for_each(self) -> None:
        torch.manual_seed(0)
        data = toy()
        twice = PairedData(data.visual, data.visual[torch.arange(60) // 2 * 2])
        forget, retain = twice[torch.arange(20)], twice[torch.arange(20, 60)]
        model = TwoTowers()
        model.other = model.visual
        result = audit(model, forget=forget, retain=retain, retain_test=retain)
        # Half of the pictures are their caption; by the number of the pair the other picture's caption ties with it.
        assert result["retrieval"]["retain"]["i2t@1"] >= 0.5 > recall(model, retain, among=twice)["i2t@1"]
