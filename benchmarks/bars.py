"""Compares the measured figures (results/) with the project's targets (bars.json)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.registry import label, parse
from benchmarks.results import Row

FILE = Path(__file__).resolve().parent / "bars.json"
_AT_MOST = ("memory", "bytes", "host_ms")


@dataclass(frozen=True)
class Bar:
    """One claim.

    Attributes:
        measure: "speed" (times faster than ``peer``, at least), "memory" (share of the peer's peak extra memory, at
            most), "bytes" (peak extra memory, at most), "floor" (share of the ceiling's speed, at least) or "host_ms"
            (milliseconds until the call is back in Python, at most).
    """

    device: str
    op: str
    shape: str
    provider: str
    measure: str
    bar: float
    source: str
    peer: str | None = None

    def measured(self, rows: Sequence[Row]) -> float | None:
        """The figure in these rows of one machine, or None."""
        wanted = parse(self.shape)
        here = {
            row.provider: row
            for row in rows
            if row.op == self.op and row.device == self.device and wanted.items() <= row.shape.items()
        }
        own, peer = here.get(self.provider), here.get(self.peer or "")
        if own is None:
            return None
        if self.measure == "speed":
            return own.speedup_over.get(self.peer or "")
        if self.measure == "floor":
            return own.share_of_floor
        if self.measure == "bytes":
            return own.peak_extra_bytes
        if self.measure == "host_ms":
            return own.host_ms
        if peer is None or own.peak_extra_bytes is None or not peer.peak_extra_bytes:
            return None
        return own.peak_extra_bytes / peer.peak_extra_bytes

    def met(self, value: float | None) -> bool:
        """A figure that was not measured does not meet its bar."""
        if value is None:
            return False
        return value <= self.bar if self.measure in _AT_MOST else value >= self.bar

    def said(self, value: float | None) -> str:
        """One line with the measured figure and its target."""
        verdict = "not measured" if value is None else "met" if self.met(value) else "NOT MET"
        sign = "≤" if self.measure in _AT_MOST else "≥"
        what = {
            "speed": f"times faster than {self.peer}",
            "memory": f"of the memory of {self.peer}",
            "bytes": "MB peak extra memory",
            "floor": "of the ceiling's speed",
            "host_ms": "ms until the call is back",
        }[self.measure]
        unit = 1e6 if self.measure == "bytes" else 1.0
        figure = "–" if value is None else f"{value / unit:.3g}"
        return (
            f"{verdict:12} {figure:>6} (bar {sign} {self.bar / unit:g} {what})  "
            f"{self.op} {label(parse(self.shape))} {self.provider} [{self.source}]"
        )


def load(path: Path = FILE) -> list[Bar]:
    """All bars."""
    return [Bar(**entry) for entry in json.loads(path.read_text())]


def check(bars: Sequence[Bar], rows: Sequence[Row]) -> tuple[list[str], bool]:
    """A line for each bar and one that counts them, and whether all are met."""
    values = [(bar, bar.measured(rows)) for bar in bars]
    met = sum(bar.met(value) for bar, value in values)
    missing = sum(value is None for _, value in values)
    lines = [bar.said(value) for bar, value in values]
    lines.append(f"{len(bars)} bars: {met} met, {len(bars) - met - missing} not met, {missing} not measured")
    return lines, met == len(bars)
