"""The methods that change more in a step than its loss: masks, clipping, slow weights and projections, by hand."""

from __future__ import annotations

import copy
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.losses.functional import info_nce
from ccu_fast.models.fusion import FusionModel
from ccu_fast.runs.checkpoint import Checkpoint, Keeper
from ccu_fast.unlearn.baselines import importance
from ccu_fast.unlearn.baselines.importance import exceeds, shuffled
from ccu_fast.unlearn.baselines.mm_unlearner import mm_unlearner, visual_mask
from ccu_fast.unlearn.baselines.null_space import leading, projected, used_directions
from ccu_fast.unlearn.baselines.plain_losses import neg_grad_plus
from ccu_fast.unlearn.baselines.registry import BASELINES
from ccu_fast.unlearn.baselines.sfr_on import coefficients, item_losses, salient_and_slow, sfr_on
from ccu_fast.unlearn.config import Budget
from ccu_fast.unlearn.loop import Batch, run
from tests.support.toy_unlearn import TiedTowers, TwoTowers, double, one_batch, split, trained, weights

FAST = Budget(steps=12, learning_rate=5e-3, batch=20)
SEED = 4


def case(kind: str = "class") -> tuple[FusionModel, PairedData, PairedData]:
    """A model in fp64 and two sets."""
    forget, retain = (double(part) for part in split(kind))
    return copy.deepcopy(trained()).double().eval(), forget, retain


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.log_softmax(1)[torch.arange(len(labels)), labels]


def by_item(model: FusionModel, data: PairedData, *names: str) -> Tensor:
    """The summed cross-entropies of some heads, [N]."""
    v, o = model.embed_visual(data.visual), model.embed_other(data.other)
    logits = {
        "visual": model.visual_head(v),
        "other": model.other_head(o),
        "fused": model.fused_head(torch.cat([v, o], 1)),
    }
    return torch.stack([ce(logits[name], data.labels) for name in names]).sum(0)


def squares(model: FusionModel, batches: list[PairedData], *names: str) -> dict[str, Tensor]:
    """The sum over batches of the squared gradients of their mean losses."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        mine = copy.deepcopy(model)
        by_item(mine, batch, *names).mean().backward()
        for name, p in mine.named_parameters():
            if p.grad is not None:
                total[name] += p.grad**2
    return total


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "BATCH", 7)


class TestImportance:
    def test_batches_of_nearly_one_size_have_every_item_once(self, small_batches: None) -> None:
        _, forget, _ = case()
        parts = shuffled(forget, SEED)
        assert [len(part) for part in parts] == [5, 5, 5]
        ids = torch.cat([part.ids for part in parts])
        assert ids.tolist() != forget.ids.tolist() and sorted(ids.tolist()) == forget.ids.tolist()
        assert torch.equal(torch.cat([part.ids for part in shuffled(forget, SEED)]), ids)

    def test_where_one_exceeds_the_other(self) -> None:
        model = nn.Linear(4, 1)
        gone = {"weight": torch.tensor([[2.0, 1.0, 0.5, 0.0]])}
        mask = exceeds(gone, {"weight": torch.tensor([[1.0, 1.0, 1.0, 1e-12]])}, model)  # type: ignore[arg-type]
        assert mask["weight"].tolist() == [[True, True, False, False]] and mask["bias"].tolist() == [True]


class TestSfrOn:
    def test_the_loss(self) -> None:
        model, forget, retain = case("instances")
        step = sfr_on(model, forget, retain, SEED)
        for number in (0, 2, 58):
            batch = one_batch(forget, retain, step=number)
            losses = by_item(model, batch.forget, "visual", "fused")
            weight = losses.detach() ** -0.5
            plain = -10 * (1 + math.cos(math.pi * number / 60)) / 2 * (weight / weight.sum() * losses).sum()
            torch.testing.assert_close(step(model, batch), plain)
            torch.testing.assert_close(
                torch.autograd.grad(step(model, batch), model.projector.weight)[0],
                torch.autograd.grad(plain, model.projector.weight)[0],
            )
        for number, steps in ((1, 60), (59, 60), (60, 61)):  # the last step is never an ascent
            batch = one_batch(forget, retain, step=number, steps=steps)
            plain = by_item(model, batch.retain, "visual", "other", "fused").mean()
            torch.testing.assert_close(step(model, batch), plain)

    def test_what_is_remembered_well_counts_more(self) -> None:
        losses = torch.tensor([0.04, 1.0, 4.0], requires_grad=True)
        weight = coefficients(losses)
        torch.testing.assert_close(weight, torch.tensor([5.0, 1.0, 0.5]) * 3 / 6.5)
        assert not weight.requires_grad

    def test_losses_of_pairs(self) -> None:
        model, (forget, _) = TwoTowers(), split()
        want = info_nce(model.embed_visual(forget.visual), model.embed_other(forget.other), scale=10.0)
        torch.testing.assert_close(item_losses(model, forget).mean(), want)

    def test_ascents_are_masked_and_all_gradients_clipped(self, small_batches: None) -> None:
        model, forget, retain = case("instances")
        gone = squares(model, shuffled(forget, SEED), "visual", "fused")
        kept = squares(model, shuffled(retain, SEED), "visual", "other", "fused")
        mask = {name: gone[name] / 2 + 1e-15 >= kept[name] / 7 + 1e-15 for name in gone}
        assert len(shuffled(forget, SEED)) == 2 and len(shuffled(retain, SEED)) == 7
        share = torch.cat([m.flatten() for m in mask.values()]).double().mean()
        assert 0.05 < share < 0.95
        update = salient_and_slow(model.requires_grad_(False), forget, retain, SEED)
        moving = copy.deepcopy(model).requires_grad_(True)
        for number, masked in ((0, True), (1, False)):
            for p in moving.parameters():
                p.grad = torch.full_like(p, 3.0)
            seen: list[Tensor] = []
            update(moving, one_batch(forget, retain, step=number), lambda seen=seen: seen.append(weights(moving)), {})
            assert len(seen) == 1
            open_ = torch.cat(
                [
                    mask[name].flatten() if masked else torch.ones(p.numel(), dtype=torch.bool)
                    for name, p in moving.named_parameters()
                ]
            )
            got = torch.cat([p.grad.flatten() for p in moving.parameters()])  # type: ignore[union-attr]
            torch.testing.assert_close(got, open_ / open_.double().sum().sqrt(), rtol=1e-5, atol=1e-9)

    def test_slow_weights_go_part_of_the_way(self) -> None:
        model, forget, retain = case()
        update = salient_and_slow(model, forget, retain, SEED, beta=0.25)
        moving, memory = copy.deepcopy(model), {}

        def move() -> None:
            with torch.no_grad():
                for p in moving.parameters():
                    p += 1.0

        before = weights(moving)
        for number, far in ((0, 1.0), (1, 0.5), (2, 1.5), (3, 1.0)):
            update(moving, one_batch(forget, retain, step=number), move, memory)
            torch.testing.assert_close(weights(moving), before + far)
            assert bool(memory) == (number % 2 == 0)

    def test_a_killed_run_has_its_slow_weights_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        forget, retain = split()
        kept = Keeper.save

        def save(self: Keeper, state: dict[str, Any]) -> None:
            kept(self, state)
            shutil.copy(self.checkpoint.path, tmp_path / f"after{len(state['losses'])}.pt")

        monkeypatch.setattr(Keeper, "save", save)
        whole, again = (
            weights(
                run(
                    trained(),
                    forget,
                    retain,
                    sfr_on,
                    FAST,
                    update=partial(salient_and_slow, beta=0.5),
                    checkpoint=Checkpoint(tmp_path / name, every=3),
                ).model
            )
            for name in ("whole.pt", "after3.pt")
        )
        assert (tmp_path / "after3.pt").exists() and torch.equal(whole, again)
        other = run(trained(), forget, retain, sfr_on, FAST, update=salient_and_slow)
        assert not torch.equal(whole, weights(other.model))


class TestMMUnlearner:
    def test_the_mask(self, small_batches: None) -> None:
        model, forget, retain = case("instances")
        gone_batches, kept_batches = shuffled(forget, SEED), shuffled(retain, SEED)
        gone = squares(model, gone_batches, "visual", "fused")
        kept = squares(model, kept_batches, "visual", "other", "fused")
        text = squares(model, gone_batches + kept_batches, "other")
        mask = visual_mask(copy.deepcopy(model).requires_grad_(False), forget, retain, SEED)
        g, k = len(gone_batches), len(kept_batches)
        for name, p in model.named_parameters():
            keep = (kept[name] + text[name]) / (g + 2 * k)
            if name.startswith(("visual_", "fused_")):  # what the other modality alone does not reach
                assert not text[name].any()
                keep = kept[name] / k
            assert torch.equal(mask[name], gone[name] / g + 1e-15 >= keep + 1e-15)
            assert mask[name].shape == p.shape
        assert not mask["other_head.weight"].any()  # what goes does not depend on it

    def test_turns(self) -> None:
        model, forget, retain = case()  # three times as many to keep
        step = mm_unlearner(model, forget, retain, SEED)
        for number, steps in ((0, 60), (1, 60), (3, 60), (4, 60), (4, 5)):
            batch = one_batch(forget, retain, step=number, steps=steps)
            up = number % 4 == 0 and number + 1 < steps
            plain = by_item(model, batch.retain, "visual", "other", "fused").mean()
            if up:
                plain = -by_item(model, batch.forget, "visual", "fused").mean()
            torch.testing.assert_close(step(model, batch), plain)

    @pytest.mark.parametrize("keep_other", [0.0, 1.0])
    def test_all_else_stays_to_the_last_bit(self, keep_other: float) -> None:
        forget, retain = split()
        mask = visual_mask(copy.deepcopy(trained()).eval(), forget, retain, SEED)
        open_ = torch.cat([mask[name].flatten() for name, _ in trained().named_parameters()])
        done = BASELINES["mm_unlearner"].run(trained(), forget, retain, "class", FAST, seed=SEED, keep_other=keep_other)
        moved = weights(done.model) != weights(trained())
        assert not (moved & ~open_).any() and (~open_).sum() > 100
        assert moved.sum() > 0.5 * open_.sum()

    def test_gradients_are_clipped_before_the_mask(self) -> None:
        model, forget, retain = case()
        update = BASELINES["mm_unlearner"].update
        assert update is not None
        change = update(model, forget, retain, SEED)
        for p in model.parameters():
            p.grad = torch.full_like(p, 3.0)
        change(model, one_batch(forget, retain), lambda: None, {})
        values = torch.cat([p.grad.flatten() for p in model.parameters()]).unique()  # type: ignore[union-attr]
        size = len(weights(model)) ** -0.5
        torch.testing.assert_close(values, torch.tensor([0, size], dtype=values.dtype), rtol=1e-5, atol=0)


class Layers(nn.Module):
    """Convolution, linear layer with a norm and a scale, all of one tower; the other tower is a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2, stride=2, padding=1)
        self.linear = nn.Linear(27, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.other = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.tensor(5.0))

    def embed_visual(self, visual: Tensor) -> Tensor:
        return F.normalize(self.norm(self.linear(self.conv(visual).flatten(1).relu())), dim=-1)

    def embed_other(self, other: Tensor) -> Tensor:
        return F.normalize(self.other(other), dim=-1)


def flat_world() -> tuple[Layers, PairedData, PairedData]:
    """Retained inputs in few dimensions, others anywhere; fp64."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = Layers().double()
        basis = torch.randn(1, 1, 4, 4, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
        turn = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
        visual = turn.cos()[:, None, None, None] * basis[0] * torch.tensor([1.0, 2.0]).double()[:, None, None]
        other = torch.stack([turn.cos(), turn.sin()], 1) @ basis[1]
        forget = PairedData(torch.randn(8, 2, 4, 4).double(), torch.randn(8, 6).double(), ids=torch.arange(8))
    return model, forget, PairedData(visual, other, ids=torch.arange(8, 16))


class TestNullSpace:
    def test_the_directions_of_each_layer(self) -> None:
        model, _, retain = case()
        used = used_directions(model, retain)
        assert set(used) == {name.rsplit(".", 1)[0] for name, _ in model.named_parameters()}
        towers = [tower(x) for tower, x in ((model.visual_tower, retain.visual), (model.other_tower, retain.other))]
        inputs = {
            "visual_tower.0": retain.visual,
            "projector": torch.cat(towers),  # both modalities go through it
            "other_head": model.embed_other(retain.other),
        }
        for name, x in inputs.items():
            x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
            _, s, v = torch.linalg.svd(x.detach(), full_matrices=False)
            basis = v[s**2 > 0.1 * (s**2).sum()]
            torch.testing.assert_close(used[name] @ used[name].mT, basis.mT @ basis)
            assert 1 <= len(basis) < x.shape[1]

    def test_a_convolution_sees_its_patches(self) -> None:
        model, forget, _ = flat_world()
        padded = F.pad(forget.visual, (1, 1, 1, 1))
        patches = [padded[:, :, i : i + 2, j : j + 2].flatten(1) for i in (0, 2, 4) for j in (0, 2, 4)]
        x = F.pad(torch.cat(patches), (0, 1), value=1.0)
        got = used_directions(model, forget)["conv"]  # type: ignore[arg-type]
        torch.testing.assert_close(got @ got.mT, leading(x.mT @ x) @ leading(x.mT @ x).mT)
        assert 1 <= got.shape[1] < 9

    def test_which_eigenvectors(self) -> None:
        turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double())
        covariance = turn @ torch.diag(torch.tensor([6.0, 2.9, 0.9, 0.2]).double()) @ turn.mT
        torch.testing.assert_close(leading(covariance) @ leading(covariance).mT, turn[:, :2] @ turn[:, :2].mT)

    def test_what_a_layer_makes_of_retained_inputs_does_not_move(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("ccu_fast.unlearn.baselines.null_space.LEAST", 1e-9)
        model, forget, retain = flat_world()
        done = run(model, forget, retain, neg_grad_plus, FAST, update=projected).model
        assert isinstance(done, Layers)
        flat = model.conv(retain.visual).flatten(1).relu()
        for name, x in (("conv", retain.visual), ("linear", flat), ("other", retain.other)):
            was, now = getattr(model, name), getattr(done, name)
            torch.testing.assert_close(now(x), was(x), rtol=0, atol=1e-12)
        for name, x in (("conv", forget.visual), ("other", forget.other)):
            assert (getattr(done, name)(x) - getattr(model, name)(x)).abs().max() > 1e-3
        assert not torch.equal(done.linear.weight, model.linear.weight)
        assert torch.equal(done.norm.weight, model.norm.weight) and torch.equal(done.scale, model.scale)
        plain = run(model, forget, retain, neg_grad_plus, FAST).model
        assert (plain.other(retain.other) - model.other(retain.other)).abs().max() > 1e-3  # type: ignore[attr-defined]

    def test_a_step_is_the_optimisers_step_projected(self) -> None:
        model, forget, retain = case()
        used = used_directions(model, retain)
        change = projected(model, forget, retain, SEED)
        moving = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(0)
        delta = torch.randn(moving.projector.weight.shape, dtype=torch.float64, generator=generator)
        shift = torch.randn(moving.projector.bias.shape, dtype=torch.float64, generator=generator)

        def move() -> None:
            with torch.no_grad():
                moving.projector.weight += delta
                moving.projector.bias += shift

        change(moving, one_batch(forget, retain), move, {})
        both = torch.cat([delta, shift[:, None]], 1)
        both = both - both @ used["projector"] @ used["projector"].mT
        torch.testing.assert_close(moving.projector.weight, model.projector.weight + both[:, :-1])
        torch.testing.assert_close(moving.projector.bias, model.projector.bias + both[:, -1])
        assert torch.equal(moving.other_head.weight, model.other_head.weight)

    def test_layers_that_are_not_free_stay(self) -> None:
        forget, retain = split()
        done = BASELINES["null_space"].run(
            trained(), forget, retain, "class", FAST, trainable=("projector.*", "visual_head.bias")
        )
        moved = {
            name
            for (name, a), b in zip(done.model.named_parameters(), trained().parameters(), strict=True)
            if not torch.equal(a, b)
        }
        assert moved == {"projector.weight", "projector.bias"}
        with pytest.raises(ValueError, match=r"^model: expected at least one linear or convolutional layer"):
            BASELINES["null_space"].run(TiedTowers(), forget, retain, "pairs", FAST)


def test_the_loop_hands_over_what_the_step_saw() -> None:
    forget, retain = split()
    seen: list[tuple[int, bool]] = []

    def update(model: Any, batch: Batch, move: Any, memory: dict[str, Tensor]) -> None:
        memory["count"] = memory.get("count", torch.zeros(())) + 1
        seen.append((batch.step, all(p.grad is not None for p in model.parameters())))
        move()
        assert memory["count"] == batch.step + 1

    mine = run(trained(), forget, retain, neg_grad_plus, FAST, update=lambda *_: update)
    assert seen == [(step, True) for step in range(FAST.steps)]
    assert torch.equal(weights(mine.model), weights(run(trained(), forget, retain, neg_grad_plus, FAST).model))
