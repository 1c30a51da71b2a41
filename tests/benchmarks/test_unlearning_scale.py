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
    words = ["--quick", "--pairs", "450", "460", "--forget", "420", "--judged", "15", "--work", str(tmp_path)]
    assert scale.main([*words, "--out", str(tmp_path / "scale.json")]) == 0
    stored = json.loads((tmp_path / "scale.json").read_text())
    runs = list(stored["runs"].values())
    assert [(run["pairs"], run["forget"], run["steps"]) for run in runs] == [
        (450, 420, 21),
        (460, 420, 21),
    ]
    for run in [*runs, stored["killed"]["resumed"]]:
        assert list(run["stages"]) == list(scale.STAGES) and min(run["stages"].values()) >= 0
        assert sum(run["stages"].values()) == pytest.approx(run["cpu_seconds"], abs=0.1) and run["peak_bytes"] > 1 << 20
    assert stored["killed"]["after_steps"] == 20 and "checkpoint.forget.pt" in stored["killed"]["kept"]
    assert not (tmp_path / "run").exists()


def pretended(settings: Path, out: Path, told: Path, until: Callable[[], bool] | None = None) -> int:
    """``scale.process`` without a run."""
    out.mkdir(exist_ok=True)
    torch.save({"losses": [1.0]}, out / "checkpoint.pt")
    told.write_text(json.dumps({"cpu_seconds": 1.0, "peak_bytes": 1, "stages": dict.fromkeys(scale.STAGES, 0.0)}))
    return 0 if until is None else -signal.SIGKILL


def quick(folder: Path) -> list[str]:
    words = ["--quick", "--pairs", "440", "450", "460", "--forget", "420", "430", "--judged", "5"]
    return [*words, "--work", str(folder), "--out", str(folder / "scale.json")]


def test_bits_that_differ_give_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "process", pretended)
    hashes = iter("aaaab")
    monkeypatch.setattr(scale, "weights_of", lambda out: next(hashes))
    with pytest.raises(RuntimeError, match="the killed run ended with other bits"):
        scale.main(quick(tmp_path))
    assert not (tmp_path / "scale.json").exists()


def test_a_killed_benchmark_goes_on_after_the_last_run_that_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def process(settings: Path, out: Path, told: Path, until: Callable[[], bool] | None = None) -> int:
        asked.append(settings.stem)
        goes_on = asked.count("440-420") == 3  # with the run that was killed on purpose
        assert goes_on or not out.exists()  # nothing of an earlier run, which would take time off this one
        if len(asked) == 2:
            out.mkdir()
            (tmp_path / "450").rename(tmp_path / "450.part")  # as if it had been killed while it wrote the data
            raise KeyboardInterrupt
        return pretended(settings, out, told, until)

    monkeypatch.setattr(scale, "process", process)
    monkeypatch.setattr(scale, "weights_of", lambda out: "a")
    with pytest.raises(KeyboardInterrupt):
        scale.main(quick(tmp_path))
    assert scale.main(quick(tmp_path)) == 0
    assert asked == ["440-420", *["450-420"] * 2, "460-420", "450-430", *["440-420"] * 2]
    assert {path.name for path in (tmp_path / "450").iterdir()} == {"visual.npy", "other.npy"}
    assert not (tmp_path / "run").exists() and (tmp_path / "scale.json").exists()
    assert scale.main(quick(tmp_path)) == 0 and len(asked) == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--forget", "500", "19"], "--forget: expected at least 20, which are a step, got 19"),
        (["--forget", "419", "20"], "--forget: expected at least 420 first, so that a step is left to kill, got 419"),
        (["--pairs", "999", "503"], "--pairs: expected at least 2004, 4 more than --forget, got 503"),
        (["--judged", "0"], "--judged: expected at least 1, got 0"),
        (["--page", "--out", "nowhere.json"], "--out: expected a file of figures, got nowhere.json, which is not"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "measure", None)
    with pytest.raises(SystemExit) as ended:
        scale.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_system_that_tells_no_peak_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scale, "STATUS", tmp_path / "status")
    with pytest.raises(SystemExit):
        scale.main([])
    assert "expected a system that tells peak memory in" in capsys.readouterr().err


def test_the_committed_page_is_what_its_file_makes() -> None:
    stored = json.loads(scale.RESULTS.read_text())
    assert stored["killed"]["same"] and scale.page(stored) == scale.PAGE.read_text()
    pairs, forget = ({run[name] for run in stored["runs"].values()} for name in ("pairs", "forget"))
    assert pairs == set(scale.PAIRS) and forget == set(scale.FORGET) and stored["parameters"] > 20e6
