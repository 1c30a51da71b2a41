"""Charts as SVG, written by hand: small files, the same bytes everywhere, and text that stays text.

Every chart has colours for light and for dark pages. An image in a page takes the colour scheme of the page, so one
file serves both; ``scheme`` fixes it, for pages that choose between two files.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"  # those that pages show
WIDTH = 640  # of a chart, in pixels
TEXT = 18  # on a phone, where the chart is 400 pixels wide, 11
LETTER = 0.58  # the width of a letter over its height, about: an image cannot measure its text
BOLD = 1.1  # times that
GAP = 22  # from one line of text to the next
EDGE = 14
MARKED = 12  # points of a line that are marked; more are a curve
FIVE = 5  # lines in a chart, or bars in a group: more cannot be told apart

# background, text, lesser text, grid; then the lines and bars, ours first
SCHEMES = {
    "light": ("#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#0969da", "#bc4c00", "#1a7f37", "#8250df", "#6e7781"),
    "dark": ("#0d1117", "#e6edf3", "#a3adb8", "#363d46", "#58a6ff", "#f0883e", "#3fb950", "#bc8cff", "#9aa4af"),
}


@dataclass(frozen=True)
class Scale:
    """An axis: what it shows, the values at which it is labelled, from end to end, and where its bars start."""

    label: str
    ticks: Sequence[float]
    said: Sequence[str] = ()
    log: bool = True
    origin: float = 1.0

    def place(self, value: float) -> float:
        """From 0 at the first tick to 1 at the last.

        Raises:
            ValueError: the value lies outside of them.
        """
        if not self.ticks[0] <= value <= self.ticks[-1]:
            raise ValueError(f"{self.label}: expected values from {self.ticks[0]} to {self.ticks[-1]}, got {value}")
        first, last, at = (math.log(v) if self.log else v for v in (self.ticks[0], self.ticks[-1], value))
        return (at - first) / (last - first)

    def labels(self) -> list[tuple[float, str]]:
        """The ticks and their texts."""
        return list(zip(self.ticks, self.said or [f"{tick:g}" for tick in self.ticks], strict=True))


def powers(values: Sequence[float], most: int = 7, base: float = 1.0) -> tuple[list[float], list[str]]:
    """Ticks of a logarithmic scale around the values, ``base`` times powers of two, and these; at most so many."""
    low, high = math.floor(math.log2(min(values) / base)), math.ceil(math.log2(max(values) / base))
    step = max(1, math.ceil((high - low) / (most - 1)))
    exponents = range(low, low + step * max(1, math.ceil((high - low) / step)) + 1, step)
    return [base * 2.0**e for e in exponents], [str(2**e) if e >= 0 else f"1/{2**-e}" for e in exponents]


def even(values: Sequence[float], most: int = 6) -> list[float]:
    """Ticks of a plain scale from zero, or from below the lowest value, at even steps of 1, 2, 2.5 or 5."""
    low, high = min(0.0, *values), max(0.0, *values)
    least = (high - low) / (most - 1) or 1.0
    power = 10.0 ** math.floor(math.log10(least))
    for step in (power * factor for factor in (1, 2, 2.5, 5, 10, 20)):
        first, last = math.floor(low / step), math.ceil(high / step)
        if last - first < most:
            break
    return [step * i for i in range(first, last + 1)]


@dataclass(frozen=True)
class Line:
    """A line and the name at its end; ``kind`` is its colour, 0 ours, and ``dashed`` for what others compare with."""

    name: str
    points: Sequence[tuple[float, float]]
    kind: int
    dashed: bool = False


@dataclass(frozen=True)
class Bar:
    """A bar and the text at its end; without a value the text alone."""

    value: float | None
    said: str
    kind: int = 0


@dataclass(frozen=True)
class Group:
    """Bars under one label: those of each panel."""

    label: str
    panels: Sequence[Sequence[Bar]]


@dataclass
class _Drawing:
    height: float = 0.0
    parts: list[str] = field(default_factory=list)

    def text(self, x: float, y: float, said: str, kind: str = "t", anchor: str = "start") -> None:
        where = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.parts.append(f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}"{where}>{escape(said)}</text>')

    def rule(self, x1: float, y1: float, x2: float, y2: float, kind: str = "g") -> None:
        self.parts.append(f'<path class="{kind}" d="M{_n(x1)} {_n(y1)}L{_n(x2)} {_n(y2)}"/>')

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        size = f'width="{_n(width)}" height="{_n(height)}"'
        self.parts.append(f'<rect class="{kind}" x="{_n(x)}" y="{_n(y)}" {size} rx="2"/>')

    def svg(self, told: str, scheme: str | None) -> str:
        height = _n(self.height)
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" role="img">'
        )
        background = f'<rect class="b" width="{WIDTH}" height="{height}" rx="6"/>'
        return "\n".join([head, f"<title>{escape(told)}</title>", _style(scheme), background, *self.parts, "</svg>\n"])


def _style(scheme: str | None) -> str:
    family = 'system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",Helvetica,Arial,sans-serif'
    fixed = (
        f"text{{font:{TEXT}px {family}}}.h{{font-weight:600}}path{{fill:none}}.g{{stroke-width:1}}.l{{stroke-width:3}}"
        ".d{stroke-dasharray:7 5}"
    )
    colours = _colours(SCHEMES[scheme or "light"])
    if scheme is None:
        colours += f"\n@media(prefers-color-scheme:dark){{{_colours(SCHEMES['dark'])}}}"
    return f"<style>{fixed}\n{colours}</style>"


def _colours(scheme: Sequence[str]) -> str:
    back, text, lesser, grid, *kinds = scheme
    said = f".b,.i{{fill:{back}}}.t,.h{{fill:{text}}}.m{{fill:{lesser}}}.g{{stroke:{grid}}}.o{{stroke:{text}}}"
    return said + "".join(f".f{i}{{fill:{kind}}}.s{i}{{stroke:{kind}}}" for i, kind in enumerate(kinds))


def lines(told: str, x: Scale, y: Scale, drawn: Sequence[Line], *, scheme: str | None = None, height: int = 390) -> str:
    """A line each, named at its right end; ``told`` is what the picture says, for those who do not see it."""
    _few(len(drawn))
    drawing = _Drawing(height)
    left = EDGE + max(_wide(said) for _, said in y.labels()) + 8
    # Lines of one colour are told apart by dashes, which their names have to show.
    sample = 34 if len({line.kind for line in drawn}) < len(drawn) else 0
    right = WIDTH - EDGE - sample - max(_wide(line.name) * (1 if line.kind else BOLD) for line in drawn) - 14
    top, bottom = EDGE + GAP + 14, height - EDGE - 2 * GAP - 4

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return left + x.place(point[0]) * (right - left), bottom - y.place(point[1]) * (bottom - top)

    drawing.text(EDGE, EDGE + TEXT - 4, y.label, "h")
    for tick, said in y.labels():
        _, level = at((x.ticks[0], tick))
        drawing.rule(left, level, right, level)
        drawing.text(left - 8, level + 6, said, "m", "end")
    for tick, said in x.labels():
        place, _ = at((tick, y.ticks[0]))
        drawing.rule(place, bottom, place, bottom + 5)
        drawing.text(place, bottom + GAP + 2, said, "m", "middle")
    drawing.text((left + right) / 2, bottom + 2 * GAP + 6, x.label, "h", "middle")
    ends = _apart([at(line.points[-1])[1] for line in drawn], bottom)
    # What others compare with lies below, ours above all.
    for line, level in sorted(zip(drawn, ends, strict=True), key=lambda one: (not one[0].dashed, -one[0].kind)):
        places = [at(point) for point in line.points]
        path = "L".join(f"{_n(a)} {_n(b)}" for a, b in places)
        drawing.parts.append(f'<path class="l s{line.kind}{" d" if line.dashed else ""}" d="M{path}"/>')
        if not line.dashed and len(places) <= MARKED:
            drawing.parts += [f'<circle class="f{line.kind}" cx="{_n(a)}" cy="{_n(b)}" r="5"/>' for a, b in places]
        if sample:
            drawing.rule(right + 14, level, right + 6 + sample, level, f"l s{line.kind}{' d' if line.dashed else ''}")
        drawing.text(right + 14 + sample, level + 6, line.name, f"f{line.kind}{'' if line.kind else ' h'}")
    return drawing.svg(told, scheme)


def bars(
    told: str,
    panels: Sequence[Scale],
    groups: Sequence[Group],
    legend: Sequence[str] = (),
    note: str = "",
    *,
    scheme: str | None = None,
) -> str:
    """Groups of bars in a panel for each scale, the kinds of bars named above and a note below."""
    _few(len(legend))
    drawing = _Drawing()
    level = _legend(drawing, legend)
    width = (WIDTH - 2 * EDGE - 26 * (len(panels) - 1)) / len(panels)
    lefts = [EDGE + i * (width + 26) for i in range(len(panels))]
    for left, panel in zip(lefts, panels, strict=True):
        drawing.text(left, level + TEXT, panel.label, "h")
    level += GAP + 12
    thick = 20 if max(len(of_panel) for group in groups for of_panel in group.panels) == 1 else 17
    for group in groups:
        drawing.text(EDGE, level + TEXT, group.label)
        level += GAP + 4
        high = thick * max(map(len, group.panels))
        for left, panel, of_panel in zip(lefts, panels, group.panels, strict=True):
            for tick in panel.ticks:
                place = left + panel.place(tick) * width
                drawing.rule(place, level - 3, place, level + high + 1, "o" if tick == panel.origin else "g")
            for i, bar in enumerate(of_panel):
                _bar(drawing, bar, panel, left, width, level + i * thick, thick - 2)
        level += high + 10
    for left, panel in zip(lefts, panels, strict=True):
        for tick, said in panel.labels():
            anchor = "start" if tick == panel.ticks[0] else "end" if tick == panel.ticks[-1] else "middle"
            drawing.text(left + panel.place(tick) * width, level + TEXT - 2, said, "m", anchor)
    level += GAP
    if note:
        level += GAP + 2
        drawing.text(EDGE, level, note, "m")
    drawing.height = level + EDGE
    return drawing.svg(told, scheme)


def _bar(drawing: _Drawing, bar: Bar, panel: Scale, left: float, width: float, top: float, thick: float) -> None:
    if bar.value is None:
        drawing.text(left + 6, top + thick - 2, bar.said, "m")
        return
    zero, end = (left + panel.place(value) * width for value in (panel.origin, bar.value))
    drawing.box(min(zero, end), top, max(abs(end - zero), 1.5), thick, f"f{bar.kind}")
    edge = max(zero, end)
    if edge + 6 + _wide(bar.said) <= left + width:
        drawing.text(edge + 6, top + thick - 2, bar.said)
    else:
        drawing.text(edge - 6, top + thick - 2, bar.said, "i", "end")


def _legend(drawing: _Drawing, names: Sequence[str]) -> float:
    x, level = float(EDGE), float(EDGE) - 6
    for kind, name in enumerate(names):
        if x > EDGE and x + 20 + _wide(name) > WIDTH - EDGE:
            x, level = EDGE, level + GAP
        drawing.box(x, level + 5, 14, 14, f"f{kind}")
        drawing.text(x + 20, level + TEXT, name)
        x += 20 + _wide(name) + 22
    return level + GAP + 6 if names else level


def _apart(levels: Sequence[float], bottom: float) -> list[float]:
    """The levels, moved as little as keeps a line of text between any two."""
    order = sorted(range(len(levels)), key=lambda i: levels[i])
    placed = list(levels)
    for before, i in itertools.pairwise(order):
        placed[i] = max(placed[i], placed[before] + GAP - 1)
    limit = bottom
    for i in reversed(order):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - GAP + 1
    return placed


def _few(count: int) -> None:
    if count > FIVE:
        raise ValueError(f"chart: expected at most {FIVE} lines or kinds of bars, got {count}")


def _wide(said: str) -> float:
    return LETTER * TEXT * len(said)


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
