"""``ccu-fast``: its commands, what they pass on, and how they end."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import ccu_fast
from ccu_fast import info
from ccu_fast.cli import console
from ccu_fast.cli import main as cli
from ccu_fast.cli.app import app
from ccu_fast.ops import machine
from ccu_fast.unlearn.config import Budget, UnlearnConfig
from ccu_fast.unlearn.study.comparison import Comparison
from tests.support.forked import in_child

# The status, output and errors of each command line.
HIDE_TYPER = """
import contextlib, io, json, sys
sys.modules["typer"] = None
from ccu_fast.cli.main import main
answers = []
for line in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(line.split())
    answers.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(answers))
"""


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in for ccu_fast.cli.demo that keeps what it was called with."""
    module = types.ModuleType("ccu_fast.cli.demo")
    module.calls = []  # type: ignore[attr-defined]

    def run(out: Path, **options: Any) -> None:
        module.calls.append((out, options))  # type: ignore[attr-defined]

    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ccu_fast.cli.demo", module)
    return module


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(machine.PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, text=True, capture_output=True, check=False
    )


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == ccu_fast.__version__


@pytest.mark.parametrize("name", ["info", "demo", "protect", "evaluate", "verify", "bench"])
def test_help_shows_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([name, "--help"]) == 0
    assert f"Example: ccu-fast {name}" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("name", ["unlearn", "demo", "protect", "evaluate", "verify", "bench", None])
def test_help_is_whole_at_any_width(
    name: str | None, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main([*filter(None, [name]), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown and "<bool>" not in shown and max(map(len, shown.splitlines())) <= columns
    if name is None:
        return
    command = get_command(app).commands[name]  # type: ignore[attr-defined]
    for option in (parameter for parameter in command.params if parameter.param_type_name == "option"):
        assert f"{option.opts[0]} " in shown
        assert not option.multiple or re.search(rf"{option.opts[0]} +<str>", shown)
    # What stands before the options fills its lines: the first word of the next would not have fitted.
    text = shown.partition("Arguments")[0].partition("Options ─")[0].partition("Options:")[0].rstrip("╭─ \n")
    lines = [line.strip() for line in text.splitlines()][2:]
    for line, following in itertools.pairwise(lines):
        if line and following:
            assert len(line) + 1 + len(following.split()[0]) > columns - 4


def test_each_example_has_a_line_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["unlearn", "--help"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line.startswith("ccu-fast")] == [
        "ccu-fast unlearn settings.toml --out clean --steps 100",
        "ccu-fast unlearn settings.toml --compare --out audit",
        "ccu-fast unlearn --compare --task digits-halves --seeds 3",
    ]


def test_what_the_settings_decide_has_its_default_in_the_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    assert cli.main(["unlearn", "--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("steps", "learning_rate", "batch"):
        assert f"as set if not given, or {getattr(Budget(), name):g}." in shown
    assert re.search(rf"--seeds .*if not given as set, or {Comparison().seeds}; of tasks 3", shown)
    assert "0.2 of a class" in shown and UnlearnConfig().used("neighbours") == 0.2


def test_overview_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in ("info", "demo", "protect", "evaluate", "verify", "bench"):
        assert name in shown
        assert name in cli.USAGE


def test_info_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == info.collect()


def test_demo_hands_its_options_on(demo: Any) -> None:
    assert cli.main(["demo"]) == 0
    assert cli.main(["demo", "--out", "there", "--seeds", "3", "--only", "protect", "--quiet"]) == 0
    assert demo.calls == [
        (Path("ccu_fast_demo"), {"seeds": 1, "only": None, "quiet": False}),
        (Path("there"), {"seeds": 3, "only": "protect", "quiet": True}),
    ]


@pytest.mark.parametrize("wrong", [["demo", "--seeds", "0"], ["demo", "--only", "both"], ["nonsense"], ["info", "x"]])
def test_wrong_command_lines_end_with_2(wrong: list[str], demo: Any) -> None:
    assert cli.main(wrong) == 2
    assert demo.calls == []


def test_demo_names_the_extra_that_is_missing(
    demo: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib.pyplot")

    monkeypatch.setattr(demo, "run", run)
    assert cli.main(["demo"]) == 1
    told = capsys.readouterr().err.partition("\n")[2]  # the first line says that it loads
    assert told.startswith("ccu-fast demo: matplotlib is needed") and told.endswith(": pip install matplotlib\n")


def test_a_missing_module_that_no_extra_brings_is_a_bug_and_shows(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'ccu_fast.typo'", name="ccu_fast.typo")

    monkeypatch.setattr(demo, "run", run)
    with pytest.raises(ModuleNotFoundError, match="typo"):
        cli.main(["demo"])


def test_ctrl_c_ends_with_one_line_and_130(
    demo: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    def interrupted() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is born without it
        assert cli.main(["demo"]) == 130

    monkeypatch.setattr(demo, "run", run)
    assert in_child(interrupted) == 0
    assert capfd.readouterr().err.splitlines()[-1] == "ccu-fast demo: interrupted"


def test_bench_runs_the_benchmarks_of_the_checkout(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "ccu_fast.h").touch()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "__main__.py").write_text("def main(arguments):\n    print(arguments)\n    return 3\n")
    done = command("-m", "ccu_fast", "bench", "topk_flips", "--device", "cpu", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "['topk_flips', '--device', 'cpu']\n"), done.stderr


def test_bench_outside_a_checkout_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "PACKAGE", tmp_path / "site-packages" / "ccu_fast")
    assert cli.main(["bench"]) == 1
    assert "in the folder of a checkout" in capsys.readouterr().err


def test_without_typer_info_works_and_the_rest_says_what_to_install() -> None:
    done = command("-c", HIDE_TYPER, "info", "demo", "--version", "", "nonsense")
    assert done.returncode == 0, done.stderr
    report, demo, version, overview, wrong = json.loads(done.stdout)
    assert "cpu kernels" in report[1]
    assert demo[0] == 1 and demo[2].startswith("ccu-fast demo: typer is needed")
    assert demo[2].endswith(": pip install typer\n")
    assert version[1].strip() == ccu_fast.__version__
    assert overview[1].startswith(cli.USAGE + "pip install ")
    assert wrong[0] == 2
    assert "no command 'nonsense'" in wrong[2]


def test_errors_name_options_that_are_there() -> None:
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        there = {option for parameter in command.params for option in parameter.opts}
        assert set(console.FLAGS.get(name, {}).values()) <= there
    assert console.FLAGS["verify"]["as_json"] == "--json"
