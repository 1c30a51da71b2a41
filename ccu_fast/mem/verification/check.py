"""One thing that was looked at, and what was wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

SHOWN = 10


@dataclass(frozen=True)
class Check:
    """What came of one check.

    Attributes:
        passed: None: it was not done.
        told: what there is, with its figure; why it was not done.
        problems: the first ten, each a sentence.
        count: how many there are.
    """

    passed: bool | None
    told: str
    problems: list[str] = field(default_factory=list)
    count: int = 0


def checked(told: str, problems: Iterable[str]) -> Check:
    """A check that was done: passed if there are no problems."""
    listed, count = [], 0
    for problem in problems:
        count += 1
        if count <= SHOWN:
            listed.append(as_text(problem))
    return Check(not count, told, listed, count)


def skipped(why: str) -> Check:
    """A check that was not done."""
    return Check(None, as_text(why))


def as_text(value: str) -> str:
    """With escapes for what is no text: a file's name may be any bytes."""
    return value.encode("utf-8", "backslashreplace").decode()


def counted(n: int, what: str) -> str:
    """``1 picture``, ``2 pictures``."""
    return f"{n:,} {what}" + ("" if n == 1 else "s")
