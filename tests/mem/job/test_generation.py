"""Checkpoints within a round: what a kill loses, what is told, and that the same bits come out."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ccu_fast.mem.config import Method
from ccu_fast.mem.job import Job, generation, protect_dataset
from ccu_fast.mem.job.checkpoint import Workplace
from ccu_fast.mem.protection import Protection
from tests.mem.job.test_protect import kill_at
from tests.support import mem_datasets as made
from tests.support.forked import in_child, on_ranks
from tests.support.mem_jobs import TINY, job, tree

pytestmark = pytest.mark.usefixtures("one_thread")
COMPAT = replace(TINY, compat=True, trigger_words=None, restart=0, batch=3)
RUNS: dict[str, dict[str, Any]] = {
    "thumbnails": {},
    "keeps its size": {"thumbnails": False},
    "compat": {"settings": COMPAT},
    "uap": {"method": Method.parse("uap")},
}


def one_caption_each(folder: Path) -> Path:
    source = made.write_csv(folder)
    lines = source.read_bytes().splitlines(keepends=True)
    source.write_bytes(b"".join(lines[:-1]))  # the last row has the first picture again
    return source


@pytest.mark.parametrize("name", RUNS)
def test_killed_in_any_phase_the_same_call_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    source = one_caption_each(tmp_path / "in")
    counts: list[int] = []
    whole_job = job(source, tmp_path / "whole", **RUNS[name])
    protect_dataset(whole_job, lambda stage, done, total, _: counts.append(total) if "protecting" in stage else None)
    whole, total = tree(tmp_path / "whole"), counts[0]
    batches = sorted(random.Random(name).sample(range(2, total + 1), 4))
    for number in batches:
        task = job(source, tmp_path / str(number), noise_on_disk=number % 2 == 1, **RUNS[name])

        def killed(task: Job = task, number: int = number) -> None:
            kill_at(Protection, "advance", number)()
            protect_dataset(task)

        status = in_child(killed)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        kept = json.loads((tmp_path / f"{number}.partial" / "checkpoint.json").read_text())
        assert kept == {"batches": number - 1}, "a batch of so small a run is more than 2 %: nothing else is lost"
        protect_dataset(task)
        assert tree(tmp_path / str(number)) == whole


def shared(task: Job, rank: int, dies: int | None = None) -> dict[str, Any] | None:
    """A process of a run; where it ``dies``, all end before that batch: one that is killed takes the others along."""

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage.startswith("protecting") and done == dies:
            raise KeyboardInterrupt

    try:
        return protect_dataset(task, progress)
    except KeyboardInterrupt:
        return None


def test_processes_with_different_numbers_of_batches_go_on_together(tmp_path: Path) -> None:
    """13 images in shards of 5, 5 and 3: one process has two batches where the other has one."""
    source = made.write_shards(tmp_path / "in", n=13, shard=5)
    for name in ("whole", "killed", "again"):
        (tmp_path / name).mkdir()
    whole = job(source, tmp_path / "whole out", thumbnails=False)
    on_ranks(2, tmp_path / "whole", partial(shared, whole))
    task = replace(whole, out=tmp_path / "out")
    assert on_ranks(2, tmp_path / "killed", partial(shared, task, dies=5)) == [None, None]
    kept = tmp_path / "out.partial"
    assert json.loads((kept / "checkpoint.json").read_text()) == {"batches": 5}
    files = {f"{rank}.{kind}" for rank in (0, 1) for kind in ("noise", "pt")}
    assert {path.name for path in (kept / "batch-000000005").iterdir()} == files
    on_ranks(2, tmp_path / "again", partial(shared, task))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole out")


def test_a_kill_loses_at_most_2_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(TINY, rounds=4, surrogate_steps=12, trigger_rounds=2, batch=2)
    saved: list[int] = []
    written: list[bool] = []
    legs: list[generation.Leg] = []
    inner, plan = Workplace.save, generation.legs

    def save(self: Workplace, done: int, protection: Protection, *, noise: bool = True) -> None:
        saved.append(done)
        written.append(noise)
        inner(self, done, protection, noise=noise)

    monkeypatch.setattr(Workplace, "save", save)

    def keep(protection: Protection) -> list[generation.Leg]:
        legs.extend(plan(protection))
        return legs

    monkeypatch.setattr(generation, "legs", keep)
    protect_dataset(job(made.write_csv(tmp_path / "in", n=24), tmp_path / "out", settings=settings))
    cost = [leg.cost for leg in legs for _ in range(leg.batches)]
    assert len(cost) == 4 * (12 + 12) + 2 * 12 and saved[-1] == len(cost)
    for before, after in zip([0, *saved], saved, strict=False):
        lost = sum(cost[before:after])
        assert after - before == 1 or lost <= 0.02 * sum(cost)
    assert 40 <= len(saved) < len(cost) / 2
    assert not all(written) and any(written), "where no noise was made, that of the checkpoint before is used"


def test_checkpoints_take_their_share_of_the_time_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes a second a batch and stands still but for a checkpoint's 10 s."""
    now, saved = [0.0], []
    inner, advance = Workplace.save, Protection.advance

    def save(self: Workplace, done: int, *arguments: Any, **options: Any) -> None:
        now[0] += 10.0
        saved.append(done)
        inner(self, done, *arguments, **options)

    def second(self: Protection) -> None:
        now[0] += 1.0
        advance(self)

    monkeypatch.setattr(Workplace, "save", save)
    monkeypatch.setattr(Protection, "advance", second)
    monkeypatch.setattr(generation, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
    settings = replace(TINY, surrogate_steps=60)
    source = made.write_csv(tmp_path / "in")
    for soon, most in ((1e9, 2), (30.0, 6)):
        saved.clear()
        now[0] = 0.0
        monkeypatch.setattr(generation, "SOON", soon)
        protect_dataset(job(source, tmp_path / f"out {soon}", settings=settings))
        assert saved[-1] == 2 * 60 + 6 and 2 <= len(saved) <= most
        if soon == 30.0:
            assert max(b - a for a, b in itertools.pairwise(saved)) <= 31, "no more than this is lost"


def test_batches_are_told_with_phase_and_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "TOLD", 0.0)
    told: list[tuple[str, int, int, str]] = []
    protect_dataset(job(made.write_csv(tmp_path / "in"), tmp_path / "out"), lambda *call: told.append(call))
    calls = [call[1:] for call in told if call[0] == "protecting, mem"]
    assert [call[:2] for call in calls] == [(i, 10) for i in range(11)]
    notes = [call[2] for call in calls]
    assert notes[0] == "round 1 of 2, surrogate" and notes[1].startswith("round 1 of 2, surrogate, loss ")
    assert [note.split(", ")[1] for note in notes[:10]] == ["surrogate"] * 2 + ["triggers"] * 2 + ["noise"] * 2 + [
        "surrogate"
    ] * 2 + ["noise"] * 2
    assert notes[-1].startswith("surrogate loss ")


def test_checkpoints_of_another_layout_are_refused_or_discarded(tmp_path: Path) -> None:
    task = job(made.write_csv(tmp_path / "in"), tmp_path / "out")

    def killed() -> None:
        kill_at(Protection, "advance", 3)()
        protect_dataset(task)

    in_child(killed)
    kept = tmp_path / "out.partial"
    run = json.loads((kept / "run.json").read_text())
    del run["format"]  # as the first one was
    (kept / "run.json").write_text(json.dumps(run))
    (kept / "checkpoint.json").write_text('{"round": 1}')
    (kept / "round-00001").mkdir()
    with pytest.raises(ValueError, match=r"out: expected checkpoints of this version .*start anew \(--fresh\)"):
        protect_dataset(task)
    protect_dataset(replace(task, fresh=True))
    assert not kept.exists() and (tmp_path / "out").exists()
    other = tmp_path / "again.partial"
    other.mkdir()
    for name in ("run.json", "scan-0.pt"):  # nothing but a look at the input is lost: it is discarded
        (other / name).write_text("{}")
    protect_dataset(replace(task, out=tmp_path / "again"))
    assert tree(tmp_path / "again") == tree(tmp_path / "out")
