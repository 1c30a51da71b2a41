"""What a run costs in time."""

from __future__ import annotations

import time
from collections.abc import Sequence


class Clock:
    """Wall time and processor time since it was made."""

    def __init__(self) -> None:
        self._start = (time.perf_counter(), time.process_time())

    def add(self, spent: Sequence[float]) -> None:
        """Count what ``read`` gave before a run was interrupted."""
        self._start = (self._start[0] - spent[0], self._start[1] - spent[1])

    def read(self) -> tuple[float, float]:
        """Wall time and processor time (all threads together), in seconds."""
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]
