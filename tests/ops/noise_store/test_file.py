"""Noise files: what a kill leaves, and what is refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from ccu_fast import NoiseStore
from ccu_fast.ops.noise_store import file
from tests.support.forked import in_child

ITEM = (3, 4, 5)


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(-8, 9, shape, dtype=torch.int8)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32])
def test_a_file_is_what_was_committed(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "noise.bin"
    store = NoiseStore.create(path, 9, ITEM, dtype=dtype, tag="set A")
    assert not store.data.any() and store.progress == {}
    store.scatter_(torch.arange(9), noise(9, *ITEM))
    store.commit(round=1, batch=7)
    committed = store.data.clone()
    store.scatter_(torch.tensor([3, 8]), noise(2, *ITEM))
    store.scatter_add_clamp_(torch.tensor([3, 0]), noise(2, *ITEM), 8 / 255)
    assert not torch.equal(store.data, committed)
    store.close()
    store.commit(round=2)  # of nothing
    for _ in range(2):
        store = NoiseStore.open(path, tag="set A", dtype=dtype, item_shape=ITEM)
        assert torch.equal(store.data, committed) and store.progress == {"round": 1, "batch": 7}
        store.close()
    assert [p.name for p in tmp_path.iterdir()] == ["noise.bin"]


def test_save_and_load(tmp_path: Path) -> None:
    store = NoiseStore(7, ITEM)
    store.scatter_(torch.arange(7), noise(7, *ITEM))
    store.commit(round=2)
    store.save(tmp_path / "a", tag="x")
    loaded = NoiseStore.load(tmp_path / "a", tag="x")
    assert torch.equal(loaded.data, store.data) and loaded.progress == {"round": 2}
    loaded.scatter_(torch.tensor([0]), noise(1, *ITEM))
    mapped = NoiseStore.open(tmp_path / "a")
    assert torch.equal(mapped.data, store.data)
    mapped.save(tmp_path / "b")
    with pytest.raises(ValueError, match=r"^path: expected another file"):
        mapped.save(tmp_path / "a")
    with pytest.raises(BlockingIOError, match="locked"):
        store.save(tmp_path / "a")
    mapped.close()
    store.save(tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(path: Path, moment: str) -> None:
    """Two commits, the second of which does not return."""
    store = NoiseStore.open(path)
    index = torch.arange(0, 40, 2)
    store.scatter_(index, torch.full((20, 3, 64, 64), 5, dtype=torch.int8))
    store.commit(batch=1)
    store.scatter_(index + 1, torch.full((20, 3, 64, 64), 6, dtype=torch.int8))
    store.scatter_add_clamp_(index, torch.full((20, 3, 64, 64), 7, dtype=torch.int8), 8 / 255)
    if moment == "noise":
        file._BLOCK = 3 * 64 * 64
        inner, calls = torch.Tensor.cpu, []
        torch.Tensor.cpu = lambda part: die() if len(calls) == 7 else calls.append(1) or inner(part)
    if moment == "rename":
        os.replace = die
    if moment == "renamed":
        store._file.close = die
    if moment != "between":
        store.commit(batch=2)
    die()


@pytest.mark.parametrize("moment", ["between", "noise", "rename", "renamed"])
def test_a_kill_leaves_the_last_commit(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "noise.bin"
    NoiseStore.create(path, 40, (3, 64, 64)).close()
    status = in_child(lambda: killed_at(path, moment))
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".noise.bin.")] == ["noise.bin"]
    store = NoiseStore.open(path)
    rows = store.data.flatten(1)
    assert bool((rows == rows[:, :1]).all())  # no half-written image
    # In "renamed" the second commit took its place before the kill: then it holds.
    expected = (2, [8, 6]) if moment == "renamed" else (1, [5, 0])
    assert store.progress == {"batch": expected[0]}
    assert rows[:, 0].tolist() == expected[1] * 20
    store.close()


def test_a_commit_keeps_the_file_locked(tmp_path: Path) -> None:
    path = tmp_path / "noise.bin"
    store = NoiseStore.create(path, 5, ITEM)
    for batch in range(2):
        store.scatter_(torch.arange(5), noise(5, *ITEM))
        store.commit(batch=batch)
        with pytest.raises(BlockingIOError, match="locked"):
            NoiseStore.open(path)
    store.close()
    assert NoiseStore.load(path).progress == {"batch": 1}


def test_one_who_opened_a_file_that_a_commit_replaced_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "noise.bin"
    store = NoiseStore.create(path, 5, ITEM)
    inner = os.open

    def overtaken(name: Any, flags: int, *more: Any, **options: Any) -> int:
        handle = inner(name, flags, *more, **options)
        if name == path:
            monkeypatch.setattr(os, "open", inner)
            store.commit(batch=1)
            store.close()
        return handle

    monkeypatch.setattr(os, "open", overtaken)
    with pytest.raises(BlockingIOError, match="locked"):
        NoiseStore.open(path)
    assert NoiseStore.load(path).progress == {"batch": 1}


def test_a_commit_without_room_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "noise.bin"
    store = NoiseStore.create(path, 5, ITEM)
    store.scatter_(torch.arange(5), noise(5, *ITEM))
    store.commit(batch=1)
    committed, inner = store.data.clone(), os.fsync
    store.scatter_(torch.arange(5), noise(5, *ITEM))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space left"):
        store.commit(batch=2)
    assert len(os.listdir("/proc/self/fd")) == before and [p.name for p in tmp_path.iterdir()] == ["noise.bin"]
    monkeypatch.setattr(os, "fsync", inner)
    assert store.progress == {"batch": 1}
    changed = store.data.clone()
    store.commit(batch=3)
    store.close()
    loaded = NoiseStore.load(path)
    assert torch.equal(loaded.data, changed) and not torch.equal(changed, committed)


def test_a_file_with_its_second_header_in_use(tmp_path: Path) -> None:
    """Commits used to write the two headers in turn."""
    path = tmp_path / "noise.bin"
    store = NoiseStore.create(path, 5, ITEM)
    store.scatter_(torch.arange(5), noise(5, *ITEM))
    store.commit(batch=1)
    written = store.data.clone()
    store.close()
    data = bytearray(path.read_bytes())
    data[4096:8192] = data[:4096]
    NoiseStore.create(tmp_path / "zeros", 5, ITEM).close()
    data[:4096] = (tmp_path / "zeros").read_bytes()[:4096]
    path.write_bytes(data)
    store = NoiseStore.open(path)
    assert store.progress == {"batch": 1} and torch.equal(store.data, written)
    store.commit(batch=2)
    store.close()
    assert NoiseStore.load(path).progress == {"batch": 2}


def test_foreign_and_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "noise.bin"
    path.write_bytes(b"something else" * 1000)
    with pytest.raises(ValueError, match=r"^path: expected a file that NoiseStore wrote"):
        NoiseStore.open(path)
    with pytest.raises(ValueError, match=r"^path: expected a file that NoiseStore wrote"):
        NoiseStore(1, (2,)).save(path)
    assert path.read_bytes().startswith(b"something else")
    with pytest.raises(FileExistsError):
        NoiseStore.create(path, 1, (2,))
    path.unlink()
    NoiseStore.create(path, 5, ITEM, tag="set A").close()
    with open(path, "r+b") as file:
        file.truncate(9000 - 900)
    with pytest.raises(ValueError, match=r"^path: expected 8492 bytes .*, got 8100: it is damaged"):
        NoiseStore.open(path)
    with pytest.raises(FileNotFoundError):
        NoiseStore.open(tmp_path / "none")
    store = NoiseStore.create(tmp_path / "second", 5, ITEM)
    with pytest.raises(ValueError, match=r"^progress: expected at most 4096 bytes"):
        store.commit(text="x" * 5000)
    store.close()


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"tag": "set B"}, "with tag 'set B', got 'set A'"),
        ({"dtype": torch.float32}, "with dtype torch.float32, got torch.int8"),
        ({"item_shape": (3, 4, 6)}, r"with item_shape \(3, 4, 6\), got \(3, 4, 5\)"),
    ],
)
def test_another_file_than_expected(tmp_path: Path, expected: dict[str, Any], message: str) -> None:
    path = tmp_path / "noise.bin"
    NoiseStore.create(path, 5, ITEM, tag="set A").close()
    for read in (NoiseStore.open, NoiseStore.load):
        with pytest.raises(ValueError, match=message):
            read(path, **expected)
    NoiseStore.open(path).close()  # and it is not left locked
