"""Copies of compressed shards that are not, for as long as this process lives: only those can be read at offsets."""

from __future__ import annotations

import atexit
import gzip
import os
import re
import shutil
import tempfile
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

from ccu_fast.files import locked, take_lock

_PREFIX = "ccu-fast-shards-"
_MADE_HERE = re.compile(rf"{_PREFIX}[a-z0-9_]{{8}}")  # by tempfile.mkdtemp
_COPY = re.compile(r"copy-[a-z0-9_]{8}\.tar")


class BadShard(ValueError):
    """A tar file that cannot be read to its end; the message says why."""


class NoCopy(OSError):
    """The folder for temporary files takes no copy, which is no fault of the shard."""


def uncompressed(shard: Path) -> Path:
    """A copy of a ``.tar.gz``, in the folder for temporary files.

    Raises:
        BadShard: not a whole gzip file.
        NoCopy: no room for it, or no such folder.
        OSError: the shard cannot be read.
    """
    facts = shard.stat()
    return _copied(shard.resolve(), facts.st_size, facts.st_mtime_ns)


@cache
def _copied(shard: Path, *_: int) -> Path:
    try:
        copy = tempfile.NamedTemporaryFile(dir=_folder(), prefix="copy-", suffix=".tar", delete=False)  # noqa: SIM115
    except OSError as error:
        raise _refused(shard, error) from error
    whole = False
    try:
        with copy, gzip.open(shard) as file:
            while block := file.read(1 << 20):
                _write(copy, block, shard)
        whole = True
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise BadShard(f"not a whole gzip file ({error})") from error
    finally:
        if not whole:
            os.unlink(copy.name)
    return Path(copy.name)


def _write(copy: IO[bytes], block: bytes, shard: Path) -> None:
    try:
        copy.write(block)
        copy.flush()
    except OSError as error:
        raise _refused(shard, error) from error


def _refused(shard: Path, error: OSError) -> NoCopy:
    place = tempfile.tempdir or os.environ.get("TMPDIR", "the folder for temporary files")
    said = f"expected room for an uncompressed copy of {shard} in {place} (TMPDIR), got {error.strerror or error}"
    return NoCopy(error.errno, said)


@cache
def _folder() -> str:
    """The folder for the copies of this process; those that killed ones left are removed first."""
    for old in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            # Nothing but what a process left that was killed here: its lock, which nobody holds any more, and copies.
            ours = _MADE_HERE.fullmatch(old.name) and not old.is_symlink() and old.stat().st_uid == os.getuid()
            inside = list(old.iterdir()) if ours else []
            names = {path.name for path in inside if path.is_file()}
            copies = len(names) == len(inside) and all(_COPY.fullmatch(name) for name in names - {"lock"})
            if copies and "lock" in names:
                with locked(old / "lock"):
                    shutil.rmtree(old)
    while True:
        folder = tempfile.mkdtemp(prefix=_PREFIX)
        with suppress(BlockingIOError, FileNotFoundError):  # another process took it for an old one
            lock = take_lock(Path(folder) / "lock")
            break
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # and not a fork of it
            shutil.rmtree(folder, ignore_errors=True)
            lock.close()  # and not before; a fork has the lock too, and ends without a word to it

    atexit.register(remove)
    return folder
