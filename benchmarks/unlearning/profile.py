"""Where the time of a CCU run goes.

    python -m benchmarks.unlearning.profile     about a minute on one core, besides training; writes profile.json

Shares of a run's time by what it is spent on, from Python's profiler, which counts the C++ and BLAS calls inside a
function as that function's. One thread; seed 100, which no table uses.
"""

from __future__ import annotations

import cProfile
import pstats
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import store
from ccu_fast.unlearn.method import run_ccu
from ccu_fast.unlearn.study.tasks import SCENARIOS, TASKS, make_scenario
from ccu_fast.unlearn.study.train import trained

PROFILE = Path(__file__).parent / "profile.json"
SEED = 100
WORK = Path("runs/unlearning/models")
# What is told apart: file and function. Inner parts are taken out of outer ones below.
PARTS = {
    "whole": ("loop.py", "run"),
    "step": ("method.py", "__call__"),
    "backward": ("_tensor.py", "backward"),
    "optimiser": ("loop.py", "_only_move"),
    "prepare": ("method.py", "__init__"),
    "dampen": ("method.py", "damage"),
    "forgetting": ("method.py", "_gone"),
    "unseen items": ("unseen.py", "of"),
    "separation": ("objective.py", "separation_loss"),
    "task": ("model.py", "task_loss"),
    "neighbours": ("objective.py", "neighbour_loss"),
    "original model": ("method.py", "of"),
}
INNER = ("forgetting", "separation", "task", "neighbours", "original model")  # of a step; the rest embeds the batch


def shares(stats: dict[Any, Any]) -> dict[str, float]:
    """Of the whole run, by part; they add up to 1.

    Args:
        stats: of pstats.Stats: (file, line, function) → (…, …, own time, time with what it calls, callers).
    """
    seconds = {
        part: sum(
            value[3]
            for key, value in stats.items()
            if Path(key[0]).name == file and key[2] == function and _ours(key, part)
        )
        for part, (file, function) in PARTS.items()
    }
    whole = seconds.pop("whole")
    seconds["embedding the batch"] = seconds.pop("step") - sum(seconds[part] for part in INNER)
    seconds["forgetting"] -= seconds["unseen items"]
    seconds["rest"] = whole - sum(seconds.values())
    return {part: round(value / whole, 3) for part, value in seconds.items()}


def _ours(key: tuple[str, int, str], part: str) -> bool:
    folder = Path(key[0]).parent.name
    return folder == "torch" if part == "backward" else folder == "unlearn"


def main() -> None:
    """Profile both scenarios of the tasks with a small and a larger model."""
    torch.set_num_threads(1)
    rows = []
    for task in (TASKS["digits-halves"], TASKS["digit-views"]):
        for scenario in SCENARIOS:
            split = make_scenario(task, scenario, SEED)
            model = trained(task, split, "original", SEED, folder=WORK).model
            config = replace(task.ccu[scenario], seed=SEED)
            unseen = None if scenario == "class" else split.held_out
            run_ccu(model, split.forget, split.retain, config, unseen=unseen)
            profiler = cProfile.Profile()
            done = profiler.runcall(run_ccu, model, split.forget, split.retain, config, unseen=unseen)
            found = shares(pstats.Stats(profiler).stats)  # type: ignore[attr-defined]
            rows.append({"task": task.name, "scenario": scenario, "steps": done.steps, "shares": found})
    store(PROFILE, {"seed": SEED, "rows": rows}, depth=2)


if __name__ == "__main__":
    main()
