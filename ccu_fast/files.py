"""Writing files so that a reader, or a killed process, never sees half of one, and trying first where they will go."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def new_file(path: Path, *, replace: bool = True) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends, all of it or nothing, also in a killed process.

    Raises:
        FileExistsError: ``path`` is there and ``replace`` is not set.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        if replace:
            os.replace(name, path)
        else:
            os.link(name, path)
            os.unlink(name)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path``: all of it or nothing, also when the process is killed."""
    with new_file(path) as file:
        file.write(text.encode())


def reserve(file: IO[bytes], size: int) -> None:
    """Take the disk space of a file that will be mapped: on a full disk this raises, and a write to the memory crashes.

    Raises:
        OSError: there is not so much.
    """
    if size:
        os.posix_fallocate(file.fileno(), 0, size)


def output_folder(path: Path, name: str = "out") -> Path:
    """The folder, made if needed, if files can be written there.

    Raises:
        OSError: they cannot; names the argument.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Permissions do not tell of a place that is mounted read-only, or full.
        with tempfile.TemporaryDirectory(dir=path, prefix="."):
            pass
    except OSError as error:
        said = f"{name}: expected a folder that can be written, got {path} ({error.strerror})"
        raise OSError(error.errno, said) from error
    return path


def output_file(path: Path, name: str = "out") -> Path:
    """The path, if a file can be written there; its folder is made if needed.

    Raises:
        OSError: it cannot; names the argument.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{name}: expected a file, got the folder {path}")
    output_folder(path.parent, name)
    return path


def new_folder(path: Path, name: str = "out") -> Path:
    """The real path of a folder that is to appear at once, by a rename; tried here, so that it works in the end.

    Symbolic links are followed: what they point to is replaced, not they. An empty folder stays as it is.

    Raises:
        FileExistsError: it is there and not empty.
        OSError: nothing can be renamed to it: its parent cannot be written, it is a mount point, the current folder.
    """
    place = Path(os.path.realpath(path))
    there = os.path.lexists(place)
    if there and (not place.is_dir() or any(place.iterdir())):
        raise FileExistsError(f"{name}: expected a new or empty folder, got {path}")
    if there and place.samefile(os.curdir):
        raise OSError(f"{name}: expected another folder than the current one, which would be replaced, got {path}")
    output_folder(place.parent, name)
    trial = tempfile.mkdtemp(dir=place.parent, prefix=".")
    try:
        if there:
            shutil.copystat(place, trial)
        os.replace(trial, place)
        if not there:
            place.rmdir()
    except OSError as error:
        os.rmdir(trial)
        said = f"{name}: expected a folder that another can replace, got {path} ({error.strerror}); choose one in it"
        raise OSError(error.errno, said) from error
    return place


@contextmanager
def locked(path: Path, name: str = "out") -> Iterator[None]:
    """Keep other processes out of a folder for a block: ``path`` is a file in it, which is gone afterwards.

    Raises:
        BlockingIOError: another process is in such a block.
    """
    try:
        file = take_lock(path)
    except BlockingIOError:
        raise BlockingIOError(f"{name}: expected no other process at work in {path.parent}, got one") from None
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def take_lock(path: Path) -> IO[str]:
    """The file, made if needed, which no other process holds as long as it is open here.

    Raises:
        BlockingIOError: another process holds it.
    """
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The process before may have removed the file after it was opened here: then the lock is of no file.
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            raise BlockingIOError(f"{path} was removed")
    except BaseException:
        file.close()
        raise
    return file


@contextmanager
def after_the_work(where: str) -> Iterator[None]:
    """For a block after long work: an error then also says where the finished work lies, and what to do.

    Args:
        where: a clause, such as "the figures are in figures.json".
    """
    try:
        yield
    except BaseException as error:
        # As add_note does, which Python 3.10 lacks.
        error.__notes__ = [*getattr(error, "__notes__", ()), where]  # type: ignore[attr-defined]
        raise


@contextmanager
def readable(path: Path, name: str) -> Iterator[None]:
    """For a block that parses a file: a damaged one may raise anything.

    Raises:
        ValueError: it raised; names the argument and the file.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name}: expected an undamaged file, got {path} ({why[:200]})") from error


def json_text(value: Any, **options: Any) -> str:
    """JSON as it is read best, in UTF-8; with escapes if a text in it holds half of a surrogate pair."""
    text = json.dumps(value, ensure_ascii=False, **options)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, **options)
    return text


def read_json(path: Path, name: str = "out") -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: not JSON; names the argument.
    """
    with readable(path, name):
        return json.loads(path.read_text(encoding="utf-8"))
