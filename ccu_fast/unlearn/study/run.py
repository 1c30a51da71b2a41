"""A task from training to audit: CCU, its ablations and the methods it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.runs.progress import Progress
from ccu_fast.unlearn.audit import MODALITIES, audit, average_gap, linear_probe, relearn_steps
from ccu_fast.unlearn.baselines.registry import BASELINES
from ccu_fast.unlearn.config import UnlearnConfig
from ccu_fast.unlearn.loop import HeldOut, Run, accuracies, embed
from ccu_fast.unlearn.method import run_ccu
from ccu_fast.unlearn.model import TwoModalityModel
from ccu_fast.unlearn.study.models import KINDS, trained
from ccu_fast.unlearn.study.scenario import Scenario, make_scenario
from ccu_fast.unlearn.study.tasks import TASKS, Task
from ccu_fast.unlearn.study.train import TrainConfig

ABLATIONS: dict[str, Callable[[UnlearnConfig], UnlearnConfig]] = {
    "ccu": lambda config: config,
    "ccu_without_a": lambda config: replace(config, forgetting=0.0),
    "ccu_without_b": lambda config: replace(config, retention=0.0, anchor=0.0),
    "ccu_without_c": lambda config: replace(config, separation=0.0),
    "ccu_without_neighbours": lambda config: replace(config, neighbours=0.0),
    "ccu_without_damage": lambda config: replace(config, dampen=0.0),
}
METHODS = {
    "original": "before unlearning",
    "gold_mask": "gold: visual masked",
    "gold_drop": "gold: both dropped",
    **{name: baseline.label for name, baseline in BASELINES.items()},
    "ccu": "CCU",
    "ccu_without_a": "CCU without (a)",
    "ccu_without_b": "CCU without (b)",
    "ccu_without_c": "CCU without (c)",
    "ccu_without_neighbours": "CCU without neighbours",
    "ccu_without_damage": "CCU without dampening",
}
DEEP_ITEMS = 256
ALWAYS = ("original", "gold_mask")


def run_digits_halves(
    seed: int = 0,
    scenario: str = "class",
    *,
    methods: Sequence[str] | None = None,
    forget_class: int = 3,
    forget_share: float = 0.1,
    config: UnlearnConfig | None = None,
    training: TrainConfig | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """:func:`run_task` on digits-halves, with the training it should have (default: the task's)."""
    task = TASKS["digits-halves"]
    return run_task(
        replace(task, training=training or task.training),
        seed,
        scenario,
        methods=methods,
        forget_class=forget_class,
        forget_share=forget_share,
        config=config,
        progress=progress,
    )


def run_task(
    task: Task,
    seed: int = 0,
    scenario: str = "class",
    *,
    methods: Sequence[str] | None = None,
    forget_class: int = 3,
    forget_share: float = 0.1,
    config: UnlearnConfig | None = None,
    models: Path | None = None,
    deep: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train on a task, unlearn with every method and audit each.

    The same arguments give the same figures, wall times aside. Runs on one CPU thread (the tensors are small; more
    threads only cost) and leaves the thread count and the global random state as they were.

    Args:
        task: one of :data:`ccu_fast.unlearn.study.tasks.TASKS`, or one of your own.
        seed: of the split, the initial weights, the batches and the choice of instances; at least 0.
        scenario: "class" or "instances".
        methods: keys of :data:`METHODS`; default all. "original" and "gold_mask" are always run: the rest is
            measured against them. CCU without something that its configuration does not use would be CCU again and is
            left out.
        forget_class: the class that goes, in [0, 9].
        forget_share: the share of training items that goes, in (0, 1).
        config: of CCU, and the budget of all; its seed and kind of forgetting are set from the arguments.
        models: folder of the trained models, see :func:`ccu_fast.unlearn.study.models.trained`; None trains anew.
        deep: methods whose features are probed and whose relearning is timed.
        progress: called as progress(stage, done, total, note), several times a second.

    Returns:
        ``setting`` – task, scenario, seed, sizes, CCU's configuration. ``metrics`` – for each method what
        :func:`ccu_fast.unlearn.audit.audit` measures, the same against the gold_mask model ("gap_to_gold", signed;
        "mia_gap", absolute; "average_gap", see :func:`ccu_fast.unlearn.audit.average_gap`) and "label".
        ``cost`` – for each method "steps", "items", "seconds" (wall time), "cpu_seconds" (processor time of the one
        thread) and "ratio" (its processor time over gold_mask's). All of that is JSON. ``embeddings`` – float32 arrays
        for a picture, visual embeddings of test and forget items: "before" and "after" CCU (when it ran), int64
        "labels", bool "forgotten".

    Raises:
        ValueError, TypeError: unknown scenario or method, a class, share or seed out of range.
    """
    check.integer("seed", seed, low=0)
    names = _order(methods)
    split = make_scenario(
        task.load(seed), scenario, forget_class=forget_class, forget_share=forget_share, seed=seed, group=task.group
    )
    config = replace(config or task.ccu[scenario], forget=scenario, seed=seed)
    names = [name for name in names if name not in ABLATIONS or name == "ccu" or ABLATIONS[name](config) != config]
    with _one_thread():
        runs = _run_all(names, task, split, config, models, progress)
        metrics = {}
        for number, (name, done) in enumerate(runs.items(), start=1):
            metrics[name] = _audit(done.model, split, deep=name in deep)
            if progress is not None:
                progress("audit", number, len(runs), METHODS[name])
        embeddings = _embeddings(runs, split)
    gold = metrics["gold_mask"]
    for name, values in metrics.items():
        values["gap_to_gold"] = {m: _gaps(values[m], gold[m]) for m in MODALITIES}
        values["mia_gap"] = abs(values["mia_auc"] - gold["mia_auc"])
        values["average_gap"] = average_gap(values, gold)
        values["label"] = METHODS[name]
    return {
        "setting": {
            "task": task.name,
            "scenario": scenario,
            "seed": seed,
            "forget_class": forget_class if scenario == "class" else None,
            "forget_items": len(split.forget),
            "retain_items": len(split.retain),
            "test_items": len(split.retain_test) + (0 if split.forget_test is None else len(split.forget_test)),
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


def _order(methods: Sequence[str] | None) -> list[str]:
    if methods is None:
        return list(METHODS)
    if isinstance(methods, str):
        raise TypeError(f"methods: expected a sequence of names, got the string {methods!r}")
    for name in methods:
        check.one_of("methods", name, tuple(METHODS))
    return [name for name in METHODS if name in methods or name in ALWAYS]


def _run_all(
    names: list[str],
    task: Task,
    split: Scenario,
    config: UnlearnConfig,
    models: Path | None,
    progress: Progress | None,
) -> dict[str, Run]:
    runs = {"original": trained(task, split, "original", config.seed, folder=models, progress=progress)}
    original = runs["original"].model
    held_out = _held_out(original, split) if config.early_stop else None
    for name in names:
        if name in KINDS:
            runs[name] = trained(task, split, name, config.seed, folder=models, progress=progress)
        elif name in BASELINES:
            runs[name] = BASELINES[name].run(
                original,
                split.forget,
                split.retain,
                split.name,
                config.budget,
                seed=config.seed,
                held_out=held_out,
                progress=progress,
                stage=name,
            )
        else:
            runs[name] = run_ccu(
                original,
                split.forget,
                split.retain,
                ABLATIONS[name](config),
                held_out=held_out,
                progress=progress,
                stage=name,
            )
    return runs


def _held_out(original: TwoModalityModel, split: Scenario) -> HeldOut:
    unseen = split.retain_held_out
    level = 0.0 if split.name == "class" else accuracies(original, unseen)["visual"]
    return HeldOut(unseen, level)


def _audit(model: TwoModalityModel, split: Scenario, *, deep: bool) -> dict[str, Any]:
    result = audit(
        model,
        forget=split.forget,
        retain=split.retain,
        retain_test=split.retain_test,
        forget_test=split.forget_test,
    )
    if deep:
        # Of a sample: each step of relearning looks at the whole forget set again.
        forget, retain = _at_most(split.forget, DEEP_ITEMS), _at_most(split.retain, 9 * DEEP_ITEMS)
        result["probe"] = linear_probe(
            model, forget=forget, retain=retain, retain_test=split.retain_test, forget_test=split.forget_test
        )
        result["relearn_steps"] = relearn_steps(model, forget, retain)
    return result


def _at_most(data: PairedData, count: int) -> PairedData:
    """Evenly spread items."""
    return data.batch(torch.linspace(0, len(data) - 1, min(count, len(data))).long())


def _gaps(values: dict[str, float | None], gold: dict[str, float | None]) -> dict[str, float | None]:
    pairs = ((k, v, gold[k]) for k, v in values.items())
    return {k: None if v is None or g is None else v - g for k, v, g in pairs}


def _embeddings(runs: dict[str, Run], split: Scenario) -> dict[str, Any]:
    parts = [split.retain_test, _at_most(split.forget, 400)] + (
        [] if split.forget_test is None else [split.forget_test]
    )
    forgotten = [part is not split.retain_test for part in parts]
    result = {
        "labels": torch.cat([part.labels for part in parts]).numpy(),
        "forgotten": torch.cat([torch.full((len(p),), f) for p, f in zip(parts, forgotten, strict=True)]).numpy(),
    }
    for key, name in (("before", "original"), ("after", "ccu")):
        if name in runs:
            result[key] = torch.cat([embed(runs[name].model, part)[0] for part in parts]).numpy()
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
