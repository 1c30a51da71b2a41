"""The CUDA C++ kernels on a CPU: the project's own tests run on them, plain and sanitized. See emulation/."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.csrc.emulation import build
from tests.support.paths import ROOT, TESTS
from tests.support.presence import absent

SANITIZED = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
# Files, and the least number of tests that must run in each, so that a selection that loses some fails.
BYTES_BOUND = {
    "ops/pgd_step/test_pgd_step.py": 90,
    "ops/noise_store/test_noise_store.py": 60,
    "ops/candidate_losses/test_candidate_losses.py": 20,
}
# These would take minutes under a sanitizer; it checks their kernels through the driver.
TOKENS = {
    "ops/topk_flips/test_topk_flips.py": 80,
    "ops/topk_flips/test_cuda.py": 30,
    "csrc/emulation/only.py": 35,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything is built, or the reason why nothing can be."""
    reason = build.impossible()
    if reason is not None:
        absent("the emulation of CUDA kernels", reason)
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture(scope="module")
def around(folder: Path) -> list[Path]:
    """Objects of code that is called but not under test."""
    return build.around(build.Build(folder / "plain"))


def passes(module: Path, files: dict[str, int], **environment: str) -> None:
    """The tests of some files on an emulated module."""
    report = module.with_suffix(".xml")
    plugins = ["-p", "tests.csrc.emulation.plugin", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            *plugins,
            "-x",
            f"--junitxml={report}",
            *(str(TESTS / name) for name in files),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ
        | environment
        | {
            "CCU_FAST_EMULATED_GPU": str(module),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        },
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    count = {name: int(suite.attrib[name]) for name in ("tests", "skipped", "failures", "errors")}
    assert count["skipped"] == count["failures"] == count["errors"] == 0, count
    for name, least in files.items():
        ran = sum(
            case.attrib["classname"].endswith(name.removesuffix(".py").replace("/", "."))
            for case in suite.iter("testcase")
        )
        assert ran >= least, f"{name}: {ran} tests"


def test_the_tests_of_token_scoring(folder: Path, around: list[Path]) -> None:
    plain = build.Build(folder / "plain")
    passes(plain.module([*build.emulated(plain), *around]), TOKENS)


def test_no_address_and_no_alignment_is_wrong(folder: Path, around: list[Path]) -> None:
    """Kernels that move packs of elements, and their tests, under the address and undefined-behaviour sanitizers."""
    sanitized = build.Build(folder / "sanitized", SANITIZED)
    kernels = build.emulated(sanitized)
    driver = sanitized.program([*kernels, *sanitized.objects([build.HERE / "drive.cpp"])], "drive")
    fibers = [path for path in kernels if path.name == "emulation-fibers.o"]
    faulty = sanitized.program([*fibers, *sanitized.objects([build.HERE / "faulty.cu"])], "faulty")
    leaks = {"ASAN_OPTIONS": "detect_leaks=0"}
    for wrong, said in (("out_of_bounds", "heap-buffer-overflow"), ("misaligned", "misaligned address")):
        done = subprocess.run([faulty, wrong], capture_output=True, text=True, timeout=60, env=os.environ | leaks)
        assert done.returncode != 0 and said in done.stderr, done.stderr
    done = subprocess.run([driver], capture_output=True, text=True, timeout=300, env=os.environ | leaks)
    assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr[-8000:]
    passes(sanitized.module([*kernels, *around]), BYTES_BOUND, LD_PRELOAD=build.runtimes(), **leaks)
