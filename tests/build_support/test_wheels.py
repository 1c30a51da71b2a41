"""`make wheels`: what it refuses, and what it says of it. That it builds is shown by running it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from build_support import wheels
from tests.support.paths import ROOT
from tests.support.presence import absent


def test_named_interpreter_that_is_missing_is_an_error() -> None:
    with pytest.raises(wheels.Failed, match=r"PYTHONS names .* python9\.9 \(not found\)"):
        wheels.find_interpreters([sys.executable, "python9.9"], strict=True)


def test_unnamed_interpreter_that_is_missing_is_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        [found] = wheels.find_interpreters(["python9.9", sys.executable, sys.executable], strict=False)
    except wheels.Failed as reason:
        absent("Python.h", str(reason))
    assert found.version == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert "left out: python9.9 (not found)" in capsys.readouterr().out


def test_no_interpreter_at_all_is_an_error() -> None:
    with pytest.raises(wheels.Failed, match=r"none of python9\.8, python9\.9 can be built for"):
        wheels.find_interpreters(["python9.8", "python9.9"], strict=False)


def test_interpreter_without_headers_is_named(tmp_path: Path) -> None:
    script = tmp_path / "python9.9"
    script.write_text(f"#!/bin/sh\necho 9.9 {tmp_path}\n")
    script.chmod(0o755)
    with pytest.raises(wheels.Failed, match=r"python9\.9 \(no .*/Python\.h: install its development package\)"):
        wheels.find_interpreters([str(script)], strict=True)


def test_the_command_ends_in_one_sentence() -> None:
    command = [sys.executable, "-m", "build_support.wheels", "--pythons", "python9.9"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1
    assert done.stderr == "wheels: PYTHONS names interpreters that cannot be built for: python9.9 (not found)\n"


def test_an_interpreter_without_torch_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    script = tmp_path / "python9.9"
    script.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'torch'\"; exit 1\n")
    script.chmod(0o755)
    with pytest.raises(
        wheels.Failed, match=r"python9\.9 has no torch to try its wheel with \(ModuleNotFoundError: .*--try-with"
    ):
        wheels.need_torch([wheels.Interpreter(str(script), "9.9")])


def test_archives_of_others_stay_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("photos.tar.gz", "ccu_fast-0.1.0.tar.gz"):
        (tmp_path / name).touch()
    monkeypatch.setattr(wheels, "run", lambda *_: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):
        wheels.source_distribution(tmp_path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photos.tar.gz"]


def test_make_passes_the_interpreters_on_and_is_never_silent() -> None:
    if shutil.which("make") is None:
        absent("make", "it is not on PATH")
    command = ["make", "-n", "wheels", "PYTHONS=python3.10 python3.14"]
    assert "--pythons 'python3.10 python3.14'" in subprocess.check_output(command, cwd=ROOT, text=True)
    plain = subprocess.check_output(["make", "-n", "wheels"], cwd=ROOT, text=True)
    assert "--pythons" not in plain
    assert "build_support/say.py" in plain  # a Python takes minutes of compiling, in which nothing else is said


def test_symbols_that_a_newer_glibc_alone_has_are_found() -> None:
    listing = """
0000000000001000 T PyInit__C
                 U PyList_New
                 U _Py_Dealloc
                 U memcpy@GLIBC_2.14
                 U arc4random
                 U __isoc23_strtol
                 w __cxa_finalize
"""
    assert wheels.unexplained_symbols(listing) == ["arc4random", "__isoc23_strtol"]


def test_old_pythons_and_new_ones_are_those_that_the_project_names() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert [name.removeprefix("python") for name in wheels.PYTHONS] == [
        line.split(":: ")[-1].rstrip('",') for line in text.splitlines() if "Python :: 3." in line
    ]


def test_recorded_wheels_are_portable_and_hold_every_kernel() -> None:
    """The file that the page on installing takes its sizes from."""
    record = json.loads((ROOT / "docs" / "wheels.json").read_text())
    for build in record["builds"]:
        assert {row["python"] for row in build["wheels"]} <= {name.removeprefix("python") for name in wheels.PYTHONS}
        for row in build["wheels"]:
            assert row["file"].endswith(f"-{wheels.POLICY}.whl")
            assert row["isas"] == ["base", "avx2", "avx512"]
            assert tuple(map(int, row["glibc"].split("."))) <= (2, 28)
            assert bool(row["cuda"]) == build["cuda"]
            assert f"{row['bytes'] / 1e6:.1f} MB" in (ROOT / "docs" / "install.md").read_text()
