"""A plot of every operation's rows, <op>.svg beside its JSON file: speed, and memory beyond the inputs.

``python -m benchmarks --plots`` draws them from the stored rows; they are not kept in the repository.

Where enough sizes were measured the plot has lines of the speedup over the baseline, otherwise bars of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.ops import OPS
from benchmarks.registry import label
from benchmarks.results import Row, read

FEWEST_POINTS = 3  # of a line; fewer shapes are bars
_STYLE: dict[str, dict[str, Any]] = {"ours": {"linewidth": 2.5}, "ceiling": {"linestyle": ":", "color": "black"}}
Value = Callable[[Row], float | None]


def write(folder: Path) -> list[Path]:
    """Draw the rows of a device's folder; the same rows give the same file. Nothing where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print(f"{folder.name}: matplotlib is not installed")
        return []

    # The text stays text, the ids do not depend on the process.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ccu_fast", "font.size": 9}):
        return [_draw(op, list(rows), folder) for op, rows in groupby(read(folder), key=lambda row: row.op)]


def _draw(op: str, rows: list[Row], folder: Path) -> Path:
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.p50_ms is not None]
    size = _only_varying(timed)
    figure = Figure(figsize=(9, 4) if size else (9, 0.6 + 0.24 * len(timed)), layout="constrained")
    left, right = figure.subplots(1, 2)
    baseline = OPS[op].baseline if op in OPS else rows[0].provider
    if size:
        _lines(left, timed, size, lambda row: 1.0 if row.provider == baseline else row.speedup_over.get(baseline))
        _lines(right, timed, size, _megabytes)
        left.set(ylabel=f"times faster than {baseline}", yscale="linear", ylim=(0, None))
        right.set(ylabel="MB beyond the inputs")
        right.legend(*left.get_legend_handles_labels(), loc="upper left", fontsize=7, frameon=False)
    else:
        _bars(left, timed, lambda row: row.p50_ms, names=True)
        _bars(right, timed, _megabytes, names=False)
        left.set(xlabel="ms")
        right.set(xlabel="MB beyond the inputs")
    figure.suptitle(f"{op}, {rows[0].environment.get('device', rows[0].device)}", fontsize=10)
    path = folder / f"{op}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def _only_varying(rows: Sequence[Row]) -> str | None:
    """The one size in which the shapes differ, if there are enough of them for a line."""
    shapes = list({label(row.shape): row.shape for row in rows}.values())
    if len(shapes) < FEWEST_POINTS:
        return None
    # If a second size differs too, only the shapes that share its most common value form one line.
    return max(shapes[0], key=lambda k: len({shape[k] for shape in shapes}))


def _megabytes(row: Row) -> float | None:
    return None if row.peak_extra_bytes is None else row.peak_extra_bytes / 1e6


def _lines(axes: Any, rows: Sequence[Row], size: str, value: Value) -> None:
    rest = [label({k: v for k, v in row.shape.items() if k != size}) for row in rows]
    common = max(rest, key=rest.count)
    on_line = [row for row, others in zip(rows, rest, strict=True) if others == common]
    for provider in dict.fromkeys(row.provider for row in on_line):
        points = [(row.shape[size], value(row)) for row in on_line if row.provider == provider]
        role = next(row.role for row in on_line if row.provider == provider)
        known = [(x, y) for x, y in points if y]
        if known:
            axes.loglog(*zip(*known, strict=True), marker="o", markersize=3, label=provider, **_STYLE.get(role, {}))
    axes.set_xlabel(f"{size} ({common})" if common else size)
    axes.grid(alpha=0.3)


def _bars(axes: Any, rows: Sequence[Row], value: Value, *, names: bool) -> None:
    said = [f"{row.provider}  {label(row.shape)}" for row in rows]
    values = [value(row) for row in rows]
    colours = [{"ours": "C0", "ceiling": "lightgrey"}.get(row.role, "C1") for row in rows]
    places = range(len(rows))
    axes.barh(places, [v or 0 for v in values], color=colours)
    axes.set_yticks(places, said if names else [""] * len(rows), fontsize=7)
    axes.invert_yaxis()
    for place, v in zip(places, values, strict=True):
        text = "–" if v is None else f"{v:.3g}"
        axes.annotate(text, (v or 0, place), xytext=(2, 0), textcoords="offset points", va="center", fontsize=7)
    axes.margins(x=0.15)
