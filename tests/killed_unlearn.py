"""A run to be killed. A program: ``python killed_unlearn.py CHECKPOINT SECONDS_BETWEEN_STEPS``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from toy_unlearn import split, trained

from ccu_fast.unlearn import Budget, Checkpoint, UnlearnConfig, unlearn

if __name__ == "__main__":
    pause = float(sys.argv[2])
    unlearn(
        trained(),
        *split(),
        UnlearnConfig(budget=Budget(steps=40, batch=10)),
        checkpoint=Checkpoint(Path(sys.argv[1]), every=5),
        progress=lambda *_: time.sleep(5 * pause),
    )
