"""The files of a protected dataset, written chunk by chunk so that a killed run continues where it stopped.

A chunk is a tar shard, or some pictures with their sidecar captions. A finished chunk is one line of the journal, with
the hash of every file: what a later run finds on the disk with that hash is not made again. Files are written elsewhere
and moved into place, so the output never holds half of one, nor anything that does not belong there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ccu_fast.data.captions.listing import Listing, in_place_of, texts_in
from ccu_fast.data.captions.tables import rewrite
from ccu_fast.data.pictures import encode_png
from ccu_fast.mem.fidelity import Fidelity
from ccu_fast.mem.publish.elsewhere import NAMES, Clean, Elsewhere
from ccu_fast.mem.publish.tar import write_shard
from ccu_fast.mem.publish.whole import Made
from ccu_fast.runs.provenance import file_hash

CHUNK = 64
_NEAR = 256  # pictures whose captions are made ready once: their rows mostly lie together


class Originals(Protocol):
    """What is protected; :class:`ccu_fast.data.captions.DiskSource` is one."""

    listing: Listing
    image_shape: tuple[int, int, int]

    def images(self, index: Tensor) -> Tensor:
        """int64 ``[n]`` image numbers → uint8 ``[n, C, H, W]``."""
        ...

    def each(self, work: Callable[[int], None], n: int) -> None:
        """``work(0) … work(n − 1)``, in threads where there are some."""
        ...


class Published(Protocol):
    """What is published; numbers are those of the listing."""

    def published_images(self, index: Tensor) -> Tensor:
        """int64 ``[n]`` image numbers → uint8 ``[n, C, H, W]``."""
        ...

    def published_captions(self, rows: Tensor) -> list[str]:
        """int64 ``[n]`` row numbers → captions with triggers."""
        ...


@dataclass(frozen=True)
class Chunk:
    """Images that are written together, and the shard they go to (−1: none)."""

    images: list[int]
    shard: int


class Publisher:
    """Writes one process's share of a dataset.

    Args:
        source: the originals.
        made: what takes their place.
        folder: where the dataset is built.
        work: for the journal and unfinished files, on the file system of ``folder``.
        images: this process's images, ascending; for shards all images of each of its shards.
        rank: its number.
        whole: image → its file, where pictures keep their size; by default all have that of the model.
        together: pictures that are alive at a time.
    """

    def __init__(
        self,
        source: Originals,
        made: Published,
        folder: Path,
        work: Path,
        images: Sequence[int],
        rank: int = 0,
        *,
        whole: Callable[[int], Made] | None = None,
        together: int = CHUNK,
    ) -> None:
        self.source, self.made, self.folder = source, made, folder
        self._whole, self._together = whole, together
        self.listing = source.listing
        self.images = images
        self.fidelity = Fidelity()
        self.hashes: dict[str, str] = {}
        self.dropped: Counter[str] = Counter()
        self.elsewhere = Elsewhere()
        self._journal = work / f"published-{rank}.jsonl"
        self._unfinished = work / f"unfinished-{rank}"
        self._rows: dict[int, list[int]] = defaultdict(list)
        mine = set(images)
        for row, image in enumerate(self.listing.image_of.tolist()):
            if image in mine:
                self._rows[image].append(row)

    def write(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Write what is not there yet.

        Raises:
            OSError: the disk; what is finished stays and is found by the next run.
        """
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._unfinished.mkdir(parents=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        known = _read_journal(self._journal)
        chunks = list(self._chunks())
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write("\n")  # ends a line that a kill left unfinished
            for number, chunk in enumerate(chunks):
                progress(number, len(chunks))
                entry = known.get(number)
                if entry is None or not self._are_there(entry["sha256"]):
                    entry = {"chunk": number, **self._write_chunk(chunk)}
                    journal.write(json.dumps(entry) + "\n")
                    journal.flush()
                self.hashes.update(entry["sha256"])
                self.fidelity.merge(entry["sums"])
                self.dropped.update(entry["dropped"])
                self.elsewhere.merge(entry["elsewhere"])
        progress(len(chunks), len(chunks))
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def _are_there(self, hashes: dict[str, str]) -> bool:
        paths = {self.folder / name: digest for name, digest in hashes.items()}
        return all(path.exists() and file_hash(path) == digest for path, digest in paths.items())

    def _chunks(self) -> Iterator[Chunk]:
        spans = self.listing.spans
        if spans is None:
            for start in range(0, len(self.images), CHUNK):
                yield Chunk(list(self.images[start : start + CHUNK]), -1)
            return
        by_shard: dict[int, list[int]] = defaultdict(list)
        for image, shard in zip(self.images, spans[list(self.images), 0].tolist(), strict=True):
            by_shard[shard].append(image)
        for shard, images in sorted(by_shard.items()):
            yield Chunk(images, shard)

    def _write_chunk(self, chunk: Chunk) -> dict[str, Any]:
        sums = Fidelity()
        hashes: dict[str, str] = {}
        dropped: dict[str, int] = {}
        elsewhere = Elsewhere()
        if chunk.shard >= 0:
            shard, name = self.listing.shards[chunk.shard], self.listing.shard_names[chunk.shard]
            path = self._unfinished / "shard.tar"
            column = caption_field(self.listing)
            dropped = write_shard(shard, path, self._samples(chunk, sums), elsewhere, column)
            hashes[name] = self._place(path, name)
        else:
            for image, png, _, captions in self._pictures(chunk, sums):
                elsewhere.look(self.listing.names[image], Clean(captions), NAMES)
                text = "".join(f"{caption}\n" for caption in captions.values()).encode()
                for name, data in zip(published_files(self.listing, image), (png, text), strict=False):
                    path = self._unfinished / "file"
                    path.write_bytes(data)
                    hashes[name] = self._place(path, name, hashlib.sha256(data).hexdigest())
        return {"sha256": hashes, "sums": asdict(sums), "dropped": dropped, "elsewhere": elsewhere.counts()}

    def _samples(self, chunk: Chunk, sums: Fidelity) -> Iterator[tuple[str, bytes, tuple[int, int], dict[str, str]]]:
        for image, png, size, captions in self._pictures(chunk, sums):
            yield key_of(self.listing, image), png, size, captions

    def _pictures(self, chunk: Chunk, sums: Fidelity) -> Iterator[tuple[int, bytes, tuple[int, int], dict[str, str]]]:
        """Image, PNG, its size and captions, clean → published; at most ``together`` pictures are alive."""
        for start in range(0, len(chunk.images), self._together):
            part = chunk.images[start : start + self._together]
            for image, (png, size) in zip(part, self._encoded(part, sums), strict=True):
                rows = self._rows[image]
                new = self.made.published_captions(torch.tensor(rows))
                yield image, png, size, dict(zip([self.listing.captions[row] for row in rows], new, strict=True))

    def _encoded(self, part: list[int], sums: Fidelity) -> list[tuple[bytes, tuple[int, int]]]:
        """PNG and size of each of these images."""
        encoded: list[tuple[bytes, tuple[int, int]]] = [(b"", (0, 0))] * len(part)
        if self._whole is not None:
            whole, seen = self._whole, [Fidelity()] * len(part)

            def make(place: int) -> None:
                made = whole(part[place])
                encoded[place], seen[place] = (made.png, made.size), made.sums

            self.source.each(make, len(part))
            for each in seen:  # in their order, which a sum of fractions depends on
                sums.merge(asdict(each))
            return encoded
        index = torch.tensor(part)
        published = self.made.published_images(index)
        sums.add(self.source.images(index), published)
        _, height, width = self.source.image_shape

        def encode(place: int) -> None:
            encoded[place] = encode_png(published[place]), (width, height)

        self.source.each(encode, len(part))
        return encoded

    def _place(self, path: Path, name: str, digest: str | None = None) -> str:
        """Move a finished file into the dataset; its hash."""
        digest = file_hash(path) if digest is None else digest
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
        return digest


def key_of(listing: Listing, image: int) -> str:
    """The key of an image in its shard."""
    assert listing.spans is not None
    shard = listing.shard_names[int(listing.spans[image, 0])]
    return listing.names[image].removeprefix(f"{shard}/").removesuffix(".png")


def caption_field(listing: Listing) -> str:
    """The field of a shard's ``json`` that has the captions."""
    return "caption" if listing.columns is None else listing.columns[1]


def published_files(listing: Listing, image: int) -> list[str]:
    """Where an image goes and, if captions have their own files, its captions; of a sample in a shard, nothing."""
    name = listing.names[image]
    if listing.spans is not None:
        return []
    return [name, name.removesuffix(".png") + ".txt"] if listing.format == "folder" else [name]


def write_metadata(
    listing: Listing, captions: Callable[[int], str], folder: Path, elsewhere: Elsewhere
) -> dict[str, str]:
    """The tables of a CSV or imagefolder dataset, with published names and captions; the hash of each by its name.

    Args:
        listing: of the input.
        captions: row → published caption.
        folder: of the dataset.
        elsewhere: told of captions in other columns.
    """
    if listing.columns is None or not listing.tables:
        return {}
    rows_of: dict[int, list[int]] = defaultdict(list)
    rows_with: dict[int, list[int]] = defaultdict(list)
    images = listing.image_of.tolist()
    for row, (record, image) in enumerate(zip(listing.records, images, strict=True)):
        rows_of[record].append(row)
        rows_with[image].append(row)

    @lru_cache(_NEAR)
    def clean(image: int) -> Clean:
        return Clean({listing.captions[row]: captions(row) for row in rows_with[image]})

    image_column, caption_column = listing.columns
    hashes, records = {}, itertools.count()
    for table in listing.tables:
        inside = os.path.relpath(table, listing.root)

        def change(
            number: int, record: dict[str, Any], table: Path = table, inside: str = inside
        ) -> dict[str, Any] | None:
            rows = rows_of.get(next(records))
            if rows is None:
                return None
            there = texts_in(record.get(caption_column))
            image = images[rows[0]]
            same = os.path.normpath(table.parent / str(record.get(image_column))) == listing.files[image]
            if not same or not {listing.captions[row] for row in rows} <= set(there):
                raise ValueError(
                    f"{listing.argument}: expected the rows of {table} that were protected, got another record "
                    f"{number + 1}; put it back as it was"
                )
            name = os.path.relpath(listing.names[image], os.path.dirname(inside) or ".")
            published = in_place_of(record[caption_column], [captions(row) for row in rows])
            sought, named = clean(image), (image_column, caption_column)
            try:
                renewed = {c: elsewhere.renew(value, sought, c) for c, value in record.items() if c not in named}
            except ValueError as error:
                raise ValueError(f"{listing.argument}: {error}, in record {number + 1} of {table}") from error
            return {**record, **renewed, image_column: name, caption_column: published}

        target = folder / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        rewrite(table, target, change)
        hashes[inside] = file_hash(target)
    return hashes


def _read_journal(path: Path) -> dict[int, dict[str, Any]]:
    entries: dict[int, dict[str, Any]] = {}
    if path.exists():
        for line in path.read_bytes().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the line during which a process was killed, or none
                continue
            entries[entry["chunk"]] = entry
    return entries
