"""Compares the measured figures (results/) with the project's targets (bars.json)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.registry import label, parse
from benchmarks.results import Row
from build_support.docs.generated import table_lines

FILE = Path(__file__).resolve().parent / "bars.json"
GPU = "GPU aims"  # the source of those that a visit to a GPU answers line by line
OF_PEERS = ("speed", "time", "memory")
_WHAT = {
    "speed": "times faster than {peer}",
    "time": "times the time of {peer}",
    "memory": "of the memory of {peer}",
    "ceiling": "times the time of the ceiling",
    "floor": "of the ceiling's speed",
    "copy": "of the speed of a copy of the same bytes",
    "gpu_ms": "ms of the GPU",
    "host_ms": "ms until the call is back",
    "bytes": "MB peak extra memory",
    "scratch": "MB beside inputs and gradients",
}
MEASURES = tuple(_WHAT)
_AT_LEAST = ("speed", "floor", "copy")


@dataclass(frozen=True)
class Bar:
    """One claim.

    Attributes:
        measure: at least "speed" (times faster than ``peer``), "floor" (share of the ceiling's speed) or "copy" (the
            same, of the GPU alone); at most "time" (in times that of ``peer``, per pair where ``peer_shape`` is given),
            "ceiling" (in times that of the ceiling), "memory" (share of the peer's peak extra memory), "bytes" (peak
            extra memory), "scratch" (the same without the gradients of both banks), "gpu_ms" (milliseconds of the GPU
            alone) or "host_ms" (until the call is back in Python). Of the GPU alone is the time of a CUDA graph, where
            the call is short enough for one: launches from Python take longer than such kernels.
        peer: several with | between them are the best of those that ran.
        peer_shape: what the peer computes at this shape, if it has other sizes.
    """

    device: str
    op: str
    shape: str
    provider: str
    measure: str
    bar: float
    source: str
    peer: str | None = None
    peer_shape: str | None = None

    @property
    def peers(self) -> list[str]:
        """The names in ``peer``."""
        return self.peer.split("|") if self.peer else []

    def measured(self, rows: Sequence[Row]) -> float | None:
        """The figure in these rows of one machine, or None."""
        here = self._here(rows)
        own = here.get(self.provider)
        if own is None:
            return None
        ratios = [own.speedup_over[peer] for peer in self.peers if own.speedup_over.get(peer)]
        if self.measure == "speed":
            return min(ratios, default=None)
        if self.measure == "time":
            return 1 / min(ratios) * self._fewer_pairs() if ratios else None
        if self.measure == "ceiling":
            return 1 / own.share_of_floor if own.share_of_floor else None
        if self.measure == "memory":
            of_peers = [here[peer].peak_extra_bytes for peer in self.peers if peer in here]
            least = min((b for b in of_peers if b), default=None)
            return None if least is None or own.peak_extra_bytes is None else own.peak_extra_bytes / least
        if self.measure == "scratch":
            return None if own.peak_extra_bytes is None else own.peak_extra_bytes - _gradients(own)
        ceiling = next((row.graph_ms for row in here.values() if row.role == "ceiling"), None)
        value: float | None = {
            "floor": own.share_of_floor,
            "copy": ceiling / own.graph_ms if ceiling and own.graph_ms else own.share_of_floor,
            "bytes": own.peak_extra_bytes,
            "gpu_ms": own.graph_ms or own.p50_ms,
            "host_ms": own.host_ms,
        }[self.measure]
        return value

    def without(self, rows: Sequence[Row]) -> str:
        """Which of the rows that it needs have no figure, and why; empty if it has all."""
        here = self._here(rows)
        if self.provider not in here:
            return "no row"
        bad = {name: here.get(name) for name in (self.provider, *self.peers)}
        return "; ".join(
            f"{name}: {'no row' if row is None else f'{row.status}, {row.reason}'}"
            for name, row in bad.items()
            if row is None or row.status != "ok"
        )

    def met(self, value: float | None) -> bool:
        """A figure that was not measured does not meet its bar."""
        if value is None:
            return False
        return value >= self.bar if self.measure in _AT_LEAST else value <= self.bar

    def verdict(self, value: float | None) -> str:
        """In two words."""
        return "not measured" if value is None else "met" if self.met(value) else "NOT MET"

    def figure(self, value: float | None) -> str:
        """Three digits in the unit of :meth:`aim`."""
        return "–" if value is None else f"{value / self._unit:.3g}"

    def aim(self) -> str:
        """What is asked for."""
        peer = (self.peer or "").replace("|", ", ")
        what = _WHAT[self.measure].format(peer=f"the best of {peer}" if len(self.peers) > 1 else peer)
        sign = "≥" if self.measure in _AT_LEAST else "≤"
        return f"{sign} {self.bar / self._unit:g} {what}" + (" per pair" if self.peer_shape else "")

    def said(self, value: float | None) -> str:
        """One line with the measured figure and its target."""
        return (
            f"{self.verdict(value):12} {self.figure(value):>6} (bar {self.aim()})  "
            f"{self.op} {label(parse(self.shape))} {self.provider} [{self.source}]"
        )

    @property
    def _unit(self) -> float:
        return 1e6 if self.measure in ("bytes", "scratch") else 1.0

    def _here(self, rows: Sequence[Row]) -> dict[str, Row]:
        wanted = parse(self.shape).items()
        return {
            row.provider: row
            for row in rows
            if row.op == self.op and row.device == self.device and wanted <= row.shape.items()
        }

    def _fewer_pairs(self) -> float:
        """Pairs of the peer for each of ours."""
        return _pairs(self.peer_shape) / _pairs(self.shape) if self.peer_shape else 1.0


def _pairs(shape: str) -> int:
    sizes = parse(shape)
    return math.prod(sizes[side] for side in "NM") if "M" in sizes else sizes["B"] ** 2


def _gradients(row: Row) -> int:
    """Bytes of the gradients of two banks of B rows."""
    itemsize: int = getattr(torch, row.dtype).itemsize
    return 2 * row.shape["B"] * row.shape["D"] * itemsize


def load(path: Path = FILE) -> list[Bar]:
    """All bars."""
    return [Bar(**entry) for entry in json.loads(path.read_text())]


def check(bars: Sequence[Bar], rows: Sequence[Row]) -> tuple[list[str], bool]:
    """A line for each bar and one that counts them, and whether all are met."""
    values = [(bar, bar.measured(rows)) for bar in bars]
    lines = [bar.said(value) for bar, value in values]
    lines.append(f"{len(bars)} bars: {_counts(values)}")
    return lines, all(bar.met(value) for bar, value in values)


def page(rows: Sequence[Row]) -> str:
    """The aims of a GPU in their order: what was measured, and what stands in the way where nothing was."""
    values = [(bar, bar.measured(rows)) for bar in load() if bar.source == GPU]
    cells = []
    for bar, value in values:
        lacks = bar.without(rows)
        figure = bar.figure(value) + (f" ({lacks})" if lacks else "")
        provider = "" if bar.provider == "ccu_fast" else f" ({bar.provider.removeprefix('ccu_fast_')})"
        what = f"{bar.op} {label(parse(bar.shape))}{provider}"
        cells.append([what, bar.aim(), figure.replace("|", "/")[:160], bar.verdict(value)])
    return "\n".join(
        [*table_lines(["what", "aim", "measured", ""], cells), "", f"{len(values)} aims: {_counts(values)}\n"]
    )


def _counts(values: Sequence[tuple[Bar, float | None]]) -> str:
    met = sum(bar.met(value) for bar, value in values)
    missing = sum(value is None for _, value in values)
    return f"{met} met, {len(values) - met - missing} not met, {missing} not measured"
