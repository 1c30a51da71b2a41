"""One unlearning run on two processes: the result equals that of one, each has half of the rows, and one writes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ccu_fast.data.paired import PairedData
from ccu_fast.models.fusion import FusionModel
from ccu_fast.runs.checkpoint import Keeper
from ccu_fast.unlearn import Budget, Checkpoint, HeldOut, UnlearnConfig, unlearn
from ccu_fast.unlearn.baselines.registry import BASELINES
from tests.support import toy_unlearn
from tests.support.forked import on_ranks
from tests.support.toy_unlearn import TwoTowers, double, weights

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET = Budget(steps=9, batch=7)
CONFIGS = {
    "class": UnlearnConfig(dampen=2.0, bank=20, neighbours=3.0, anchor=1.0, saliency=0.5, budget=BUDGET),
    "instances": UnlearnConfig(forget="instances", budget=BUDGET, trainable=("visual_*", "projector.*", "*_head.*")),
    "unseen": UnlearnConfig(forget="instances", budget=BUDGET),
    "trained": UnlearnConfig(forget="instances", keep="trained", anchor=1.0, budget=BUDGET),
    "pairs": UnlearnConfig(forget="pairs", anchor=1.0, budget=BUDGET),
}


class Counted(FusionModel):
    """Counts the rows that a tower embeds for a step."""

    rows = 0

    def embed_visual(self, visual: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.training:
            Counted.rows += len(visual)
        return super().embed_visual(visual)


class Clip(TwoTowers):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(10.0))  # type: ignore[assignment]


def problem(kind: str) -> tuple[Any, PairedData, PairedData]:
    forget, retain = (double(part) for part in toy_unlearn.split("class" if kind == "class" else "instances"))
    model: nn.Module
    if kind == "pairs":
        torch.manual_seed(1)
        model = Clip()
    else:
        model = Counted(
            toy_unlearn.INPUTS, toy_unlearn.INPUTS, toy_unlearn.CLASSES, hidden=16, embedding=toy_unlearn.DIM
        )
        model.load_state_dict(toy_unlearn.trained().state_dict())
    return model.double(), forget, retain


def on_two(folder: Path, work: Callable[[int], Any]) -> list[Any]:
    toy_unlearn.trained()  # once, here
    return on_ranks(2, folder, work)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_two_processes_end_where_one_does(tmp_path: Path, kind: str) -> None:
    model, forget, retain = problem(kind)

    fresh = double(toy_unlearn.toy(21, seed=3))
    unseen = PairedData(fresh.visual, fresh.other, fresh.labels, fresh.ids + 100) if kind == "unseen" else None

    def run(group: Any) -> dict[str, Any]:
        Counted.rows = 0
        clean = unlearn(model, forget, retain, CONFIGS[kind], unseen=unseen, group=group)
        return {"weights": weights(clean), "rows": Counted.rows}

    one = run(None)
    both = on_two(tmp_path, lambda rank: run(dist.group.WORLD))
    assert torch.equal(both[0]["weights"], both[1]["weights"])
    torch.testing.assert_close(both[0]["weights"], one["weights"], rtol=1e-7, atol=1e-9)
    assert not torch.equal(one["weights"], weights(model))
    if kind != "pairs":
        assert one["rows"] == 9 * 14 and [b["rows"] for b in both] == [9 * 7, 9 * 7]


def test_a_baseline_and_stopping_early(tmp_path: Path) -> None:
    model, forget, retain = problem("class")
    unseen = double(toy_unlearn.toy(40, seed=3))
    held_out = HeldOut(unseen[unseen.labels != toy_unlearn.GONE], level=0.0, slack=0.5)
    stopping = UnlearnConfig(early_stop=True, budget=Budget(steps=60, learning_rate=1e-2, batch=14))

    def run(group: Any) -> list[torch.Tensor]:
        baselines = (
            BASELINES[name].run(model, forget, retain, "class", BUDGET, seed=0, group=group)
            for name in ("neg_grad_plus", "sfr_on", "mm_unlearner", "null_space")
        )
        return [
            *(weights(done.model) for done in baselines),
            weights(unlearn(model, forget, retain, stopping, held_out=held_out, group=group)),
        ]

    one, both = run(None), on_two(tmp_path, lambda rank: run(dist.group.WORLD))
    for alone, first, second in zip(one, *both, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, alone, rtol=1e-6, atol=1e-8)


def test_one_writes_and_both_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, forget, retain = problem("class")
    checkpoint = Checkpoint(tmp_path / "state.pt", every=3)
    whole = weights(unlearn(model, forget, retain, CONFIGS["class"]))
    wrote: list[int] = []
    kept = Keeper.save

    def save(self: Keeper, state: dict[str, Any]) -> None:
        kept(self, state)
        wrote.append(len(state["losses"]))
        shutil.copy(self.checkpoint.path, tmp_path / f"after{wrote[-1]}.pt")

    monkeypatch.setattr(Keeper, "save", save)
    (tmp_path / "bad.pt").write_bytes(b"no")

    def work(rank: int) -> dict[str, Any]:
        heard: list[int] = []

        def run(config: UnlearnConfig, where: Checkpoint | None) -> torch.Tensor:
            return weights(
                unlearn(
                    model,
                    forget,
                    retain,
                    config,
                    checkpoint=where,
                    group=dist.group.WORLD,
                    progress=lambda stage, done, total, note: heard.append(done),
                )
            )

        first = run(CONFIGS["class"], checkpoint)
        if rank == 0:  # what a run leaves that is killed after six steps
            os.replace(tmp_path / "after6.pt", checkpoint.path)
        resumed = run(CONFIGS["class"], checkpoint)
        problems = []
        for config, where in (
            (UnlearnConfig(budget=Budget(steps=2 + rank)), None),
            (UnlearnConfig(budget=Budget(batch=1)), None),
            (CONFIGS["class"], Checkpoint(tmp_path / "bad.pt")),
        ):
            with pytest.raises(ValueError) as error:
                run(config, where)
            problems.append(str(error.value))
        return {"heard": heard, "wrote": wrote, "problems": problems, "weights": [first, resumed]}

    one, two = on_two(tmp_path, work)
    assert (one["wrote"], two["wrote"]) == ([3, 6, 9, 9], [])
    assert (one["heard"], two["heard"]) == ([5, 9, 9], [])
    for first, second in zip(one["weights"], two["weights"], strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, whole, rtol=1e-7, atol=1e-9)
    assert one["problems"] == two["problems"]
    different, many, bad = one["problems"]
    assert "same model, data and settings on all 2 processes" in different
    assert "as many processes as a batch has items of each set (1), got 2" in many
    assert "expected an undamaged file" in bad
    # One process resumes what two have written.
    os.replace(tmp_path / "after3.pt", checkpoint.path)
    alone = unlearn(model, forget, retain, CONFIGS["class"], checkpoint=checkpoint)
    torch.testing.assert_close(weights(alone), whole, rtol=1e-7, atol=1e-9)
