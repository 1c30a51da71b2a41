"""The script for a visit to a GPU, on a machine without one: every step has its line, whatever becomes of it."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks import bars, environment, results
from benchmarks.ops import OPS
from benchmarks.registry import Case, Provider, label, select
from benchmarks.visit import __main__ as command
from benchmarks.visit import archive, program, steps, warm
from benchmarks.visit.steps import ROOT, Done, Step, Visit
from tests.benchmarks.visit import made_up

MIB = 1 << 20
PYTHON = [sys.executable, "-c"]


def members(packed: Path) -> dict[str, bytes]:
    with tarfile.open(packed) as tar:
        return {m.name: file.read() for m in tar if (file := tar.extractfile(m)) is not None}


def row(op: str = "clip_loss", b: int = 128, **more: object) -> results.Row:
    values: dict[str, object] = {"dtype": "bfloat16", "device": "cuda", "provider": "ccu_fast", "role": "ours"}
    values |= {"arithmetic": "working", "p50_ms": 1.0, "environment": {"device": "a GPU", "git_sha": "abc"}}
    return results.Row(op=op, shape={"B": b, "D": 512}, **{**values, **more})  # type: ignore[arg-type]


# --- from the command line to what comes back, and home --------------------------------------------------------------


def test_a_tiny_visit_comes_back_as_two_files_and_goes_into_the_repository(tmp_path: Path, native: str) -> None:
    out = tmp_path / "out"
    words = [
        "--out",
        out,
        "--tiny",
        "--python",
        sys.executable,
        "--only",
        "bench",
        "--ops",
        "info_nce_margin",  # none of its providers is compiled by torch, which takes half a minute
        "--commit",
        "c0ffee",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.visit", *words], cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["summary.md", "visit.tgz"]
    found = members(out / "visit.tgz")
    said = {line["step"]: line for line in json.loads(found["summary.json"])}
    assert set(list(said)[:5]) == {"commit", "peers", "info", "build", "warm bench"}
    assert list(said)[5:] == ["bench 1", "report"]
    assert said["warm bench"]["said"] == "1 of 1 cases called"
    assert "info_nce_margin B=96,D=64" in said["bench 1"]["said"] and said["bench 1"]["status"] == "ok"
    assert (out / "summary.md").read_text() in done.stdout and len(done.stdout) < 12_000
    (name,) = (name for name in found if name.endswith("info_nce_margin.json"))
    device = Path(name).parent.name
    assert json.loads(found[name])[0]["environment"]["git_sha"] == "c0ffee"
    home = tmp_path / "benchmarks"
    written = archive.unpack(out / "visit.tgz", home)
    assert home / "results" / device / "info_nce_margin.json" in written
    assert {path.name for path in (home / "visits" / device).iterdir()} == {"info.txt", "summary.json", "summary.md"}
    assert any(r.role == "ours" and r.p50_ms for r in results.read(home / "results" / device))


def test_what_a_visit_writes_is_no_change_of_what_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "REPOSITORY", tmp_path)
    monkeypatch.setenv(environment.COMMIT, "")  # put back at the end, as the visit sets it
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(program, "execute", lambda now, plan: None)
    now = command.visit(tmp_path / "gets it", minutes=1)
    assert (tmp_path / "gets it" / "summary.md").is_file() and "+changes" not in now.done[0].said
    assert environment.source() == (now.done[0].said, False)


def test_without_a_folder_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def stand_in(out: Path, **more: object) -> Visit:
        asked.append(out)
        raise ValueError("enough")

    monkeypatch.setattr(command, "visit", stand_in)
    monkeypatch.setattr(command.signal, "signal", lambda *a: None)
    for out in ("", "/some/where"):
        monkeypatch.setenv("OUT", out)
        assert command.main(["--minutes", "4"]) == 2
    assert asked == [Path("out"), Path("/some/where")]


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """A stand-in for Python that reports success and records how it was called."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho stored in\necho "3 right, 0 wrong, 0 not run"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def run_recorded(tmp_path: Path, recorder: Path, minutes: float = 9, **more: object) -> tuple[list[Done], list[str]]:
    now = Visit(tmp_path / "out", 60 * minutes)
    asked = {"tiny": False, "python": recorder, "build": True, "ops": (), "only": None, **more}
    program.execute(now, program.Plan(**asked))  # type: ignore[arg-type]
    return now.done, (tmp_path / "calls").read_text().splitlines()


def test_what_matters_most_comes_first(tmp_path: Path, recorder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program.shutil, "which", lambda *_, **__: None)
    done, calls = run_recorded(tmp_path, recorder)
    names = [d.step for d in done]
    first = names.index("bench 1")
    assert set(names[:first]) == {"info", "build", "smoke triton", "warm bench"}
    benches = [name for name in names if name.startswith("bench")]
    main, last = len(program.MAIN), names[-4:-2]
    assert names[first:-4] == [
        *benches[:main],
        "smoke native",
        "info built",
        "tests",
        "sanitizer",
        "exercise",
        *benches[main:],
    ]
    assert set(last) == {"commands", "memory of surrogates"} and names[-2:] == ["tune", "report"]
    assert benches == [f"bench {number}" for number in range(1, main + len(program.REST) + 2)]
    assert sum("tests.support.smoke --backend triton" in call for call in calls) == max(1, (os.cpu_count() or 2) // 2)
    assert sum("build_ext --inplace" in call for call in calls) == 1
    measured = [call for call in calls if "--seconds" in call]
    assert "--shapes B=32768,D=512 --ops clip_loss" in measured[0] and "--shapes B=65536 --ops clip_loss" in measured[1]
    assert not any(word in call.split() for call in calls for word in ("make", "pip"))


@pytest.mark.parametrize(
    ("only", "ran", "not_run"),
    [
        ("smoke", {"smoke triton", "smoke native"}, {"warm bench", "tests", "bench 1", "tune", "report"}),
        ("bench", {"warm bench", "bench 1", "report"}, {"smoke triton", "tests", "tune"}),
        ("tests", {"tests", "sanitizer", "exercise"}, {"smoke native", "bench 1", "tune", "warm bench", "commands"}),
        ("commands", {"commands", "memory of surrogates"}, {"smoke native", "bench 1", "tests", "tune", "warm bench"}),
        ("tune", {"warm tune", "tune"}, {"smoke native", "bench 1", "tests", "report", "warm bench"}),
    ],
)
def test_only_one_part(only: str, ran: set[str], not_run: set[str], tmp_path: Path, recorder: Path) -> None:
    names = {d.step for d in run_recorded(tmp_path, recorder, only=only)[0]}
    assert names >= ran | {"info", "build"} and not names & not_run


def test_only_files_with_tests_for_a_gpu_are_collected() -> None:
    """If the imports of other tests are missing, pytest would stop before the first test."""
    files = program.gpu_tests()
    assert {
        "tests/ops/reduce_similarity/test_on_a_gpu.py",
        "tests/ops/test_smoke.py",
        "tests/ops/topk_flips/test_cuda.py",
    } <= set(files)
    assert "tests/benchmarks/visit/test_visit.py" not in files
    assert len(files) < 30


def test_what_does_not_fit_says_so(tmp_path: Path, recorder: Path) -> None:
    done, calls = run_recorded(tmp_path, recorder, minutes=0.5)
    late = {d.step: d.said for d in done if d.status == "not run"}
    assert late["tests"].startswith("needs 30 s, ") and late["tune"].startswith("needs 60 s, ")
    assert not any("pytest" in call for call in calls)
    assert [d.step for d in done][-1] == "report" and done[-1].status == "ok"


def test_every_aim_is_measured_before_anything_else() -> None:
    planned = {
        (op, label(shape))
        for ops, patterns in program.MAIN
        for op in ops
        for shape in select(OPS[op], patterns, "cuda", quick=False)
    }
    aims = {(bar.op, bar.shape) for bar in bars.load() if bar.source == bars.GPU}
    assert planned == aims | {("clip_loss_banks", "K=17,B=128,D=1024")}


@pytest.fixture
def dying(tmp_path: Path) -> Path:
    """A stand-in for Python that measures a group's first case only without other projects' kernels."""
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        'case "$*" in *--without*|*N=2560,*) echo stored in; exit 0;; *--seconds*) exit 139;; esac\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def test_a_group_that_died_is_measured_without_what_may_have_killed_it(tmp_path: Path, dying: Path) -> None:
    _, calls = run_recorded(tmp_path, dying, only="bench", ops=("topk_flips", "sigmoid_loss"))
    measured = [call.partition("--shapes ")[2] for call in calls if "--seconds" in call]
    others = "--without inf_cl memeff siglip_kernel --ops"
    assert measured[:5] == [
        "B=65536 --ops sigmoid_loss",
        f"B=65536,D=512 {others} sigmoid_loss",
        "N=5 N=2560 --ops topk_flips",
        f"N=5,V=49408,D=512,k=16 {others} topk_flips",
        "N=2560,V=49408,D=512,k=16 --ops topk_flips",
    ]


def test_a_run_can_leave_providers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def run(case: Case, *_: object, **__: object) -> list[results.Row]:
        names.extend(provider.name for provider in case.providers())
        return [row()]

    monkeypatch.setattr(bench, "run", run)
    words = ["--ops", "noise_add", "--quick", "--no-compiled", "--device", "cpu"]
    assert bench.main([*words, "--without", "mem_", "ccu_fast_fp32"]) == 0
    assert names == ["eager", "ccu_fast", "ccu_fast_out", "copy_ceiling"]


def test_the_aims_are_first_in_what_is_printed(tmp_path: Path) -> None:
    now = Visit(tmp_path, 60)
    results.write(now.work / "results" / made_up.DEVICE, made_up.rows())
    program.judge_rows(now, ["clip_loss"], ["B=128"], [])
    now.note(Done("long", "failed", said="x" * 1000))
    said = command.ending(now)
    assert said.startswith("| what | aim | measured |") and "29 aims: " in said and "x" * 200 not in said
    assert "| clip_loss B=10000,D=512 | ≤ 1.15 times the time of even per pair | 0.997 | met |" in said
    assert program.AIMS in members(tmp_path / archive.NAME)


def test_the_end_of_the_output_fits_where_only_the_end_comes_back(tmp_path: Path) -> None:
    now = Visit(tmp_path, 60)
    for number in range(200):
        now.note(Done(f"step {number}", "failed", said="x" * 160))
    assert len(command.ending(now)) <= command.PRINTED
    assert command.ending(now).endswith("the rest is in the archive\n")


# --- steps -----------------------------------------------------------------------------------------------------------


def test_a_failing_step_is_a_line_and_the_next_one_runs(tmp_path: Path) -> None:
    now = Visit(tmp_path, seconds=60)
    assert not now.run(Step("breaks", [[*PYTHON, "print('it'); raise SystemExit(3)"]]))
    assert not now.run(Step("missing", [["/no/such/command"]]))
    assert now.run(Step("works", [[*PYTHON, "print('one'); print('two')"]]))
    assert not now.run(Step("says no", [[*PYTHON, ""]], judge=lambda logs: ("not run", "nothing was there")))
    assert [(d.step, d.status) for d in now.done] == [
        ("breaks", "failed"),
        ("missing", "failed"),
        ("works", "ok"),
        ("says no", "not run"),
    ]
    assert [d.said for d in now.done][2:] == ["two", "nothing was there"]
    assert "No such file" in now.done[1].said
    assert [line["status"] for line in json.loads((now.work / "summary.json").read_text())][:2] == ["failed"] * 2


def test_a_step_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    now = Visit(tmp_path / "out", seconds=60)
    pulse = tmp_path / "pulse"
    child = f"import time\nwhile True: open({str(pulse)!r}, 'a').write('.'); time.sleep(0.05)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert not now.run(Step("hangs", [[*PYTHON, parent]], most=4))
    assert now.done[0].status == "out of time"
    beats = pulse.stat().st_size
    assert beats > 0
    time.sleep(0.3)
    assert pulse.stat().st_size == beats


def test_a_visit_that_is_told_to_end_leaves_nothing_running(tmp_path: Path) -> None:
    recorder = tmp_path / "python"
    recorder.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 100\n")
    recorder.chmod(0o755)
    words = ["--out", tmp_path / "out", "--python", recorder]
    visit = subprocess.Popen([sys.executable, "-m", "benchmarks.visit", *words], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert visit.poll() is None
            time.sleep(0.05)
    finally:
        visit.terminate()
    assert visit.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert (tmp_path / "out" / archive.NAME).exists()


def test_told_to_end_while_it_starts_it_ends_what_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_told_to_end", [])
    begun: list[Any] = []
    start = steps._start

    def interrupted(*words: Any) -> Any:
        begun.append(start(*words))
        steps.end(15, None)
        return begun[-1]

    monkeypatch.setattr(steps, "_start", interrupted)
    with pytest.raises(SystemExit) as left:
        Visit(tmp_path / "out", 60).run(*(Step(name, [["sleep", "100"], ["sleep", "100"]]) for name in ("one", "two")))
    assert left.value.code == 143 and len(begun) == 4
    assert all(process is not None and process.poll() is not None for process in begun)


def test_steps_side_by_side_wait_for_each_other(tmp_path: Path) -> None:
    """Each waits for a file that the other one makes; the line shows what one of them reports as wrong."""
    now = Visit(tmp_path / "out", seconds=60)
    meet = (
        "import sys, time; from pathlib import Path\nown, other = map(Path, sys.argv[1:3]); own.touch()\n"
        "while not other.exists(): time.sleep(0.01)\nprint(sys.argv[3])"
    )
    a, b, c = (str(tmp_path / name) for name in "abc")
    right, wrong = "5 right, 0 wrong, 0 not run", "2 right, 1 wrong, 0 not run: lse"
    commands = [[*PYTHON, meet, a, c, right], [*PYTHON, meet, b, a, wrong]]
    together = Step("many", commands, judge=steps.add_counts)
    assert not now.run(together, Step("one", [[*PYTHON, meet, c, b, "met"]]))
    lines = {d.step: (d.status, d.said) for d in now.done}
    assert lines == {"many": ("failed", "7 right, 1 wrong, 0 not run: lse"), "one": ("ok", "met")}
    assert {path.name for path in (now.work / "logs").iterdir()} == {"many.1.log", "many.2.log", "one.log"}


def test_no_step_starts_after_the_deadline(tmp_path: Path) -> None:
    now = Visit(tmp_path, seconds=steps.RESERVE + 1)
    assert not now.run(Step("late", [[*PYTHON, "print('started')"]]))
    assert (now.done[0].status, now.done[0].said[:9]) == ("not run", "needs 3 s")
    assert now.run(Step("the page", [[*PYTHON, "print('made')"]]), reserve=0)


def test_a_part_that_died_is_not_right(tmp_path: Path) -> None:
    for name, text in (("1.log", "4 right, 0 wrong, 0 not run"), ("2.log", "Segmentation fault")):
        (tmp_path / name).write_text(text + "\n")
    status, said = steps.add_counts([tmp_path / "1.log", tmp_path / "2.log"])
    assert (status, said) == ("failed", "4 right, 0 wrong, 0 not run: 2.log: Segmentation fault")
    assert steps.add_counts([tmp_path / "1.log"]) == ("ok", "4 right, 0 wrong, 0 not run")


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            "tests/test_a.py::test_b PASSED [ 50%]\ntests/test_a.py::test_c[x - y] SKIPPED (no GPU) [100%]",
            ("ok", "1 passed, 1 skipped"),
        ),
        (
            "tests/test_a.py::test_c SKIPPED (no GPU) [100%]\nSKIPPED [1] tests/test_a.py:3: no GPU",
            ("not run", "1 skipped"),
        ),
        (
            "[gw0] [ 50%] PASSED tests/test_a.py::test_b\n[gw1] [ 75%] FAILED tests/test_a.py::test_c",
            ("failed", "1 passed, 1 failed"),
        ),
        ("tests/test_a.py::test_b FAILED [ 50%]\nFAILED tests/test_a.py::test_b - assert 1", ("failed", "1 failed")),
        ("collected 0 items", ("not run", "no tests")),
    ],
)
def test_tests_are_counted_also_where_pytest_was_stopped(log: str, expected: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "log").write_text(log + "\n")
    assert steps.count_tests([tmp_path / "log"]) == expected


def test_a_group_of_which_ours_is_wrong_has_failed(tmp_path: Path) -> None:
    now = Visit(tmp_path, 60)
    assert program.judge_rows(now, ["clip_loss"], [], []) == ("failed", "nothing of ours was measured")
    folder = now.work / "results" / "cuda-a"
    results.write(folder, [row(speedup_over={"a": 2.0, "b": 1.5}), row(b=256, status="wrong", reason="dx is off")])
    assert program.judge_rows(now, ["clip_loss"], ["B=128"], []) == ("ok", "clip_loss B=128,D=512 1 ms, 1.50 × b")
    status, said = program.judge_rows(now, ["clip_loss"], [], [])
    assert status == "failed" and said.startswith("ccu_fast B=256,D=512 wrong: dx is off; ")


def test_kernels_of_others_are_compiled_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[str] = []
    others = Provider("memeff", lambda inputs, shape: lambda: called.append("memeff") or {})
    ours = Provider("ccu_fast", lambda inputs, shape: lambda: called.append("ours") or {}, role="ours")
    op = dataclasses.replace(OPS["pgd_step"], providers=[others, ours])
    case = Case(op, op.quick[0], torch.float32, torch.device("cpu"))
    monkeypatch.setattr(warm.program, "cases", lambda *_, **__: [case, case])
    monkeypatch.setattr(warm.os, "nice", lambda _: 0)
    assert warm.main(["bench", "--device", "cpu"]) == 0
    assert called == ["ours", "ours", "memeff", "memeff"]
    assert capsys.readouterr().out.endswith("2 of 2 cases called\n")


def test_peers_come_from_wheels_without_pip(tmp_path: Path) -> None:
    wheels, now = tmp_path / "wheels", Visit(tmp_path / "out", 60)
    wheels.mkdir()
    assert program.unpack_wheels(wheels, now.site).status == "failed"
    with zipfile.ZipFile(wheels / "a_peer-1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a_peer.py", "")
        wheel.writestr("a_peer-1.2.dist-info/METADATA", "Name: a-peer\nVersion: 1.2\n")
    done = program.unpack_wheels(wheels, now.site)
    assert (done.status, done.said) == ("ok", "a_peer-1.2")
    asks = "import a_peer, importlib.metadata as m; print(m.version('a-peer'))"
    assert now.run(Step("peer", [[*PYTHON, asks]])) and now.done[-1].said == "1.2"
    (wheels / "c-1-cp312-cp312-linux_x86_64.whl").touch()
    assert "holds compiled code" in program.unpack_wheels(wheels, now.site).said


def test_every_case_of_a_gpu_is_measured_and_warmed_once() -> None:
    groups = [*program.MAIN, *program.REST, *program.others()]
    planned = [
        (op, label(shape))
        for ops, patterns in program.chosen(groups, ())
        for op in ops
        for shape in select(OPS[op], patterns, "cuda", quick=False)
    ]
    assert sorted(planned) == sorted((name, label(s)) for name, op in OPS.items() for s in op.shapes["cuda"])
    assert planned[0] == ("clip_loss", "B=32768,D=512")
    assert [(case.op.name, label(case.shape)) for case in program.cases("cuda", (), quick=False)] == planned
    assert program.chosen(groups, ["pgd_step"]) == [(("pgd_step",), ())]
