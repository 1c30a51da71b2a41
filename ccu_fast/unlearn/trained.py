"""The trained models of a comparison, each trained once and kept: the original and those that never saw."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

import ccu_fast
from ccu_fast.unlearn.baselines.retrain import retrain
from ccu_fast.unlearn.config import Progress
from ccu_fast.unlearn.loop import Run
from ccu_fast.unlearn.saved import load_model, save_model
from ccu_fast.unlearn.scenario import Scenario
from ccu_fast.unlearn.tasks import Task
from ccu_fast.unlearn.training import train

KINDS = ("original", "gold_mask", "gold_drop")


def trained(
    task: Task, split: Scenario, kind: str, seed: int, *, folder: Path | None = None, progress: Progress | None = None
) -> Run:
    """The model, from ``folder`` if this very code and setting left it there; its seconds are those of its training.

    Args:
        task: what to train, and how.
        split: what "gold_mask" and "gold_drop" must not see.
        kind: "original", "gold_mask" (the visual half of the forget set hidden) or "gold_drop" (both halves).
        seed: of the initial weights and the batches.
        folder: where models are kept; None keeps none.
        progress: see :func:`ccu_fast.unlearn.training.train`.
    """
    config = replace(task.training, seed=seed)
    which = f"{task.name}-seed{seed}" + ("" if kind == "original" else f"-{split.name}") + f"-{kind}"
    path = None if folder is None else folder / f"{which}.safetensors"
    made_of = {
        "task": task.name,
        "kind": kind,
        "training": asdict(config),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "forgotten": None if kind == "original" else hashlib.sha256(split.forget.ids.numpy().tobytes()).hexdigest(),
        "source": _source(),
    }
    if path is not None and path.exists():
        state, provenance = load_model(path)
        if provenance["made_of"] == json.loads(json.dumps(made_of)):
            model: Any = task.make_model()
            model.load_state_dict(state)
            cost = provenance["cost"]
            return Run(model=model.eval(), **cost)
    if kind == "original":
        done = train(task.make_model, split.train, config, progress=progress, stage=kind)
    else:
        done = retrain(
            task.make_model, split.train, split.forget.ids, config,
            kind=kind.removeprefix("gold_"), progress=progress, stage=kind,
        )  # fmt: skip
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cost = {field.name: getattr(done, field.name) for field in fields(done) if field.name != "model"}
        save_model(done.model, path, {"made_of": made_of, "cost": cost})
    return done


def _source() -> str:
    """Changes with the code that decides what a trained model is."""
    root = Path(ccu_fast.__file__).parent
    digest = hashlib.sha256()
    parts = (
        "data/halves.py",
        "data/views.py",
        "models/fusion.py",
        "unlearn/training.py",
        "unlearn/baselines/retrain.py",
    )
    for name in parts:
        digest.update((root / name).read_bytes())
    return digest.hexdigest()
