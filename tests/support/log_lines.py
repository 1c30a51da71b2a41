"""What a command has written to a log, where there is no terminal."""

from __future__ import annotations


def stages(log: str) -> list[str]:
    """The stages that its lines are of, in the order in which they began; counts and notes left out."""
    return list(dict.fromkeys(line.partition(",")[0].rstrip("0123456789/ ") for line in log.splitlines()))
