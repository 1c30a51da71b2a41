"""Inputs that stay on a disk: chosen without being read, read by the batch, and refused once they have changed."""

from __future__ import annotations

import hashlib
import math
import os
import weakref
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor


class RowSource(Protocol):
    """Where rows come from.

    Attributes:
        shape: ``(N, ...)`` of all of them.
        dtype: of a row.
        name: what they are called in an error: the argument they came as and their file or folder.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str

    def rows(self, index: Tensor) -> Tensor:
        """int64 ``[n]`` on the CPU → ``[n, ...]`` on the CPU; the same bits at every call."""


class DiskRows:
    """Rows of a source, in any order; stands where a ``[N, ...]`` tensor of inputs does.

    Indexing reads rows and gives a tensor, :meth:`select` chooses and reads nothing. What a row held when it was first
    read is remembered as its SHA-256, by all selections of a source together.

    Args:
        source: the rows.
        device: where a batch goes.
    """

    def __init__(self, source: RowSource, *, device: torch.device | str = "cpu") -> None:
        self.source, self.device = source, torch.device(device)
        self.index = torch.arange(source.shape[0])
        self.seen = torch.zeros(source.shape[0], 32, dtype=torch.uint8)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.index), *self.source.shape[1:]))

    @property
    def ndim(self) -> int:
        return len(self.source.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    @property
    def nbytes(self) -> int:
        """What all of it would take in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.index)

    def is_floating_point(self) -> bool:
        """As of a tensor."""
        return self.dtype.is_floating_point

    def select(self, index: Tensor) -> DiskRows:
        """The rows of a boolean mask ``[N]`` or of int64 positions; nothing is read."""
        return self._like(self.index[index.cpu()], self.device)

    def to(self, device: torch.device | str) -> DiskRows:
        """The same rows, whose batches go to another device; nothing is read."""
        return self._like(self.index, torch.device(device))

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Read rows of int64 positions ``[n]`` or of a slice.

        Raises:
            ValueError: a row is not what it was when it was first read.
        """
        return self.read(index).to(self.device)

    def split(self, size: int) -> Iterator[Tensor]:
        """All rows in order, ``size`` at a time, each read when it is asked for."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def read(self, index: Tensor | slice) -> Tensor:
        """As indexing, on the CPU."""
        numbers = self.index[index.cpu() if isinstance(index, Tensor) else index]
        rows = self.source.rows(numbers)
        self._compare(numbers, row_digests(rows))
        return rows

    def digests(self) -> Tensor:
        """uint8 ``[N, 32]``: SHA-256 of each row. Those that were read before are not read again."""
        new = (self.seen[self.index] == 0).all(1).nonzero()[:, 0]  # no SHA-256 is zero
        for part in new.split(256):
            self.read(part)
        return self.seen[self.index]

    def _compare(self, numbers: Tensor, now: Tensor) -> None:
        before = self.seen[numbers]
        known = (before != 0).any(1)
        changed = numbers[known & (before != now).any(1)]
        if len(changed):
            raise ValueError(
                f"{self.source.name}: expected inputs that stay as they are during a run, got a changed one in row "
                f"{int(changed[0])}"
            )
        self.seen[numbers] = now

    def _like(self, index: Tensor, device: torch.device) -> DiskRows:
        same = object.__new__(DiskRows)
        same.source, same.device, same.index, same.seen = self.source, device, index, self.seen
        return same


def row_digests(rows: Tensor) -> Tensor:
    """uint8 ``[n, 32]``: SHA-256 of the bytes of each row."""
    if not len(rows):
        return torch.empty(0, 32, dtype=torch.uint8)
    flat = rows.detach().cpu().contiguous().reshape(len(rows), -1).view(torch.uint8).numpy()
    found = b"".join(hashlib.sha256(row).digest() for row in flat)
    return torch.frombuffer(bytearray(found), dtype=torch.uint8).view(-1, 32)


class ArrayRows:
    """Rows of an array in a file: a ``.npy``, or an uncompressed member of a ``.npz``.

    They are read, not mapped: pages of a map count as memory of the process, and a file that is cut short under a map
    ends it.

    Args:
        path: of the file.
        start: where in it the ``.npy`` begins.
        argument: what ``path`` came as, for errors.

    Raises:
        ValueError: no array that rows can be read from: not ``.npy``, in Fortran order, of Python objects.
    """

    def __init__(self, path: Path, start: int = 0, argument: str = "path") -> None:
        self.name, self._path = f"{argument}: {path}", path
        self._file: BinaryIO = path.open("rb")
        weakref.finalize(self, self._file.close)  # with the last selection that reads it, and where this fails
        self._file.seek(start)
        form = np.lib.format
        version = form.read_magic(self._file)
        read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        self.shape, by_column, self._dtype = read(self._file)
        if self._dtype.hasobject or not self.shape or (by_column and len(self.shape) > 1):
            raise ValueError(f"{argument}: expected an array of numbers in C order with rows in {path}, got another")
        self._start = self._file.tell()
        self._width = self._dtype.itemsize * math.prod(self.shape[1:])
        self.dtype = as_tensor(np.empty((0, *self.shape[1:]), self._dtype), "an array", path).dtype

    def rows(self, index: Tensor) -> Tensor:
        numbers = index.numpy()
        out = np.empty((len(numbers), *self.shape[1:]), self._dtype)
        runs = np.flatnonzero(np.diff(numbers, prepend=-2) != 1)  # neighbours are read at once
        for first, after in pairwise([*runs.tolist(), len(numbers)]):
            self._fill(memoryview(out[first:after].reshape(-1).view(np.uint8)), int(numbers[first]))  # type: ignore[arg-type]
        return as_tensor(out, "an array", self._path)

    def _fill(self, buffer: memoryview, row: int) -> None:
        done = 0
        while done < len(buffer):
            got = os.preadv(self._file.fileno(), [buffer[done:]], self._start + row * self._width + done)
            if not got:
                raise ValueError(f"{self.name}: expected {self.shape[0]} rows, got a file that ends in row {row}")
            done += got


def as_tensor(array: np.ndarray, name: str, path: Path) -> Tensor:
    """The array in a dtype that torch computes in.

    Raises:
        ValueError: it holds no numbers, or larger ones than int64.
    """
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise ValueError(f"path: expected numbers as {name} in {path}, got {array.dtype}")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind == "u" and array.dtype != np.uint8:  # torch has no arithmetic of the larger ones
        if array.size and int(array.max()) > np.iinfo(np.int64).max:
            raise ValueError(f"path: expected numbers below 2**63 as {name} in {path}, got {array.max()}")
        array = array.astype(np.int64)
    if array.dtype == np.float64:
        array = array.astype(np.float32)  # what towers compute in
    return torch.from_numpy(np.ascontiguousarray(array))


def inside_archive(path: Path, names: Sequence[str]) -> dict[str, int] | None:
    """Where in an ``.npz`` each of these arrays begins; None where one is compressed, for which there is no such place.

    Raises:
        ValueError: the file is damaged.
    """
    import zipfile

    found = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for name in names:
            member = archive.getinfo(f"{name}.npy")
            if member.compress_type != zipfile.ZIP_STORED:
                return None
            file.seek(member.header_offset)
            header = file.read(30)  # its own name and extra field may be longer than those of the directory
            lengths = np.frombuffer(header[26:30], dtype="<u2").tolist()
            found[name] = member.header_offset + 30 + sum(lengths)
    return found
