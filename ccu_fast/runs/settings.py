"""Settings in TOML files: an error names the file, the table and the key."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")


def read_toml(path: Path, argument: str) -> dict[str, Any]:
    """What a TOML file holds.

    Raises:
        ValueError: no such file, or not TOML; names the argument.
    """
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    if not path.is_file():
        raise ValueError(f"{argument}: expected a TOML file, got {path}, which is not there")
    try:
        return dict(toml.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{argument}: expected TOML in {path}, got {error}") from error


def with_known_keys(table: Mapping[str, Any], keys: Collection[str], where: str, path: Path) -> dict[str, Any]:
    """The table with _ for - in its keys.

    Raises:
        ValueError: another key than ``keys``; names ``where`` it is in the file.
    """
    named = {key.replace("-", "_"): value for key, value in table.items()}
    for key in named:
        if key not in keys:
            raise ValueError(f"{where}: expected one of {tuple(keys)} in {path}, got {key!r}")
    return named


def from_table(kind: Callable[..., Config], table: Mapping[str, Any], where: str, path: Path) -> Config:
    """``kind(**table)``; its errors then name ``where`` in the file the table is.

    Raises:
        ValueError: a value of another type or out of bounds.
    """
    try:
        return kind(**table)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} {error} (in {path})") from error
