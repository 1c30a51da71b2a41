"""Every baseline: its characteristic step against a computation by hand, and a run of each."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.models.fusion import FusionModel
from ccu_fast.unlearn.baselines.bad_teacher import bad_teacher, reinitialised
from ccu_fast.unlearn.baselines.boundary import ShadowClass, nearest_labels, to_shadow
from ccu_fast.unlearn.baselines.clip_erase import clip_erase
from ccu_fast.unlearn.baselines.contrastive_unlearning import contrastive_unlearning, unlearning_loss
from ccu_fast.unlearn.baselines.multi_delete import multi_delete
from ccu_fast.unlearn.baselines.plain_losses import fine_tune, gradient_ascent, neg_grad_plus
from ccu_fast.unlearn.baselines.predictions import distillation_loss, predictions
from ccu_fast.unlearn.baselines.random_label import random_label, wrong_labels
from ccu_fast.unlearn.baselines.registry import BASELINES, keeping_other
from ccu_fast.unlearn.baselines.scrub import scrub
from ccu_fast.unlearn.baselines.ssd import dampening, ssd
from ccu_fast.unlearn.config import Budget
from ccu_fast.unlearn.loop import Batch, Prepare
from ccu_fast.unlearn.model import loss_on
from tests.support.toy_unlearn import (
    CLASSES,
    DIM,
    TwoTowers,
    accuracies,
    double,
    one_batch,
    split,
    trained,
    weights,
)

FAST = Budget(steps=30, learning_rate=5e-3, batch=20)
SEED = 7
NEED_LABELS = {
    "random_label",
    "salun",
    "boundary_shrink",
    "boundary_expand",
    "contrastive_unlearning",
    "contrastive_unlearning_released",
    "mm_unlearner",
}


class Logits:
    """Embeddings and logits of a model in fp64, for formulas by hand."""

    def __init__(self, model: FusionModel, data: PairedData) -> None:
        self.v, self.o = model.embed_visual(data.visual), model.embed_other(data.other)
        self.visual, self.other = model.visual_head(self.v), model.other_head(self.o)
        self.fused = model.fused_head(torch.cat([self.v, self.o], 1))
        self.labels = data.labels

    def ce(self, *names: str) -> Tensor:
        picked = [getattr(self, name).log_softmax(1)[torch.arange(len(self.labels)), self.labels] for name in names]
        return -sum(p.mean() for p in picked)


def kl(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) from its definition, mean over rows."""
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    return (p * (p.log() - q.log())).sum(1).mean()


@pytest.fixture
def case() -> tuple[FusionModel, FusionModel, Batch, tuple[PairedData, PairedData]]:
    """A frozen original, a model that has moved away from it, a batch, all fp64."""
    frozen = copy.deepcopy(trained()).double().eval().requires_grad_(False)
    model = copy.deepcopy(trained()).double()
    with torch.no_grad():
        noise = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=noise)
    sets = tuple(double(part) for part in split("instances"))
    return frozen, model, one_batch(*sets), sets


def loss_and_gradients(prepare: Prepare, case, **change) -> tuple[Tensor, list[Tensor | None]]:
    frozen, model, batch, sets = case
    batch = Batch(**{**batch.__dict__, **change})
    loss = prepare(frozen, *sets, SEED)(model, batch)
    return loss, list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


def same(ours: tuple[Tensor, list[Tensor | None]], plain: Tensor, model: nn.Module) -> None:
    torch.testing.assert_close(ours[0], plain, rtol=1e-10, atol=1e-12)
    wanted = torch.autograd.grad(plain, list(model.parameters()), allow_unused=True)
    assert any(w is not None and w.any() for w in wanted)
    for got, want in zip(ours[1], wanted, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if got is None or not got.any() else got,
            zero if want is None or not want.any() else want,
            rtol=1e-8,
            atol=1e-11,
            check_dtype=False,
        )


class TestFormulas:
    def test_fine_tuning_ascent_and_their_mixture(self, case) -> None:
        _, model, batch, _ = case
        u, r = Logits(model, batch.forget), Logits(model, batch.retain)
        same(loss_and_gradients(fine_tune, case), r.ce("visual", "other", "fused"), model)
        same(loss_and_gradients(gradient_ascent, case), -u.ce("visual", "fused"), model)
        u, r = Logits(model, batch.forget), Logits(model, batch.retain)
        mixed = 0.95 * r.ce("visual", "other", "fused") - 0.05 * u.ce("visual", "fused")
        same(loss_and_gradients(neg_grad_plus, case), mixed, model)

    def test_random_labels(self, case) -> None:
        _, model, batch, (forget, retain) = case
        u, r = Logits(model, batch.forget), Logits(model, batch.retain)
        u.labels = wrong_labels(forget.labels, retain.labels.unique(), SEED)[batch.forget_rows]
        assert not (u.labels == batch.forget.labels).any()
        same(loss_and_gradients(random_label, case), u.ce("visual", "fused") + r.ce("visual", "other", "fused"), model)

    def test_scrub_disobeys_and_obeys_in_turns(self, case) -> None:
        frozen, model, batch, _ = case
        for step, maximise in ((0, True), (1, False), (2, True), (38, True), (39, False), (40, False), (59, False)):
            part = batch.forget if maximise else batch.retain
            mine, theirs = Logits(model, part), Logits(frozen, part)
            names = ("visual", "fused") if maximise else ("visual", "other", "fused")
            apart = 16 * sum(kl(getattr(theirs, n), getattr(mine, n), 4) for n in names)
            plain = -apart if maximise else 0.99 * mine.ce(*names) + 0.001 * apart
            same(loss_and_gradients(scrub, case, step=step), plain, model)

    def test_bad_teacher(self, case) -> None:
        frozen, model, batch, _ = case
        random = reinitialised(frozen, SEED)
        u, ur = Logits(model, batch.forget), Logits(random, batch.forget)
        r, r0 = Logits(model, batch.retain), Logits(frozen, batch.retain)
        gone = sum(kl(getattr(ur, n), getattr(u, n)) for n in ("visual", "fused"))
        kept = sum(kl(getattr(r0, n), getattr(r, n)) for n in ("visual", "other", "fused"))
        n_u, n_r = len(batch.forget), len(batch.retain)
        same(loss_and_gradients(bad_teacher, case), (n_u * gone + n_r * kept) / (n_u + n_r), model)

    def test_the_random_teacher_knows_nothing_and_is_its_seeds(self) -> None:
        state = torch.random.get_rng_state()
        one, two, three = (reinitialised(trained(), seed) for seed in (3, 3, 4))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(weights(one), weights(two)) and not torch.equal(weights(one), weights(three))
        _, retain = split()
        assert accuracies(one, retain)["visual"] < 0.6 < 0.95 < accuracies(trained(), retain)["visual"]
        with pytest.raises(ValueError, match="reset_parameters"):
            reinitialised(nn.Identity(), 0)

    def test_multi_delete(self, case) -> None:
        frozen, model, batch, _ = case
        u, u0, r, r0 = (Logits(m, d) for d in (batch.forget, batch.retain) for m in (model, frozen))
        strangers = r0.o[: len(batch.forget)]
        apart = frozen.fused_head(torch.cat([u0.v, strangers], 1))
        plain = (
            (u.fused - apart).square().mean()
            + (r.fused - r0.fused).square().mean()
            + (u.v - u0.v).square().mean()
            + (u.o - u0.o).square().mean()
        )
        same(loss_and_gradients(multi_delete, case), plain, model)

    def test_clip_erase(self, case) -> None:
        frozen, model, batch, _ = case
        u, r, r0 = Logits(model, batch.forget), Logits(model, batch.retain), Logits(frozen, batch.retain)
        plain = (
            r.ce("visual", "other", "fused")
            + 3 * (u.v * u.o).sum(1).mean()
            + 3 * (kl(r0.visual, r.visual) + kl(r0.other, r.other))
        )
        same(loss_and_gradients(clip_erase, case), plain, model)

    @pytest.mark.parametrize("released", [False, True])
    def test_contrastive_unlearning(self, case, released: bool) -> None:
        _, model, batch, _ = case
        u, r = Logits(model, batch.forget), Logits(model, batch.retain)
        s = u.v @ r.v.T / 0.7
        other = batch.forget.labels[:, None] != batch.retain.labels[None]
        assert other.any(1).all() and (~other).any(1).all()
        log_sum = (s.exp() * ~other).sum(1, keepdim=True).log()
        # As a formula the log-sum is taken from the n_i other columns, in the released code from all N_r of them.
        log_prob = s * other - log_sum if released else (s - log_sum) * other
        plain = 3 * -(log_prob.sum(1) / other.sum(1)).mean() + r.ce("visual", "other", "fused")
        same(loss_and_gradients(partial(contrastive_unlearning, released=released), case), plain, model)

    def test_the_variants_of_contrastive_unlearning_differ(self) -> None:
        z = F.normalize(torch.randn(2, 8, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=-1)
        labels, only_own = torch.arange(8) % 3, torch.zeros(8, dtype=torch.long)
        call = {"scale": 2.0, "whole_class": False}
        formula, released = (unlearning_loss(*z, labels, labels, released=r, **call) for r in (False, True))
        assert released != formula
        # Without an item of another class a row has no pull; without its own no push: either counts as 0.
        assert unlearning_loss(*z, only_own, only_own, released=True, **call) == 0
        assert unlearning_loss(*z, only_own + 5, only_own, released=True, **call) == 0

    def test_boundary_expansion_learns_the_shadow_class(self, case) -> None:
        _, model, batch, sets = case
        wide = ShadowClass(model, DIM, 0, torch.zeros(1, dtype=torch.float64))
        v, o = model.embed_visual(batch.forget.visual), model.embed_other(batch.forget.other)
        logits = wide.classify_visual(v), wide.classify_fused(v, o)
        assert [x.shape[1] for x in logits] == [CLASSES + 1] * 2 and wide.classify_other(o).shape[1] == CLASSES
        torch.testing.assert_close(logits[0][:, :CLASSES], model.classify_visual(v))
        shadow = torch.full((len(v),), CLASSES)
        plain = F.cross_entropy(logits[0], shadow) + F.cross_entropy(logits[1], shadow)
        ours = to_shadow(wide, *sets, SEED)(wide, batch)
        torch.testing.assert_close(ours, plain)
        assert torch.autograd.grad(ours, wide.visual_shadow.weight)[0].any()

    def test_distillation_is_kl_of_the_teacher_and_keeps_its_size(self) -> None:
        t, s = torch.randn(2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        s.requires_grad_()
        torch.testing.assert_close(distillation_loss({"x": s}, {"x": t, "y": s}, 3.0), 9 * kl(t, s, 3.0))
        assert distillation_loss({"x": t}, {"x": t}, 2.0).abs() < 1e-14
        assert distillation_loss({"x": s}, {"x": t}, 1.0) != kl(s, t)
        assert kl(t, s).item() > 0

    def test_a_model_without_heads_predicts_the_pairs(self) -> None:
        model, (forget, _) = TwoTowers(), split()
        v, o = model.embed_visual(forget.visual), model.embed_other(forget.other)
        said = predictions(model, v, o, visual_only=True)
        torch.testing.assert_close(said["pairs"], 10 * v @ o.T)
        torch.testing.assert_close(said["pairs_back"], 10 * o @ v.T)


class TestSynapticDampening:
    def test_the_factor(self) -> None:
        # F_f > α F_D is false, true with λ F_D / F_f < 1, true with a factor above 1, both zero.
        everything = torch.tensor([1.0, 1.0, 1.0, 0.0])
        forget = torch.tensor([2.0, 8.0, 3.0, 0.0])
        assert dampening(everything, forget, 2.0).tolist() == [1.0, 1 / 8, pytest.approx(1 / 3), 1.0]
        assert dampening(4 * everything, forget, 0.25).tolist() == [1.0, 0.5, 1.0, 1.0]

    def test_equals_a_computation_by_hand(self) -> None:
        original = copy.deepcopy(trained()).double()
        original.other_head.requires_grad_(False)
        forget, retain = (double(part) for part in split())

        def fisher(*parts: PairedData) -> dict[str, Tensor]:
            squares: dict[str, list[Tensor]] = {name: [] for name, _ in original.named_parameters()}
            for part in parts:
                for item in range(len(part)):
                    model = copy.deepcopy(original)
                    Logits(model, part[torch.tensor([item])]).ce("visual", "fused").backward()
                    for name, p in model.named_parameters():
                        squares[name].append(torch.zeros_like(p) if p.grad is None else p.grad**2)
            return {name: torch.stack(values).mean(0) for name, values in squares.items()}

        whole, gone = fisher(forget, retain), fisher(forget)
        run = ssd(original, forget, retain, alpha=1.5)
        selected = 0
        for (name, before), after in zip(original.named_parameters(), run.model.parameters(), strict=True):
            pick = gone[name] > 1.5 * whole[name]
            factor = torch.where(pick, torch.clamp(whole[name] / gone[name], max=1.0), 1.0)
            torch.testing.assert_close(after, before * factor, rtol=1e-10, atol=0)
            selected += int(pick.sum())
        assert 0 < selected < len(weights(original))
        assert torch.equal(run.model.other_head.weight, original.other_head.weight)
        assert (run.steps, run.items, run.losses) == (0, len(forget) + len(retain), [])

    def test_pairs_are_dampened_too_by_the_gradients_of_several_at_once(self) -> None:
        forget, retain = (PairedData(p.visual, p.other, ids=p.ids) for p in split("instances"))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            original = TwoTowers()

        def fisher(*parts: PairedData) -> dict[str, Tensor]:
            squares = {name: torch.zeros_like(p) for name, p in original.named_parameters()}
            for part in parts:
                for rows in torch.arange(len(part)).tensor_split(-(-len(part) // 64)):
                    named = dict(original.named_parameters())
                    gradients = torch.autograd.grad(loss_on(original, part[rows]), list(named.values()))
                    for name, gradient in zip(named, gradients, strict=True):
                        squares[name] += gradient**2
            batches = sum(-(-len(part) // 64) for part in parts)
            return {name: value / batches for name, value in squares.items()}

        whole, gone = fisher(forget, retain), fisher(forget)
        # One pair alone is always told right, and no weight matters to that.
        assert loss_on(original, forget[torch.tensor([0])]) == 0
        done = ssd(original, forget, retain, alpha=1.1)
        selected = 0
        for (name, before), after in zip(original.named_parameters(), done.model.parameters(), strict=True):
            pick = gone[name] > 1.1 * whole[name]
            torch.testing.assert_close(after, torch.where(pick, before * whole[name] / gone[name], before))
            selected += int(pick.sum())
        assert 0 < selected < len(weights(original))


class TestSaliency:
    def test_only_the_weights_the_forget_set_leans_on_move(self) -> None:
        forget, retain = split()
        model = copy.deepcopy(trained())
        (Logits(model, forget).ce("visual", "fused")).backward()
        size = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad.abs()).flatten() for p in model.parameters()]
        )
        share = 0.3
        largest = torch.zeros(len(size), dtype=torch.bool)
        largest[size.topk(round(share * len(size))).indices] = True
        done = replace(BASELINES["salun"], saliency=share).run(trained(), forget, retain, "class", FAST)
        moved = weights(done.model) != weights(trained())
        assert not (moved & ~largest).any()
        assert moved.sum() > 0.9 * (largest & (size > 0)).sum()


class TestBoundary:
    def test_the_nearest_wrong_class_of_a_model_one_can_see_through(self) -> None:
        class Line(nn.Module):
            """Classes 0, 1, 2 around −1, 0, 1 on a line: logits −(x − centre)²·4."""

            def __init__(self) -> None:
                super().__init__()
                self.centre = nn.Parameter(torch.tensor([-1.0, 0.0, 1.0]))

            def embed_visual(self, x: Tensor) -> Tensor:
                return x

            def embed_other(self, x: Tensor) -> Tensor:
                return x

            def classify_visual(self, x: Tensor) -> Tensor:
                return -4 * (x - self.centre).square()

        x = torch.tensor([[-0.2], [0.2], [0.9]])
        data = PairedData(x, x, torch.tensor([1, 1, 2]))
        everyone = torch.tensor([0, 1, 2])
        assert nearest_labels(Line(), data, everyone, 0.5).tolist() == [0, 2, 1]
        # A step too small to cross: still a wrong class; and never one outside the retain set.
        assert nearest_labels(Line(), data, everyone, 1e-3).tolist() == [0, 2, 1]
        assert nearest_labels(Line(), data, torch.tensor([0, 2]), 0.5).tolist() == [0, 2, 0]
        with pytest.raises(ValueError, match="at least one class besides"):
            nearest_labels(Line(), data, torch.tensor([1]), 0.5)
        with pytest.raises(TypeError, match="visual"):
            nearest_labels(Line(), PairedData(x.long(), x, data.labels), everyone, 0.5)

    def test_the_shadow_class_is_gone_afterwards(self) -> None:
        forget, retain = split()
        done = BASELINES["boundary_expand"].run(trained(), forget, retain, "class", FAST)
        assert isinstance(done.model, FusionModel)
        assert done.model.classify_visual(torch.zeros(1, DIM)).shape == (1, CLASSES)
        assert [p.shape for p in done.model.parameters()] == [p.shape for p in trained().parameters()]
        with pytest.raises(ValueError, match="heads visual, other, fused, got none"):
            BASELINES["boundary_expand"].run(TwoTowers(), forget, retain, "class", FAST)


class TestRuns:
    @pytest.mark.parametrize("kind", ["class", "instances"])
    @pytest.mark.parametrize("name", list(BASELINES))
    def test_every_method_runs_again_alike_and_leaves_the_rest_alone(self, name: str, kind: str) -> None:
        forget, retain = split(kind)
        before, state = weights(trained()), torch.random.get_rng_state()
        # At the full rate: the toy has few steps.
        method = replace(BASELINES[name], rates=(1.0, 1.0))
        one, two = (method.run(trained(), forget, retain, kind, FAST, seed=3) for _ in range(2))
        assert torch.equal(weights(trained()), before)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(weights(one.model), weights(two.model))
        if name != "ssd":
            assert not torch.equal(weights(one.model), before)
            assert one.steps == len(one.losses) == FAST.steps
        # Three methods do not act on what the visual modality knows alone; SSD's own test is above.
        if kind == "class" and name not in ("fine_tune", "multi_delete", "clip_erase", "ssd"):
            before_loss, after_loss = (Logits(m, forget).ce("visual").item() for m in (trained(), one.model))
            assert after_loss > 1.1 * before_loss

    @pytest.mark.parametrize("name", sorted(BASELINES.keys() - NEED_LABELS))
    def test_methods_without_labels_forget_pairs(self, name: str) -> None:
        forget, retain = (PairedData(p.visual, p.other, ids=p.ids) for p in split("instances"))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = TwoTowers()
        done = BASELINES[name].run(model, forget, retain, "pairs", FAST)
        assert torch.isfinite(weights(done.model)).all()
        if name == "ssd":
            assert done.steps == 0
        else:
            assert not torch.equal(weights(done.model), weights(model))

    @pytest.mark.parametrize("name", sorted(NEED_LABELS))
    def test_the_others_say_what_they_lack(self, name: str) -> None:
        forget, retain = (PairedData(p.visual, p.other, ids=p.ids) for p in split("instances"))
        with pytest.raises(ValueError, match=r"^(retain|forget|model): expected"):
            BASELINES[name].run(TwoTowers(), forget, retain, "pairs", FAST)

    def test_methods_as_published_lose_the_other_modality_unless_told_to_keep_it(self) -> None:
        forget, retain = split()
        run = BASELINES["random_label"].run
        published, told = (
            accuracies(run(trained(), forget, retain, "class", FAST, keep_other=k).model, forget) for k in (0.0, 1.0)
        )
        assert published["visual"] == told["visual"] == 0
        assert published["other"] < 0.5 < 0.95 <= told["other"]

    def test_keeping_the_other_modality_is_one_term(self, case) -> None:
        _, model, batch, _ = case
        u, r = Logits(model, batch.forget), Logits(model, batch.retain)
        plain = r.ce("visual", "other", "fused") + 2 * u.ce("other")
        same(loss_and_gradients(keeping_other(fine_tune, 2.0), case), plain, model)
        with pytest.raises(ValueError, match="keep_other"):
            BASELINES["fine_tune"].run(trained(), *split(), "class", FAST, keep_other=-1.0)
        with pytest.raises(ValueError, match="keep_other"):
            BASELINES["fine_tune"].run(TwoTowers(), *split(), "class", FAST, keep_other=1.0)

    def test_a_shadow_class_and_the_other_modality(self) -> None:
        forget, retain = split()
        run = replace(BASELINES["boundary_expand"], rates=(1.0, 1.0)).run
        lost, kept = (
            accuracies(run(trained(), forget, retain, "class", FAST, keep_other=k).model, forget)["other"]
            for k in (0.0, 1.0)
        )
        assert lost < kept
