"""The demo with tiny settings: real work, seconds instead of minutes. Also a program: ``python small_demo.py OUT``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from ccu_fast import demo
from ccu_fast.mem.experiment import run_digit_strips
from ccu_fast.mem.settings import Settings
from ccu_fast.mem.victim import Recipe
from ccu_fast.unlearn.config import Budget, UnlearnConfig
from ccu_fast.unlearn.experiment import run_digits_halves
from ccu_fast.unlearn.training import TrainConfig

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


def install(target: Any = demo) -> None:
    """Make the demo of this process small."""
    target.run_digits_halves, target.run_digit_strips = digits_halves, digit_strips


if __name__ == "__main__":
    install()
    demo.run(Path(sys.argv[1]), quiet=True)
