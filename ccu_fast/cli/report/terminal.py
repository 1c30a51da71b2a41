"""Tables in a terminal of any width: a column is wrapped or moved below the others, and nothing is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ccu_fast.cli.report.tables import Table

if TYPE_CHECKING:
    from rich.console import Console

WORDS = 17  # what a column of words is not made narrower than


def show(table: Table, console: Console) -> None:
    """Print one table.

    Args:
        table: columns that do not fit beside the others follow in a second part, below the same names of rows.
        console: of rich; its width is kept to.
    """
    from rich.text import Text

    for line in [*_wrapped(table.caption, console.width, console), "", *lines(table, console), ""]:
        console.print(Text(line))  # a name in brackets is no markup


def lines(table: Table, console: Console) -> list[str]:
    """The lines of a table, each as wide as the console at most."""
    from rich.cells import cell_len

    def longest(texts: list[str]) -> int:
        return max(map(cell_len, texts), default=0)

    columns = [[row[i] for row in table.rows] for i in range(len(table.columns))]
    full = [longest([*cells, *title.split()]) for title, cells in zip(table.columns, columns, strict=True)]
    words = [i == 0 or title in table.words for i, title in enumerate(table.columns)]
    # Numbers stay whole; words are wrapped, and of what is longer than half a line the letters.
    least = [
        min(w, max(WORDS if i else 0, longest(" ".join([title, *cells]).split()))) if wordy else w
        for i, (title, cells, w, wordy) in enumerate(zip(table.columns, columns, full, words, strict=True))
    ]
    least = [min(w, console.width // 2 - 1) for w in least]

    parts: list[list[int]] = [[]]
    used = least[0]
    for i in range(1, len(columns)):
        if parts[-1] and used + 1 + least[i] > console.width:
            parts.append([])
            used = least[0]
        parts[-1].append(i)
        used += 1 + least[i]
    shown: list[str] = []
    for part in parts:
        widths = {i: least[i] for i in (0, *part)}
        spare = console.width - sum(widths.values()) - len(part)
        for i in widths:  # the names of the rows come first
            more = min(spare, full[i] - widths[i]) if words[i] else 0
            widths[i] += more
            spare -= more
        gap = " " * (2 if spare >= len(part) else 1)
        rows = [[table.columns[i] for i in widths], *([row[i] for i in widths] for row in table.rows)]
        printed = [_row(row, widths, words, gap, console, low=not n) for n, row in enumerate(rows)]
        rule = "─" * max(cell_len(line) for row in printed for line in row)
        shown += ([""] if shown else []) + [*printed[0], rule, *(line for row in printed[1:] for line in row)]
    return shown


def _row(
    cells: list[str], widths: dict[int, int], words: list[bool], gap: str, console: Console, *, low: bool
) -> list[str]:
    """The lines of one row; titles stand low in theirs."""
    from rich.cells import cell_len

    wrapped = [_wrapped(cell, width, console) for cell, width in zip(cells, widths.values(), strict=True)]
    height = max(map(len, wrapped))
    padded = [[""] * (height - len(c)) + c if low else c + [""] * (height - len(c)) for c in wrapped]
    columns = []
    for (i, width), texts in zip(widths.items(), padded, strict=True):
        blanks = [" " * (width - cell_len(text)) for text in texts]
        columns.append([text + b if words[i] else b + text for text, b in zip(texts, blanks, strict=True)])
    return [gap.join(line).rstrip() for line in zip(*columns, strict=True)]


def _wrapped(text: str, width: int, console: Console) -> list[str]:
    from rich.text import Text

    return [line.plain.rstrip() for line in Text(text).wrap(console, width, overflow="fold")] or [""]
