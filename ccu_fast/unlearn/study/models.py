"""The models of a comparison, each trained once and kept: the original and those retrained without the forget set."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from ccu_fast.runs.progress import Progress
from ccu_fast.runs.provenance import load_model, save_model, tensors_hash, versions
from ccu_fast.unlearn.loop import Run
from ccu_fast.unlearn.study.scenario import Scenario
from ccu_fast.unlearn.study.tasks import Task
from ccu_fast.unlearn.study.train import train

KINDS = ("original", "gold_mask", "gold_drop")
# Of the kept models. Raise it whenever the same settings and versions train another model: other data, another
# architecture, another course of the training.
FORMAT = 1


def trained(
    task: Task, split: Scenario, kind: str, seed: int, *, folder: Path | None = None, progress: Progress | None = None
) -> Run:
    """The model, from ``folder`` if the same settings, versions and FORMAT left it there; its cost is that of its
    training.

    Args:
        task: what to train, and how.
        split: what "gold_mask" and "gold_drop" must not see.
        kind: "original", "gold_mask" (the visual half of the forget set hidden, which a method that keeps the other
            modality should equal) or "gold_drop" (both halves).
        seed: of the initial weights and the batches.
        folder: where models are kept; None keeps none.
        progress: see :func:`ccu_fast.unlearn.study.train.train`.
    """
    config = replace(task.training, seed=seed)
    which = f"{task.name}-seed{seed}" + ("" if kind == "original" else f"-{split.name}") + f"-{kind}"
    path = None if folder is None else folder / f"{which}.safetensors"
    made_of = {
        "task": task.name,
        "kind": kind,
        "training": asdict(config),
        "forgotten": None if kind == "original" else tensors_hash({"ids": split.forget.ids}),
        "versions": versions("ccu_fast", "torch", "python", "machine", "threads"),
        "format": FORMAT,
    }
    found = None if path is None else _found(path, made_of, task)
    if found is not None:
        return found
    data = split.retain if kind == "gold_drop" else split.train
    known = ~torch.isin(data.ids, split.forget.ids) if kind == "gold_mask" else None
    done = train(task.make_model, data, config, visual_known=known, progress=progress, stage=kind)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cost = {field.name: getattr(done, field.name) for field in fields(done) if field.name != "model"}
        save_model(done.model, path, {"made_of": made_of, "cost": cost})
    return done


def _found(path: Path, made_of: dict[str, Any], task: Task) -> Run | None:
    """The model of the file; None if there is none, or a damaged one, or one that was made of something else."""
    if not path.exists():
        return None
    try:
        state, provenance = load_model(path)
        if provenance["made_of"] != json.loads(json.dumps(made_of)):
            return None
        model: Any = task.make_model()
        model.load_state_dict(state)
        return Run(model=model.eval(), **provenance["cost"])
    except (KeyError, RuntimeError, TypeError, ValueError):
        return None
