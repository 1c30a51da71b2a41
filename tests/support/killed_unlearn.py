"""A run to be killed. A program: ``python -m tests.support.killed_unlearn CHECKPOINT SECONDS_BETWEEN_STEPS``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from ccu_fast.unlearn import Budget, Checkpoint, UnlearnConfig, unlearn
from tests.support.toy_unlearn import split, trained

if __name__ == "__main__":
    pause = float(sys.argv[2])
    unlearn(
        trained(),
        *split(),
        UnlearnConfig(budget=Budget(steps=40, batch=10)),
        checkpoint=Checkpoint(Path(sys.argv[1]), every=5),
        progress=lambda *_: time.sleep(5 * pause),
    )
