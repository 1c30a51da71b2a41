"""Labels and ids as users write them: whole numbers or names, and never one taken for the other."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ccu_fast.files import readable

# pandas writes a whole number as 3.0 where its column has, or once had, a gap.
_WHOLE = re.compile(r"[+-]?\d{1,20}(\.0*)?", re.ASCII)
# A spreadsheet writes large numbers with an exponent and rounds them, so that two may look alike.
_OTHER_NUMBER = re.compile(r"[+\u2212-]?(\d*\.?\d+|\d+\.?\d*)(e[+-]?\d+)?|[+-]?inf(inity)?", re.ASCII | re.IGNORECASE)
# What is left of an empty cell in a column that was made text, by Python, pandas or a database.
_MISSING = ("", "NaT", "<NA>", "None", "NULL", "null")
_LARGEST = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Names:
    """What the classes and the items of a data set are called; a whole number is called by its digits.

    Attributes:
        classes: name → label.
        items: name → ids of the items it stands for.
        files: path of a picture → ids of the items that have it, where items go by their picture too.
        root: the folder that paths of pictures are relative to.
    """

    classes: dict[str, int]
    items: dict[str, list[int]]
    files: dict[str, list[int]] = field(default_factory=dict)
    root: Path = Path()

    def find(self, name: str) -> list[int]:
        """The ids of the items of this name; none for an unknown one.

        Raises:
            ValueError: the name is that of an item and the path of a picture.
        """
        item, file = self.items.get(canonical(name), []), self.files.get(os.path.normpath(self.root / name), [])
        if item and file:
            raise ValueError(f"ids: expected the number of an item or a picture, got {name!r}, which is both")
        return item or file


def canonical(name: object) -> str:
    """Text without the blanks around it; a whole number by its digits: 3 of " 3", "3.0" and "03"."""
    text = str(name).strip()
    return str(int(text.partition(".")[0])) if _WHOLE.fullmatch(text) else text


def read_labels(values: Sequence[str], where: Callable[[int], str]) -> tuple[Tensor, dict[str, int]]:
    """The labels of items, int64 ``[N]``, and the label of each name.

    Whole numbers stay what they are; names are numbered in sorted order.

    Args:
        values: as written.
        where: the place of a value, for errors.

    Raises:
        ValueError: a value that is missing, negative or a fraction; numbers and names together.
    """
    names = [canonical(value) for value in values]
    numeric = [_WHOLE.fullmatch(name) is not None for name in names]
    for row, name in enumerate(names):
        number = 0 <= int(name) <= _LARGEST if numeric[row] else not _OTHER_NUMBER.fullmatch(name)
        if _missing(name) or not number or "\0" in name:
            why = ", which stands for a missing value" if name and _missing(name) else ""
            raise ValueError(
                "path: expected a name or a whole number of at least 0 as label, got "
                f"{values[row]!r} in {where(row)}{why}"
            )
        if numeric[row] != numeric[0]:
            raise ValueError(
                f"path: expected either numbers or names as labels, got {values[0]!r} in {where(0)} and "
                f"{values[row]!r} in {where(row)}"
            )
    distinct = sorted(set(names), key=int if numeric[0] else None)
    classes = {name: int(name) if numeric[0] else number for number, name in enumerate(distinct)}
    return torch.tensor([classes[name] for name in names]), classes


def read_ids(values: Sequence[str], where: Callable[[int], str]) -> tuple[Tensor, dict[str, list[int]]]:
    """The ids of items, int64 ``[N]``, and the ids of each name.

    Ids that are whole numbers of 64 bits, all of them, stay; others are names, and their items are numbered from 0.

    Args:
        values: as written.
        where: the place of a value, for errors.

    Raises:
        ValueError: a value that is missing or that occurs twice.
    """
    names = [canonical(value) for value in values]
    first: dict[str, int] = {}
    for row, name in enumerate(names):
        if _missing(name):
            raise ValueError(f"path: expected a name or a number as id, got {values[row]!r} in {where(row)}")
        if first.setdefault(name, row) != row:
            raise ValueError(
                f"path: expected every id once, got {values[row]!r} in {where(first[name])} and {where(row)}"
            )
    whole = all(_WHOLE.fullmatch(name) and -_LARGEST - 1 <= int(name) <= _LARGEST for name in names)
    ids = [int(name) if whole else row for row, name in enumerate(names)]
    return torch.tensor(ids), {name: [item] for name, item in zip(names, ids, strict=True)}


def texts(array: np.ndarray, name: str, path: Path) -> list[str]:
    """The labels or ids of an array as text.

    Raises:
        ValueError: another shape than ``[N]``; neither numbers nor text; numbers that are not whole.
    """
    if array.ndim != 1:
        raise ValueError(f"path: expected {name} of shape [N] in {path}, got {list(array.shape)}")
    if array.dtype.kind == "S":
        with readable(path, "path"):
            array = np.char.decode(array, "utf-8")
    if array.dtype.kind not in "biufU":
        raise ValueError(f"path: expected whole numbers or text as {name} in {path}, got {array.dtype}")
    if array.dtype.kind != "f":
        return [str(value) for value in array.tolist()]
    for row, value in enumerate(array.tolist()):
        if not value.is_integer():
            raise ValueError(f"path: expected whole numbers or text as {name}, got {value} in {name}[{row}] of {path}")
    return [f"{value:.0f}" for value in array.tolist()]


def _missing(name: str) -> bool:
    return name in _MISSING or name.lower() == "nan"
