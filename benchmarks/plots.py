"""Pictures of every operation's rows beside its JSON file: <op>-speed.svg, and <op>-memory.svg beyond the inputs.

``python -m benchmarks --plots`` draws them from the stored rows; they are not kept in the repository. Speed is over the
operation's baseline. Where enough sizes were measured a picture has lines, otherwise bars: ours, the baseline and the
fastest of the rest, five in all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.charts import FIVE, Bar, Group, Line, Scale, bars, lines, powers
from benchmarks.ops import OPS
from benchmarks.registry import label
from benchmarks.results import Row, read, replace

FEWEST_POINTS = 3  # of a line; fewer shapes are bars
Value = Callable[[Row], float | None]


def write(folder: Path) -> list[Path]:
    """Draw the rows of a device's folder; the same rows give the same files."""
    return [
        path for op, rows in groupby(read(folder), key=lambda row: row.op) for path in _draw(op, list(rows), folder)
    ]


def _draw(op: str, rows: list[Row], folder: Path) -> list[Path]:
    timed = [row for row in rows if row.p50_ms is not None and row.role in ("ours", "peer")]
    if not timed:
        return []
    baseline = OPS[op].baseline if op in OPS else timed[0].provider

    def speed(row: Row) -> float | None:
        return 1.0 if row.provider == baseline else row.speedup_over.get(baseline)

    shown = _shown(timed, baseline, speed)
    size = _only_varying(timed)
    written = []
    of = f"{op}, {rows[0].environment.get('device', rows[0].device)}"
    for what, title, value in (
        ("speed", f"times as fast as {baseline}", speed),
        ("memory", "MB beyond the inputs", _megabytes),
    ):
        known = [v for row in timed if row.provider in shown and (v := value(row))]
        if not known:
            continue
        told = f"{of}: {title}"
        ticks = powers([1.0, *known] if what == "speed" else known)
        scale = Scale(title, *ticks, origin=1.0 if what == "speed" else ticks[0][0])
        text = (_lines if size else _bars)(told, timed, shown, size, scale, value)
        written.append(folder / f"{op}-{what}.svg")
        replace(written[-1], text)
    return written


def _shown(rows: Sequence[Row], baseline: str, speed: Value) -> list[str]:
    """Providers by colour: our first way, the baseline, our first in bf16, and the fastest at any shape of the rest."""
    ours = {row.arithmetic: row.provider for row in reversed(rows) if row.role == "ours"}
    best: dict[str, float] = {}
    for row in rows:
        best[row.provider] = max(best.get(row.provider, 0.0), speed(row) or 0.0)
    peers = {row.provider for row in rows if row.role == "peer"}
    rest = sorted(peers, key=lambda name: best[name], reverse=True)
    first = [ours.get("working"), baseline if baseline in best else None, ours.get("bf16")]
    return list(dict.fromkeys(name for name in (*first, *rest) if name))[:FIVE]


def _only_varying(rows: Sequence[Row]) -> str | None:
    """The one size in which the shapes differ, if there are enough of them for a line."""
    shapes = list({label(row.shape): row.shape for row in rows}.values())
    if len(shapes) < FEWEST_POINTS:
        return None
    # If a second size differs too, only the shapes that share its most common value form one line.
    return max(shapes[0], key=lambda k: len({shape[k] for shape in shapes}))


def _megabytes(row: Row) -> float | None:
    return None if row.peak_extra_bytes is None else row.peak_extra_bytes / 1e6


def _lines(told: str, rows: Sequence[Row], shown: Sequence[str], size: str | None, scale: Scale, value: Value) -> str:
    assert size is not None
    rest = [label({k: v for k, v in row.shape.items() if k != size}) for row in rows]
    common = max(rest, key=rest.count)
    on_line = [row for row, others in zip(rows, rest, strict=True) if others == common]
    drawn = []
    for kind, provider in enumerate(shown):
        points = [(float(row.shape[size]), value(row)) for row in on_line if row.provider == provider]
        known = [(x, y) for x, y in points if y]
        if known:
            drawn.append(Line(provider, known, kind))
    x = Scale(f"{size} ({common})" if common else size, *powers([x for line in drawn for x, _ in line.points], most=6))
    return lines(told, x, scale, drawn)


def _bars(told: str, rows: Sequence[Row], shown: Sequence[str], size: str | None, scale: Scale, value: Value) -> str:
    groups = []
    for shape, of_shape in groupby(rows, key=lambda row: label(row.shape)):
        found = {row.provider: value(row) for row in of_shape}
        known = [(kind, found[name]) for kind, name in enumerate(shown) if name in found]
        bars_ = [Bar(v or None, "–" if v is None else f"{v:.3g}", kind) for kind, v in known]
        if bars_:
            groups.append(Group(shape.replace(",", ", "), [bars_]))
    return bars(told, [scale], groups, shown)
