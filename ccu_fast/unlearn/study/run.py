"""A task from training to audit: CCU, its ablations and the methods it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ccu_fast import check
from ccu_fast.runs.progress import Progress, renamed, silent
from ccu_fast.unlearn.config import UnlearnConfig
from ccu_fast.unlearn.loop import Run, ready
from ccu_fast.unlearn.study.measure import against_gold, measured, pictured, sizes_of
from ccu_fast.unlearn.study.methods import METHODS, differs, unlearned
from ccu_fast.unlearn.study.tasks import FORGET_CLASS, Scenario, Task, make_scenario
from ccu_fast.unlearn.study.train import KINDS, trained

ALWAYS = ("original", "gold_mask")


def run_task(
    task: Task,
    seed: int,
    scenario: str,
    *,
    methods: Sequence[str] = tuple(METHODS),
    models: Path | None = None,
    deep: Sequence[str] = (),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train on a task, unlearn with every method and audit each.

    The same arguments give the same figures, wall times aside. Runs on one CPU thread (the tensors are small; more
    threads only cost) and leaves the thread count and the global random state as they were.

    Args:
        task: one of :data:`ccu_fast.unlearn.study.tasks.TASKS`, or one of your own.
        seed: of the split, the initial weights, the batches and the choice of instances; at least 0.
        scenario: "class" or "instances".
        methods: keys of :data:`METHODS`. "original" and "gold_mask" are always run: the rest is measured against them.
            CCU without something that its configuration does not use would be CCU again and is left out. Where
            instances are forgotten it gets ``held_out`` of the scenario as its unseen items.
        models: folder of the trained models, see :func:`ccu_fast.unlearn.study.train.trained`; None trains anew.
        deep: methods whose features are probed and whose relearning is timed.
        progress: called as progress(stage, done, total, note), several times a second.

    Returns:
        ``setting`` – task, scenario, seed, numbers of items, "sizes", which count the views of one thing once, CCU's
        configuration. ``metrics`` – for each method what :func:`ccu_fast.unlearn.audit.audit` measures, the same
        against the gold_mask model ("gap_to_gold", signed; "mia_gap", absolute; "average_gap", see
        :func:`ccu_fast.unlearn.audit.average_gap`; "worst_gap", its "points" and "figure"; "verdict", its "kind" and
        "text") and "label".
        ``cost`` – for each method "steps", "items", "seconds" (wall time), "cpu_seconds" (CPU time of the one
        thread) and "ratio" (its CPU time over gold_mask's). All of that is JSON. ``embeddings`` – float32 arrays
        for a picture, visual embeddings of test and forget items: "before" and "after" CCU (when it ran), int64
        "labels", bool "forgotten".

    Raises:
        ValueError: unknown scenario or method.
    """
    for name in methods:
        check.one_of("methods", name, tuple(METHODS))
    split = make_scenario(task, scenario, seed)
    config = replace(task.ccu[scenario], seed=seed)
    names = [name for name in METHODS if name in ALWAYS or (name in methods and differs(name, config))]
    with _one_thread():
        runs = run_all(names, task, split, config, models, progress)
        metrics = {}
        for number, (name, done) in enumerate(runs.items(), start=1):
            metrics[name] = measured(done.model, split, probe=name in deep, relearn=name in deep)
            progress("audit", number, len(runs), METHODS[name])
        shown = {"before": "original", "after": "ccu"}
        embeddings = pictured(split, {key: runs[name].model for key, name in shown.items() if name in runs})
    gold, sizes = metrics["gold_mask"], sizes_of(split, task.group)
    for name, values in metrics.items():
        values |= {**against_gold(values, gold, sizes), "label": METHODS[name]}
    return {
        "setting": {
            "task": task.name,
            "scenario": scenario,
            "seed": seed,
            "forget_class": FORGET_CLASS if scenario == "class" else None,
            "forget_items": len(split.forget),
            "retain_items": len(split.retain),
            "test_items": len(split.retain_test) + (0 if split.forget_test is None else len(split.forget_test)),
            "sizes": sizes,
            "ccu": asdict(config),
            "training": asdict(replace(task.training, seed=seed)),
        },
        "metrics": metrics,
        "cost": {
            name: {
                "steps": done.steps,
                "items": done.items,
                "seconds": done.seconds,
                "cpu_seconds": done.cpu_seconds,
                "ratio": done.cpu_seconds / runs["gold_mask"].cpu_seconds,
            }
            for name, done in runs.items()
        },
        "embeddings": embeddings,
    }


def run_all(
    names: list[str], task: Task, split: Scenario, config: UnlearnConfig, models: Path | None, progress: Progress
) -> dict[str, Run]:
    """The models of some methods by name.

    Args:
        names: of :data:`METHODS`, "original" first.
        task, split: the task, and its scenario, which says what is forgotten.
        config: CCU's settings; its seed and its budget are every method's.
        models: folder of the trained models, see :func:`ccu_fast.unlearn.study.train.trained`; None trains anew.
        progress: called as progress(stage, done, total, note).
    """
    runs: dict[str, Run] = {}
    for name in names:
        heard = renamed(progress, METHODS[name])
        if name in KINDS:
            runs[name] = trained(task, split, name, config.seed, folder=models, progress=heard)
        else:
            runs[name] = unlearned(name, runs["original"].model, split, config, progress=heard)
    return runs


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ready()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
