"""Pairs on a disk as the generator reads them: pictures are decoded when they are asked for and not kept."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.data.captions.listing import Bad, Listing
from ccu_fast.data.captions.shards import read_span
from ccu_fast.data.pictures import MAX_PIXELS, BadPicture, Box, Whole, decode, decode_whole, decode_windows, measure

KEPT = 60.0  # seconds between two states of a scan that are kept
_CHUNK = 64


@dataclass(frozen=True)
class Scan:
    """What one look at every picture found.

    Attributes:
        digests: uint8 ``[images, 32]``: SHA-256 of each encoded picture; zeros for the bad ones.
        bad: image number → why it cannot be used.
        notes: what :func:`ccu_fast.data.pictures.decode` (of whole pictures :func:`ccu_fast.data.pictures.measure`)
            notes → of how many of them.
        sizes: of whole pictures: int64 ``[images, 3]``, height, width and colours (1 or 3); zeros for the bad ones.
    """

    digests: Tensor
    bad: dict[int, str]
    notes: dict[str, int]
    sizes: Tensor | None = None


class DiskSource:
    """The pairs of a listing with random access; protection reads them as a ``PairSource``.

    Decoding runs in threads that live as long as the source (Pillow's decoders and resizing release the interpreter).
    A call of :meth:`images` keeps its own batch alive and at most one picture for each thread.

    Args:
        listing: what there is.
        shape: (C, H, W) of the model; see :func:`ccu_fast.data.pictures.decode`.
        digests: uint8 ``[images, 32]`` from :func:`scan`: a picture that has changed since is refused. None: no check.
        threads: decoders; by default the processors this process may use.
        max_pixels: larger pictures are refused.
    """

    def __init__(
        self,
        listing: Listing,
        shape: tuple[int, int, int],
        *,
        digests: Tensor | None = None,
        threads: int | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        threads = len(os.sched_getaffinity(0)) if threads is None else threads
        check.integer("threads", threads, low=1)
        check.integer("max_pixels", max_pixels, low=1)
        self.listing, self.image_shape, self.digests, self.max_pixels = listing, shape, digests, max_pixels
        self.captions: Sequence[str] = listing.captions
        self.image_of = listing.image_of
        self.n_images = listing.n_images
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def images(self, index: Tensor) -> Tensor:
        """int64 ``[n]`` image numbers (not rows) → uint8 ``[n, C, H, W]`` on the CPU; the same bits at every call.

        Raises:
            BadPicture: with its path: unreadable, or changed since it was scanned.
        """
        numbers = index.tolist()
        batch = torch.empty((len(numbers), *self.image_shape), dtype=torch.uint8)

        def fill(place: int) -> None:
            batch[place] = self._decoded(numbers[place])

        self.each(fill, len(numbers))
        return batch

    def each(self, work: Callable[[int], None], n: int) -> None:
        """``work(0) … work(n − 1)`` in the decoding threads; the first exception is raised when all have ended."""
        waiting = [self._pool.submit(work, i) for i in range(n)]
        errors = [error for future in waiting if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def read(self, number: int) -> bytes:
        """The encoded picture.

        Raises:
            OSError: it cannot be read.
        """
        spans = self.listing.spans
        if spans is None:
            return Path(self.listing.files[number]).read_bytes()
        shard, offset, size = spans[number].tolist()
        return read_span(self.listing.shards[shard], offset, size)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def windows(self, number: int, boxes: Sequence[Box]) -> Tensor:
        """uint8 ``[windows, C, H, W]`` of one picture, see :func:`ccu_fast.data.pictures.decode_windows`.

        Raises:
            BadPicture: as of :meth:`images`.
        """
        with self._named(number):
            return decode_windows(self._unchanged(number), self.image_shape, boxes, max_pixels=self.max_pixels)

    def whole(self, number: int) -> Whole:
        """One picture of its own size.

        Raises:
            BadPicture: as of :meth:`images`.
        """
        with self._named(number):
            return decode_whole(self._unchanged(number), max_pixels=self.max_pixels)

    def _decoded(self, number: int) -> Tensor:
        with self._named(number):
            return decode(self._unchanged(number), self.image_shape, max_pixels=self.max_pixels)

    def _unchanged(self, number: int) -> bytes:
        data = self.read(number)
        if self.digests is not None and not torch.equal(_digest(data), self.digests[number]):
            raise BadPicture("changed since it was checked")
        return data

    @contextmanager
    def _named(self, number: int) -> Iterator[None]:
        try:
            yield
        except (OSError, BadPicture) as error:
            file = self.listing.files[number]
            raise BadPicture(f"{self.listing.argument}: expected usable pictures, got {file}: {_why(error)}") from error


def scan(
    source: DiskSource,
    numbers: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
    *,
    whole: bool = False,
    seen: Scan | None = None,
    keep: Callable[[Scan], None] | None = None,
) -> Scan:
    """Read and decode each of these pictures once, so that what is bad is known before hours of work.

    Args:
        source: the pictures; its digests are not looked at.
        numbers: which of them.
        progress: called as ``progress(done, total)``.
        whole: they are to keep their size, which is looked up.
        seen: what ``keep`` got in a scan of the same pictures that was interrupted; changed. Those found good in it
            are not read again; the others are, because they may have been mended.
        keep: called with what was found so far, now and then.
    """
    n = source.n_images
    if seen is None:
        sizes = torch.zeros(n, 3, dtype=torch.int64) if whole else None
        seen = Scan(torch.zeros(n, 32, dtype=torch.uint8), {}, {}, sizes)
    digests, sizes, before = seen.digests, seen.sizes, Counter(seen.notes)
    good = digests.any(1).tolist()  # no SHA-256 is zero
    bad: dict[int, str] = {}
    notes: list[str] = []  # which threads may extend

    def found() -> Scan:
        return Scan(digests, dict(sorted(bad.items())), dict(sorted((before + Counter(notes)).items())), sizes)

    def look(number: int) -> None:
        if good[number]:
            return
        try:
            data = source.read(number)
            if sizes is not None:
                sizes[number] = torch.tensor(measure(data, max_pixels=source.max_pixels, notes=notes))
            else:
                decode(data, source.image_shape, max_pixels=source.max_pixels, notes=notes)
            digests[number] = _digest(data)
        except (OSError, BadPicture) as error:
            bad[number] = _why(error)

    kept = time.monotonic()
    for start in range(0, len(numbers), _CHUNK):
        if keep is not None and start and time.monotonic() - kept >= KEPT:
            keep(found())
            kept = time.monotonic()
        part = numbers[start : start + _CHUNK]
        source.each(lambda place, part=part: look(part[place]), len(part))  # type: ignore[misc]
        if progress is not None:
            progress(start + len(part), len(numbers))
    return found()


def bad_pictures(listing: Listing, bad: dict[int, str], *, published: bool = False) -> list[Bad]:
    """What a scan found, in the words of the listing; to be published without the folders above the dataset.

    What lies outside it is then told by the name that it would have been published under.
    """

    def where(number: int) -> str:
        file = listing.files[number]
        if not published or listing.spans is not None:
            return file
        inside = os.path.relpath(file, listing.root)
        return listing.names[number] if inside.startswith("..") else inside

    return [Bad(where(number), why) for number, why in sorted(bad.items())]


def _digest(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(hashlib.sha256(data).digest()), dtype=torch.uint8)


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
