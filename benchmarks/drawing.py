"""Plots as the pages show them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GREY = "#808080"


@contextmanager
def figure_of(path: Path, size: tuple[float, float] = (9, 3.6)) -> Iterator[Any]:
    """A figure for :func:`save`, of a size in inches of 96 pixels; None without matplotlib, which is said."""
    try:
        import matplotlib
    except ImportError:
        print(f"{path.name}: matplotlib is not installed")
        yield None
        return
    # The text stays text, the ids do not depend on the process; transparent, and in greys that are read on white and
    # on black.
    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY)
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": "ccu_fast", "font.size": 9, **colours}
    with matplotlib.rc_context(options):
        from matplotlib.figure import Figure

        yield Figure(figsize=size, layout="constrained")


def save(figure: Any, path: Path, source: str | None = None) -> None:
    """The same bytes of the same figures. ``source`` says what it was drawn from, where the file's metadata is read."""
    figure.savefig(path, metadata={"Date": None, "Source": source}, transparent=True)
