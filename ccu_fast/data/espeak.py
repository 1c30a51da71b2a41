"""Speech from text: eSpeak NG of the package ``espeakng-loader``, in a process of its own.

eSpeak NG is under the GPL, version 3 or later. Nothing of it is part of this package.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ccu_fast import check, extras
from ccu_fast.data.spectrogram import RATE

PACKAGE = "espeakng_loader"
WORKER = Path(__file__).with_name("espeak_worker.py")


@dataclass(frozen=True)
class Speaker:
    """Who speaks, and how.

    Attributes:
        voice: an accent, and after a plus sign a variant of the voice: "en-us", "en-gb-x-rp+f2".
        speed: in words per minute, in [80, 450].
        pitch: in [0, 99].

    >>> ccu_fast.data.espeak.Speaker("en-us+f3", speed=160).pitch
    50
    """

    voice: str = "en-us"
    speed: int = check.field(175, low=80, high=450)
    pitch: int = check.field(50, low=0, high=99)

    def __post_init__(self) -> None:
        check.fields(self)


def spoken(requests: Iterable[tuple[str, Speaker]]) -> Iterator[Tensor]:
    """Texts, each spoken by somebody: int16 samples ``[N]``, 22050 a second, one tensor for each text.

    The same text and speaker give the same bits, whatever was spoken before.

    Args:
        requests: texts of at least one character, and who speaks.

    Raises:
        ImportError: espeakng-loader is not installed.
        TypeError, ValueError: no text; naming it.
        RuntimeError: eSpeak NG failed, as it does for a voice that it has not got; says what it said.
    """
    library, data = _installed()
    command = [sys.executable, "-I", "-S", str(WORKER), str(library), str(data)]
    with tempfile.TemporaryFile() as said:
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said)
        assert worker.stdin is not None and worker.stdout is not None

        def read(count: int | None) -> bytes:
            """As many bytes; a line for None."""
            assert worker.stdout is not None
            found = worker.stdout.readline() if count is None else worker.stdout.read(count)
            if len(found) < (count or 1):
                worker.wait()
                said.seek(0)
                raise RuntimeError(f"espeak-ng: {said.read().decode(errors='replace').strip() or worker.returncode}")
            return found

        try:
            version, rate = json.loads(read(None))
            if rate != RATE:
                raise RuntimeError(f"espeak-ng: expected {RATE} samples per second, got {rate} of version {version}")
            for text, speaker in requests:
                if not isinstance(text, str):
                    raise TypeError(f"text: expected a string, got {type(text).__name__}")
                if not text.strip() or "\0" in text:
                    raise ValueError(f"text: expected something to say, got {text!r}")
                with suppress(BrokenPipeError):  # reading says why
                    worker.stdin.write(json.dumps({"text": text, **asdict(speaker)}).encode() + b"\n")
                    worker.stdin.flush()
                samples = read(int.from_bytes(read(8), "little"))
                yield torch.from_numpy(np.frombuffer(samples, "<i2").astype(np.int16))
        finally:
            with suppress(BrokenPipeError):
                worker.stdin.close()
            worker.stdout.close()
            worker.wait()


def espeak_hash() -> str:
    """SHA-256 over all that decides what eSpeak NG says: the library, and the names and the contents of its data.

    Raises:
        ImportError: espeakng-loader is not installed.
    """
    library, data = _installed()
    digest = hashlib.sha256(library.read_bytes())
    for file in sorted(path for path in data.rglob("*") if path.is_file()):
        digest.update(file.relative_to(data).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _installed() -> tuple[Path, Path]:
    """The library and the folder of its data."""
    extras.require(PACKAGE)
    package = importlib.import_module(PACKAGE)
    return Path(package.get_library_path()), Path(package.get_data_path())
