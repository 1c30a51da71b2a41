"""What a run does once: look into the model, copy it, hash what it is given; and what a step does not do at all."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ccu_fast.models.fusion import FusionModel
from ccu_fast.runs import provenance
from ccu_fast.runs.checkpoint import Checkpoint
from ccu_fast.runs.provenance import Hashes, items_hash, tensors_hash
from ccu_fast.unlearn import method
from ccu_fast.unlearn.config import Budget, UnlearnConfig
from ccu_fast.unlearn.job import run_job
from ccu_fast.unlearn.method import check_run, run_ccu
from ccu_fast.unlearn.model import check_problem
from ccu_fast.unlearn.settings import read_job
from ccu_fast.unlearn.study.own import compare_own
from tests.support import toy_unlearn
from tests.support.toy_unlearn import split, toy

pytestmark = pytest.mark.usefixtures("one_thread")

TOML = f"""{toy_unlearn.SETTINGS}test = "test.npz"
[forget]
classes = [1]
[budget]
steps = 3
batch = 20
[compare]
methods = ["fine_tune", "ssd", "ccu", "ccu_without_c"]
relearn = false
probe = false
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_unlearn.saved(tmp_path, pairs=toy(), test=toy(40, seed=5))
    (tmp_path / "settings.toml").write_text(TOML)
    return tmp_path


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many models were copied."""
    found: Counter[str] = Counter()
    plain = copy.deepcopy

    def counted(value: Any, *rest: Any) -> Any:
        found["models"] += isinstance(value, nn.Module) and not rest
        return plain(value, *rest)

    monkeypatch.setattr(copy, "deepcopy", counted)
    return found


class Restless(FusionModel):
    """Changes buffers in evaluation mode too, in place and by another tensor."""

    def __init__(self) -> None:
        super().__init__(5, 5, 4, hidden=16)
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))
        self.calls: Tensor
        self.last: Tensor

    def embed_other(self, other: Tensor) -> Tensor:
        self.calls += 1
        self.last = other.mean().detach()
        return super().embed_other(self.norm(other))


def restless() -> Restless:
    torch.manual_seed(0)
    model = Restless().train()
    model.norm.eval()
    model.visual_tower[0].weight.requires_grad_(False)
    model.other_head.weight.grad = torch.ones_like(model.other_head.weight)
    return model


class TestLooking:
    @pytest.mark.parametrize("given", [{}, {"lora": 2}, {"keep": "trained"}, {"keep": "trained", "lora": 2}])
    def test_the_model_is_afterwards_as_it_was_and_is_not_copied(
        self, given: dict[str, Any], copied: Counter[str]
    ) -> None:
        model, (forget, retain) = restless(), split()
        buffers = dict(model.named_buffers())
        state = {name: value.clone() for name, value in model.state_dict().items()}
        check_problem(model, forget, retain, "class")
        check_run(model, forget, retain, UnlearnConfig(**given))
        assert copied["models"] == 0
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(value is buffers[name] for name, value in model.named_buffers())
        assert model.training and model.visual_tower.training and not model.norm.training
        assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["visual_tower.0.weight"]
        assert [n for n, p in model.named_parameters() if p.grad is not None] == ["other_head.weight"]
        assert not any(module._forward_pre_hooks for module in model.modules())

    @pytest.mark.parametrize("given", [{}, {"lora": 2}, {"keep": "trained"}])
    @pytest.mark.parametrize("layer", ["spectral norm", "hook", "attribute", "new buffer", "one value everywhere"])
    def test_nothing_that_a_forward_pass_leaves_stays(self, layer: str, given: dict[str, Any]) -> None:
        model, (forget, retain) = toy_unlearn.make_model(), split()
        first = model.visual_tower[0]
        if layer == "spectral norm":
            torch.nn.utils.spectral_norm(first)
        elif layer == "hook":
            first.seen = {}
            first.register_forward_hook(lambda module, _, out: module.seen.update(last=out))
        elif layer == "attribute":
            first.register_forward_hook(lambda module, _, out: setattr(module, "last", out))
        elif layer == "new buffer":
            first.register_forward_hook(lambda module, _, out: module.register_buffer("last", out.detach()))
        else:  # torch writes into no such tensor
            first.register_buffer("one", torch.ones(1).expand(3), persistent=False)
        names, own = list(model.state_dict()), list(first.__dict__)
        check_problem(model, forget, retain, "class")
        check_run(model, forget, retain, UnlearnConfig(**given))
        assert list(model.state_dict()) == names and list(first.__dict__) == own
        copy.deepcopy(model)

    def test_nor_after_an_error(self) -> None:
        model, (forget, retain) = restless(), split()
        with pytest.raises(ValueError, match="matches none"):
            check_run(model, forget, retain, UnlearnConfig(trainable=("nothing",)))
        assert model.training and float(model.calls) == 0

    def test_a_run_copies_the_model_twice(self, copied: Counter[str]) -> None:
        forget, retain = split()
        run_ccu(toy_unlearn.trained(), forget, retain, UnlearnConfig(budget=Budget(steps=2, batch=8)))
        assert copied["models"] == 2  # the frozen one, and that which is trained

    def test_the_command_looks_once(self, folder: Path, copied: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
        looked = []
        for name in ("parameters_of_other", "parameters_of_visual", "buffers_of_other"):
            plain = getattr(method, name)
            monkeypatch.setattr(
                method, name, lambda *given, plain=plain, name=name: looked.append(name) or plain(*given)
            )
        job = read_job(folder / "settings.toml", {"ccu": {"lora": 2}})
        run_job(job, folder / "out")
        assert sorted(looked) == ["buffers_of_other", "parameters_of_other", "parameters_of_visual"]
        assert copied["models"] == 3  # and that which the user's function returned


class TestHashes:
    def test_are_those_of_the_functions_and_taken_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, data, hashes = toy_unlearn.trained(), toy(), Hashes()
        assert hashes.of(model) == tensors_hash(model.state_dict()) and hashes.of(data) == items_hash(data)
        monkeypatch.setattr(provenance, "tensors_hash", None)
        assert hashes.of(model) != hashes.of(data)

    def hashed(self, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
        found: Counter[str] = Counter()
        plain = provenance.tensors_hash

        def counted(tensors: Any, *rest: Any) -> str:
            digest = plain(tensors, *rest)
            found[digest] += 1
            return digest

        for module in [m for name, m in sys.modules.items() if name.startswith("ccu_fast")]:
            if getattr(module, "tensors_hash", None) is plain:
                monkeypatch.setattr(module, "tensors_hash", counted)
        return found

    def test_a_run_hashes_nothing_twice(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.hashed(monkeypatch)
        made = run_job(read_job(folder / "settings.toml"), folder / "out")["provenance"]
        wanted = [made[f"{name}_sha256"] for name in ("original", "forget", "retain", "test", "weights")]
        assert found == Counter(wanted)

    def test_nor_does_a_comparison(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.hashed(monkeypatch)
        made = compare_own(read_job(folder / "settings.toml"), folder / "out")["provenance"]
        assert found == Counter(made[f"{name}_sha256"] for name in ("original", "forget", "retain", "test"))

    def test_a_run_with_a_checkpoint_does_not(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.hashed(monkeypatch)
        config = UnlearnConfig(budget=Budget(steps=2, batch=8))
        run_ccu(toy_unlearn.trained(), *split(), config, checkpoint=Checkpoint(tmp_path / "run.pt"))
        assert len(found) == 3 and set(found.values()) == {1}


def calls_of(kind: str, **given: Any) -> float:
    """Calls of torch's operations in a step, those inside others left out."""
    forget, retain = split(kind)
    config = UnlearnConfig(forget=kind, **given)

    def counted(steps: int) -> int:
        few = replace(config, budget=Budget(steps=steps, batch=20))
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            run_ccu(toy_unlearn.trained(), forget, retain, few)
        outer = [
            event
            for event in seen.events()
            if event.name.startswith("aten::")
            and (event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::"))
        ]
        return len(outer)

    counted(2)
    return (counted(12) - counted(2)) / 10


@pytest.mark.parametrize(("kind", "most"), [("class", 685), ("instances", 385)])
def test_a_step_makes_no_needless_calls(kind: str, most: int) -> None:
    """With 128 rows a call costs more than its arithmetic."""
    assert calls_of(kind) <= most


def test_torch_has_imported_all_before_the_clock_runs() -> None:
    code = (
        "import sys; from ccu_fast.unlearn import loop; from tests.support.toy_unlearn import *\n"
        "class Clock(loop.Clock):\n"
        "    def __init__(self):\n"
        "        print('torch._dynamo' in sys.modules); super().__init__()\n"
        "loop.Clock = Clock\n"
        "from ccu_fast.unlearn.baselines.registry import BASELINES; from ccu_fast.unlearn.config import Budget\n"
        "BASELINES['fine_tune'].run(make_model(), *split(), 'class', Budget(steps=1))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"]
