"""What tuning answers from its rows, and that it runs: in Triton's interpreter, on small shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks.registry import Call, Shape, Tensors
from benchmarks.results import Row
from benchmarks.visit import questions, tune
from benchmarks.visit.steps import ROOT
from tests.support.presence import require_interpreter


def test_tuning_in_the_interpreter(tmp_path: Path) -> None:
    require_interpreter()
    asked = "import sys; from benchmarks.visit import questions, tune; ask = questions.questions\n"
    asked += "tune.questions = lambda *a, **k: [q for q in ask(*a, **k) if q.about in sys.argv[1].split(',')]\n"
    asked += "sys.exit(tune.main(sys.argv[2:]))"
    options = ["--out", tmp_path, "--device", "cpu", "--tiny"]
    done = subprocess.run(
        [sys.executable, "-c", asked, "tiles without labels,parts of dX's sum", *options],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    answers = json.loads((tmp_path / "tune.json").read_text())
    assert [a["question"] for a in answers] == ["tiles without labels", "parts of dX's sum", "parts of dX's sum"]
    tiles = {r["provider"]: r["status"] for r in answers[0]["rows"]}
    assert tiles == {"open_clip": "ok", "as it is": "ok", "forward 32x32": "ok"}
    assert answers[0]["kernels"] and answers[0]["parts"].keys() == {"as it is", "forward 32x32"}
    page = (tmp_path / "tune.md").read_text()
    assert page.count("| parts of dX's sum |") == 2 and "| forward 32x32 |" in page


def answered(**ms: float) -> tune.Answer:
    rows = [
        Row("clip_loss", {"B": 128}, "bfloat16", "cuda", name.replace("_", " "), "ours", "working", p50_ms=value)
        for name, value in ms.items()
    ]
    return tune.Answer("a constant", rows, {}, [])


def test_an_answer_is_worth_more_than_noise() -> None:
    assert answered(as_it_is=1.0, other=0.98).text() == "keep"
    assert answered(as_it_is=1.0, other=0.9, third=0.8).text() == "change to third, −20%"
    wrong = answered(as_it_is=1.0, other=0.5)
    wrong.rows[1].status, wrong.rows[1].p50_ms, wrong.rows[1].reason = "wrong", None, "dx is off"
    assert wrong.text() == "no answer: other wrong: dx is off"
    short = answered(as_it_is=1.0, other=0.9)
    short.rows[0].graph_ms, short.rows[1].graph_ms = 0.1, 0.2  # the GPU's time decides, not the host's
    assert short.text() == "keep"


def test_a_changed_tile_is_taken_and_one_that_nobody_asks_for_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = pytest.importorskip("ccu_fast.ops.reduce_similarity.triton.configs")
    device = configs.of("sm_90", 132)
    monkeypatch.setattr(configs, "device", lambda: device)
    change = questions.Change(gradient={"num_warps": 2})
    taken, devices = [], []

    def call() -> Tensors:
        devices.append(configs.device())
        taken.append(configs.device().gradient["half"].num_warps)
        return {}

    def build(inputs: Tensors, shape: Shape) -> Call:
        return call

    questions.build_changed({}, {}, build=build, change=change)()
    assert taken == [2, 2] and configs.device() is device
    assert devices[0] is devices[1] is not device  # what it planned is there at its next call
    with pytest.raises(RuntimeError, match="did not ask for the gradient tile"):
        questions.build_changed({}, {}, build=lambda *_: dict, change=change)


def test_every_change_is_one_of_what_there_is() -> None:
    """A field of a tile or a limit that was renamed would be a question without an answer."""
    configs = pytest.importorskip("ccu_fast.ops.reduce_similarity.triton.configs")
    device = configs.of("sm_90", 132)
    with patch.object(configs, "device", lambda: device):
        for question in questions.questions("cuda"):
            for provider in question.case.providers():
                change = getattr(provider.build, "keywords", {}).get("change", questions.Change())
                changed = questions.device_of(change, set())
                assert (changed is None) == (not change.forward and not change.gradient)
                with questions.made(change, changed):
                    assert configs.device() is (changed or device)


def test_what_is_left_for_lack_of_time_is_in_the_table(tmp_path: Path) -> None:
    assert tune.main(["--out", str(tmp_path), "--device", "cpu", "--tiny", "--minutes", "-1"]) == 1
    left = questions.questions("cuda")
    where = {"device": "a GPU", "torch": "2", "triton": "3", "measured": "today"}
    page = tune.page([answered(as_it_is=1.0, other=0.5)], left, where)
    assert page.count("not run: out of time") == len(left) > 10
    assert {q.about for q in left} >= {"the default workspace", "tiles with labels", "the border of small batches"}
    assert {provider.name for q in left for provider in q.case.providers()} >= {"4 GiB", "8 parts", "small kernels"}
