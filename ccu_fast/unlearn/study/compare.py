"""Every method on every task, scenario and seed, in parts that a kill cannot lose: what the published table is made of.

A part (one scenario of one seed on one task) is a file in ``parts/``, written when it is done; the models it trains are
kept in ``models/``. What another version, setting or FORMAT made is made anew.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ccu_fast import check
from ccu_fast.files import locked, output_file, write_whole
from ccu_fast.runs import cache
from ccu_fast.runs.progress import Progress, silent
from ccu_fast.runs.provenance import json_hash, versions
from ccu_fast.unlearn.baselines.registry import BASELINES
from ccu_fast.unlearn.study.methods import METHODS
from ccu_fast.unlearn.study.run import run_task
from ccu_fast.unlearn.study.tasks import SCENARIOS, TASKS, Task
from ccu_fast.unlearn.study.train import FORMAT as TRAINED_FORMAT

DEEP = ("gold_mask", "ccu")  # methods whose features are probed and whose relearning is timed
# Of the kept parts. Raise it whenever a method or the audit gives other figures with the same settings and versions, or
# figures of another form. What changes the trained models has a number of its own, in train.py.
FORMAT = 3


def compare(
    out: Path,
    *,
    tasks: Sequence[str | Task] | Mapping[str, Task] = tuple(TASKS),
    scenarios: Sequence[str] = SCENARIOS,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Run what is missing and gather all of it.

    Args:
        out: folder of ``parts/``, ``models/`` and ``results.json``; made if needed.
        tasks: names of embedded tasks, or tasks of your own: a list, or a mapping of which the values count. What is
            kept of a task is found again by its name and settings: give another name to other data.
        scenarios, seeds: what to run, every combination.
        methods: as for :func:`ccu_fast.unlearn.study.run.run_task`; None for all that the task does not leave out.
        progress: called as progress(stage, done, total, note).

    Returns:
        What ``results.json`` holds, with the embeddings: "versions", and under "unlearn" by task, scenario and seed
        what :func:`ccu_fast.unlearn.study.run.run_task` returns, with "best_baseline" – the published method with the
        smallest average gap in this part.

    Raises:
        ValueError: an unknown task, scenario or method; two tasks of one name; a damaged part.
        OSError: ``out`` cannot be written, or another process is at work in it.
    """
    chosen = _tasks(tasks)
    for name in scenarios:
        check.one_of("scenarios", name, SCENARIOS)
    for name in methods or ():
        check.one_of("methods", name, tuple(METHODS))
    output_file(out / "results.json")
    results: dict[str, Any] = {"versions": versions(), "seeds": list(seeds), "unlearn": {}}
    with locked(out / "lock"):
        for task, seed, scenario in itertools.product(chosen, seeds, scenarios):
            value = _part(out, task, scenario, seed, methods, progress)
            results["unlearn"].setdefault(task.name, {}).setdefault(scenario, {})[str(seed)] = value
        write_whole(out / "results.json", json.dumps(cache.without(results, "embeddings"), indent=1) + "\n")
    return results


def best_baseline(metrics: Mapping[str, Any]) -> str | None:
    """The published method with the smallest average gap; None where none ran."""
    gaps = {name: values["average_gap"] for name, values in metrics.items() if name in BASELINES}
    return min(gaps, key=lambda name: gaps[name], default=None)


def _tasks(tasks: Sequence[str | Task] | Mapping[str, Task]) -> list[Task]:
    given = list(tasks.values()) if isinstance(tasks, Mapping) else tasks
    chosen = [task if isinstance(task, Task) else TASKS[check.one_of("tasks", task, tuple(TASKS))] for task in given]
    names = [task.name for task in chosen]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks: expected every name once, got {names}")
    return chosen


def _part(
    out: Path, task: Task, scenario: str, seed: int, some: Sequence[str] | None, progress: Progress
) -> dict[str, Any]:
    methods = [name for name in METHODS if (name not in task.left_out if some is None else name in some)]

    def named(stage: str, done: int, total: int, note: str) -> None:
        progress(f"{task.name}, {scenario}, seed {seed}: {stage}", done, total, note)

    def compute() -> dict[str, Any]:
        value = run_task(task, seed, scenario, methods=methods, deep=DEEP, models=out / "models", progress=named)
        value["best_baseline"] = best_baseline(value["metrics"])
        return value

    # With some of the methods alone it is a part of its own, which leaves that with all of them where it is.
    which = "" if some is None else f"-{json_hash(methods)[:12]}"
    path = out / "parts" / f"{task.name}-{scenario}-seed{seed}{which}.json"
    return cache.part(path, _key(task, scenario, seed, methods), compute)


def _key(task: Task, scenario: str, seed: int, methods: Sequence[str]) -> str:
    settings = [asdict(task.ccu[scenario]), asdict(task.training), task.group]
    what = [task.name, scenario, seed, list(methods), list(DEEP), settings]
    return json_hash([{"compare": FORMAT, "trained": TRAINED_FORMAT}, versions(), what])
