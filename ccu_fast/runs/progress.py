"""How long work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""Called as progress(stage, done, total, note)."""


def silent(stage: str, done: int, total: int, note: str) -> None:
    """The progress callback that says nothing."""
