"""WebDataset tar shards, as img2dataset writes them: for each key a picture, a ``txt`` with the caption, a ``json``.

A shard is indexed by one pass over its headers and then read at offsets, so any pair can be had at any time without
unpacking. Only uncompressed tar files allow that: of a compressed one a copy is made.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ccu_fast.data.captions.copies import BadShard, NoCopy, uncompressed
from ccu_fast.data.captions.listing import Listing, Rows, is_hidden, texts_in, visible_files
from ccu_fast.data.pictures import EXTENSIONS, is_picture

SHARDS = (".tar", ".tar.gz", ".tgz")  # how the names of shards end
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Sample:
    """The members of one key: extension → (offset, size); ``repeated`` are extensions that came again."""

    key: str
    members: dict[str, tuple[int, int]]
    repeated: list[str] = field(default_factory=list)

    @property
    def pictures(self) -> list[str]:
        """Extensions of its pictures; of ``jpg`` beside ``seg.png`` it is ``jpg`` alone."""
        found = [extension for extension in self.members if is_picture(extension)]
        plain = [extension for extension in found if extension in EXTENSIONS]
        return plain if len(plain) == 1 else found


def is_shard(file: str) -> bool:
    """Whether a path is that of a shard."""
    return file.lower().endswith(SHARDS)


def list_shards(path: Path, caption_column: str | None = None) -> Listing:
    """The pairs of one shard or of all in a folder and below, in the order of names and members.

    A shard that cannot be read to its end is left out as a whole.

    Args:
        path: of the shard or folder.
        caption_column: field of each ``json`` that has the captions; by default the ``txt``, else "caption".

    Raises:
        NoCopy: there is no room for an uncompressed copy.
    """
    root = path.parent if path.is_file() else path
    files = [path.name] if path.is_file() else sorted(filter(is_shard, visible_files(path)))
    rows, spans, names, good, good_names = Rows(), [], [], [], []
    record = -1
    for file in files:
        name = _published_name(file)
        try:
            if name in good_names:
                raise BadShard(f"the name of an earlier one without its ending, {name}")
            shard = root / file if name == file else uncompressed(root / file)
            samples = list(read_index(shard))
        except NoCopy:
            raise
        except (BadShard, OSError) as error:
            rows.refuse(file, f"unreadable shard: {error}")
            continue
        good.append(shard)
        good_names.append(name)
        keys: set[str] = set()
        for sample in samples:
            record += 1
            where = f"{name}/{sample.key}"
            pictures = sample.pictures
            again = sample.key in keys
            keys.add(sample.key)
            if again or sample.repeated:
                rows.refuse(where, "the key of an earlier sample" if again else f"{sample.repeated[0]} occurs twice")
            elif len(pictures) != 1:
                rows.refuse(where, f"expected one picture, got {pictures or 'none'}")
            else:
                try:
                    captions = _captions(shard, sample, caption_column)
                except ValueError as error:
                    rows.refuse(where, str(error))
                    continue
                before = len(rows.files)
                for caption in captions:
                    rows.add(record, where, f"{where}.{pictures[0]}", caption)
                if len(rows.files) > before:
                    names.append(f"{where}.png")
                    spans.append((len(good) - 1, *sample.members[pictures[0]]))
    return rows.listing(
        "webdataset",
        root,
        names=names,
        columns=None if caption_column is None else ("png", caption_column),
        spans=torch.tensor(spans, dtype=torch.int64).reshape(-1, 3),
        shards=good,
        shard_names=good_names,
    )


def _captions(shard: Path, sample: Sample, column: str | None) -> list[str]:
    if column is None and "txt" in sample.members:
        try:
            return [read_span(shard, *sample.members["txt"]).decode("utf-8-sig")]
        except UnicodeDecodeError as error:
            raise ValueError(f"expected UTF-8 text in {sample.key}.txt, got {error}") from error
    if "json" not in sample.members:
        raise ValueError(f"no {sample.key}.json" if column else f"no caption {sample.key}.txt or {sample.key}.json")
    column = column or "caption"
    about = read_json(shard, sample)
    captions = texts_in(about.get(column)) if isinstance(about, dict) else []
    if not captions:
        raise ValueError(f"expected a text, or a list of texts, as {column} in {sample.key}.json")
    return captions


def read_json(shard: Path, sample: Sample) -> Any:
    """What the ``json`` of a sample that has one holds.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(read_span(shard, *sample.members["json"]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its json is no JSON ({error})") from error


def _published_name(file: str) -> str:
    """``a/b.tar.gz`` and ``a/b.tgz`` → ``a/b.tar``."""
    stem, _, ending = file.rpartition(".")
    if ending.lower() not in ("gz", "tgz"):
        return file
    return stem if ending.lower() == "gz" else f"{stem}.tar"


def read_index(shard: Path) -> Iterator[Sample]:
    """The samples of a shard: neighbours with the same key (the path up to the first dot of its last part).

    Members without a key or an extension belong to no sample, as in webdataset, nor do those in hidden folders.

    Raises:
        BadShard: not a plain tar file, damaged, or truncated. The tarfile module takes a damaged header in the middle
            for the end of the file; here the end must be one.
    """
    size = shard.stat().st_size
    end = 0
    key = ""
    members: dict[str, tuple[int, int]] = {}
    repeated: list[str] = []
    try:
        with tarfile.open(shard, mode="r:") as archive:
            for member in archive:
                end = member.offset_data + (-(-member.size // _BLOCK) * _BLOCK if member.isreg() else 0)
                if member.isreg():
                    if member.offset_data + member.size > size:
                        raise BadShard(f"truncated in {member.name}")
                    name, extension = split_key(member.name)
                    if extension and name and not name.endswith("/") and not is_hidden(name):
                        if name != key and members:
                            yield from _parts(Sample(key, members, repeated))
                            members, repeated = {}, []
                        key = name
                        if extension in members:
                            repeated.append(extension)
                        else:
                            members[extension] = (member.offset_data, member.size)
                # The module keeps every header it has read.
                archive.members = []  # type: ignore[attr-defined]
    except tarfile.TarError as error:
        raise BadShard(f"not a whole, uncompressed tar file ({error})") from error
    if members:
        yield from _parts(Sample(key, members, repeated))
    with shard.open("rb") as file:
        file.seek(end)
        if file.read(_BLOCK).strip(b"\0"):
            raise BadShard(f"damaged at byte {end}")
    if end > size:
        raise BadShard("truncated")


def _parts(sample: Sample) -> Iterator[Sample]:
    """Of ``a.1.jpg``, ``a.1.txt``, ``a.2.jpg``, ``a.2.txt`` webdataset makes one sample ``a``: here two.

    What has a picture and a caption of its own before the last dot is a sample of its own. A ``json`` is enough where
    the key has no picture, ``txt`` or ``json`` without such a dot.
    """
    own: dict[str, dict[str, tuple[int, int]]] = {}
    for extension, span in sample.members.items():
        prefix, _, last = extension.rpartition(".")
        own.setdefault(prefix, {})[last] = span
    rest = dict(sample.members)
    plain = own.get("", {})
    captions = {"txt"} if {"txt", "json"} & plain.keys() or any(map(is_picture, plain)) else {"txt", "json"}
    for prefix, members in own.items():
        if prefix and not sample.repeated and captions & members.keys() and any(map(is_picture, members)):
            yield Sample(f"{sample.key}.{prefix}", members)
            for last in members:
                del rest[f"{prefix}.{last}"]
    if rest:
        yield Sample(sample.key, rest, sample.repeated)


def split_key(name: str) -> tuple[str, str]:
    """``a/b.c.JPG`` → (``a/b``, ``c.jpg``), as webdataset splits; what follows the last dot in lower case.

    What stands between the dots may be a part of the key (see :func:`_parts`), which keeps its capitals.
    """
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    between, dot, ending = extension.rpartition(".")
    return folder + slash + stem, between + dot + ending.lower()


def read_span(path: Path, offset: int, size: int) -> bytes:
    """``size`` bytes at ``offset``.

    Raises:
        OSError: the file ends before.
    """
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise OSError(f"{path}: expected {size} bytes at {offset}, got {len(data)}")
    return data
