"""Kept parts: when one is reused, when it is recomputed, and what its key contains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ccu_fast.cli import demo
from ccu_fast.mem.config import Settings
from ccu_fast.ops.machine import PACKAGE
from ccu_fast.runs import cache, provenance
from ccu_fast.runs.provenance import file_hash, json_hash, tensors_hash, versions
from ccu_fast.unlearn.study import compare as comparing
from ccu_fast.unlearn.study import train as training
from ccu_fast.unlearn.study.tasks import TASKS, TrainConfig, make_scenario

KEYS = """
import json, sys
from ccu_fast.cli import demo
from ccu_fast.unlearn.study import compare
from ccu_fast.unlearn.study.tasks import TASKS
parts = [demo._key(demo.Part(half, one, 0)) for half, several in demo.VARIANTS.items() for one in several]
print(json.dumps([compare.__file__, *parts, compare._key(TASKS["digits-halves"], "class", 0, ["ccu"])]))
"""
PART = demo.Part("protect", "mem", 0)


def key_of_comparison() -> str:
    return comparing._key(TASKS["digits-halves"], "class", 0, ["ccu"])


def test_a_part_is_computed_once_and_is_the_same_fresh_or_kept(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, Any]:
        calls.append(1)
        return {"a": np.arange(3), "b": np.float32(0.5), "c": (1, None)}

    path = tmp_path / "parts" / "one.json"
    for _ in range(2):
        assert cache.part(path, "key", compute) == {"a": [0, 1, 2], "b": 0.5, "c": [1, None]}
    assert len(calls) == 1 and [p.name for p in path.parent.iterdir()] == ["one.json"]
    cache.part(path, "another", compute)
    assert len(calls) == 2 and json.loads(path.read_text())["key"] == "another"


@pytest.mark.parametrize(
    "there",
    [b"", b'{"key": "key", "val', b"\xff\x00", b"[1]", b'"text"', b'{"value": {}}', b'{"key": "key", "value": 3}'],
)
def test_a_damaged_or_foreign_file_is_made_again(tmp_path: Path, there: bytes) -> None:
    path = tmp_path / "one.json"
    path.write_bytes(there)
    assert cache.part(path, "key", lambda: {"new": 1}) == {"new": 1}
    assert cache.part(path, "key", dict) == {"new": 1}


def test_what_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON: set"):
        cache.part(tmp_path / "one.json", "key", lambda: {"a": {1}})
    assert list(tmp_path.iterdir()) == []


def test_a_key_changes_with_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    of_demo, of_comparison = demo._key(PART), key_of_comparison()
    assert demo._key(replace(PART, seed=1)) != of_demo == demo._key(PART)
    monkeypatch.setattr(demo, "Settings", lambda: Settings(rounds=3))
    assert demo._key(PART) != of_demo
    task = TASKS["digits-halves"]
    changed = replace(task, training=TrainConfig(epochs=1))
    assert comparing._key(changed, "class", 0, ["ccu"]) != of_comparison == key_of_comparison()
    assert comparing._key(task, "class", 1, ["ccu"]) != of_comparison
    assert comparing._key(task, "class", 0, ["ccu", "ssd"]) != of_comparison


@pytest.mark.parametrize("name", ["ccu_fast", "torch", "python", "machine"])
def test_a_key_changes_with_a_version(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = demo._key(PART), key_of_comparison()
    monkeypatch.setitem(provenance._VERSIONS, name, lambda: "another")
    assert all(old != new for old, new in zip(before, (demo._key(PART), key_of_comparison()), strict=True))


@pytest.mark.parametrize(
    ("module", "number", "changed"),
    [
        (demo, "FORMAT", (True, False)),
        (comparing, "FORMAT", (False, True)),
        (comparing, "TRAINED_FORMAT", (False, True)),
    ],
)
def test_a_key_changes_with_its_format(
    module: Any, number: str, changed: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = demo._key(PART), key_of_comparison()
    monkeypatch.setattr(module, number, getattr(module, number) + 1)
    assert (demo._key(PART) != before[0], key_of_comparison() != before[1]) == changed


def test_a_comment_in_the_source_changes_no_key(tmp_path: Path) -> None:
    """Neither does a missing compiled module."""
    shutil.copytree(PACKAGE, tmp_path / "ccu_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for path in (tmp_path / "ccu_fast").rglob("*.py"):
        path.write_text(path.read_text(encoding="utf-8") + "\n# A comment.\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", KEYS],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=tmp_path.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    there, *theirs = json.loads(done.stdout)
    assert Path(comparing.__file__).is_relative_to(PACKAGE) and Path(there).is_relative_to(tmp_path)
    parts = [demo._key(demo.Part(half, one, 0)) for half, several in demo.VARIANTS.items() for one in several]
    ours = [*parts, key_of_comparison()]
    assert ours == theirs and len(set(ours)) == len(ours)


def test_a_trained_model_is_kept_under_its_settings_versions_and_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = replace(TASKS["digits-halves"], training=TrainConfig(epochs=1))
    split = make_scenario(task, "class", 0)
    split = replace(split, train=split.train.batch(torch.arange(100)))
    stages: list[str] = []

    def get(task: Any = task) -> Any:
        stages.clear()
        return training.trained(
            task, split, "original", 0, folder=tmp_path, progress=lambda stage, *_: stages.append(stage)
        )

    first = get()
    assert stages
    again = get()
    assert not stages and again.cpu_seconds == first.cpu_seconds
    for name, value in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)
    get(replace(task, training=TrainConfig(epochs=2)))
    assert stages
    get()
    monkeypatch.setattr(training, "FORMAT", training.FORMAT + 1)
    get()
    assert stages
    get()
    assert not stages
    monkeypatch.setitem(provenance._VERSIONS, "torch", lambda: "another")
    get()
    assert stages
    (path,) = tmp_path.iterdir()
    for there in (b"", path.read_bytes()[:-1000], path.read_bytes()[:-4] + b"\0\0\0\0"):
        path.write_bytes(there)
        get()
        assert stages
        get()
        assert not stages


def test_versions_in_the_order_asked_for() -> None:
    assert list(versions()) == ["ccu_fast", "torch", "python", "machine"]
    assert list(versions("pillow", "threads")) == ["pillow", "threads"]
    assert versions("threads") == {"threads": torch.get_num_threads()}


def test_without() -> None:
    value = {"a": [{"b": 1, "c": 2}], "b": {"c": 3}, "d": {"e": {"c": 4, "b": 5}}}
    assert cache.without(value, "b") == {"a": [{"c": 2}], "d": {"e": {"c": 4}}}
    assert cache.without(value, "b", "c") == {"a": [{}], "d": {"e": {}}}


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_hash(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(FileNotFoundError):
        file_hash(tmp_path / "none")
    assert json_hash({"a": 1, "b": (2,)}) == json_hash({"b": [2], "a": 1}) != json_hash({"a": 1, "b": [3]})
    one, two = torch.zeros(2, 3), torch.ones(())
    reference = tensors_hash({"a": one, "b": two})
    assert tensors_hash({"b": two, "a": one}) == reference
    for other in ({"a": one.T, "b": two}, {"a": one.int(), "b": two}, {"b": one, "a": two}, {"a": one, "b": -two}):
        assert tensors_hash(other) != reference
