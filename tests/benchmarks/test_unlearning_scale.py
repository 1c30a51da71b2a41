"""The benchmark of how unlearning grows with its data: it runs, kills, and makes the page that is committed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo  # which optimisers import at their first use: not in each child

from benchmarks.unlearning import scale
from tests.support.forked import fork, kill_when

pytestmark = pytest.mark.usefixtures("one_thread")


def forked(settings: Path, out: Path, told: Path, until: Callable[[], bool] | None = None) -> int:
    """``scale.process`` in a child that need not import torch again."""
    child = fork(lambda: scale.measured(settings, out, told))
    if until is not None:
        kill_when(child, until, seconds=60)
        return -signal.SIGKILL
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0
    return status


def test_it_measures_kills_and_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "process", forked)
    words = ["--quick", "--pairs", "500", "520", "--forget", "440", "460", "--judged", "15", "--work", str(tmp_path)]
    assert scale.main([*words, "--out", str(tmp_path / "scale.json")]) == 0
    stored = json.loads((tmp_path / "scale.json").read_text())
    runs = list(stored["runs"].values())
    assert [(run["pairs"], run["forget"], run["steps"]) for run in runs] == [
        (500, 440, 22),
        (520, 440, 22),
        (520, 460, 23),
    ]
    for run in [*runs, stored["killed"]["resumed"]]:
        assert list(run["stages"]) == list(scale.STAGES) and min(run["stages"].values()) >= 0
        assert sum(run["stages"].values()) == pytest.approx(run["cpu_seconds"], abs=0.1) and run["peak_bytes"] > 1 << 20
    assert stored["killed"]["after_steps"] == 20 and "checkpoint.forget.pt" in stored["killed"]["kept"]
    assert not list(tmp_path.glob("*/killed"))  # its own folder of data is gone


def test_bits_that_differ_give_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretended(settings: Path, out: Path, told: Path, until: Callable[[], bool] | None = None) -> int:
        out.mkdir(exist_ok=True)
        torch.save({"losses": [1.0]}, out / "checkpoint.pt")
        told.write_text("{}")
        return 0 if until is None else -signal.SIGKILL

    monkeypatch.setattr(scale, "process", pretended)
    words = ["--quick", "--pairs", "30", "40", "--forget", "20", "--work", str(tmp_path)]
    hashes = iter(["a", "a", "b"])
    monkeypatch.setattr(scale, "weights_of", lambda out: next(hashes))
    with pytest.raises(RuntimeError, match="the killed run ended with other bits"):
        scale.main([*words, "--out", str(tmp_path / "scale.json")])
    assert not (tmp_path / "scale.json").exists()


def test_the_committed_page_is_what_its_file_makes() -> None:
    stored = json.loads(scale.RESULTS.read_text())
    assert stored["killed"]["same"] and scale.page(stored) == scale.PAGE.read_text()
    pairs, forget = ({run[name] for run in stored["runs"].values()} for name in ("pairs", "forget"))
    assert pairs == set(scale.PAIRS) and forget == set(scale.FORGET) and stored["parameters"] > 20e6
