"""The file of a NoiseStore: after a kill exactly what it was at the last commit.

    bytes 0..4095       header: magic, CRC32, JSON
    bytes 4096..8191    zeros, or in older files a second header; that of the higher generation holds
    bytes 8192..        the noise, [rows, *item_shape], little-endian

A store works on a copy of the noise in a file without a name, which is mapped into memory and goes with the process.
A commit writes header and noise to a new file that takes the place of the old one. The price is that opening and
committing take as long as the file is large, and twice its space (three times while a commit is written).
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccu_fast.files import new_file, reserve

_MAGIC = b"ccu_fast.NoiseStore 1\n"
_SLOT, _DATA = 4096, 8192
_BLOCK = 64 << 20
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

    @staticmethod
    def create(path: Path, shape: tuple[int, ...], dtype: torch.dtype, tag: str) -> None:
        """A file of zeros, sparse where the file system can."""
        with new_file(path, replace=False) as file:
            file.write(_header(shape, dtype, tag, 0, {}))
            file.truncate(_DATA + math.prod(shape) * dtype.itemsize)

    @staticmethod
    def write_whole(path: Path, data: Tensor, tag: str, progress: dict[str, Any]) -> None:
        """All of ``data`` in a new file that then takes the place of ``path``."""
        if path.exists():
            NoiseFile.open(path).close()  # not while somebody has it open
        with new_file(path) as file:
            _write(file, data, tag, 0, progress)

    @staticmethod
    def open(path: Path) -> NoiseFile:
        """Lock and read the header.

        Raises:
            ValueError: no such file of ours, or damaged.
            BlockingIOError: locked.
        """
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self = NoiseFile(path, handle)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(handle).st_nlink == 0:  # a commit took its place since it was opened
                    raise BlockingIOError
            except BlockingIOError:
                raise BlockingIOError(
                    f"path: expected a file that nobody has open, got {path}, which is locked"
                ) from None
            self._read_header()
        except BaseException:
            self.close()
            raise
        return self

    def _read_header(self) -> None:
        slots = [_parse(os.pread(self._handle, _SLOT, at)) for at in (0, _SLOT)]
        valid = [slot for slot in slots if slot is not None]
        if not valid:
            raise ValueError(f"path: expected a file that NoiseStore wrote, got {self.path}")
        header = max(valid, key=lambda slot: slot["generation"])
        self.rows: int = header["rows"]
        self.item_shape: tuple[int, ...] = tuple(header["item_shape"])
        self.dtype: torch.dtype = _NAMES[header["dtype"]]
        self.tag: str = header["tag"]
        self.generation: int = header["generation"]
        self.progress: dict[str, Any] = header["progress"]
        expected = _DATA + self.rows * math.prod(self.item_shape) * self.dtype.itemsize
        found = os.fstat(self._handle).st_size
        if found != expected:
            raise ValueError(f"path: expected {expected} bytes in {self.path}, got {found}: it is damaged")

    def expect(self, item_shape: tuple[int, ...] | None, dtype: torch.dtype | None, tag: str | None) -> None:
        """Refuse a file that holds something else."""
        for name, wanted, got in (
            ("item_shape", item_shape, self.item_shape), ("dtype", dtype, self.dtype), ("tag", tag, self.tag),
        ):  # fmt: skip
            if wanted is not None and wanted != got:
                raise ValueError(f"path: expected {self.path} with {name} {wanted!r}, got {got!r}")

    def read(self) -> Tensor:
        """The noise as it is in the file; writing to it does not reach the file."""
        with os.fdopen(os.dup(self._handle), "rb") as file:
            return _mapped(file, (self.rows, *self.item_shape), self.dtype, mode="c", offset=_DATA)

    def copy(self) -> Tensor:
        """The noise in a file without a name beside this one, mapped into memory."""
        there = self.read()
        made = scratch(self.path.parent, there.shape, self.dtype)
        for old, new in zip(_blocks(there), _blocks(made), strict=True):
            if old.any():  # zeros are there
                new.copy_(old)
        return made

    def commit(self, data: Tensor, progress: dict[str, Any]) -> None:
        """Header and noise in a new file, which takes the place of this one and is locked before it does."""
        handle = -1
        try:
            with new_file(self.path) as file:
                _write(file, data, self.tag, self.generation + 1, progress)
                handle = os.dup(file.fileno())
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            if handle >= 0:
                os.close(handle)  # it would keep the space of a file that the disk had no room for
            raise
        self.close()
        self._handle, self.generation, self.progress = handle, self.generation + 1, progress

    def close(self) -> None:
        """Unlock and let go."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def scratch(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in a file without a name, mapped into memory; it goes with the process, however that ends."""
    with tempfile.TemporaryFile(dir=folder) as file:
        reserve(file, math.prod(shape) * dtype.itemsize)
        return _mapped(file, shape, dtype, mode="r+")


def _mapped(file: Any, shape: tuple[int, ...], dtype: torch.dtype, **options: Any) -> Tensor:
    if math.prod(shape) == 0:
        return torch.zeros(shape, dtype=dtype)
    return torch.from_numpy(np.memmap(file, dtype=_little(dtype), shape=tuple(shape), **options))


def _little(dtype: torch.dtype) -> np.dtype[Any]:
    """How the file stores a dtype."""
    return np.dtype(str(dtype).removeprefix("torch.")).newbyteorder("<")


def _blocks(data: Tensor) -> tuple[Tensor, ...]:
    return data.split(max(1, _BLOCK // max(1, math.prod(data.shape[1:]) * data.dtype.itemsize)))


def _write(file: Any, data: Tensor, tag: str, generation: int, progress: dict[str, Any]) -> None:
    file.write(_header(data.shape, data.dtype, tag, generation, progress))
    for part in _blocks(data):
        file.write(part.cpu().contiguous().numpy().astype(_little(data.dtype), copy=False).data)


def _header(shape: Sequence[int], dtype: torch.dtype, tag: str, generation: int, progress: dict[str, Any]) -> bytes:
    rows, *item_shape = shape
    described = {"rows": rows, "item_shape": item_shape, "dtype": str(dtype).removeprefix("torch."), "tag": tag}
    body = json.dumps({**described, "generation": generation, "progress": progress}).encode()
    head = _MAGIC + struct.pack("<II", zlib.crc32(body), len(body)) + body
    if len(head) > _SLOT:
        raise ValueError(
            f"progress: expected at most {_SLOT} bytes of JSON with the rest of the header, got {len(head)}"
        )
    return head.ljust(_DATA, b"\0")


def _parse(slot: bytes) -> dict[str, Any] | None:
    if not slot.startswith(_MAGIC):
        return None
    crc, size = struct.unpack_from("<II", slot, len(_MAGIC))
    body = slot[len(_MAGIC) + 8 :][:size]
    if len(body) != size or zlib.crc32(body) != crc:
        return None
    header: dict[str, Any] = json.loads(body)
    return header
