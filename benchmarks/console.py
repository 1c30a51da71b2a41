"""What benchmarks say while they run, on stderr."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """One line, at once."""
    print(text, file=sys.stderr, flush=True)


def say_ends(stage: str, done: int, total: int, note: str) -> None:
    """A :data:`ccu_fast.runs.progress.Progress` that tells where a stage begins and ends."""
    if done in (0, total):
        say(f"{stage} {done}/{total} {note}".rstrip())
