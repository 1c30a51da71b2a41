"""`make wheels`: what it refuses, and what it says of it. That it builds is shown by running it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from build_support import wheel_record, wheels
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


def test_make_passes_the_interpreters_and_the_index_of_torch_on() -> None:
    assert "--pythons 'python3.10 python3.14'" in planned("wheels", "PYTHONS=python3.10 python3.14")
    plain = planned("wheels")
    assert "--pythons" not in plain and "--torch-index" not in plain
    assert "--torch-index 'https://download.pytorch.org/whl/cpu'" in planned("wheels", "CPU=1")
    assert "build_support/say.py" in plain  # a Python takes minutes of compiling


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
    monkeypatch.setattr(wheels, "progress", lambda *_: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception):
        wheels.source_distribution(tmp_path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["photos.tar.gz"]


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


def test_what_a_newer_libstdcxx_takes_from_a_newer_glibc_is_linked_in(tmp_path: Path) -> None:
    """eh_alloc.o of GCC 13 and later, in every wheel, asks for C23's strtoul on a system with glibc 2.38 or later."""
    lacking = tmp_path / "lacking.o"
    source = ROOT / "csrc" / "portable" / "glibc_2_28.c"
    wheels.run(["c++", "-x", "c", "-O2", "-fPIC", "-Wall", "-Wextra", "-Werror", "-c", source, "-o", lacking])
    caller = tmp_path / "caller.c"
    caller.write_text(
        """#include <stdio.h>
        unsigned long __isoc23_strtoul(const char*, char**, int);
        unsigned int arc4random(void);
        extern char __libc_single_threaded;
        int main(void) {
          char text[] = "4096:rest", *end = 0;
          unsigned long number = __isoc23_strtoul(text, &end, 0);
          printf("%lu %s %d", number, end, arc4random() != arc4random());
          return __libc_single_threaded > 1;
        }"""
    )
    wheels.run(["c++", "-x", "c", caller, "-x", "none", lacking, "-o", tmp_path / "caller"])
    assert wheels.run([tmp_path / "caller"]) == "4096 :rest 1"


def test_old_pythons_and_new_ones_are_those_that_the_project_names() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert [name.removeprefix("python") for name in wheels.PYTHONS] == [
        line.split(":: ")[-1].rstrip('",') for line in text.splitlines() if "Python :: 3." in line
    ]


def build_of(cuda: list[str] | None, torch: str | None) -> dict[str, Any]:
    wheel = {"python": "3.11", "bytes": 2_800_000, "module_bytes": 5_100_000, "glibc": "2.27"}
    return {
        "command": "make wheels",
        "compiler": "c++ 12",
        "cuda": cuda,
        "nvcc": cuda and "13.0",
        "sdist": {"file": "ccu_fast-0.tar.gz", "bytes": 1_900_000},
        "wheels": [{**wheel, "tried": {"torch": torch}}],
    }


def test_a_record_takes_the_place_of_the_one_of_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, page = tmp_path / "wheels.json", tmp_path / "install.md"
    monkeypatch.setattr(wheel_record, "RECORD", record)
    monkeypatch.setattr(wheel_record, "PAGE", page)
    record.write_text('{"builds": []}')
    page.write_text(f"before\n\n{wheel_record.BEGIN}\n{wheel_record.END}\n\nafter\n")
    wheel_record.keep(build_of(["80", "90"], "2.13.0"))
    wheel_record.keep(build_of(None, "2.8.0"))
    wheel_record.keep(build_of(None, None))
    assert wheel_record.read() == [build_of(None, None), build_of(["80", "90"], "2.13.0")]
    text = page.read_text()
    tables = wheel_record.tables(wheel_record.read())
    assert text == f"before\n\n{wheel_record.BEGIN}\n\n{tables}\n\n{wheel_record.END}\n\nafter\n"
    assert "2.8.0" not in text and text.count("| 3.11 | 2.8 MB | 5.1 MB | 2.27 | ") == 2
    assert "Without CUDA kernels, by c++ 12. The source distribution has 1.9 MB." in text
    assert "With CUDA kernels for sm_80, sm_90, by c++ 12 and nvcc 13.0." in text


def test_a_wheel_whose_info_tells_of_another_build_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "ccu_fast-0.9-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("ccu_fast/_build_info.json", '{"cuda": null}')
    wheels.check_info({"ccu_fast": {"version": "0.9"}, "build": {"cuda": None}}, wheel)
    for version, cuda in (("0.8", None), ("0.9", {"archs": ["80"]})):
        with pytest.raises(wheels.Failed, match=r"`ccu-fast info` of ccu_fast-0\.9-.* tells of "):
            wheels.check_info({"ccu_fast": {"version": version}, "build": {"cuda": cuda}}, wheel)


def test_what_a_long_command_prints_is_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(wheels.Failed, match="failed with status 3, for the reason above"):
        wheels.progress([sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"])
    assert capfd.readouterr().out == "why\n"


def test_the_page_on_installing_shows_what_is_on_record() -> None:
    assert wheel_record.tables(wheel_record.read()) in wheel_record.PAGE.read_text(encoding="utf-8")


def test_recorded_wheels_are_portable_and_hold_every_kernel() -> None:
    plain, cuda = wheel_record.read()
    assert [f"python{row['python']}" for row in plain["wheels"]] == list(wheels.PYTHONS)
    assert plain["cuda"] is None and plain["nvcc"] is None
    assert cuda["cuda"] == ["80", "86", "89", "90", "100", "120"] and cuda["nvcc"]
    for build in (plain, cuda):
        assert re.fullmatch(r"[0-9a-f]{40}", build["commit"])  # no changes beside it
        for row in build["wheels"]:
            assert row["file"].endswith(f"-{wheels.POLICY}.whl")
            assert row["auditwheel"].startswith("manylinux_2_")
            assert row["isas"] == ["base", "avx2", "avx512"]
            assert tuple(map(int, row["glibc"].split("."))) <= (2, 28)
            assert row["tried"]["isa"] in row["isas"]


def test_files_that_are_not_of_the_checkout_are_told_from_those_that_are() -> None:
    if not (ROOT / ".git").exists():
        absent("the history", "this is no checkout")
    known = wheels.known_files(ROOT)
    assert {"setup.py", "ccu_fast/__init__.py", "csrc/bindings/module.cpp", "PKG-INFO"} <= known
    assert not any(name.startswith((".venv", "dist/", "site/", "build/")) for name in known)
