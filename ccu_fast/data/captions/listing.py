"""What a dataset holds, before any picture is decoded: distinct images, rows, and what is wrong with the rest."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check

FORMATS = ("csv", "folder", "imagefolder", "webdataset")
MANIFEST = "manifest.json"
_SHOWN = 10


@dataclass(frozen=True)
class Bad:
    """Something that cannot be used: where it is and why."""

    where: str
    why: str

    def __post_init__(self) -> None:
        # A name may be bytes that are no text; what is told and written down is text.
        for name, value in (("where", self.where), ("why", self.why)):
            object.__setattr__(self, name, value.encode("utf-8", "backslashreplace").decode())

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"


class BadData(ValueError):
    """The dataset has parts that cannot be used.

    Args:
        bad: all of them; the message shows the first ten.
        remedy: what the caller offers to do about it.
        name: the argument that the dataset came as, for the message.
    """

    def __init__(self, bad: Sequence[Bad], remedy: str = "", name: str = "input") -> None:
        self.bad = list(bad)
        items = [str(item) for item in self.bad[:_SHOWN]]
        more = [f"and {len(self.bad) - _SHOWN} more"] if len(self.bad) > _SHOWN else []
        count = f"{len(self.bad)} bad " + ("item" if len(self.bad) == 1 else "items")
        listed = "; ".join([*items, *more])
        super().__init__(f"{name}: expected usable pairs, got {count}{remedy and f' ({remedy})'}: {listed}")


@dataclass(frozen=True)
class Options:
    """How to read a dataset.

    Attributes:
        format: one of :data:`FORMATS`; None: see :func:`ccu_fast.data.captions.list_pairs`.
        image_column: CSV and imagefolder; default the first there is of "images", "file_name" (of an imagefolder the
            other way round), "image_path", "filepath", "filename" and, but for Parquet, "image".
        caption_column: CSV and imagefolder; default the first there is of "caption", "text" and "title".
            Of a webdataset the field of each ``json``; by default "caption", where a sample has no ``txt``.
    """

    format: str | None = check.field(
        None, "csv, folder, imagefolder or webdataset; recognised if not given.", allowed=FORMATS
    )
    image_column: str | None = check.field(
        None, "Column of paths; if not given images, file_name, image_path, filepath, filename or image."
    )
    caption_column: str | None = check.field(
        None, "Column (webdataset: json field) of captions; caption, text or title if not given."
    )

    def __post_init__(self) -> None:
        check.fields(self)


@dataclass(frozen=True)
class Listing:
    """The usable part of a dataset.

    Attributes:
        format: one of :data:`FORMATS`.
        root: the folder of the table, of the pictures or of the shards.
        tables: the files that name images and captions (CSV; imagefolder, one for each split).
        columns: their two columns; of a webdataset with a ``caption_column`` png and that field.
        files: for each image its path, or ``shard.tar/key.jpg``.
        names: for each image its published path, relative to the output, ending in ``.png``; of a webdataset
            ``shard.tar/key.png``, with the key as it came.
        spans: webdataset: int64 ``[images, 3]``: shard, offset and size in bytes of each image.
        shards: webdataset: the tar files; of a compressed one a copy that is not.
        shard_names: webdataset: what each is called below ``root`` and in the output.
        captions: for each row.
        image_of: int64 ``[rows]``.
        records: for each row its number among the records of all tables, so that writing can follow the input; a record
            with a list of captions has several rows.
        bad: what was left out.
        argument: what the dataset came as, for errors.
    """

    format: str
    root: Path
    files: list[str]
    names: list[str]
    captions: list[str]
    image_of: Tensor
    records: list[int]
    bad: list[Bad] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    columns: tuple[str, str] | None = None
    spans: Tensor | None = None
    shards: list[Path] = field(default_factory=list)
    shard_names: list[str] = field(default_factory=list)
    argument: str = "input"

    @property
    def n_images(self) -> int:
        return len(self.files)

    def whole(self, remedy: str = "") -> Listing:
        """The listing itself, of which nothing may have been left out.

        Raises:
            BadData: something was; with the caller's remedy.
        """
        if self.bad:
            raise BadData(self.bad, remedy, self.argument)
        return self

    def fingerprint(self) -> str:
        """Changes with the names, captions, order and layout; contents of pictures are not in it."""
        digest = hashlib.sha256(json.dumps([self.format, self.columns, list(map(asdict, self.bad))]).encode())
        for part in (self.names, self.captions, self.records):
            for item in part:
                digest.update(f"{item}\0".encode("utf-8", "surrogatepass"))
        digest.update(self.image_of.numpy().tobytes())
        return digest.hexdigest()

    def without(self, images: Sequence[int], bad: Sequence[Bad]) -> Listing:
        """The listing without these images and their rows; ``bad`` is added to what was left out."""
        keep = torch.ones(self.n_images, dtype=torch.bool)
        keep[torch.tensor(images, dtype=torch.int64)] = False
        number = keep.cumsum(0) - 1
        rows = keep[self.image_of].nonzero()[:, 0].tolist()
        kept = keep.nonzero()[:, 0].tolist()
        return replace(
            self,
            files=[self.files[i] for i in kept],
            names=[self.names[i] for i in kept],
            spans=None if self.spans is None else self.spans[keep],
            captions=[self.captions[row] for row in rows],
            image_of=number[self.image_of[rows]],
            records=[self.records[row] for row in rows],
            bad=[*self.bad, *bad],
        )


class Rows:
    """Collects rows while a dataset is read; refuses empty captions, repeated rows, and what is no text or no path."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.captions: list[str] = []
        self.image_of: list[int] = []
        self.records: list[int] = []
        self.bad: list[Bad] = []
        self._number: dict[str, int] = {}
        self._seen: set[tuple[int, str]] = set()

    def refuse(self, where: str, why: str) -> None:
        """Leave something out."""
        self.bad.append(Bad(where, why))

    def add(self, record: int, where: str, file: str, caption: str) -> bool:
        """A row; False (and an entry in ``bad``) when it cannot be used."""
        if not caption.strip():
            self.refuse(where, "empty caption")
            return False
        if not is_text(caption):
            self.refuse(where, "a caption with half of a surrogate pair")
            return False
        if not _is_path(file):
            self.refuse(where, "a path that no file can have")
            return False
        number = self._number.get(file, len(self.files))
        if (number, caption) in self._seen:
            self.refuse(where, "the same image and caption as an earlier row")
            return False
        if number == len(self.files):
            self._number[file] = number
            self.files.append(file)
        self._seen.add((number, caption))
        self.captions.append(caption)
        self.image_of.append(number)
        self.records.append(record)
        return True

    def listing(self, format: str, root: Path, names: list[str] | None = None, **rest: Any) -> Listing:
        """What was collected, with names by :func:`published_names` unless given; ``rest`` are more attributes."""
        return Listing(
            format=format,
            root=root,
            files=self.files,
            names=published_names(self.files, root) if names is None else names,
            captions=self.captions,
            image_of=torch.tensor(self.image_of, dtype=torch.int64),
            records=self.records,
            bad=self.bad,
            **rest,
        )


def visible_files(root: Path) -> Iterator[str]:
    """The files below ``root``, relative to it, folder by folder in the order of names.

    Hidden ones (.DS_Store, .git, the ``._x.jpg`` that macOS writes beside an ``x.jpg``) are no part of a dataset.
    """
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
        for name in sorted(files):
            if not is_hidden(name):
                yield os.path.relpath(os.path.join(folder, name), root)


def is_hidden(path: str) -> bool:
    """Whether a file, or a folder that it is in, is hidden or one that macOS adds to archives."""
    parts = [part for part in path.split("/") if part not in (".", "..")]
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def texts_in(value: Any) -> list[str]:
    """The captions in one field: a text, or a list of them; [] if it is neither."""
    if isinstance(value, str):
        return [value]
    return list(value) if isinstance(value, list) and value and all(isinstance(v, str) for v in value) else []


def in_place_of(value: Any, captions: list[str]) -> Any:
    """Captions in the form of the field that they came from."""
    return captions if isinstance(value, list) else captions[0]


def is_text(value: str) -> bool:
    """Whether it can be written in UTF-8: a JSON escape or a file's name may be half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_path(value: str) -> bool:
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def published_names(files: Sequence[str], root: Path) -> list[str]:
    """Where each image goes: its path below ``root`` if it has one, else below ``images/``; always with ``.png``.

    Where two would get the same name, their old extension stays: ``a.jpg`` and ``a.gif`` become ``a.jpg.png`` and
    ``a.gif.png``.
    """
    root_text = os.path.abspath(root)
    absolute = [os.path.abspath(file) for file in files]
    outside = [path for path in absolute if not path.startswith(root_text.rstrip("/") + "/")]
    common = os.path.commonpath([os.path.dirname(path) for path in outside]) if outside else ""
    relative = [
        os.path.relpath(path, root_text)
        if path.startswith(root_text.rstrip("/") + "/")
        else os.path.join("images", os.path.relpath(path, common))
        for path in absolute
    ]
    short = [str(PurePosixPath(name).with_suffix(".png")) for name in relative]
    count = Counter(short)
    return [new if count[new] == 1 else f"{old}.png" for new, old in zip(short, relative, strict=True)]
