"""visit.tgz: its size, what is in it after every step, and what of it goes into the repository."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.visit import archive
from benchmarks.visit.steps import Step, Visit
from tests.benchmarks.visit.test_visit import MIB, PYTHON, members, row


def test_the_archive_stays_below_its_size_and_keeps_the_results(tmp_path: Path) -> None:
    work, packed = tmp_path / "work", tmp_path / "out" / archive.NAME
    for folder in ("logs", "results/cuda-a", "tune"):
        (work / folder).mkdir(parents=True)
    (work / "summary.md").write_text("summary")
    (work / "results/cuda-a/clip_loss.json").write_bytes(os.urandom(1 * MIB))
    long = b"first\n" + os.urandom(MIB) + b"\nlast"
    (work / "logs" / "long.log").write_bytes(long)
    for number in range(20):
        (work / "logs" / f"{number}.log").write_bytes(os.urandom(archive.HEAD + archive.TAIL))
    archive.pack(work, packed, limit=3 * MIB)
    assert packed.stat().st_size <= 3 * MIB
    found = members(packed)
    assert {"summary.md", "results/cuda-a/clip_loss.json", archive.LEFT_OUT} <= found.keys()
    assert found[archive.LEFT_OUT].count(b"bytes packed") == 21 + 2 - (len(found) - 1)
    archive.pack(work, packed)
    assert packed.stat().st_size <= archive.LIMIT <= 16 * MIB - MIB
    kept = members(packed)["logs/long.log"]
    assert kept.startswith(b"first") and kept.endswith(b"last") and len(kept) < archive.HEAD + archive.TAIL + 100
    assert list(packed.parent.iterdir()) == [packed]


def test_the_archive_is_there_after_every_step(tmp_path: Path) -> None:
    now = Visit(tmp_path, seconds=60)
    for number, text in enumerate(("one", "two"), 1):
        assert now.run(Step(text, [[*PYTHON, f"print({text!r})"]]))
        found = members(tmp_path / archive.NAME)
        assert found[f"logs/{text}.log"].decode().splitlines()[-1] == text
        assert len(json.loads(found["summary.json"])) == number


def test_at_home_rows_replace_those_of_the_same_shape_alone(tmp_path: Path) -> None:
    home = tmp_path / "benchmarks"
    old = home / "results" / "cuda-a"
    results.write(old, [row(b=128, p50_ms=9.0), row(b=4096, p50_ms=8.0)])
    work = tmp_path / "work"
    results.write(work / "results" / "cuda-a", [row(b=128, p50_ms=1.0)])
    (work / "tune").mkdir()
    (work / "tune" / "tune.md").write_text("tuned")
    archive.pack(work, tmp_path / archive.NAME)
    with tarfile.open(tmp_path / "foreign.tgz", "w:gz") as tar:
        for name, data in {**members(tmp_path / archive.NAME), "../results/x/y.json": b"[]", "setup.py": b"no"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    written = archive.unpack(tmp_path / "foreign.tgz", home)
    assert [(r.shape["B"], r.p50_ms) for r in results.read(old)] == [(128, 1.0), (4096, 8.0)]
    assert (home / "visits" / "cuda-a" / "tune.md").read_text() == "tuned"
    assert {path.relative_to(home).as_posix() for path in written} == {
        "results/cuda-a/clip_loss.json",
        "visits/cuda-a/tune.md",
    }
    assert {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*.json")} == {"benchmarks", "work"}
    archive.pack(work / "tune", tmp_path / "empty.tgz")
    with pytest.raises(ValueError, match="archive: expected results/"):
        archive.unpack(tmp_path / "empty.tgz", home)
