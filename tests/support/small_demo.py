"""The demo with tiny settings: real work, seconds instead of minutes."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ccu_fast.cli import demo
from ccu_fast.cli.report import figures
from ccu_fast.mem.config import Settings
from ccu_fast.mem.study.run import run_digit_strips
from ccu_fast.mem.victim import Recipe
from ccu_fast.unlearn.config import Budget, UnlearnConfig
from ccu_fast.unlearn.study.run import run_digits_halves
from ccu_fast.unlearn.study.train import TrainConfig

SETTINGS = Settings(rounds=1, surrogate_steps=1, pgd_steps=1, trigger_rounds=1, candidates=2, batch=32)

digits_halves = partial(
    run_digits_halves,
    methods=("ccu",),
    training=TrainConfig(epochs=1),
    config=UnlearnConfig(budget=Budget(steps=2)),
)
digit_strips = partial(
    run_digit_strips, settings=SETTINGS, recipe=Recipe(epochs=1, batch=32), n_train=64, n_test=16, width=32
)


def quick_map(before: np.ndarray, after: np.ndarray, *, kind: str) -> list[np.ndarray]:
    """Two coordinates instead of t-SNE, which takes longer than all the rest."""
    return [before[:, :2], after[:, :2]]


# What to replace where.
REPLACEMENTS: tuple[tuple[Any, str, Any], ...] = (
    (demo, "run_digits_halves", digits_halves),
    (demo, "run_digit_strips", digit_strips),
    (figures, "embedding_map", quick_map),
)
