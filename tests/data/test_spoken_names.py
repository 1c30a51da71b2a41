"""Spoken names: what is kept and found again, what is refused, and the real eSpeak NG where it is installed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from ccu_fast.data import espeak
from ccu_fast.data import spoken_names as module
from ccu_fast.data.espeak import PACKAGE, Speaker, espeak_hash, spoken
from ccu_fast.data.spectrogram import FRAMES, MELS, log_mel
from ccu_fast.data.spoken_names import SPEAKERS, sayable, spoken_names
from tests.support.presence import require_espeak

NAMES = ["red apple", "kiss: woman, man", "O button (blood type)"]
TWO = (Speaker("low", 100, 10), Speaker("high", 200, 90))
Asked = list[tuple[str, str]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What a stand-in for eSpeak NG is asked to say; it beeps, for each text and speaker differently."""
    told: Asked = []

    def beeps(requests: Iterable[tuple[str, Speaker]]) -> Iterator[Tensor]:
        for text, speaker in requests:
            told.append((text, speaker.voice))
            yield (20000 * (torch.arange(9000) * (len(text) + speaker.pitch) / 50).sin()).to(torch.int16)

    monkeypatch.setattr(module, "spoken", beeps)
    monkeypatch.setattr(module, "espeak_hash", lambda: "an engine")
    return told


def test_every_speaker_says_every_name_once(asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = []
    cache = tmp_path / "new" / "folder"
    first = spoken_names(NAMES, speakers=TWO, cache=cache, progress=lambda *said: stages.append(said[:3]))
    assert asked == [(text, who.voice) for who in TWO for text in map(sayable, NAMES)]
    assert stages == [(f"speech of {who}", done, 3) for who in ("low", "high") for done in (0, 3)]
    assert first.shape == (3, 2, MELS, FRAMES) and first.dtype == torch.float32
    text, speaker = sayable(NAMES[1]), TWO[1]
    [samples] = module.spoken([(text, speaker)])
    assert torch.equal(first[1, 1], log_mel(samples).half().float())
    asked.clear()
    assert torch.equal(spoken_names(NAMES, speakers=TWO, cache=cache), first) and not asked
    # A speaker alone is found too; what was killed before it wrote is said again, and the rest is not.
    assert torch.equal(spoken_names(NAMES, speakers=TWO[1:], cache=cache), first[:, 1:]) and not asked
    next(cache.glob("low-*")).unlink()
    assert torch.equal(spoken_names(NAMES, speakers=TWO, cache=cache), first)
    assert {voice for _, voice in asked} == {"low"} and len(list(cache.iterdir())) == 2
    # Nothing is kept where nothing is asked for, and the result is the same.
    assert torch.equal(spoken_names(NAMES, speakers=TWO), first) and len(list(cache.iterdir())) == 2


def test_what_something_else_left_is_not_taken(asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(names: list[str] = NAMES, who: Speaker = TWO[0]) -> int:
        asked.clear()
        spoken_names(names, speakers=[who], cache=tmp_path)
        return len(asked)

    assert (said(), said()) == (3, 0)
    assert said(NAMES[:2]) == 2  # other names
    assert said(who=Speaker("low", 100, 11)) == 3  # another speaker
    monkeypatch.setattr(module, "espeak_hash", lambda: "another engine")
    assert (said(), said()) == (3, 0)
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    assert (said(), said()) == (3, 0)


@pytest.mark.parametrize("damage", ["cut", "nothing", "text", "key", "shape", "dtype", "bytes"])
def test_a_damaged_file_is_made_anew(asked: Asked, tmp_path: Path, damage: str) -> None:
    first = spoken_names(NAMES, speakers=TWO[:1], cache=tmp_path)
    [path] = tmp_path.iterdir()
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    if damage in ("key", "shape", "dtype"):
        arrays |= {
            "key": {"key": np.array("another")},
            "shape": {"mels": arrays["mels"][:1]},
            "dtype": {"mels": arrays["mels"].astype(np.float32)},
        }[damage]
        np.savez(path, **arrays)
    else:
        middle = len(whole) // 2
        changed = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
        path.write_bytes({"cut": whole[:middle], "nothing": b"", "text": b"key", "bytes": changed}[damage])
    asked.clear()
    assert torch.equal(spoken_names(NAMES, speakers=TWO[:1], cache=tmp_path), first)
    assert len(asked) == 3 and [path.read_bytes() for path in tmp_path.iterdir()] == [whole]


def test_a_voice_may_be_named_by_its_file(asked: Asked, tmp_path: Path) -> None:
    first = spoken_names(NAMES, speakers=[Speaker("gmw/en")], cache=tmp_path)
    asked.clear()
    assert torch.equal(spoken_names(NAMES, speakers=[Speaker("gmw/en")], cache=tmp_path), first) and not asked
    assert [path.name[:7] for path in tmp_path.iterdir()] == ["gmw-en-"]


def test_what_makes_pauses_is_left_out() -> None:
    assert [sayable(name) for name in NAMES] == ["red apple", "kiss woman man", "O button blood type"]
    assert sayable("flag: St. Barthélemy") == "flag St. Barthélemy" and sayable("o’clock") == "o’clock"


def test_what_cannot_be_said_is_refused(asked: Asked, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names: expected something to say, got ': '"):
        spoken_names(["apple", ": "])
    with pytest.raises(ValueError, match="names: expected at least one, got none"):
        spoken_names([])
    with pytest.raises(ValueError, match="speakers: expected at least one, got none"):
        spoken_names(NAMES, speakers=[])
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cache: expected a folder that can be written"):
        spoken_names(NAMES, cache=tmp_path / "file")
    assert not asked
    with pytest.raises(ValueError, match="speed: expected"):
        Speaker("en-us", speed=1000)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGE, None)  # as if it were not installed
    for call in (espeak_hash, lambda: list(spoken([("apple", Speaker())])), lambda: spoken_names(["apple"])):
        with pytest.raises(ImportError, match=r"espeakng-loader is needed .* pip install espeakng-loader==0\.2\.4"):
            call()


def test_a_library_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "libespeak-ng.so"
    library.write_text("no library")
    package = SimpleNamespace(get_library_path=lambda: str(library), get_data_path=lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, PACKAGE, package)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"(?s)espeak-ng: .*libespeak-ng\.so"):
        list(spoken([("apple", Speaker())]))
    hashes = [espeak_hash()]
    words = tmp_path / "en_dict"
    for change in (
        lambda: words.write_text("words"),
        lambda: words.write_text("other"),
        lambda: words.rename(tmp_path / "de"),
    ):
        change()
        hashes.append(espeak_hash())
    library.write_text("another library")
    assert len({*hashes, espeak_hash()}) == 5


def test_another_rate_than_that_of_spectrograms_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = SimpleNamespace(get_library_path=lambda: "library", get_data_path=lambda: "data")
    monkeypatch.setitem(sys.modules, PACKAGE, package)  # type: ignore[arg-type]
    worker = tmp_path / "worker.py"
    worker.write_text("print('[\"1.52\", 16000]')")
    monkeypatch.setattr(espeak, "WORKER", worker)
    with pytest.raises(RuntimeError, match=r"espeak-ng: expected 22050 samples per second, got 16000 of version 1\.52"):
        list(spoken([("apple", Speaker())]))


def test_the_same_is_said_with_the_same_bits_whatever_came_before() -> None:
    require_espeak()
    who = Speaker("en-us+f3", 160, 60)
    alone, again, other, third = spoken([(t, who) for t in ("red apple", "red apple", "green book", "red apple")])
    assert torch.equal(alone, again) and torch.equal(alone, third)
    assert alone.dtype == torch.int16 and 3000 < len(alone) < 50_000 and int(alone.abs().max()) > 3000
    assert not torch.equal(log_mel(alone), log_mel(other))
    # In other processes, two at once, and in another second: the breath of this voice is seeded by the clock.
    time.sleep(1.1)
    one, two = spoken([("red apple", who)]), spoken([("green book", who), ("red apple", who)])
    assert torch.equal(next(two), other) and torch.equal(next(one), alone) and torch.equal(next(two), alone)


def test_every_speaker_is_another_voice() -> None:
    require_espeak()
    mels = spoken_names(["grinning face", "Åland Islands"])
    assert mels.shape == (2, len(SPEAKERS), MELS, FRAMES)
    for name in mels:
        assert name.amax((1, 2)).min() > 2
        apart = (name[:, None] - name[None]).abs().amax((2, 3)) + 9 * torch.eye(len(SPEAKERS))
        assert apart.min() > 0.5


def test_what_espeak_cannot_do_is_said() -> None:
    require_espeak()
    with pytest.raises(RuntimeError, match=r"espeak-ng: cannot speak .*nobody"):
        list(spoken([("apple", Speaker("nobody"))]))
    for nothing in (" ", "apple\0"):
        with pytest.raises(ValueError, match="text: expected something to say, got "):
            list(spoken([(nothing, Speaker())]))
    with pytest.raises(TypeError, match="text: expected a string, got int"):
        list(spoken([(1, Speaker())]))  # type: ignore[list-item]
