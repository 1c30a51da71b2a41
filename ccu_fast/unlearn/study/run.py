"""A task from training to audit: CCU, its ablations and the methods it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.runs.progress import Progress, silent
from ccu_fast.unlearn.audit import MODALITIES, audit, average_gap, linear_probe, relearn_steps, verdict, worst_gap
from ccu_fast.unlearn.baselines.registry import BASELINES
from ccu_fast.unlearn.config import UnlearnConfig
from ccu_fast.unlearn.loop import Run, embed
from ccu_fast.unlearn.method import run_ccu
from ccu_fast.unlearn.model import TwoModalityModel
from ccu_fast.unlearn.study.tasks import FORGET_CLASS, Scenario, Task, make_scenario
from ccu_fast.unlearn.study.train import KINDS, trained

TOLD = ", told"  # how the name of a baseline ends that is told to keep the other modality
# Not those that train nothing, or are told already.
TELLABLE = (
    "random_label",
    "salun",
    "neg_grad_plus",
    "scrub",
    "bad_teacher",
    "boundary_shrink",
    "contrastive_unlearning",
    "clip_erase",
    "sfr_on",
    "mm_unlearner",
    "null_space",
)
METHODS = {
    "original": "before unlearning",
    "gold_mask": "gold: visual masked",
    "gold_drop": "gold: both dropped",
    "gold_again": "gold, another seed",
    **{name: baseline.label for name, baseline in BASELINES.items()},
    **{name + TOLD: BASELINES[name].label + TOLD for name in TELLABLE},
    "ccu": "CCU",
    "ccu_without_a": "CCU without (a)",
    "ccu_without_b": "CCU without (b)",
    "ccu_without_c": "CCU without (c)",
    "ccu_without_neighbours": "CCU without neighbours",
    "ccu_without_damage": "CCU without dampening",
    "ccu_without_unseen": "CCU without unseen items",
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "ccu_without_a": {"forgetting": 0.0},
    # The other modality is trained, and nothing holds it.
    "ccu_without_b": {"keep": "trained", "retention": 0.0},
    "ccu_without_c": {"separation": 0.0},
    "ccu_without_neighbours": {"neighbours": 0.0},
    "ccu_without_damage": {"dampen": 0.0},
    "ccu_without_unseen": {},
}
# What a short comparison runs: each method once, and one retraining of each kind.
ONCE = tuple(name for name in METHODS if not name.endswith(TOLD) and name != "gold_again")
ALWAYS = ("original", "gold_mask")
DEEP_ITEMS = 256


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
    names = [name for name in METHODS if name in ALWAYS or (name in methods and _differs(name, config))]
    with _one_thread():
        runs = run_all(names, task, split, config, models, progress)
        metrics = {}
        for number, (name, done) in enumerate(runs.items(), start=1):
            metrics[name] = _audit(done.model, split, deep=name in deep)
            progress("audit", number, len(runs), METHODS[name])
        embeddings = _embeddings(runs, split)
    gold, sizes = metrics["gold_mask"], _sizes(split, task.group)
    for name, values in metrics.items():
        values["gap_to_gold"] = {m: _gaps(values[m], gold[m]) for m in MODALITIES}
        values["mia_gap"] = abs(values["mia_auc"] - gold["mia_auc"])
        values["average_gap"] = average_gap(values, gold)
        values["worst_gap"] = dict(zip(("points", "figure"), worst_gap(values, gold), strict=True))
        values["verdict"] = asdict(verdict(values, gold, sizes=sizes))
        values["label"] = METHODS[name]
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
        if name in KINDS:
            runs[name] = trained(task, split, name, config.seed, folder=models, progress=progress)
            continue
        sets = runs["original"].model, split.forget, split.retain
        baseline = BASELINES.get(name.removesuffix(TOLD))
        if baseline is not None:
            runs[name] = baseline.run(
                *sets,
                split.name,
                config.budget,
                keep_other=float(name.endswith(TOLD)),
                seed=config.seed,
                progress=progress,
                stage=name,
            )
        else:
            own = replace(config, **ABLATIONS.get(name, {}))
            unseen = None if name == "ccu_without_unseen" or own.forget == "class" else split.held_out
            runs[name] = run_ccu(*sets, own, unseen=unseen, progress=progress, stage=name)
    return runs


def _differs(name: str, config: UnlearnConfig) -> bool:
    """Whether a method is no ablation, or one of something that these settings use."""
    if name == "ccu_without_unseen":
        return config.forget != "class"
    changed = ABLATIONS.get(name)
    return changed is None or any(config.used(key) != value for key, value in changed.items())


def _audit(model: TwoModalityModel, split: Scenario, *, deep: bool) -> dict[str, Any]:
    result: dict[str, Any] = audit(model, **split.judged)
    if deep:
        # Of a sample: each step of relearning looks at the whole forget set again.
        forget, retain = _at_most(split.forget, DEEP_ITEMS), _at_most(split.retain, 9 * DEEP_ITEMS)
        result["probe"] = linear_probe(model, **replace(split, forget=forget, retain=retain).judged)
        result["relearn_steps"] = relearn_steps(model, forget, retain)
    return result


def _at_most(data: PairedData, count: int) -> PairedData:
    """Evenly spread items."""
    return data.batch(torch.linspace(0, len(data) - 1, min(count, len(data))).long())


def _sizes(split: Scenario, group: int) -> dict[str, int]:
    """How many independent items each part has: things, not views of them."""
    parts = {
        "forget_train": split.forget,
        "forget_test": split.forget_test,
        "retain_train": split.retain,
        "retain_test": split.retain_test,
    }
    return {name: len(torch.unique(part.ids // group)) for name, part in parts.items() if part is not None}


def _gaps(values: dict[str, float | None], gold: dict[str, float | None]) -> dict[str, float | None]:
    pairs = ((k, v, gold[k]) for k, v in values.items())
    return {k: None if v is None or g is None else v - g for k, v, g in pairs}


def _embeddings(runs: dict[str, Run], split: Scenario) -> dict[str, Any]:
    sets = (split.retain_test, _at_most(split.forget, 400), split.forget_test)
    parts = [part for part in sets if part is not None]
    forgotten = [torch.full((len(part),), part is not split.retain_test) for part in parts]
    result = {
        "labels": torch.cat([part.labels for part in parts]).numpy(),
        "forgotten": torch.cat(forgotten).numpy(),
    }
    for key, name in (("before", "original"), ("after", "ccu")):
        if name in runs:
            result[key] = torch.cat([embed(runs[name].model, part)[0] for part in parts]).numpy()
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # The first optimiser of a process makes torch import for seconds, which is no method's time.
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    try:
        yield
    finally:
        torch.set_num_threads(threads)
