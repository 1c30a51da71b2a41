"""The script for a visit to a GPU, on a machine without one: every step has its line, whatever becomes of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import exercise, visit
from benchmarks.gate import Gate
from benchmarks.ops import OPS, pgd_step
from benchmarks.registry import Call, Case, Provider, Shape, Tensors, label, select
from benchmarks.visit import Visit


def test_a_tiny_visit_leaves_a_line_a_log_and_results(tmp_path: Path, native: str) -> None:
    out = tmp_path / "out"
    command = ["--out", str(out), "--tiny", "--python", sys.executable, "--ops", "pgd_step"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.visit", *command],
        cwd=visit.ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    steps = {line["step"]: line for line in json.loads((out / "summary.json").read_text())}
    assert list(steps) == ["build", "peers", "info", "exercise", "sanitizer", "tests", "bench-1", "report"]
    ran = [step for step, line in steps.items() if line["status"] == "ok"]
    assert {"info", "exercise", "bench-1", "report"} <= set(ran)
    assert steps["exercise"]["said"] == "1 exercised on cpu, 0 wrong"
    if not torch.cuda.is_available():
        assert steps["tests"]["status"] == "not run"  # all were skipped, and that is not "ok"
    assert all((out / f"{step}.log").stat().st_size for step in ran)
    (rows,) = out.glob("results/*/pgd_step.json")
    assert any(row["role"] == "ours" and row["p50_ms"] for row in json.loads(rows.read_text()))
    assert rows.with_suffix(".svg").exists()
    summary = (out / "summary.md").read_text()
    assert summary.count("\n") == len(steps) + 2


def test_a_failing_step_is_a_line_and_the_next_one_runs(tmp_path: Path) -> None:
    now = Visit(tmp_path, seconds=60)
    python = [sys.executable, "-c"]
    assert not now.run("breaks", [*python, "print('it'); raise SystemExit(3)"])
    assert not now.run("missing", ["/no/such/command"])
    assert now.run("works", [*python, "print('one'); print('two')"])
    assert not now.run("says no", [*python, ""], judge=lambda: ("not run", "nothing was there"))
    assert [(d.step, d.status) for d in now.done] == [
        ("breaks", "failed"), ("missing", "failed"), ("works", "ok"), ("says no", "not run"),
    ]  # fmt: skip
    assert [d.said for d in now.done][2:] == ["two", "nothing was there"]
    assert "No such file" in now.done[1].said
    assert [line["status"] for line in json.loads((tmp_path / "summary.json").read_text())][:2] == ["failed"] * 2


def test_a_step_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    now = Visit(tmp_path, seconds=60)
    pulse = tmp_path / "pulse"
    child = f"import time\nwhile True: open({str(pulse)!r}, 'a').write('.'); time.sleep(0.05)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert not now.run("hangs", [sys.executable, "-c", parent], most=3)
    assert now.done[0].status == "out of time"
    beats = pulse.stat().st_size
    assert beats > 0
    time.sleep(0.3)
    assert pulse.stat().st_size == beats


def test_no_step_starts_after_the_deadline(tmp_path: Path) -> None:
    now = Visit(tmp_path, seconds=visit.RESERVE - 1)
    assert not now.run("late", [sys.executable, "-c", "print('started')"])
    assert (now.done[0].status, now.done[0].said) == ("not run", "out of time")
    assert now.run("the page", [sys.executable, "-c", "print('made')"], reserve=0)


def test_every_case_of_a_gpu_is_in_one_group() -> None:
    planned = [
        (op, label(shape))
        for ops, patterns in visit.groups()
        for op in ops
        for shape in select(OPS[op], patterns, "cuda", quick=False)
    ]
    assert sorted(planned) == sorted((name, label(s)) for name, op in OPS.items() for s in op.shapes["cuda"])
    assert planned[0] == ("clip_loss", "B=32768,D=512")
    assert visit.groups(["pgd_step"]) == [(("pgd_step",), ())]


@pytest.mark.parametrize(
    ("counts", "status"),
    [
        ('tests="3" skipped="1" failures="0" errors="0"', "ok"),
        ('tests="3" skipped="3" failures="0" errors="0"', "not run"),
        ('tests="0" skipped="0" failures="0" errors="0"', "not run"),
    ],
)
def test_skipped_tests_show_nothing(tmp_path: Path, counts: str, status: str) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(f"<testsuites><testsuite {counts}><testcase/></testsuite></testsuites>")
    assert visit.count_tests(report)[0] == status
    assert visit.count_tests(tmp_path / "none.xml")[0] == "failed"


# --- exercise --------------------------------------------------------------------------------------------------------


def unsteady(inputs: Tensors, shape: Shape) -> Call:
    """Right, but another last bit at every call."""
    image = pgd_step.build_eager(inputs, shape)()["image"]
    first = image.flatten()[0]
    first.copy_(torch.nextafter(first, torch.rand(())))
    return lambda: {"image": image}


def off(inputs: Tensors, shape: Shape) -> Call:
    image = pgd_step.build_eager(inputs, shape)()["image"]
    return lambda: {"image": image + 0.01}


@pytest.mark.parametrize(
    ("build", "problem"), [(unsteady, "image differs from call to call"), (off, "image is off by")]
)
def test_exercise_sees_what_is_wrong(build: object, problem: str) -> None:
    case = Case(pgd_step.PGD_STEP, {"B": 2, "H": 5}, torch.float32, torch.device("cpu"))
    gate = Gate(case, case.inputs())
    right = Provider("ours", pgd_step.build_eager, role="ours")
    assert exercise.exercise(case, right, gate, 3) is None
    said = exercise.exercise(case, Provider("ours", build, role="ours"), gate, 3)  # type: ignore[arg-type]
    assert said is not None and problem in said


def test_exercise_fails_if_nothing_ran(capsys: pytest.CaptureFixture[str]) -> None:
    assert exercise.main(["--ops", "pgd_step", "--device", "cpu", "--once"]) == 0
    assert "1 exercised on cpu, 0 wrong" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert exercise.main(["--device", "cuda"]) == 2
