"""Low-rank adaptation: what may differ, of which rank, under which names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ccu_fast.runs.provenance import load_model, save_model
from ccu_fast.unlearn import Budget, Checkpoint, UnlearnConfig, unlearn
from ccu_fast.unlearn.alarms import NothingTrainable
from ccu_fast.unlearn.job import run_job
from ccu_fast.unlearn.lora import LowRank, attach
from ccu_fast.unlearn.settings import read_job
from tests.support import toy_unlearn
from tests.support.toy_unlearn import TiedTowers, accuracies, double, toy, weights
from tests.unlearn.test_stopping import write

pytestmark = pytest.mark.usefixtures("one_thread")

BUDGET = Budget(steps=40, learning_rate=1e-2, batch=20)


def problem(kind: str = "class") -> tuple[Any, Any, Any]:
    """In double precision, in which a rank is not hidden by rounding."""
    forget, retain = toy_unlearn.split(kind)
    return copy.deepcopy(toy_unlearn.trained()).double(), double(forget), double(retain)


def ranks(before: nn.Module, after: nn.Module) -> dict[str, int]:
    """Of the difference of each tensor that differs; vectors count as matrices of one row."""
    old, new = before.state_dict(), after.state_dict()
    assert list(old) == list(new)
    found = {name: new[name] - old[name] for name in old if not torch.equal(old[name], new[name])}
    return {name: int(torch.linalg.matrix_rank(torch.atleast_2d(d), rtol=1e-9)) for name, d in found.items()}


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("keep", ["exact", "trained"])
def test_the_difference_has_that_rank_in_the_visual_linear_layers(rank: int, keep: str) -> None:
    model, forget, retain = problem()
    clean = unlearn(model, forget, retain, UnlearnConfig(lora=rank, keep=keep, budget=BUDGET))
    linear = {
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and not name.startswith(("other_tower", "other_head"))
    }
    found = ranks(model, clean)
    if keep == "exact":  # what both towers share stays too
        assert torch.equal(clean.embed_other(forget.other), model.embed_other(forget.other))
        assert found.keys() < linear and any("visual_tower" in name for name in found)
    else:
        assert found.keys() == linear
    assert set(found.values()) == {rank}
    assert type(clean) is type(model) and not any("parametrizations" in name for name, _ in clean.named_modules())
    assert [n for n, _ in clean.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(p.requires_grad for p in clean.parameters())
    whole = ranks(model, unlearn(model, forget, retain, UnlearnConfig(dampen=0.0, keep=keep, budget=BUDGET)))
    assert max(whole.values()) > rank  # not for want of steps


def test_it_forgets() -> None:
    model, forget, retain = problem()
    clean = unlearn(model, forget, retain, UnlearnConfig(lora=2, budget=BUDGET))
    assert accuracies(clean, forget)["visual"] <= 0.1 and min(accuracies(clean, retain).values()) >= 0.9


def test_patterns_choose_among_the_layers() -> None:
    model, forget, retain = problem()
    chosen = UnlearnConfig(lora=2, trainable=("visual_tower.0.*",), budget=BUDGET)
    assert ranks(model, unlearn(model, forget, retain, chosen)) == {"visual_tower.0.weight": 2}
    with pytest.raises(NothingTrainable, match=r"lora: .* a linear layer .*such as visual_tower\.0\.weight, "):
        unlearn(model, forget, retain, UnlearnConfig(lora=2, trainable=("visual_tower.*.bias",), budget=BUDGET))


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    model, forget, retain = problem()
    config = UnlearnConfig(lora=2, budget=BUDGET)
    whole = weights(unlearn(model, forget, retain, config))

    def kill(stage: str, done: int, total: int, note: str) -> None:
        if done == 15:
            raise KeyboardInterrupt

    checkpoint = Checkpoint(tmp_path / "state.pt", every=10)
    with pytest.raises(KeyboardInterrupt):
        unlearn(model, forget, retain, config, checkpoint=checkpoint, progress=kill)
    heard: list[int] = []
    resumed = unlearn(
        model, forget, retain, config, checkpoint=checkpoint, progress=lambda stage, done, *_: heard.append(done)
    )
    assert heard[0] == 15 and torch.equal(weights(resumed), whole)
    assert torch.equal(weights(unlearn(model, forget, retain, config, checkpoint=checkpoint)), whole)  # finished
    with pytest.raises(ValueError, match="checkpoint: expected the state of this run"):
        unlearn(model, forget, retain, UnlearnConfig(lora=3, budget=BUDGET), checkpoint=checkpoint)


def test_from_the_settings_it_is_written_under_its_own_names(tmp_path: Path) -> None:
    data = toy()
    np.savez(tmp_path / "pairs.npz", visual=data.visual, other=data.other, labels=data.labels, ids=data.ids)
    save_model(toy_unlearn.trained(), tmp_path / "weights.safetensors", {})
    path = write(tmp_path, unseen=False)
    path.write_text(path.read_text().replace("[model]", "[model]\nlora = 1"))
    job = read_job(path)
    assert job.config.lora == 1 and job.config.used("dampen") == 0
    run_job(job, tmp_path / "out")
    state, provenance = load_model(tmp_path / "out" / "model.safetensors")
    assert state.keys() == toy_unlearn.trained().state_dict().keys() and provenance["config"]["lora"] == 1
    path.write_text(path.read_text().replace("lora = 1", "lora = 0"))
    with pytest.raises(ValueError, match=r"settings \[model\] lora: expected an int at least 1, got 0"):
        read_job(path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dampen": 5.0}, "dampen: expected 0 with lora, .* got 5.0"),
        ({"saliency": 0.5}, "saliency: expected 1 with lora, .* got 0.5"),
    ],
)
def test_what_changes_whole_weights_does_not_go_with_it(given: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnlearnConfig(lora=2, **given)  # type: ignore[arg-type]
    assert UnlearnConfig(lora=2, dampen=0.0).used("dampen") == 0


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x, x, x)[0]
        return found


def test_attention_and_merging() -> None:
    torch.manual_seed(0)
    model, x = Attention().double(), torch.randn(3, 5, 8, dtype=torch.float64)
    before = copy.deepcopy(model)
    merge = attach(model, 2)
    assert torch.equal(model(x), before(x))  # nothing is added at first
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all(name.endswith(("up", "down")) for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("up"):
                parameter.normal_()
    adapted = model(x)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), adapted)
    merge()
    assert ranks(before, model) == {"inner.in_proj_weight": 2, "inner.out_proj.weight": 2}
    torch.testing.assert_close(model(x), adapted)
    assert type(model.inner) is nn.MultiheadAttention
    generator = torch.Generator().manual_seed(0)
    assert LowRank(torch.zeros(3, 8), 5, generator).down.shape == (3, 8)  # no more than the weight can have
    assert float(LowRank(torch.zeros(90, 400), 90, generator).down.detach().std()) == pytest.approx(400**-0.5, rel=0.02)


def test_the_seed_is_that_of_the_start() -> None:
    starts = []
    for seed in (0, 0, 1):
        model = nn.Sequential(nn.Linear(6, 4))
        attach(model, 2, seed=seed)
        starts.append(next(p for name, p in model.named_parameters() if name.endswith("down")))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_weights_that_layers_share_are_refused() -> None:
    with pytest.raises(ValueError, match="lora: expected linear layers with weights of their own"):
        attach(TiedTowers(), 2)
