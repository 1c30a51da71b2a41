"""digits-halves from training to audit: CCU, its ablations and the methods it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from ccu_fast import check
from ccu_fast.data.halves import CLASSES, PIXELS, load_halves
from ccu_fast.models.fusion import FusionModel
from ccu_fast.unlearn.audit import MODALITIES, audit, average_gap
from ccu_fast.unlearn.baselines.registry import BASELINES
from ccu_fast.unlearn.baselines.retrain import retrain
from ccu_fast.unlearn.ccu import ccu_method
from ccu_fast.unlearn.config import Progress, UnlearnConfig
from ccu_fast.unlearn.loop import HeldOut, Run, accuracies, embed, run
from ccu_fast.unlearn.protocol import TwoModalityModel
from ccu_fast.unlearn.scenario import Scenario, make_scenario
from ccu_fast.unlearn.training import TrainConfig, train

METHODS = {
    "original": "before unlearning",
    "gold_mask": "gold: visual masked",
    "gold_drop": "gold: both dropped",
    **{name: baseline.label for name, baseline in BASELINES.items()},
    "ccu": "CCU",
    "ccu_without_a": "CCU without (a)",
    "ccu_without_b": "CCU without (b)",
    "ccu_without_c": "CCU without (c)",
}
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
    """Train on digits-halves, unlearn with every method and audit each.

    The same arguments give the same figures, wall times aside. Runs on one CPU thread (the tensors are small; more
    threads only cost) and leaves the thread count and the global random state as they were.

    Args:
        seed: of the split, the initial weights, the batches and the choice of instances; at least 0.
        scenario: "class" or "instances".
        methods: keys of :data:`METHODS`; default all. "original" and "gold_mask" are always run: the rest is
            measured against them.
        forget_class: the class that goes, in [0, 9].
        forget_share: the share of training items that goes, in (0, 1).
        config: of CCU; its seed and kind of forgetting are set from the arguments.
        training: of the original and the retrained models; its seed is set from the argument.
        progress: called as progress(stage, done, total, note), several times a second.

    Returns:
        ``setting`` – task, scenario, seed, sizes, CCU's configuration. ``metrics`` – for each method what
        :func:`ccu_fast.unlearn.audit.audit` measures, the same against the gold_mask model ("gap_to_gold", signed;
        "mia_gap", absolute; "average_gap", see :func:`ccu_fast.unlearn.audit.average_gap`) and "label".
        ``cost`` – for each method "steps", "items", "seconds" and "ratio" (its seconds over gold_mask's). All of that
        is JSON. ``embeddings`` – float32 arrays for a picture, visual
        embeddings of test and forget items: "before" and "after" CCU (when it ran), int64 "labels", bool "forgotten".

    Raises:
        ValueError, TypeError: unknown scenario or method, a class, share or seed out of range.
    """
    check.integer("seed", seed, low=0)
    names = _order(methods)
    training = replace(training or TrainConfig(), seed=seed)
    split = make_scenario(load_halves(seed), scenario, forget_class=forget_class, forget_share=forget_share, seed=seed)
    config = replace(config or default_config(scenario), forget=scenario, seed=seed)
    with _one_thread():
        runs = _run_all(names, split, config, training, progress)
        metrics = {name: _audit(done.model, split) for name, done in runs.items()}
        embeddings = _embeddings(runs, split)
    gold = metrics["gold_mask"]
    for name, values in metrics.items():
        values["gap_to_gold"] = {m: _gaps(values[m], gold[m]) for m in MODALITIES}
        values["mia_gap"] = abs(values["mia_auc"] - gold["mia_auc"])
        values["average_gap"] = average_gap(values, gold)
        values["label"] = METHODS[name]
    return {
        "setting": {
            "task": "digits-halves",
            "scenario": scenario,
            "seed": seed,
            "forget_class": forget_class if scenario == "class" else None,
            "forget_items": len(split.forget),
            "retain_items": len(split.retain),
            "test_items": len(split.retain_test) + (0 if split.forget_test is None else len(split.forget_test)),
            "ccu": asdict(config),
            "training": asdict(training),
        },
        "metrics": metrics,
        "cost": {
            name: {
                "steps": done.steps,
                "items": done.items,
                "seconds": done.seconds,
                "ratio": done.seconds / runs["gold_mask"].seconds,
            }
            for name, done in runs.items()
        },
        "embeddings": embeddings,
    }


def default_config(scenario: str) -> UnlearnConfig:
    """CCU's settings for digits-halves, chosen on held-out items."""
    return UnlearnConfig(forget=scenario)


def _order(methods: Sequence[str] | None) -> list[str]:
    if methods is None:
        return list(METHODS)
    if isinstance(methods, str):
        raise TypeError(f"methods: expected a sequence of names, got the string {methods!r}")
    for name in methods:
        check.one_of("methods", name, tuple(METHODS))
    return [name for name in METHODS if name in methods or name in ALWAYS]


def _run_all(
    names: list[str], split: Scenario, config: UnlearnConfig, training: TrainConfig, progress: Progress | None
) -> dict[str, Run]:
    make_model = partial(FusionModel, PIXELS, PIXELS, CLASSES)
    runs = {"original": train(make_model, split.train, training, progress=progress, stage="original")}
    original = runs["original"].model
    held_out = _held_out(original, split) if config.early_stop else None
    loop = partial(run, original, split.forget, split.retain, seed=config.seed, held_out=held_out, progress=progress)
    for name in names:
        if name in ("gold_mask", "gold_drop"):
            kind = name.removeprefix("gold_")
            runs[name] = retrain(
                make_model, split.train, split.forget.ids, training, kind=kind, progress=progress, stage=name
            )
        elif name in BASELINES:
            runs[name] = BASELINES[name].run(
                original, split.forget, split.retain, split.name, config.budget,
                seed=config.seed, held_out=held_out, progress=progress, stage=name,
            )  # fmt: skip
        elif name != "original":
            runs[name] = loop(ccu_method(_ablation(name, config)), config.budget, stage=name)
    return runs


def _ablation(name: str, config: UnlearnConfig) -> UnlearnConfig:
    without = {
        "ccu_without_a": replace(config, forgetting=0.0),
        "ccu_without_b": replace(config, retention=0.0),
        "ccu_without_c": replace(config, separation=0.0),
    }
    return without.get(name, config)


def _held_out(original: TwoModalityModel, split: Scenario) -> HeldOut:
    unseen = split.retain_held_out
    level = 0.0 if split.name == "class" else accuracies(original, unseen)["visual"]
    return HeldOut(unseen, level)


def _audit(model: TwoModalityModel, split: Scenario) -> dict[str, Any]:
    return audit(
        model,
        forget=split.forget,
        retain=split.retain,
        retain_test=split.retain_test,
        forget_test=split.forget_test,
    )


def _gaps(values: dict[str, float | None], gold: dict[str, float | None]) -> dict[str, float | None]:
    pairs = ((k, v, gold[k]) for k, v in values.items())
    return {k: None if v is None or g is None else v - g for k, v, g in pairs}


def _embeddings(runs: dict[str, Run], split: Scenario) -> dict[str, Any]:
    parts = [split.retain_test, split.forget] + ([] if split.forget_test is None else [split.forget_test])
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
