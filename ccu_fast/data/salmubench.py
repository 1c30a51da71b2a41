"""The files of SALMUBench: what it forgets, what it holds out, and what it keeps.

SALMUBench (Selvas-Sala, Kang and Gomez, CVPR 2026, arXiv 2603.26316) publishes a data set
(``cvc-mmu/salmubench-512-redistributed`` of Hugging Face) and two CLIPs of open_clip, ViT-B-16: one was trained with
the sensitive associations (``cvc-mmu/clip-vit-b-16-salmu-compromised``), one without (``…-salmu-clean``).
Nothing is downloaded here. A folder with the data set has::

    data/SPLIT-*.parquet   columns image (struct of bytes and path), text, identity_id, file_name

SPLIT is one of :data:`SPLITS`. The two held-out ones are for evaluation alone. Rows of ``retain_synth`` without an
identity show nobody of the sensitive set; of those with one the portrait is described, and nothing private told.

The data set's card could not be seen when this was written. The layout is as public code reads the released files; what
is not there (``forget_target``, captions without attributes, the list of fragile knowledge) is not read, nor is
``sensitive_set_captions_metadata.json``, which tells what kind of attribute each caption has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check, extras
from ccu_fast.data.pictures import BadPicture, decode

SPLITS = ("forget", "retain_synth", "holdout_identity", "holdout_association")
COLUMNS = ("image", "text", "identity_id", "file_name")
_ROWS = 64  # of a file, in memory at a time, encoded


@dataclass(frozen=True)
class Split:
    """Some rows of one split.

    Attributes:
        pictures: uint8 ``[N, C, H, W]``.
        captions: N strings.
        identities: whom each shows; None for nobody of the sensitive set.
        files: the names of the pictures' files, which are those of the associations.
    """

    pictures: Tensor
    captions: list[str]
    identities: list[str | None]
    files: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def where(self, keep: Callable[[str | None], bool]) -> Split:
        """The rows whose identity is one of those to keep."""
        rows = [row for row, identity in enumerate(self.identities) if keep(identity)]
        captions, identities, files = ([column[row] for row in rows] for column in self._columns)
        return Split(self.pictures[rows], captions, identities, files)

    @property
    def _columns(self) -> tuple[list[Any], ...]:
        return self.captions, self.identities, self.files


def read_split(
    folder: str | Path, split: str, shape: tuple[int, int, int], *, most: int | None = None, seed: int = 0
) -> Split:
    """Rows of a split, their pictures decoded for a model.

    Args:
        folder: with the unpacked data set.
        split: one of :data:`SPLITS`.
        shape: (C, H, W) of the model; see :func:`ccu_fast.data.pictures.decode`.
        most: rows that are drawn where there are more, at least 1; None reads all: 150 kB each at 224×224.
        seed: of the draw.

    Raises:
        FileNotFoundError: no file of the split.
        ImportError: pyarrow or pillow is not installed.
        ValueError: no Parquet, a column missing or of another kind, a picture that cannot be read; names file and row.
    """
    extras.require("pyarrow", "PIL")
    check.one_of("split", split, SPLITS)
    check.integer("seed", seed, low=0)
    if most is not None:
        check.integer("most", most, low=1)
    files = sorted((Path(folder) / "data").glob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"folder: expected data/{split}-*.parquet in {folder}, got none")
    total = sum(_rows(file) for file in files)
    if not total:
        raise ValueError(f"folder: expected rows in the split {split} of {folder}, got none")
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:most]
    wanted, first = set(drawn.tolist()), 0
    pictures: list[Tensor] = []
    told: list[str] = []
    who: list[str | None] = []
    named: list[str] = []
    for file in files:
        for number, row in enumerate(_read(file)):
            if first + number in wanted:
                text, identity, name = (_text(row, key, file, number) for key in COLUMNS[1:])
                if text is None or name is None:
                    raise ValueError(f"{file}, row {number}: expected text and file_name, got an empty one")
                pictures.append(_picture(row["image"], shape, f"{file}, row {number}"))
                told.append(text)
                who.append(identity)
                named.append(name)
        first += _rows(file)
    return Split(torch.stack(pictures), told, who, named)


def _rows(file: Path) -> int:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file) as opened:
            names = opened.schema_arrow.names
            count = int(opened.metadata.num_rows)
    except ArrowException as error:
        raise ValueError(f"{file}: expected Parquet, got {' '.join(str(error).split())}") from error
    missing: Sequence[str] = [name for name in COLUMNS if name not in names]
    if missing:
        raise ValueError(f"{file}: expected the columns {', '.join(COLUMNS)}, got none called {missing[0]}")
    return count


def _read(file: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as opened:
        for batch in opened.iter_batches(_ROWS, columns=list(COLUMNS)):
            yield from batch.to_pylist()


def _text(row: dict[str, Any], key: str, file: Path, number: int) -> str | None:
    value = row[key]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{file}, row {number}: expected text as {key}, got {type(value).__name__}")
    return value


def _picture(value: Any, shape: tuple[int, int, int], where: str) -> Tensor:
    data = value.get("bytes") if isinstance(value, dict) else None
    if not isinstance(data, bytes):
        raise ValueError(f"{where}: expected the bytes of a picture in image, got none")
    try:
        return decode(data, shape)
    except BadPicture as error:
        raise ValueError(f"{where}: expected a usable picture, got {error}") from error
