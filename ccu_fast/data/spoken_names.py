"""Names as several synthetic speakers say them: a log-mel spectrogram for each, kept in a folder.

The speakers are voices of eSpeak NG (:mod:`ccu_fast.data.espeak`), which ``pip install espeakng-loader==0.2.4`` brings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ccu_fast.data.espeak import Speaker, espeak_hash, spoken
from ccu_fast.data.spectrogram import FRAMES, MELS, log_mel
from ccu_fast.files import new_file, output_folder

SPEAKERS = (
    Speaker("en-us", 175, 50),
    Speaker("en-us+f3", 170, 60),
    Speaker("en-gb-x-rp+m3", 180, 45),
    Speaker("en-gb-x-rp+f2", 165, 65),
    Speaker("en-gb-scotland+m1", 185, 40),
    Speaker("en-gb-scotland+f4", 175, 55),
    Speaker("en-029+m7", 170, 35),
    Speaker("en-us-nyc+f5", 190, 70),
)
FORMAT = 2  # of the kept files; raise it whenever the same names and speakers give other spectrograms
PROGRESS_EVERY = 100


def spoken_names(
    names: Sequence[str],
    *,
    speakers: Sequence[Speaker] = SPEAKERS,
    cache: Path | None = None,
    progress: Callable[[str, int, int, str], object] | None = None,
) -> Tensor:
    """Spectrograms of names, each said by every speaker: fp32 ``[names, speakers, MELS, FRAMES]``, rounded to fp16.

    Speaking takes a few milliseconds for each, so what a speaker said is kept in a file of its own. It is found again
    by the names, the speaker and the bytes of eSpeak NG, and what is damaged is made anew.

    Args:
        names: what is said, at least one; punctuation is left out, because it makes pauses.
        speakers: who says it, at least one.
        cache: folder of the files, made if needed; None keeps nothing.
        progress: called as progress(stage, done, total, note).

    Raises:
        ImportError: espeakng-loader is not installed.
        OSError: ``cache`` cannot be written.
        RuntimeError: as for :func:`ccu_fast.data.espeak.spoken`.
        ValueError: no names, no speakers, or a name with nothing to say.
    """
    for what, given in (("names", names), ("speakers", speakers)):
        if not given:
            raise ValueError(f"{what}: expected at least one, got none")
    texts = [sayable(name) for name in names]
    engine = espeak_hash()
    if cache is not None:
        output_folder(cache, "cache")
    said = []
    for speaker in speakers:
        made_of = json.dumps([FORMAT, MELS, FRAMES, engine, asdict(speaker), texts])
        key = hashlib.sha256(made_of.encode()).hexdigest()
        path = None if cache is None else cache / f"{speaker.voice.replace('/', '-')}-{key[:16]}.npz"
        mels = None if path is None else _kept(path, key, len(texts))
        if mels is None:
            mels = _said(texts, speaker, progress)
            if path is not None:
                with new_file(path) as file:
                    np.savez(file, key=np.array(key), mels=mels)
        said.append(torch.from_numpy(mels))
    return torch.stack(said, 1).float()


def sayable(name: str) -> str:
    """A name without the punctuation that would make a pause.

    Raises:
        ValueError: nothing is left.

    >>> ccu_fast.data.spoken_names.sayable("kiss: woman, man")
    'kiss woman man'
    """
    text = " ".join(re.sub("[:;,!?()“”]", " ", name).split())
    if not text:
        raise ValueError(f"names: expected something to say, got {name!r}")
    return text


def _said(texts: list[str], speaker: Speaker, progress: Callable[[str, int, int, str], object] | None) -> np.ndarray:
    made = np.empty((len(texts), MELS, FRAMES), np.float16)
    for i, samples in enumerate(spoken((text, speaker) for text in texts)):
        if progress is not None and i % PROGRESS_EVERY == 0:
            progress(f"speech of {speaker.voice}", i, len(texts), texts[i])
        made[i] = log_mel(samples).half().numpy()
    if progress is not None:
        progress(f"speech of {speaker.voice}", len(texts), len(texts), "")
    return made


def _kept(path: Path, key: str, count: int) -> np.ndarray | None:
    """What the file holds; None if there is none, or a damaged or foreign one."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            mels: np.ndarray = file["mels"]
            fits = str(file["key"]) == key and mels.shape == (count, MELS, FRAMES) and mels.dtype == np.float16
    except Exception:  # a damaged file may raise anything
        return None
    return mels if fits else None
