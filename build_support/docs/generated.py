"""What a program writes into a page of Markdown: tables, and the text between two marks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table_lines(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: int = 0) -> list[str]:
    """The lines of a table.

    Args:
        columns: the heads.
        rows: the cells, in Markdown, without a bare ``|``.
        right: how many columns, from the last, have their text on the right.
    """
    rule = "|---" * (len(columns) - right) + "|--:" * right + "|"
    return [_line(columns), rule, *map(_line, rows)]


def splice(page: str, text: str, begin: str, end: str) -> str:
    """The page with ``text`` between the lines ``begin`` and ``end``.

    Raises:
        ValueError: the page lacks one of them.
    """
    before, found, rest = page.partition(begin)
    if not found:
        raise ValueError(f"page: expected the line {begin!r}, got none")
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"page: expected the line {end!r} after {begin!r}, got none")
    stripped = text.strip("\n")
    return f"{before}{begin}\n\n{stripped}\n\n{end}{after}"


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
