"""WebDataset tar shards, as img2dataset writes them: for each key a picture, a ``txt`` with the caption, a ``json``.

A shard is indexed by one pass over its headers and then read at offsets, so any pair can be had at any time without
unpacking. Only uncompressed tar files allow that.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ccu_fast.data.captions.listing import Listing, Rows
from ccu_fast.data.pictures import EXTENSIONS

_BLOCK = tarfile.BLOCKSIZE


class BadShard(ValueError):
    """A tar file that cannot be read to its end; the message says why."""


@dataclass(frozen=True)
class Sample:
    """The members of one key: extension → (offset, size); ``repeated`` are extensions that came again."""

    key: str
    members: dict[str, tuple[int, int]]
    repeated: list[str] = field(default_factory=list)

    @property
    def pictures(self) -> list[str]:
        """Extensions of its pictures."""
        return [extension for extension in self.members if extension.rpartition(".")[2] in EXTENSIONS]


def list_shards(path: Path) -> Listing:
    """The pairs of one ``.tar`` file or of all in a folder, in the order of names and members.

    A shard that cannot be read to its end is left out as a whole.
    """
    shards = [path] if path.is_file() else sorted(path.glob("*.tar"))
    rows, spans, names, good = Rows(), [], [], []
    record = -1
    for shard in shards:
        try:
            samples = list(read_index(shard))
        except (BadShard, OSError) as error:
            rows.refuse(shard.name, f"unreadable shard: {error}")
            continue
        good.append(shard)
        keys: set[str] = set()
        for sample in samples:
            record += 1
            where = f"{shard.name}/{sample.key}"
            pictures = sample.pictures
            again = sample.key in keys
            keys.add(sample.key)
            if again or sample.repeated:
                rows.refuse(where, "the key of an earlier sample" if again else f"{sample.repeated[0]} occurs twice")
            elif len(pictures) != 1:
                rows.refuse(where, f"expected one picture, got {pictures or 'none'}")
            elif "txt" not in sample.members:
                rows.refuse(where, f"no caption {sample.key}.txt")
            else:
                try:
                    caption = read_span(shard, *sample.members["txt"]).decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    rows.refuse(f"{where}.txt", f"expected UTF-8 text, got {error}")
                    continue
                if rows.add(record, where, f"{where}.{pictures[0]}", caption):
                    names.append(f"{where}.png")
                    spans.append((len(good) - 1, *sample.members[pictures[0]]))
    return rows.listing(
        "webdataset",
        path.parent if path.is_file() else path,
        names=names,
        spans=torch.tensor(spans, dtype=torch.int64).reshape(-1, 3),
        shards=good,
    )


def read_index(shard: Path) -> Iterator[Sample]:
    """The samples of a shard: neighbours with the same key (the path up to the first dot of its last part).

    Members without a key or an extension belong to no sample, as in webdataset.

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
                    if extension and name and not name.endswith("/"):
                        if name != key and members:
                            yield Sample(key, members, repeated)
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
        yield Sample(key, members, repeated)
    with shard.open("rb") as file:
        file.seek(end)
        if file.read(_BLOCK).strip(b"\0"):
            raise BadShard(f"damaged at byte {end}")
    if end > size:
        raise BadShard("truncated")


def split_key(name: str) -> tuple[str, str]:
    """``a/b.c.jpg`` → (``a/b``, ``c.jpg``), as webdataset splits; extensions in lower case."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


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
