"""The file of a NoiseStore: mapped into memory, and after a kill exactly what it was at the last commit.

    bytes 0..4095, 4096..8191   two headers in turn: magic, CRC32, JSON; the valid one of the higher generation holds
    bytes 8192..                the noise, [rows, *item_shape], little-endian
    <path>.journal              rows as they were at the last commit, appended before a row's first change since

A commit flushes the noise, then writes the other header with the next generation, then starts a new journal. Opening a
file whose journal belongs to the header's generation puts its rows back. A process may be killed at any point: a
journal record counts only if whole (it has a CRC32), and a row changes only after its record is written. That holds for
the process; against a loss of power a commit is safe once it has returned, an interrupted write between two commits is
safe where the file system keeps the order of writes.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccu_fast.files import new_file

_MAGIC = b"ccu_fast.NoiseStore 1\n"
_SLOT, _DATA = 4096, 8192
_JOURNAL = struct.Struct("<qq")  # generation, bytes a row
_RECORD = struct.Struct("<qI")  # row, CRC32 of row and noise
_NAMES = {"int8": torch.int8, "float16": torch.float16, "float32": torch.float32}


class NoiseFile:
    """One open file, locked against other processes.

    Attributes:
        path: resolved.
        rows, item_shape, dtype, tag: what it holds.
        generation: commits so far.
        progress: the note of the last commit.
    """

    def __init__(self, path: Path, handle: int) -> None:
        self.path = path.resolve()
        self._handle = handle
        self._map: np.ndarray[Any, Any] | None = None
        self._journal: Any = None
        self._saved: np.ndarray[Any, Any] | None = None

    @staticmethod
    def create(path: Path, rows: int, item_shape: tuple[int, ...], dtype: torch.dtype, tag: str) -> None:
        """A file of zeros, sparse where the file system can."""
        with new_file(path, replace=False) as file:
            file.write(_header(_description(rows, item_shape, dtype, tag, 0, {})))
            file.truncate(_DATA + rows * math.prod(item_shape) * dtype.itemsize)

    @staticmethod
    def write_whole(path: Path, data: Tensor, tag: str, progress: dict[str, Any]) -> None:
        """All of ``data`` in a new file that then takes the place of ``path``."""
        rows, *item_shape = data.shape
        if path.exists():
            NoiseFile.open(path).close()  # not while somebody has it open; and its journal ends here
        with new_file(path) as file:
            file.write(_header(_description(rows, tuple(item_shape), data.dtype, tag, 0, progress)))
            file.seek(_DATA)
            step = max(1, (64 << 20) // max(1, math.prod(item_shape) * data.dtype.itemsize))
            for start in range(0, rows, step):
                file.write(_little(data[start : start + step].cpu().contiguous().numpy()).data)
            file.truncate(_DATA + data.numel() * data.dtype.itemsize)

    @staticmethod
    def open(path: Path) -> NoiseFile:
        """Lock, read the header, roll back.

        Raises:
            ValueError: no such file of ours, or damaged.
            BlockingIOError: locked.
        """
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self = NoiseFile(path, handle)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(
                    f"path: expected a file that nobody has open, got {path}, which is locked"
                ) from None
            self._read_header()
            self._roll_back()
        except BaseException:
            self.close()
            raise
        return self

    def _read_header(self) -> None:
        slots = [_parse(os.pread(self._handle, _SLOT, at)) for at in (0, _SLOT)]
        valid = [slot for slot in slots if slot is not None]
        if not valid:
            raise ValueError(f"path: expected a file that NoiseStore wrote, got {self.path}")
        self._describe(max(valid, key=lambda slot: slot["generation"]))
        expected, found = _DATA + self.rows * self._row_bytes, os.fstat(self._handle).st_size
        if found != expected:
            raise ValueError(f"path: expected {expected} bytes in {self.path}, got {found}: it is damaged")

    def _describe(self, header: dict[str, Any]) -> None:
        self.rows: int = header["rows"]
        self.item_shape: tuple[int, ...] = tuple(header["item_shape"])
        self.dtype: torch.dtype = _NAMES[header["dtype"]]
        self.tag: str = header["tag"]
        self.generation: int = header["generation"]
        self.progress: dict[str, Any] = header["progress"]
        self._row_bytes = math.prod(self.item_shape) * self.dtype.itemsize

    def expect(self, item_shape: tuple[int, ...] | None, dtype: torch.dtype | None, tag: str | None) -> None:
        """Refuse a file that holds something else."""
        for name, wanted, got in (
            ("item_shape", item_shape, self.item_shape), ("dtype", dtype, self.dtype), ("tag", tag, self.tag),
        ):  # fmt: skip
            if wanted is not None and wanted != got:
                raise ValueError(f"path: expected {self.path} with {name} {wanted!r}, got {got!r}")

    def map(self) -> Tensor:
        """The noise; writing to it writes to the file."""
        if self.rows * self._row_bytes == 0:
            return torch.zeros((self.rows, *self.item_shape), dtype=self.dtype)
        if sys.byteorder != "little":
            raise ValueError("path: noise files are little-endian and can be mapped on such machines only")
        name = str(self.dtype).removeprefix("torch.")
        with os.fdopen(os.dup(self._handle), "r+b") as file:
            self._map = np.memmap(file, dtype=name, mode="r+", offset=_DATA, shape=(self.rows, *self.item_shape))
        return torch.from_numpy(self._map)

    @property
    def _journal_path(self) -> Path:
        return self.path.with_name(self.path.name + ".journal")

    def journal(self, index: Tensor) -> None:
        """Keep the rows of ``index`` as they are, unless that is done since the last commit."""
        if self._map is None:
            return
        if self._saved is None:
            self._saved = np.zeros(self.rows, dtype=bool)
        rows = np.unique(index.numpy())
        rows = rows[~self._saved[rows]]
        if not len(rows):
            return
        if self._journal is None:
            self._journal = open(self._journal_path, "wb", buffering=0)  # noqa: SIM115 - until the commit
            self._journal.write(_JOURNAL.pack(self.generation, self._row_bytes))
        for row in rows.tolist():
            noise = self._map[row].tobytes()
            self._journal.write(_RECORD.pack(row, _crc(row, noise)) + noise)
        self._saved[rows] = True

    def commit(self, progress: dict[str, Any]) -> None:
        """Flush the noise, then the header that says so."""
        following = _description(self.rows, self.item_shape, self.dtype, self.tag, self.generation + 1, progress)
        header = _header(following)
        if isinstance(self._map, np.memmap):
            self._map.flush()
        os.pwrite(self._handle, header, _SLOT * (following["generation"] % 2))
        os.fsync(self._handle)
        self._describe(following)
        self._end_journal()

    def _end_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
        self._journal = self._saved = None
        self._journal_path.unlink(missing_ok=True)

    def _roll_back(self) -> None:
        try:
            file = open(self._journal_path, "rb")  # noqa: SIM115 - a missing one is the usual case
        except FileNotFoundError:
            return
        with file:
            head = file.read(_JOURNAL.size)
            if len(head) == _JOURNAL.size and _JOURNAL.unpack(head) == (self.generation, self._row_bytes):
                while len(record := file.read(_RECORD.size)) == _RECORD.size:
                    row, crc = _RECORD.unpack(record)
                    noise = file.read(self._row_bytes)
                    if len(noise) != self._row_bytes or _crc(row, noise) != crc or not 0 <= row < self.rows:
                        break  # killed while writing it: its row has not changed
                    os.pwrite(self._handle, noise, _DATA + row * self._row_bytes)
                os.fsync(self._handle)
        self._journal_path.unlink()

    def close(self) -> None:
        """Unlock and let go; the journal stays for the next one to open the file."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        self._map = None
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _crc(row: int, noise: bytes) -> int:
    return zlib.crc32(noise, zlib.crc32(struct.pack("<q", row)))


def _little(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(values.astype(values.dtype.newbyteorder("<"), copy=False))


def _description(
    rows: int, item_shape: tuple[int, ...], dtype: torch.dtype, tag: str, generation: int, progress: dict[str, Any]
) -> dict[str, Any]:
    return {
        "rows": rows, "item_shape": list(item_shape), "dtype": str(dtype).removeprefix("torch."), "tag": tag,
        "generation": generation, "progress": progress,
    }  # fmt: skip


def _header(description: dict[str, Any]) -> bytes:
    body = json.dumps(description).encode()
    head = _MAGIC + struct.pack("<II", zlib.crc32(body), len(body)) + body
    if len(head) > _SLOT:
        raise ValueError(
            f"progress: expected at most {_SLOT} bytes of JSON with the rest of the header, got {len(head)}"
        )
    return head.ljust(_SLOT, b"\0")


def _parse(slot: bytes) -> dict[str, Any] | None:
    if not slot.startswith(_MAGIC):
        return None
    crc, size = struct.unpack_from("<II", slot, len(_MAGIC))
    body = slot[len(_MAGIC) + 8 :][:size]
    if len(body) != size or zlib.crc32(body) != crc:
        return None
    header: dict[str, Any] = json.loads(body)
    return header
