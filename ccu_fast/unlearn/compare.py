"""Every method on every task, scenario and seed, in parts that a kill cannot lose: what the published table is made of.

A part (one scenario of one seed on one task) is a file in ``parts/``, written when it is done; the models it trains are
kept in ``models/``. What another version of the code, of torch, or another setting made is made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import ccu_fast
from ccu_fast import check
from ccu_fast.files import write_whole
from ccu_fast.unlearn.audit import most_accurate
from ccu_fast.unlearn.baselines.registry import BASELINES
from ccu_fast.unlearn.config import Progress
from ccu_fast.unlearn.experiment import METHODS, run_task
from ccu_fast.unlearn.saved import versions
from ccu_fast.unlearn.scenario import SCENARIOS
from ccu_fast.unlearn.tasks import TASKS

DEEP = ("gold_mask", "ccu")


def compare(
    out: Path,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    scenarios: Sequence[str] = SCENARIOS,
    seeds: Sequence[int] = (0, 1, 2),
    methods: Sequence[str] | None = None,
    deep: Sequence[str] = DEEP,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run what is missing and gather all of it.

    Args:
        out: folder of ``parts/``, ``models/`` and ``results.json``; made if needed.
        tasks, scenarios, seeds: what to run, every combination.
        methods: keys of :data:`ccu_fast.unlearn.experiment.METHODS`; default all but what the task leaves out.
        deep: those whose features are probed and whose relearning is timed.
        progress: called as progress(stage, done, total, note).

    Returns:
        What ``results.json`` holds, with the embeddings: "versions", and under "unlearn" by task, scenario and seed
        what :func:`ccu_fast.unlearn.experiment.run_task` returns, with "best_baseline" – the published method with the
        smallest average gap in this part.

    Raises:
        ValueError: an unknown task, scenario or method.
    """
    for name in tasks:
        check.one_of("tasks", name, tuple(TASKS))
    for name in scenarios:
        check.one_of("scenarios", name, SCENARIOS)
    (out / "parts").mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"versions": versions(), "seeds": list(seeds), "unlearn": {}}
    for task in tasks:
        for seed in seeds:
            for scenario in scenarios:
                value = _part(out, task, scenario, seed, methods, deep, progress)
                results["unlearn"].setdefault(task, {}).setdefault(scenario, {})[str(seed)] = value
    write_whole(out / "results.json", json.dumps(without_embeddings(results), indent=1) + "\n")
    return results


def without_embeddings(results: dict[str, Any]) -> dict[str, Any]:
    """The figures alone."""
    figures = {
        task: {
            scenario: {seed: {k: v for k, v in part.items() if k != "embeddings"} for seed, part in by_seed.items()}
            for scenario, by_seed in by_scenario.items()
        }
        for task, by_scenario in results["unlearn"].items()
    }
    return {**results, "unlearn": figures}


def _part(
    out: Path,
    task: str,
    scenario: str,
    seed: int,
    methods: Sequence[str] | None,
    deep: Sequence[str],
    progress: Progress | None,
) -> dict[str, Any]:
    path = out / "parts" / f"{task}-{scenario}-seed{seed}.json"
    chosen = TASKS[task]
    methods = methods or [name for name in METHODS if name not in chosen.left_out]
    key = _key(methods, deep, asdict(chosen.ccu[scenario]), asdict(chosen.training), chosen.group)
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return dict(stored["value"])

    def named(stage: str, done: int, total: int, note: str) -> None:
        if progress is not None:
            progress(f"{task}, {scenario}, seed {seed}: {stage}", done, total, note)

    value = run_task(TASKS[task], seed, scenario, methods=methods, deep=deep, models=out / "models", progress=named)
    gaps = {name: values["average_gap"] for name, values in value["metrics"].items() if name in BASELINES}
    value["best_baseline"] = most_accurate(gaps, gaps) if gaps else None
    # Through JSON also when fresh, so that a resumed table cannot differ from an uninterrupted one.
    text = json.dumps({"key": key, "value": value}, default=_plain)
    write_whole(path, text)
    return dict(json.loads(text)["value"])


def _key(*settings: Any) -> str:
    """Changes with the settings, the versions and the code of what is compared."""
    digest = hashlib.sha256(json.dumps([versions(), settings]).encode())
    root = Path(ccu_fast.__file__).parent
    for folder in ("data", "models", "unlearn"):
        for source in sorted((root / folder).rglob("*.py")):
            if source.name != "tasks.py":  # its settings are in the key, each with the parts it decides
                digest.update(source.read_bytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"not JSON: {type(value).__name__}")
