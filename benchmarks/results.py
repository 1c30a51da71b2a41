"""The rows of a measurement, and the JSON files that store them: results/<device>/<op>.json.

:func:`store` writes the figures of every benchmark, one row per line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.registry import label

FOLDER = Path(__file__).resolve().parent / "results"


@dataclass
class Row:
    """One provider at one shape.

    Attributes:
        status: "ok"; "wrong" (the gate failed: nothing was timed); "unavailable"; "error".
        backend: which of ccu_fast's backends ran, for ours.
        reason: why the status is not "ok".
        gate_errors, gate_limits: error of each output against ``reference``, and what was allowed.
        p20_ms, p50_ms, p80_ms: quantiles over ``rounds`` interleaved rounds.
        host_ms: median time until the call returned to Python (a GPU may still be working).
        graph_ms: median time of the same call replayed as a CUDA graph, for calls below a millisecond.
        speedup_over: for each peer timed in the same run, the median of the ratios taken round by round.
        share_of_floor: time of the ceiling (the FLOPs or bytes and nothing else) divided by this time, taken alike.
        peak_extra_bytes: peak memory of one call beyond its inputs; results included.
    """

    op: str
    shape: dict[str, int]
    dtype: str
    device: str
    provider: str
    role: str
    arithmetic: str
    status: str = "ok"
    reason: str | None = None
    backend: str | None = None
    note: str | None = None
    reference: str | None = None
    gate_errors: dict[str, float | None] = field(default_factory=dict)
    gate_limits: dict[str, float] = field(default_factory=dict)
    rounds: int | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    host_ms: float | None = None
    graph_ms: float | None = None
    speedup_over: dict[str, float] = field(default_factory=dict)
    share_of_floor: float | None = None
    tflops: float | None = None
    gb_per_s: float | None = None
    peak_extra_bytes: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def group(self) -> tuple[str, str, str]:
        """What was measured together in one run."""
        return self.op, label(self.shape), self.dtype


def read(folder: Path) -> list[Row]:
    """All rows of a device's folder, in file order."""
    return [row for path in sorted(folder.glob("*.json")) for row in _load(path)]


def write(folder: Path, rows: Iterable[Row]) -> None:
    """Store rows. New rows of a shape replace all its old ones, so rows that are compared always come from one run."""
    by_op: dict[str, list[Row]] = {}
    for row in rows:
        by_op.setdefault(row.op, []).append(row)
    folder.mkdir(parents=True, exist_ok=True)
    for op, new in by_op.items():
        path = folder / f"{op}.json"
        groups = {row.group for row in new}
        kept = [row for row in _load(path) if row.group not in groups] if path.exists() else []
        ordered = sorted(kept + new, key=lambda row: (row.dtype, tuple(row.shape.values())))  # stable within a group
        store(path, [asdict(row) for row in ordered], depth=1)


def store(path: Path, value: Any, depth: int) -> None:
    """Write figures as JSON in one step, as :func:`text` sets them."""
    replace(path, text(value, depth))


def text(value: Any, depth: int) -> str:
    """JSON in which what lies ``depth`` levels down is a line, whatever is in it: a changed row changes one line.

    Keys stay in their order. A list or an object that holds neither lists nor objects is one line at any level.
    """
    # Through JSON first, which leaves lists, objects with keys that are strings, and plain values.
    return _spread(json.loads(json.dumps(value, allow_nan=False)), depth, "") + "\n"


def _spread(value: Any, depth: int, indent: str) -> str:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if depth == 0 or not any(isinstance(item, dict | list) for item in inner):
        return json.dumps(value)
    names = [f"{json.dumps(key)}: " for key in value] if isinstance(value, dict) else [""] * len(value)
    lines = [indent + name + _spread(item, depth - 1, indent + " ") for name, item in zip(names, inner, strict=True)]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return start + "\n" + ",\n".join(lines) + "\n" + indent[1:] + end


def replace(path: Path, text: str) -> None:
    """Write a file in one step: an interrupted run leaves the old one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def _load(path: Path) -> list[Row]:
    return [Row(**row) for row in json.loads(path.read_text())]
