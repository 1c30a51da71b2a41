"""Files of settings: TOML whose tables and keys are known; an error names the file, the table and the key."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

Config = TypeVar("Config")


def read_settings(path: Path, argument: str, known: Mapping[str, Collection[str]]) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file.

    Args:
        path: of the file.
        argument: what it came as, for errors.
        known: the keys of each table; those before the first table are of table "". A key may have - for _.

    Returns:
        All known tables, with _ in their keys; empty where the file has none.

    Raises:
        ValueError: no such file, not TOML, an unknown table or key.
    """
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    if not path.is_file():
        raise ValueError(f"{argument}: expected a TOML file, got {path}, which is not there")
    try:
        given = toml.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{argument}: expected TOML in {path}, got {error}") from error
    tables: dict[str, dict[str, Any]] = {name: {} for name in known}
    for name, value in given.items():
        if name in known and isinstance(value, dict):
            for key, item in value.items():
                tables[name][_known(key, known[name], f"{argument} [{name}]", path)] = item
        elif name in known:
            raise ValueError(f"{argument}: expected a table [{name}] in {path}, got {value!r}")
        else:
            key = _known(name, (*filter(None, known), *known.get("", ())), argument, path)
            tables[""][key] = value
    return tables


def _known(key: str, keys: Collection[str], where: str, path: Path) -> str:
    name = key.replace("-", "_")
    if name not in keys:
        raise ValueError(f"{where}: expected one of {tuple(keys)} in {path}, got {key!r}")
    return name


def from_table(kind: Callable[..., Config], table: Mapping[str, Any], where: str, path: Path) -> Config:
    """``kind(**table)``, with the table and the file in its errors.

    Raises:
        ValueError: a value of another type or out of bounds.
    """
    try:
        return kind(**table)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} {error} (in {path})") from error
