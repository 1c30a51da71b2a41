"""A program that speaks: texts on its standard input become samples on its standard output, by libespeak-ng.

It is run by :mod:`ccu_fast.data.espeak` in a process of its own, without torch. eSpeak NG holds all its state in global
variables: it cannot be initialised twice, is not safe among threads, and the same text sounds a little different each
time, because the flutter of the voice goes on where it stopped and its breath is random, seeded by the clock. Here each
text is spoken by a fork of the state right after initialisation, with a seed that is always the same: what comes out
depends on the request alone.

    arguments: libespeak-ng.so, espeak-ng-data
    at first → a line of JSON: version, samples per second
    in       ← a line of JSON for each text: text, voice, speed (words per minute), pitch (0 – 99)
    out      → eight bytes, little endian: the count of the bytes that follow, which are int16 samples
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from typing import Any, NoReturn

# Of speak_lib.h.
SYNCHRONOUS, DO_NOT_EXIT = 2, 1 << 15
CHARACTERS, UTF8 = 1, 1
SPEED, PITCH = 1, 3
SEED = 1  # of the breath
HEARD = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def main(library: str, data: str) -> None:
    """Serve requests until the input ends."""
    espeak = ctypes.CDLL(library)
    espeak.espeak_Info.restype = ctypes.c_char_p
    espeak.espeak_Synth.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_uint,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    rate = espeak.espeak_Initialize(SYNCHRONOUS, 0, os.fsencode(data), DO_NOT_EXIT)
    if rate <= 0:
        sys.exit(f"espeak_Initialize: {rate} with data {data}")
    out = sys.stdout.buffer
    out.write(json.dumps([espeak.espeak_Info(None).decode(), rate]).encode() + b"\n")
    out.flush()
    for line in sys.stdin.buffer:
        samples = forked(espeak, json.loads(line))
        out.write(len(samples).to_bytes(8, "little") + samples)
        out.flush()


def forked(espeak: Any, request: dict[str, Any]) -> bytes:
    """The samples, spoken by a child that ends with it."""
    ours, its = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        speak(espeak, request, its)
    os.close(its)
    with os.fdopen(ours, "rb") as pipe:
        samples = pipe.read()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"cannot speak {request}")
    return samples


def speak(espeak: Any, request: dict[str, Any], pipe: int) -> NoReturn:
    """Write the samples into a pipe and end the process; its status says whether all went well."""
    parts: list[bytes] = []

    @HEARD
    def heard(samples: Any, count: int, _: Any) -> int:
        if samples and count > 0:
            parts.append(ctypes.string_at(samples, 2 * count))
        return 0

    text = request["text"].encode()
    espeak.espeak_ng_SetRandSeed(ctypes.c_long(SEED))
    espeak.espeak_SetSynthCallback(heard)
    failed = (
        espeak.espeak_SetVoiceByName(request["voice"].encode())
        or espeak.espeak_SetParameter(SPEED, request["speed"], 0)
        or espeak.espeak_SetParameter(PITCH, request["pitch"], 0)
        or espeak.espeak_Synth(text, len(text) + 1, 0, CHARACTERS, 0, UTF8, None, None)
    )
    with os.fdopen(pipe, "wb") as out:
        out.write(b"".join(parts))
    os._exit(bool(failed))


if __name__ == "__main__":
    main(*sys.argv[1:])
