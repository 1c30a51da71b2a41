"""What a run will take, told before it: counts are exact, and nothing is left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ccu_fast.mem.config import Method
from ccu_fast.mem.job import Job, estimate, protect_dataset
from tests.mem.job.test_generation import COMPAT, one_caption_each
from tests.support import mem_datasets as made
from tests.support.mem_jobs import TINY, job, tree

pytestmark = pytest.mark.usefixtures("one_thread")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


VARIANTS: dict[str, dict[str, Any]] = {
    "thumbnails": {},
    "keeps its size": {"thumbnails": False, "noise_on_disk": True},
    "compat": {"settings": COMPAT},
    "tap": {"method": Method.parse("tap")},
    "no surrogate steps": {"settings": replace(TINY, surrogate_steps=0)},
    "random": {"method": Method.parse("random-2")},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_batches_are_those_of_the_run_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    source = one_caption_each(tmp_path / "in")
    before = files(tmp_path)
    task = job(source, tmp_path / "new" / "er" / "out", **VARIANTS[name])
    told = estimate(task)
    assert files(tmp_path) == before
    assert json.loads(json.dumps(told)) == told
    assert (told["images"], told["rows"], told["bad"], told["ready"]) == (6, 6, [], True)
    totals: list[int] = []
    protect_dataset(task, lambda stage, done, total, _: totals.append(total) if "protecting" in stage else None)
    assert sum(phase["batches"] for phase in told["phases"].values()) == (totals[0] if totals else 0)
    seconds = told["seconds"]
    generating = sum(phase["batches"] * phase["seconds"] for phase in told["phases"].values())
    assert seconds["generating"] == pytest.approx(generating) and seconds["writing"] > 0 < seconds["checking"]
    assert seconds["total"] == pytest.approx(sum(spent for part, spent in seconds.items() if part != "total"))
    assert told["memory_bytes"] > 1e7 and 0 < told["disk_bytes"]["needed"] < told["disk_bytes"]["free"]
    for phase, count in (("surrogate", {"compat": 4, "thumbnails": 4, "tap": 4}.get(name)), ("noise", None)):
        assert count is None or told["phases"][phase]["batches"] == count


def test_more_rounds_are_more_batches_and_more_time(tmp_path: Path) -> None:
    source = made.write_csv(tmp_path / "in")
    few, many = (estimate(job(source, tmp_path / "out", settings=replace(TINY, rounds=rounds))) for rounds in (2, 200))
    assert {name: phase["batches"] for name, phase in few["phases"].items()} == {
        "surrogate": 4,
        "triggers": 2,
        "noise": 4,
    }
    assert many["phases"]["noise"]["batches"] == 400 and many["phases"]["triggers"]["batches"] == 2
    assert many["seconds"]["generating"] > few["seconds"]["generating"] > 0


def test_sizes_are_those_of_the_published_pictures(tmp_path: Path) -> None:
    source = made.write_csv(tmp_path / "in")
    for i in range(6):
        made.picture(i, (30 + 9 * i, 20)).save(tmp_path / "in" / "pictures" / f"{i}.png")
    told = estimate(job(source, tmp_path / "out", thumbnails=False))
    assert told["pictures"] == {"smallest": [20, 30], "median": [20, 57], "largest": [20, 75]}
    told = estimate(job(source, tmp_path / "out"))
    assert told["pictures"] == {name: [16, 16] for name in ("smallest", "median", "largest")}


def test_all_that_is_bad_is_told_at_once(tmp_path: Path) -> None:
    source = made.write_csv(tmp_path / "in", n=20)
    with source.open("a") as file:
        file.write("x,pictures/3.png,\r\n")
    for i in range(2, 16):
        (tmp_path / "in" / "pictures" / f"{i}.png").write_bytes(b"no picture")
    before = files(tmp_path)
    task = job(source, tmp_path / "out")
    told = estimate(task)
    assert len(told["bad"]) == 15 and told["bad"][0]["why"] == "empty caption" and not told["ready"]
    assert told["images"] == 6 and told["seconds"]["total"] > 0
    assert estimate(replace(task, skip_bad=True))["ready"]
    for i in range(20):
        (tmp_path / "in" / "pictures" / f"{i}.png").write_bytes(b"no picture")
    told = estimate(replace(task, skip_bad=True))
    assert (told["images"], told["ready"], len(told["bad"])) == (0, False, 21) and "seconds" not in told
    assert files(tmp_path) == before


def test_what_stops_a_run_stops_an_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made.write_csv(tmp_path / "in")
    task = job(source, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="out: expected a new or empty folder"):
        estimate(task)
    assert tree(tmp_path / "out") == {"mine.txt": b"keep"}
    with pytest.raises(ValueError, match="tokenizer: expected at least 90000 trigger words"):
        estimate(job(source, tmp_path / "b", settings=replace(TINY, candidates=90000)))
    with pytest.raises(ValueError, match="compat: expected one caption for each image"):
        estimate(job(source, tmp_path / "b", settings=COMPAT))
    full = type("Usage", (), {"free": 1000})()
    with monkeypatch.context() as disk:
        disk.setattr("ccu_fast.mem.publish.rehearse.shutil.disk_usage", lambda _: full)
        told = estimate(job(source, tmp_path / "b"))
    assert not told["ready"] and told["disk_bytes"]["needed"] > told["disk_bytes"]["free"] == 1000
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="dry_run: expected one process, got 2"):
        estimate(job(source, tmp_path / "b"))


def test_an_unfinished_run_is_left_as_it_is(tmp_path: Path) -> None:
    source = made.write_csv(tmp_path / "in")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "run.json").write_text("{}")
    task: Job = job(source, tmp_path / "out", fresh=True)
    estimate(task)
    assert tree(partial) == {"run.json": b"{}"}
