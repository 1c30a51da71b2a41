"""The demo with tiny settings: real work, seconds instead of minutes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ccu_fast.cli import demo
from ccu_fast.cli.report import figures
from ccu_fast.mem.config import Settings
from ccu_fast.mem.study import run_digit_strips
from ccu_fast.mem.victim import Recipe
from ccu_fast.unlearn.config import Budget, UnlearnConfig
from ccu_fast.unlearn.study.run import run_task
from ccu_fast.unlearn.study.tasks import SCENARIOS, Task, TrainConfig

SETTINGS = Settings(rounds=1, surrogate_steps=1, pgd_steps=1, trigger_rounds=1, candidates=2, batch=32)

digit_strips = partial(
    run_digit_strips, settings=SETTINGS, recipe=Recipe(epochs=1, batch=32), n_train=64, n_test=16, width=32
)


def quick_task(task: Task, seed: int, scenario: str, **options: Any) -> dict[str, Any]:
    """CCU alone, in two steps from a model of one epoch."""
    configs = {name: UnlearnConfig(forget=name, budget=Budget(steps=2)) for name in SCENARIOS}
    quick = replace(task, training=TrainConfig(epochs=1), ccu=configs)
    return run_task(quick, seed, scenario, **{**options, "methods": ("ccu",)})


def quick_map(before: np.ndarray, after: np.ndarray, *, kind: str) -> list[np.ndarray]:
    """Two coordinates instead of t-SNE, which takes longer than all the rest."""
    return [before[:, :2], after[:, :2]]


# What to replace where.
REPLACEMENTS: tuple[tuple[Any, str, Any], ...] = (
    (demo, "run_task", quick_task),
    (demo, "run_digit_strips", digit_strips),
    (figures, "embedding_map", quick_map),
)
