"""Every method on every task, scenario and seed, in parts that a kill cannot lose: what the published table is made of.

A part (one scenario of one seed on one task) is a file in ``parts/``, written when it is done; the models it trains are
kept in ``models/``. What another version, setting or FORMAT made is made anew.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ccu_fast import check
from ccu_fast.files import locked, output_file, write_whole
from ccu_fast.runs import cache
from ccu_fast.runs.progress import Progress, silent
from ccu_fast.runs.provenance import json_hash, versions
from ccu_fast.unlearn.baselines.registry import BASELINES
from ccu_fast.unlearn.study.run import METHODS, run_task
from ccu_fast.unlearn.study.tasks import SCENARIOS, TASKS, Task
from ccu_fast.unlearn.study.train import FORMAT as TRAINED_FORMAT

DEEP = ("gold_mask", "ccu")  # methods whose features are probed and whose relearning is timed
# Of the kept parts. Raise it whenever a method or the audit gives other figures with the same settings and versions, or
# figures of another form. What changes the trained models has a number of its own, in train.py.
FORMAT = 2


def compare(
    out: Path,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    scenarios: Sequence[str] = SCENARIOS,
    seeds: Sequence[int] = (0, 1, 2),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run what is missing and gather all of it.

    Args:
        out: folder of ``parts/``, ``models/`` and ``results.json``; made if needed.
        tasks, scenarios, seeds: what to run, every combination.
        progress: called as progress(stage, done, total, note).

    Returns:
        What ``results.json`` holds, with the embeddings: "versions", and under "unlearn" by task, scenario and seed
        what :func:`ccu_fast.unlearn.study.run.run_task` returns, with "best_baseline" – the published method with the
        smallest average gap in this part.

    Raises:
        ValueError: an unknown task or scenario; a damaged part.
        OSError: ``out`` cannot be written, or another process is at work in it.
    """
    for name in tasks:
        check.one_of("tasks", name, tuple(TASKS))
    for name in scenarios:
        check.one_of("scenarios", name, SCENARIOS)
    output_file(out / "results.json")
    results: dict[str, Any] = {"versions": versions(), "seeds": list(seeds), "unlearn": {}}
    with locked(out / "lock"):
        for task, seed, scenario in itertools.product(tasks, seeds, scenarios):
            value = _part(out, TASKS[task], scenario, seed, progress)
            results["unlearn"].setdefault(task, {}).setdefault(scenario, {})[str(seed)] = value
        write_whole(out / "results.json", json.dumps(cache.without(results, "embeddings"), indent=1) + "\n")
    return results


def _part(out: Path, task: Task, scenario: str, seed: int, progress: Progress) -> dict[str, Any]:
    methods = [name for name in METHODS if name not in task.left_out]

    def named(stage: str, done: int, total: int, note: str) -> None:
        progress(f"{task.name}, {scenario}, seed {seed}: {stage}", done, total, note)

    def compute() -> dict[str, Any]:
        value = run_task(task, seed, scenario, methods=methods, deep=DEEP, models=out / "models", progress=named)
        gaps = {name: values["average_gap"] for name, values in value["metrics"].items() if name in BASELINES}
        value["best_baseline"] = min(gaps, key=lambda name: gaps[name], default=None)
        return value

    path = out / "parts" / f"{task.name}-{scenario}-seed{seed}.json"
    return cache.part(path, _key(task, scenario, seed, methods), compute)


def _key(task: Task, scenario: str, seed: int, methods: Sequence[str]) -> str:
    settings = [asdict(task.ccu[scenario]), asdict(task.training), task.group]
    what = [task.name, scenario, seed, list(methods), list(DEEP), settings]
    return json_hash([{"compare": FORMAT, "trained": TRAINED_FORMAT}, versions(), what])
