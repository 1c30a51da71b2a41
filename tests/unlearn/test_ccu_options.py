"""CCU beyond its three losses: heads, banks, pairs without labels, what may change, checkpoints."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ccu_fast
from ccu_fast.data.paired import PairedData
from ccu_fast.models.fusion import ConvFusionModel, FusionModel
from ccu_fast.unlearn import Budget, Checkpoint, HeldOut, KeyBank, UnlearnConfig, unlearn
from ccu_fast.unlearn.baselines.ssd import dampen
from ccu_fast.unlearn.loop import run
from ccu_fast.unlearn.method import CcuStep, Frozen, check_run, damage, run_ccu
from ccu_fast.unlearn.objective import (
    anchor_loss,
    forgetting_loss,
    level_loss,
    neighbour_loss,
    separation_loss,
    unclassify_loss,
)
from ccu_fast.unlearn.parameters import parameters_of_other, salient
from tests.support import toy_unlearn
from tests.support.forked import fork, kill_when
from tests.support.toy_unlearn import TwoTowers, accuracies, make_model, toy, weights

pytestmark = pytest.mark.usefixtures("one_thread")


def unit(rows: int, seed: int) -> Tensor:
    z = torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(z, dim=-1).requires_grad_()


@pytest.fixture(scope="module")
def trained() -> tuple[FusionModel, PairedData]:
    return toy_unlearn.trained(), toy()


def sets(data: PairedData) -> tuple[PairedData, PairedData]:
    return data[data.labels == 1], data[data.labels != 1]


class TestObjective:
    def test_anchor_equals_plain_torch(self) -> None:
        rows, frozen = unit(5, 1), unit(5, 2)
        loss = anchor_loss(rows, frozen)
        torch.testing.assert_close(loss, (1 - F.cosine_similarity(rows, frozen)).mean())
        one, two = torch.autograd.grad(loss, [rows, frozen], allow_unused=True)
        torch.testing.assert_close(one, -frozen.detach() / 5)
        assert two is None
        assert anchor_loss(rows[:0], frozen[:0]) == 0
        with pytest.raises(ValueError, match="frozen_rows"):
            anchor_loss(rows, frozen[:3])

    def test_neighbours_equal_plain_torch_and_only_u_learns(self) -> None:
        u, r = unit(5, 1), unit(5, 2)
        loss = neighbour_loss(u, r)
        torch.testing.assert_close(loss, sum(1 - u[i] @ r[i] for i in range(5)) / 5, rtol=1e-14, atol=0)
        one, two = torch.autograd.grad(loss, [u, r], allow_unused=True)
        torch.testing.assert_close(one, -r.detach() / 5, rtol=1e-14, atol=0)
        assert two is None
        assert neighbour_loss(u[:0], r[:0]) == 0 and neighbour_loss(r, r).abs() < 1e-15
        with pytest.raises(ValueError, match="neighbours"):
            neighbour_loss(u, r[:3])

    def test_unclassify_is_minus_log_of_the_rest_and_fades(self) -> None:
        logits = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        labels = torch.tensor([0, 1, 2, 3, 0, 1, 2])
        p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
        plain = -torch.log1p(-p).mean()
        ours = unclassify_loss(logits, labels)
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (ours, plain)), rtol=1e-11, atol=1e-14)
        gone = torch.tensor([[-40.0, 0.0, 0.0, 0.0]], requires_grad=True)
        loss = unclassify_loss(gone, torch.tensor([0]))
        assert torch.autograd.grad(loss, gone)[0].abs().max() < 1e-15
        with pytest.raises(ValueError, match="two classes"):
            unclassify_loss(logits[:, :1], labels)
        with pytest.raises(ValueError, match="labels"):
            unclassify_loss(logits, labels[:2])

    @pytest.mark.parametrize("width", [0.2, 1.5])
    def test_levels_equal_plain_torch_and_have_no_gradient(self, width: float) -> None:
        g = torch.Generator().manual_seed(0)
        now, levels = (torch.randn(40, dtype=torch.float64, generator=g).requires_grad_() for _ in range(2))
        d = now - levels.detach()
        plain = torch.where(d.abs() > width, d.abs() - width / 2, d.square() / (2 * width)).mean()
        ours = level_loss(now, levels, width=width)
        torch.testing.assert_close(ours, plain, rtol=1e-13, atol=0)
        got, none = torch.autograd.grad(ours, [now, levels], allow_unused=True)
        torch.testing.assert_close(got, (d / width).clamp(-1, 1).detach() / 40, rtol=1e-13, atol=1e-16)
        assert none is None
        at_level = torch.autograd.grad(level_loss(now, now.detach()), now)[0]
        assert not at_level.any()  # no further
        assert level_loss(now[:0], levels[:0]) == 0
        for dtype in (torch.float32, torch.bfloat16):
            live = now.detach().to(dtype).requires_grad_()
            loss = level_loss(live, levels)
            loss.backward()
            assert loss.dtype == live.grad.dtype == dtype

    def test_bad_levels_are_named(self) -> None:
        for error, message, arguments in (
            (ValueError, r"levels: expected shape \[3\]", {"levels": torch.zeros(2)}),
            (ValueError, r"log_odds", {"log_odds": torch.zeros(3, 1)}),
            (TypeError, r"levels", {"levels": 1.0}),
            (ValueError, r"width", {"width": 0.0}),
            (ValueError, r"width", {"width": math.nan}),
        ):
            with pytest.raises(error, match=message):
                level_loss(**{"log_odds": torch.zeros(3), "levels": torch.zeros(3), **arguments})

    @pytest.mark.parametrize("roles", ["labels", "ids"])
    def test_a_bank_is_more_keys(self, roles: str) -> None:
        u, r, u0, a0, b0, more = (unit(n, seed) for seed, n in enumerate((4, 6, 4, 4, 6, 9)))
        of_forget, of_retain = torch.tensor([0, 1, 2, 0]), torch.arange(20, 26)
        of_bank = torch.tensor([0, 0, 1, 5, 6, 7, 2, 30, 31])
        bank = KeyBank(more, of_bank, of_bank)
        keys = torch.cat([r, b0, a0, u0, more]).detach()
        columns = torch.cat([of_retain, of_retain, of_forget, of_forget, of_bank])
        s = 5.0 * u @ keys.T
        other = s.masked_fill(of_forget[:, None] == columns, -torch.inf)
        plain = (s.logsumexp(1) - other.logsumexp(1)).mean()
        ours = forgetting_loss(
            u,
            r,
            u0=u0,
            a0=a0,
            b0=b0,
            scale=5.0,
            bank=bank,
            **{f"forget_{roles}": of_forget, f"retain_{roles}": of_retain},
        )
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(v, u)[0] for v in (ours, plain)), rtol=1e-11, atol=1e-13)

    def test_banks_are_drawn_without_repetition(self) -> None:
        bank = KeyBank(unit(9, 0), torch.arange(9), torch.arange(9))
        drawn = bank.draw(4, seed=1)
        assert len(set(drawn.ids.tolist())) == 4 and torch.equal(drawn.keys, bank.keys[drawn.ids])
        assert not drawn.keys.requires_grad
        assert torch.equal(bank.draw(50, seed=1).ids, bank.ids)
        with pytest.raises(ValueError, match="labels"):
            KeyBank(unit(3, 0), torch.arange(2), torch.arange(3))

    def test_separation_without_labels(self) -> None:
        r, r0, u = unit(6, 1), unit(6, 2), unit(4, 3)
        p, q = 5.0 * r @ r0.detach().T, 5.0 * r @ u.T
        plain = (torch.cat([p, q + math.log(0.3)], 1).logsumexp(1) - p.diagonal()).mean()
        ours = separation_loss(r, r0, u, scale=5.0, weight=0.3, retain_ids=torch.arange(10, 16))
        for got, want in zip(torch.autograd.grad(ours, [r, u]), torch.autograd.grad(plain, [r, u]), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
        with pytest.raises(ValueError, match="neither"):
            separation_loss(r, r0, u, scale=1.0)


class TestWhatMayChange:
    def test_the_package_is_a_function_too(self, trained: tuple[FusionModel, PairedData]) -> None:
        forget, retain = sets(trained[1])
        config = UnlearnConfig(budget=Budget(steps=2))
        clean = ccu_fast.unlearn(trained[0], forget, retain, config)
        assert torch.equal(weights(clean), weights(unlearn(trained[0], forget, retain, config)))
        assert ccu_fast.unlearn.UnlearnConfig is UnlearnConfig
        with pytest.raises(AttributeError, match="nothing"):
            ccu_fast.nothing  # noqa: B018

    def test_only_parameters_of_the_patterns(self, trained: tuple[FusionModel, PairedData]) -> None:
        model, data = trained
        patterns = ("visual_tower.*", "projector.weight")
        config = UnlearnConfig(keep="trained", budget=Budget(steps=3), trainable=patterns)
        clean = unlearn(model, *sets(data), config)
        changed = {n for (n, p), q in zip(model.named_parameters(), clean.parameters(), strict=True) if (p != q).any()}
        assert changed == {n for n, _ in model.named_parameters() if n.startswith("visual_tower")} | {
            "projector.weight"
        }
        assert all(p.requires_grad for p in clean.parameters())
        with pytest.raises(ValueError, match=r"trainable.*'tower'"):
            unlearn(model, *sets(data), UnlearnConfig(trainable=("tower",)))
        with pytest.raises(TypeError, match="trainable"):
            UnlearnConfig(trainable="visual*")

    def test_saliency_opens_the_share_that_matters_most(self, trained: tuple[FusionModel, PairedData]) -> None:
        model, data = trained
        forget, retain = sets(data)
        mask = salient(model, forget, 0.25)
        total = sum(p.numel() for p in model.parameters())
        assert sum(int(m.sum()) for m in mask.values()) == round(0.25 * total)
        mine = copy.deepcopy(model)
        z = mine.embed_visual(forget.visual)
        fused = mine.classify_fused(z, mine.embed_other(forget.other))
        (F.cross_entropy(mine.classify_visual(z), forget.labels) + F.cross_entropy(fused, forget.labels)).backward()
        sizes = {n: torch.zeros(()) if p.grad is None else p.grad.abs() for n, p in mine.named_parameters()}
        least_open = min(sizes[n][m].min() for n, m in mask.items() if m.any())
        most_shut = max(sizes[n][~m].max() for n, m in mask.items() if (~m).any() and sizes[n].ndim)
        assert least_open >= most_shut * (1 - 1e-4)
        # In a run it is the share of what may change at all; dampening, too, keeps to it.
        own = copy.deepcopy(model)
        for name in parameters_of_other(model, forget):
            own.get_parameter(name).requires_grad_(False)
        mask = salient(own, forget, 0.25)
        assert sum(int(m.sum()) for m in mask.values()) == round(0.25 * sum(m.numel() for m in mask.values()))
        config = UnlearnConfig(budget=Budget(steps=4), saliency=0.25, dampen=1.5)
        clean = unlearn(model, forget, retain, config)
        for (name, old), new in zip(model.named_parameters(), clean.parameters(), strict=True):
            shut = ~mask[name] if name in mask else torch.ones_like(old, dtype=torch.bool)
            assert torch.equal(old[shut], new[shut])
        assert not torch.equal(weights(clean), weights(model))

    def test_dampening_damages_before_the_first_step(self, trained: tuple[FusionModel, PairedData]) -> None:
        model, data = trained
        damaged = copy.deepcopy(model)
        damage(UnlearnConfig(dampen=1.5), *sets(data), damaged)
        pairs = list(zip(model.parameters(), damaged.parameters(), strict=True))
        assert all(bool((new.abs() <= old.abs()).all()) for old, new in pairs)
        assert any(bool((new.abs() < old.abs()).any()) for old, new in pairs)
        assert accuracies(damaged, sets(data)[0])["visual"] < accuracies(model, sets(data)[0])["visual"]

    @pytest.mark.parametrize("kind", ["class", "instances"])
    def test_the_step_pulls_towards_where_the_items_that_look_most_alike_were(
        self, trained: tuple[FusionModel, PairedData], kind: str
    ) -> None:
        model, (forget, retain) = trained[0], toy_unlearn.split(kind)
        batch = toy_unlearn.one_batch(forget, retain)
        # Nearness is that of the inputs, whatever the model makes of them.
        a, b = (part.visual - retain.visual.mean(0) for part in (forget, retain))
        found = F.cosine_similarity(a[:, None], b[None], dim=2).argmax(1)
        live = copy.deepcopy(model)
        with torch.no_grad():
            live.visual_tower[0].weight.mul_(0.5)  # not where the frozen model has them
        losses = [
            CcuStep(UnlearnConfig(forget=kind, neighbours=w), model, forget, retain, seed=2)(live, batch)
            for w in (0.0, 2.0)
        ]
        u = live.embed_visual(batch.forget.visual)
        r = model.embed_visual(retain.visual[found[batch.forget_rows]]).detach()
        assert (live.embed_visual(retain.visual[:1]) - model.embed_visual(retain.visual[:1])).abs().max() > 1e-3
        torch.testing.assert_close(losses[1] - losses[0], 2 * (1 - (u * r).sum(1)).mean(), rtol=1e-4, atol=1e-6)

    def test_the_pull_is_for_a_class_and_for_inputs_that_measure_something(
        self, trained: tuple[FusionModel, PairedData]
    ) -> None:
        for kind, default in (("class", True), ("instances", False)):
            step = CcuStep(UnlearnConfig(forget=kind), trained[0], *toy_unlearn.split(kind), seed=0)
            assert (step.neighbour is not None) is default

        class Words(FusionModel):
            def embed_visual(self, visual: Tensor) -> Tensor:
                return super().embed_visual(visual.float())

        model = Words(toy_unlearn.INPUTS, toy_unlearn.INPUTS, toy_unlearn.CLASSES).eval().requires_grad_(False)
        tokens = [PairedData(part.visual.long(), part.other, part.labels, part.ids) for part in toy_unlearn.split()]
        assert CcuStep(UnlearnConfig(), model, *tokens, seed=0).neighbour is None
        with pytest.raises(ValueError, match="neighbours: expected 0 for visual inputs of int64"):
            check_run(model, *tokens, UnlearnConfig(neighbours=1.0))

    def test_one_at_a_time_or_many(self, trained: tuple[FusionModel, PairedData]) -> None:
        model, sides = trained[0], toy_unlearn.split("instances")
        names = [name for name, _ in model.named_parameters()]
        for at_once, alpha in ((1, 1.2), (5, 1.1)):
            importance = []
            for part in sides:
                # Of 12 items 5 at once are parts of 4; of 48, 10 parts.
                parts = torch.arange(len(part)).tensor_split(-(-len(part) // at_once))
                squares = [torch.zeros_like(p) for p in model.parameters()]
                for rows in parts:
                    z = model.embed_visual(part.visual[rows])
                    fused = model.classify_fused(z, model.embed_other(part.other[rows]))
                    y = part.labels[rows]
                    loss = F.cross_entropy(model.classify_visual(z), y) + F.cross_entropy(fused, y)
                    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
                    squares = [s if g is None else s + g.square() for s, g in zip(squares, found, strict=True)]
                importance.append((squares, len(parts)))
            (forget, n), (retain, m) = importance
            damaged = copy.deepcopy(model)
            dampen(damaged, *sides, alpha=alpha, at_once=at_once)
            count = 0
            for name, f, r in zip(names, forget, retain, strict=True):
                of_all, of_forget = (f + r) / (n + m), f / n
                selected = of_forget > alpha * of_all
                count += int(selected.sum())
                factor = torch.where(selected, (of_all / of_forget).clamp(max=1), 1.0)
                was, now = model.get_parameter(name), damaged.get_parameter(name)
                torch.testing.assert_close(now, was * factor, rtol=1e-4, atol=1e-6)
            assert count > 20

    def test_what_none_stands_for(self) -> None:
        for kind, pull, damping in (("class", 0.2, 8.0), ("instances", 0.0, 0.0), ("pairs", 0.0, 0.0)):
            config = UnlearnConfig(forget=kind)
            assert (config.used("neighbours"), config.used("dampen")) == (pull, damping)
            given = UnlearnConfig(forget=kind, neighbours=0.0, dampen=3.0)
            assert (given.used("neighbours"), given.used("dampen"), given.used("anchor")) == (0.0, 3.0, 0.0)

    def test_retained_items_stay_apart_each_at_its_place(self, trained: tuple[FusionModel, PairedData]) -> None:
        model, (forget, retain) = trained[0], toy_unlearn.split()
        batch = toy_unlearn.one_batch(forget, retain)
        live = copy.deepcopy(model)
        with torch.no_grad():
            live.visual_tower[0].weight.mul_(0.5)
        with_c, without = (
            CcuStep(UnlearnConfig(separation=w), model, forget, retain, seed=0)(live, batch) for w in (2.0, 0.0)
        )
        r, u, r0 = (
            m.embed_visual(part.visual)
            for m, part in ((live, batch.retain), (live, batch.forget), (model, batch.retain))
        )
        everything = torch.cat([5 * r @ r0.T, 5 * r @ u.T + math.log(0.1)], 1).logsumexp(1)
        plain = (everything - 5 * (r * r0).sum(1)).mean()
        torch.testing.assert_close(with_c - without, 2 * plain, rtol=1e-4, atol=1e-5)

    def test_the_heads_unlearn_the_class_where_it_is_and_where_it_was(
        self, trained: tuple[FusionModel, PairedData]
    ) -> None:
        model, (forget, retain) = trained[0], sets(trained[1])
        batch = toy_unlearn.one_batch(forget, retain)
        live = copy.deepcopy(model)
        with torch.no_grad():
            live.visual_tower[0].weight.mul_(0.5)
        with_a, without = (
            CcuStep(UnlearnConfig(forgetting=w), model, forget, retain, seed=0)(live, batch) for w in (2.0, 0.0)
        )
        u0, a0, b0 = (
            f(x)
            for f, x in (
                (model.embed_visual, batch.forget.visual),
                (model.embed_other, batch.forget.other),
                (model.embed_other, batch.retain.other),
            )
        )
        u, a, r = live.embed_visual(batch.forget.visual), a0, live.embed_visual(batch.retain.visual)
        y = batch.forget.labels
        heads = sum(
            -torch.log1p(-logits.softmax(1).gather(1, y[:, None])).mean()
            for place in (u, u0)
            for logits in (live.classify_visual(place), live.classify_fused(place, a))
        )
        towers = forgetting_loss(
            u, r, u0=u0, a0=a0, b0=b0, scale=5.0, forget_labels=y, retain_labels=batch.retain.labels
        )
        torch.testing.assert_close(with_a - without, 2 * (towers + heads) / 5, rtol=1e-3, atol=1e-4)


def of_other(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that :class:`FusionModel` embeds and classifies the other modality with."""
    prefixes = ("other_tower", "projector", "other_head")
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith(prefixes)}


class TestTheOtherModality:
    @pytest.mark.parametrize("kind", ["class", "instances"])
    def test_exact_leaves_it_the_same_to_the_bit(self, trained: tuple[FusionModel, PairedData], kind: str) -> None:
        model, (forget, retain) = trained[0], toy_unlearn.split(kind)
        # Dampening changes weights before the first step.
        config = UnlearnConfig(forget=kind, dampen=2.0, anchor=1.0, bank=10, budget=Budget(steps=6))
        clean = unlearn(model, forget, retain, config)
        assert parameters_of_other(model, forget) == set(of_other(model))
        for name, value in of_other(clean).items():
            assert torch.equal(value, model.get_parameter(name)), name
        for part in (forget, retain):
            before, after = (m.embed_other(part.other) for m in (model, clean))
            assert torch.equal(before, after)
            assert torch.equal(model.classify_other(before), clean.classify_other(after))
        for name in ("visual_tower.0.weight", "visual_head.weight", "fused_head.weight"):
            assert not torch.equal(clean.get_parameter(name), model.get_parameter(name)), name
        assert all(p.requires_grad for p in clean.parameters())

    @pytest.mark.parametrize("statistics", [False, True])
    def test_exact_with_a_shared_trunk(self, statistics: bool) -> None:
        class Trunk(TwoTowers):
            def __init__(self) -> None:
                super().__init__()
                self.trunk = nn.Sequential(nn.Linear(toy_unlearn.INPUTS, toy_unlearn.INPUTS), nn.Dropout(0.1))
                if statistics:
                    self.trunk.append(nn.BatchNorm1d(toy_unlearn.INPUTS, affine=False))

            def embed_visual(self, visual: Tensor) -> Tensor:
                return super().embed_visual(self.trunk(visual))

            def embed_other(self, other: Tensor) -> Tensor:
                return super().embed_other(self.trunk(other))

        torch.manual_seed(0)
        model = Trunk()
        forget, retain = toy_unlearn.split("instances")
        assert parameters_of_other(model, forget) == {"trunk.0.weight", "trunk.0.bias", "other.weight", "other.bias"}
        config = UnlearnConfig(forget="pairs", budget=Budget(steps=6))
        # Unseen items are embedded in evaluation mode at every step.
        unseen = PairedData(retain.visual + 0.1, retain.other, retain.labels, retain.ids + 1000)
        clean = unlearn(model, forget, retain, config, unseen=unseen)
        assert clean.training and all(m.training for m in clean.modules())
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, clean.get_parameter(n))}
        assert changed == {"visual.weight", "visual.bias"}
        one, two = (m.eval().embed_other(retain.other) for m in (model, clean))
        assert torch.equal(one, two)

    def test_nothing_left_to_train_is_an_error(self, trained: tuple[FusionModel, PairedData]) -> None:
        torch.manual_seed(0)
        tied = toy_unlearn.TiedTowers()
        tied.visual.bias.requires_grad_(False)
        forget, retain = toy_unlearn.split("instances")
        shared = (
            r'keep: expected keep="trained" for a model whose visual embeddings depend on no trainable .* got "exact"'
        )
        with pytest.raises(ValueError, match=shared):
            unlearn(tied, forget, retain, UnlearnConfig(forget="pairs", budget=Budget(steps=2)))
        # Heads alone could hide what the embeddings tell: that is asked for, or refused.
        model, parts = trained[0], sets(trained[1])
        with pytest.raises(ValueError, match=shared):
            unlearn(model, *parts, UnlearnConfig(trainable=("projector.*", "*_head.*")))
        heads = unlearn(model, *parts, UnlearnConfig(trainable=("*_head.*",), budget=Budget(steps=2)))
        assert torch.equal(heads.projector.weight, model.projector.weight)
        with pytest.raises(ValueError, match=r'keep="trained" where .* \(other_tower\.\*\), got "exact"'):
            unlearn(model, *parts, UnlearnConfig(trainable=("other_tower.*",)))
        config = UnlearnConfig(forget="pairs", keep="trained", budget=Budget(steps=2))
        assert not torch.equal(weights(unlearn(tied, forget, retain, config)), weights(tied))
        with pytest.raises(ValueError, match=r"keep: expected one of"):
            UnlearnConfig(keep="both")

    def test_trained_changes_it_and_the_loss_holds_it(self, trained: tuple[FusionModel, PairedData]) -> None:
        model, (forget, retain) = trained[0], sets(trained[1])
        budget = Budget(steps=40, learning_rate=5e-3, batch=20)
        moved = {}
        for retention in (0.0, 3.0):
            config = UnlearnConfig(keep="trained", dampen=0.0, task=0.0, retention=retention, budget=budget)
            clean = unlearn(model, forget, retain, config)
            same = [name for name, p in of_other(clean).items() if torch.equal(p, model.get_parameter(name))]
            # Without (b) and the task only what both modalities share learns anything.
            assert all(name.startswith(("other_tower", "other_head")) for name in same) and bool(same) == (
                not retention
            )
            near = F.cosine_similarity(clean.embed_other(forget.other), model.embed_other(forget.other))
            moved[retention] = 1 - near.mean().item()
        assert 0 < moved[3.0] < 0.5 * moved[0.0]

    def test_a_trained_step_has_all_of_b(self, trained: tuple[FusionModel, PairedData]) -> None:
        model, (forget, retain) = trained[0], sets(trained[1])
        batch = toy_unlearn.one_batch(forget, retain)
        live = copy.deepcopy(model)
        with torch.no_grad():
            live.other_tower[0].weight.mul_(0.5)
        shared = {"keep": "trained", "neighbours": 0.0}
        with_b, without = (
            CcuStep(UnlearnConfig(retention=w, **shared), model, forget, retain, seed=0)(live, batch)
            for w in (2.0, 0.0)
        )
        inputs = torch.cat([batch.forget.other, batch.retain.other])
        now, then = live.embed_other(inputs), model.embed_other(inputs)
        plain = F.cross_entropy(5 * now @ then.T, (5 * then @ then.T).softmax(1))
        known = F.cross_entropy(live.classify_other(now[: len(batch.forget)]), batch.forget.labels)
        torch.testing.assert_close(with_b - without, 2 * (plain + known), rtol=1e-4, atol=1e-5)
        exact = [CcuStep(UnlearnConfig(retention=w), model, forget, retain, seed=0)(live, batch) for w in (2.0, 0.0)]
        assert torch.equal(*exact)

    @pytest.mark.parametrize("keep", ["exact", "trained"])
    def test_the_task_is_that_of_the_heads_that_may_change(
        self, trained: tuple[FusionModel, PairedData], keep: str
    ) -> None:
        model, (forget, retain) = trained[0], sets(trained[1])
        batch = toy_unlearn.one_batch(forget, retain)
        live = copy.deepcopy(model)
        with torch.no_grad():
            live.other_head.weight.mul_(0.5)
        with_task, without = (
            CcuStep(UnlearnConfig(task=w, keep=keep), model, forget, retain, seed=0)(live, batch) for w in (2.0, 0.0)
        )
        r, b, y = live.embed_visual(batch.retain.visual), live.embed_other(batch.retain.other), batch.retain.labels
        logits = [live.classify_visual(r), live.classify_fused(r, b)]
        if keep == "trained":
            logits.append(live.classify_other(b))
        plain = sum(F.cross_entropy(x, y) for x in logits)
        assert F.cross_entropy(live.classify_other(b), y) > 1e-2
        torch.testing.assert_close(with_task - without, 2 * plain, rtol=1e-3, atol=1e-4)


class TestFrozen:
    def test_a_large_retain_set_is_not_embedded_whole(self, trained: tuple[FusionModel, PairedData]) -> None:
        rows: list[int] = []

        class Counted(FusionModel):
            def embed_visual(self, visual: Tensor) -> Tensor:
                rows.append(len(visual))
                return super().embed_visual(visual)

        frozen = Counted(toy_unlearn.INPUTS, toy_unlearn.INPUTS, toy_unlearn.CLASSES)
        forget = toy(40, seed=1)[torch.arange(8)]
        seen = {}
        for items in (60, 400, 4000):
            retain = toy(items, seed=2)
            retain = PairedData(retain.visual, retain.other, retain.labels, retain.ids + 100)
            rows.clear()
            config = UnlearnConfig(forget="instances", separation=0.0, budget=Budget(steps=4, batch=8))
            run_ccu(frozen, forget, retain, config, unseen=toy(20, seed=3))
            seen[items] = sum(rows)
        # Of the partners only the other half is embedded.
        assert seen[60] == seen[400] == seen[4000] < 400

    def test_the_rows_are_the_same_either_way(self, trained: tuple[FusionModel, PairedData]) -> None:
        model, (_, retain) = trained[0], sets(trained[1])
        rows = torch.tensor([3, 0, 11, 7])
        whole, by_batch = (Frozen(model, retain, used) for used in (len(retain), len(retain) - 1))
        assert whole.whole is not None and by_batch.whole is None
        for one, two in zip(whole.of(rows, retain[rows]), by_batch.of(rows, retain[rows]), strict=True):
            torch.testing.assert_close(one, two)
            assert not one.requires_grad and not two.requires_grad
        forget = sets(trained[1])[0]
        ends = []
        for batch in (1, 3):  # 6 and 18 of the 45 retained items at a time
            model_of = CcuStep(UnlearnConfig(budget=Budget(steps=6, batch=batch)), model, forget, retain, seed=0)
            assert model_of.retained.whole is None
            ends.append(model_of(model, toy_unlearn.one_batch(forget, retain)))
        every = CcuStep(UnlearnConfig(), model, forget, retain, seed=0)
        assert every.retained.whole is not None
        for end in ends:
            torch.testing.assert_close(end, every(model, toy_unlearn.one_batch(forget, retain)))


class TestPairs:
    def test_forgets_pairs_without_labels_or_heads(self) -> None:
        model, data, unseen = toy_unlearn.trained_on_pairs(), toy_unlearn.pairs(), toy_unlearn.pairs(seed=5, first=1000)
        assert not data.labelled and not data[torch.arange(3)].labelled
        gone = torch.arange(80) % 5 == 0
        forget, retain = data[gone], data[~gone]

        def found(m: nn.Module, rows: Tensor) -> float:
            visual, other = m.embed_visual(data.visual), m.embed_other(data.other)
            return ((visual @ other.T).argmax(1) == torch.arange(80))[rows].double().mean().item()

        before = found(model, ~gone)
        assert found(model, gone) >= 0.9 and before >= 0.85
        config = UnlearnConfig(forget="pairs", anchor=10.0, budget=Budget(steps=160, learning_rate=5e-3, batch=40))
        clean = unlearn(model, forget, retain, config, unseen=unseen)
        assert found(clean, gone) <= 0.15
        assert found(clean, ~gone) >= before - 0.15
        # The other modality stays where it was.
        assert torch.equal(clean.embed_other(data.other), model.embed_other(data.other))
        assert set(accuracies(clean, retain)) == {"visual", "other"}
        for kind in ("class", "instances"):
            with pytest.raises(ValueError, match=r"forget: expected labels for forget="):
                unlearn(model, forget, retain, UnlearnConfig(forget=kind))
        stopping = UnlearnConfig(forget="pairs", early_stop=True, budget=Budget(steps=200, learning_rate=3e-3))
        stopped = run_ccu(model, forget, retain, stopping, unseen=unseen, held_out=HeldOut(retain, 0.5, slack=1.0))
        assert stopped.steps < 200

    def test_a_dual_encoder_with_the_names_of_the_protocol(self) -> None:
        from ccu_fast.models.dual_encoder import SmallDualEncoder

        class Pair(SmallDualEncoder):
            embed_visual, embed_other = SmallDualEncoder.encode_image, SmallDualEncoder.encode_text

        model = Pair(20, 1, image_size=(8, 8), width=32, text_depth=1, context=4)
        g = torch.Generator().manual_seed(0)
        tokens = torch.randint(2, 20, (12, 4), generator=g)
        tokens[:, -1] = 1
        data = PairedData(torch.rand(12, 1, 8, 8, generator=g), tokens)
        config = UnlearnConfig(forget="pairs", budget=Budget(steps=2))
        clean = unlearn(model, data[torch.arange(3)], data[torch.arange(3, 12)], config)
        assert not torch.equal(weights(clean), weights(model))
        assert torch.equal(clean.embed_other(tokens[:2]).norm(dim=1).round(decimals=4), torch.ones(2))


class Interrupted(Exception):
    pass


class TestCheckpoint:
    def interrupted_at(self, step: int):
        def progress(stage: str, done: int, total: int, note: str) -> None:
            if done == step:
                raise Interrupted

        return progress

    def test_goes_on_and_ends_as_it_would_have(self, trained: tuple[FusionModel, PairedData], tmp_path: Path) -> None:
        model, (forget, retain) = trained[0], sets(trained[1])
        config = UnlearnConfig(budget=Budget(steps=20, batch=7), dampen=2.0, bank=20, neighbours=3.0)
        whole = unlearn(model, forget, retain, config)
        checkpoint = Checkpoint(tmp_path / "state.pt", every=4)
        with pytest.raises(Interrupted):
            unlearn(model, forget, retain, config, checkpoint=checkpoint, progress=self.interrupted_at(15))
        kept = {f"state.{name}.pt" for name in ("forget", "neighbours", "retain")}
        assert {p.name for p in tmp_path.iterdir()} == {*kept, "state.pt"}
        assert len(torch.load(checkpoint.path, weights_only=True)["losses"]) == 12
        heard: list[int] = []
        resumed = unlearn(
            model, forget, retain, config, checkpoint=checkpoint, progress=lambda s, done, t, n: heard.append(done)
        )
        assert heard == [15, 20]
        assert torch.equal(weights(resumed), weights(whole))
        assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
        again = unlearn(model, forget, retain, config, checkpoint=checkpoint, progress=self.interrupted_at(20))
        assert torch.equal(weights(again), weights(whole))  # finished: nothing runs

    def test_unseen_items_are_part_of_a_run(self, trained: tuple[FusionModel, PairedData], tmp_path: Path) -> None:
        model, (forget, retain) = trained[0], toy_unlearn.split("instances")
        data = toy(30, seed=4)
        unseen = PairedData(data.visual, data.other, data.labels, data.ids + 100)
        other = PairedData(data.visual, data.other, data.labels, data.ids + 101)
        config = UnlearnConfig(forget="instances", budget=Budget(steps=12, batch=7))
        whole = unlearn(model, forget, retain, config, unseen=unseen)
        assert not torch.equal(weights(whole), weights(unlearn(model, forget, retain, config)))
        checkpoint = Checkpoint(tmp_path / "state.pt", every=4)
        with pytest.raises(Interrupted):
            stop = self.interrupted_at(10)
            unlearn(model, forget, retain, config, unseen=unseen, checkpoint=checkpoint, progress=stop)
        for another in (other, None):
            with pytest.raises(ValueError, match="another model, other data or other settings"):
                unlearn(model, forget, retain, config, unseen=another, checkpoint=checkpoint)
        softer = replace(config, forgetting=0.5)
        with pytest.raises(ValueError, match="another model, other data or other settings"):
            unlearn(model, forget, retain, softer, unseen=unseen, checkpoint=checkpoint)
        resumed = unlearn(model, forget, retain, config, unseen=unseen, checkpoint=checkpoint)
        assert torch.equal(weights(resumed), weights(whole))

    def test_a_file_of_another_run_is_an_error(self, trained: tuple[FusionModel, PairedData], tmp_path: Path) -> None:
        model, (forget, retain) = trained[0], sets(trained[1])
        checkpoint = Checkpoint(tmp_path / "state.pt")
        config = UnlearnConfig(budget=Budget(steps=2))
        unlearn(model, forget, retain, config, checkpoint=checkpoint)
        with pytest.raises(ValueError, match="another model, other data or other settings"):
            unlearn(model, forget, retain[torch.arange(20)], config, checkpoint=checkpoint)
        checkpoint.path.write_bytes(b"no")
        with pytest.raises(ValueError, match="checkpoint: expected an undamaged file"):
            unlearn(model, forget, retain, config, checkpoint=checkpoint)
        with pytest.raises(ValueError, match="existing folder"):
            Checkpoint(tmp_path / "missing" / "state.pt")

    def test_a_loss_that_turns_nan_keeps_the_last_good_state(
        self, trained: tuple[FusionModel, PairedData], tmp_path: Path
    ) -> None:
        model, (forget, retain) = trained[0], sets(trained[1])

        def prepare(*prepared):
            inner = CcuStep(UnlearnConfig(), *prepared)
            return lambda m, batch: inner(m, batch) * (math.nan if batch.step == 7 else 1)

        checkpoint = Checkpoint(tmp_path / "state.pt", every=3)
        with pytest.raises(FloatingPointError, match=r"step 8 of 40; the state after step 6 is in .*state\.pt"):
            run(model, forget, retain, prepare, Budget(), checkpoint=checkpoint)
        state = torch.load(checkpoint.path, weights_only=True)
        assert len(state["losses"]) == 6
        assert all(bool(v.isfinite().all()) for v in state["model"].values())

    def test_kill_9(self, trained: tuple[FusionModel, PairedData], tmp_path: Path) -> None:
        config = UnlearnConfig(budget=Budget(steps=40, batch=10))
        checkpoint = Checkpoint(tmp_path / "killed.pt", every=5)

        def slowly() -> None:
            unlearn(
                trained[0], *toy_unlearn.split(), config, checkpoint=checkpoint, progress=lambda *_: time.sleep(0.2)
            )

        child = fork(slowly)
        kill_when(child, checkpoint.path.exists, seconds=60)
        state = torch.load(checkpoint.path, weights_only=True)
        assert 0 < len(state["losses"]) < 40 and not state["done"]
        for name in ("killed.pt", "whole.pt"):
            unlearn(trained[0], *toy_unlearn.split(), config, checkpoint=Checkpoint(tmp_path / name, every=5))
        one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("killed.pt", "whole.pt"))
        assert one["losses"] == two["losses"]
        assert all(torch.equal(one["model"][k], two["model"][k]) for k in two["model"])


class TestModels:
    def test_convolutional_towers(self) -> None:
        model = ConvFusionModel((8, 4), 3, channels=2, hidden=8, embedding=6)
        logits = model(torch.rand(2, 1, 8, 4), torch.rand(2, 1, 8, 4))
        assert [list(x.shape) for x in logits] == [[2, 3]] * 3
        colours = ConvFusionModel((8, 4), 3, channels=2, hidden=8, embedding=6, inputs=3)
        assert colours.embed_visual(torch.rand(2, 3, 8, 4)).shape == (2, 6)
        for error, arguments in (
            ("inputs", {"size": (8, 4), "classes": 3, "inputs": 0}),
            ("size", {"size": (7, 4), "classes": 3}),
            ("channels", {"size": (8, 4), "classes": 3, "channels": 0}),
        ):
            with pytest.raises(ValueError, match=error):
                ConvFusionModel(**arguments)

    def test_a_model_with_one_head(self, trained: tuple[FusionModel, PairedData]) -> None:
        class OneHead(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.whole = make_model()

            def embed_visual(self, x: Tensor) -> Tensor:
                return self.whole.embed_visual(x)

            def embed_other(self, x: Tensor) -> Tensor:
                return self.whole.embed_other(x)

            def classify_visual(self, z: Tensor) -> Tensor:
                return self.whole.classify_visual(z)

        _, data = trained
        clean = unlearn(OneHead(), *sets(data), UnlearnConfig(budget=Budget(steps=2)))
        assert list(accuracies(clean, data)) == ["visual"]
