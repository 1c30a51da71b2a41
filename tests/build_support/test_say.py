"""What make says of a step while it runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from build_support import say
from tests.support.makefile import planned

PIP = re.compile(r"Downloading .*[MG]B\)")
FRESH = "VENV=.venv-of-nobody"  # as in a fresh clone


def python(program: str) -> list[str]:
    return [sys.executable, "-I", "-c", program]


def test_every_few_seconds_of_silence_the_newest_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(say, "SECONDS", 0.05)
    heard = tmp_path / "heard"
    program = f"""
import pathlib, time
print("Collecting torch", flush=True)
while not pathlib.Path({str(heard)!r}).exists():
    time.sleep(0.01)
print("Downloading torch.whl (188.3 MB)", flush=True)
"""
    lines: list[str] = []

    def told(line: str) -> None:
        lines.append(line)
        if re.search(r"… \d+ s: Collecting torch$", line):  # the command ends when it has been heard
            heard.touch()

    assert say.run("torch", python(program), PIP, told) == 0
    assert lines[0] == "-- torch" and re.fullmatch(r"   done in \d+ s", lines[-1])
    assert "   Downloading torch.whl (188.3 MB)" in lines and "Collecting torch" not in lines


def test_a_step_that_fails_shows_everything_and_its_status() -> None:
    lines: list[str] = []
    program = "import sys; print('why'); print('and more', file=sys.stderr); sys.exit(3)"
    assert say.run("a step", python(program), PIP, lines.append) == 3
    assert "why" in "\n".join(lines) and "and more" in "\n".join(lines) and lines[-1].startswith("   failed after")
    killed = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    assert say.run("a step", python(killed), None, lines.append) == 137


def test_without_a_filter_each_line_is_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    assert say.main(["types", "--", *python("print('Success: no issues'); print('é')")]) == 0
    assert capfd.readouterr().out.splitlines()[:3] == ["-- types", "Success: no issues", "é"]
    with pytest.raises(SystemExit):
        say.main(["types"])


def test_a_terminal_without_utf_8_is_no_reason_to_fail() -> None:
    command = [sys.executable, say.__file__, "types", "--", *python(r"import os; os.write(1, b'\xc3\xa9 \xff\n')")]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    assert done.stdout.splitlines()[:2] == [b"-- types", b"? ?"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_ends_the_command_and_its_last_lines_are_passed_on(number: signal.Signals) -> None:
    program = """
import os, signal, sys
signals = {signal.SIGINT, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
print(os.getpid(), flush=True)
signal.sigwait(signals)
print("tidied up")
sys.exit(1)
"""
    command = [sys.executable, "-I", say.__file__, "a step", "--", *python(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as saying:
        assert saying.stdout is not None
        assert saying.stdout.readline() == "-- a step\n"
        child = int(saying.stdout.readline())
        saying.send_signal(number)
        if number == signal.SIGINT:  # which a terminal sends to both
            os.kill(child, number)
        assert re.fullmatch(r"tidied up\n   failed after \d+ s\n", saying.stdout.read())
        assert saying.wait() == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.parametrize("target", ["demo", "lint", "test-quick", "docs", "compat", "wheels"])
def test_every_step_that_may_take_long_says_what_it_does(target: str) -> None:
    steps = planned(target, FRESH).replace("\\\n", " ").splitlines()
    silent = ("touch", "rm", "case", "echo")
    told = [step for step in steps if "build_support/say.py" in step or "-m ccu_fast" in step or "-m pytest" in step]
    assert told and all(step in told or step.strip().startswith(silent) for step in steps), steps


def test_torch_for_cpus_comes_from_the_index_of_cpu_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPU", "1")  # as where these tests are run by `make test CPU=1`
    usual, cpu = planned("demo", FRESH), planned("demo", FRESH, "CPU=1")
    assert "--index-url" not in usual and "CPU=1" in usual  # which says when it is of use
    ours = [line for line in cpu.splitlines() if "--index-url https://download.pytorch.org/whl/cpu" in line]
    assert len(ours) == 1 and ours[0].split()[-1].startswith("torch==") and "triton" not in ours[0]
    assert "--index-url https://elsewhere/cu130" in planned("demo", FRESH, "TORCH_INDEX=https://elsewhere/cu130")
