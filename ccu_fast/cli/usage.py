"""How ``--help`` shows a command: paragraphs that fill a line, and types of the options that take a value."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

NARROW = 72  # columns; in fewer a table of options cuts their names


class Command(TyperCommand):
    """A command whose help is as wide as the terminal, however its docstring is broken."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.help = flowing(self.help)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """In a table where there is room for one."""
        if shutil.get_terminal_size().columns < NARROW:
            self.rich_markup_mode = None
        super().format_help(ctx, formatter)

    def get_params(self, ctx: Any) -> list[Any]:
        """As the base has it, see :func:`as_typed`."""
        return as_typed(super().get_params(ctx))


class Group(TyperGroup):
    """The same for the program itself."""

    def get_params(self, ctx: Any) -> list[Any]:
        """As the base has it, see :func:`as_typed`."""
        return as_typed(super().get_params(ctx))


def flowing(text: str | None) -> str | None:
    """Each paragraph on one line, so that whoever shows it breaks it."""
    if text is None:
        return None
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(text).split("\n\n"))


def as_typed(params: Sequence[Any]) -> list[Any]:
    """Options with the type of what is typed: none after a flag, that of one value where an option may be repeated."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""  # recent typer shows <bool>, as if a value followed
        elif getattr(param, "multiple", False) and param.metavar is None:
            param.metavar = "<str>"  # not <list[str]>
    return list(params)
