"""Writing files so that a reader, or a killed process, never sees half of one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


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


def read_json(path: Path, name: str = "out") -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: not JSON; names the argument.
    """
    with readable(path, name):
        return json.loads(path.read_text(encoding="utf-8"))
