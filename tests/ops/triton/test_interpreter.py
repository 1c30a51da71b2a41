"""The Triton kernels in Triton's interpreter, in a process of their own: the variable acts when triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.presence import require_interpreter

INTERPRETED = Path(__file__).parent / "interpreted"
AT_LEAST = 160  # about as many as there are today; a collection that lost some must not pass


def test_kernels_in_the_interpreter(tmp_path: Path) -> None:
    require_interpreter()
    report = tmp_path / "report.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(INTERPRETED)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    count = {name: int(suite.attrib[name]) for name in ("tests", "skipped", "failures", "errors")}
    assert count["tests"] >= AT_LEAST, count
    assert count["skipped"] == count["failures"] == count["errors"] == 0, count
    print(f"{count['tests']} tests in the interpreter")
