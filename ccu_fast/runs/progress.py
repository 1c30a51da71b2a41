"""Progress reports of long work, and the time that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

Progress = Callable[[str, int, int, str], None]
"""Called as progress(stage, done, total, note)."""


def silent(stage: str, done: int, total: int, note: str) -> None:
    """The progress callback that says nothing."""


def renamed(progress: Progress, stage: str) -> Progress:
    """The same callback for work whose stage is to be called otherwise."""
    return lambda _, done, total, note: progress(stage, done, total, note)


class Clock:
    """Wall time and CPU time since it was made."""

    def __init__(self) -> None:
        self._start = (time.perf_counter(), time.process_time())

    def add(self, spent: Sequence[float]) -> None:
        """Count what ``read`` gave before a run was interrupted."""
        self._start = (self._start[0] - spent[0], self._start[1] - spent[1])

    def read(self) -> tuple[float, float]:
        """Seconds by the clock on the wall, and seconds that the process computed (all its threads together)."""
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]
