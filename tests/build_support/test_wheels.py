"""`make wheels`: what it refuses, and what it says of it. That it builds is shown by running it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from build_support import wheels
from ccu_fast import info
from tests.support.makefile import planned
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


def test_make_passes_the_interpreters_on() -> None:
    assert "--pythons 'python3.10 python3.14'" in planned("wheels", "PYTHONS=python3.10 python3.14")
    assert "--pythons" not in planned("wheels")


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
    record, page = json.loads((ROOT / "docs" / "wheels.json").read_text()), (ROOT / "docs" / "install.md").read_text()
    for build in record["builds"]:
        assert {row["python"] for row in build["wheels"]} <= {name.removeprefix("python") for name in wheels.PYTHONS}
        for row in build["wheels"]:
            assert row["file"].endswith(f"-{wheels.POLICY}.whl")
            assert row["isas"] == ["base", "avx2", "avx512"]
            assert tuple(map(int, row["glibc"].split("."))) <= (2, 28)
            assert bool(row["cuda"]) == build["cuda"]
            tried = row["tried"]["torch"].partition("+")[0] if "tried" in row else "not tried"
            sizes = f"{row['bytes'] / 1e6:.1f} MB | {row['module_bytes'] / 1e6:.1f} MB"
            assert f"\n| {row['python']} | {sizes} | {row['glibc']} | {tried} |\n" in page
        assert f"(the source distribution has {build['sdist']['bytes'] / 1e6:.1f} MB)" in page


def test_what_ran_elsewhere_is_on_the_page_and_bounds_what_info_calls_tested() -> None:
    runs = json.loads((ROOT / "docs" / "support.json").read_text())["runs"]
    page = (ROOT / "docs" / "install.md").read_text()
    for run in runs:
        counts = f"{run['passed']} | {len(run['failed'])} | {run['skipped']}"
        assert f"\n| {run['python']} | {run['torch']} | {run['triton']} | {run['what']} | {counts} |\n" in page
    for name, ends in info.TESTED.items():
        assert set(ends) <= {".".join(run[name].split(".")[:2]) for run in runs}
