"""Run the libraries' own tests of their losses, without and with the patch, and compare them test by test.

    python -m benchmarks.compat.suites FOLDER [--only TARGET]

FOLDER holds the libraries' sources, or their tests alone, each under the name in ``SUITES``; nothing is downloaded. The
libraries are those of this environment, but for open_clip: no release has tests of its losses, so its source has to be
in FOLDER. Writes ``suites.json`` and ``SUITES.md`` beside this file. Rows of libraries that were not selected stay. The
exit status is 1 when a test passes without the patch only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.compat import stand_ins
from build_support.docs.generated import table_lines
from ccu_fast.files import write_whole

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
RESULTS, TABLE = HERE / "suites.json", HERE / "SUITES.md"


@dataclass(frozen=True)
class Suite:
    """The tests of one library that reach what is patched there.

    Attributes:
        target: a name of :func:`ccu_fast.patch.targets`.
        folder: of its sources.
        tests: files and folders of tests in it; those that are missing in this version are left out.
        environment: variables that its tests read.
        source: the folder of the library in it, for tests that are newer than the library of this environment.
    """

    target: str
    folder: str
    tests: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    source: str = ""


SUITES = (
    Suite(
        "open_clip",
        "open_clip",
        (
            "tests/test_loss.py",
            "tests/test_siglip_chunked_loss.py",
            "tests/test_task_base_unit.py",
            "tests/test_task_specific_unit.py",
            "tests/test_clap_task.py",
        ),
        source="src",
    ),
    Suite(
        "pytorch_metric_learning",
        "pytorch-metric-learning",
        (
            "tests/losses/test_ntxent_loss.py",
            "tests/losses/test_losses_without_labels.py",
            "tests/losses/test_self_supervised_loss.py",
        ),
        (("TEST_DEVICE", "cpu"),),
    ),
    Suite(
        "sentence_transformers",
        "sentence-transformers",
        ("tests/sentence_transformer/losses", "tests/sparse_encoder/losses"),
    ),
)


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 when a test passes without the patch only."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compat.suites", description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="where the libraries' sources are")
    names = [suite.target for suite in SUITES]
    parser.add_argument("--only", choices=names, help="one target")
    options = parser.parse_args(arguments)
    chosen = [suite for suite in SUITES if options.only in (None, suite.target)]
    for suite in chosen:
        if not (options.folder / suite.folder).is_dir():
            parser.error(f"folder: expected {suite.folder} in {options.folder}, got none")
    rows: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for suite in chosen:
        rows[suite.target] = row = run(suite, options.folder.resolve())
        print(f"{suite.target}: {row}", file=sys.stderr)
        results.store(RESULTS, dict(sorted(rows.items())), depth=1)
    write_whole(TABLE, table(rows))
    return int(any(rows[suite.target]["worse"] for suite in chosen))


def run(suite: Suite, folder: Path) -> dict[str, Any]:
    """One row of the results."""
    sources = folder / suite.folder
    without, _ = outcomes(suite, sources, patched=False)
    those_with, seen = outcomes(suite, sources, patched=True)
    return {
        "target": suite.target,
        "version": seen.pop("version"),
        **compare(without, those_with),
        **seen,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def outcomes(suite: Suite, sources: Path, *, patched: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """What became of each test; the library's version, and how many calls of patched functions were ours and theirs.

    Raises:
        RuntimeError: the tests could not be run.
    """
    tests = [test for test in suite.tests if (sources / test).exists()]
    source = [str(sources / suite.source)] if suite.source else []
    with tempfile.TemporaryDirectory() as scratch:
        record = Path(scratch) / "record.json"
        environment = {
            **os.environ,
            **dict(suite.environment),
            "CCU_FAST_SUITE": json.dumps({"target": suite.target, "patched": patched, "record": str(record)}),
            "HF_HOME": str(stand_ins.make(Path(scratch))) if suite.target == "sentence_transformers" else scratch,
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(CHECKOUT), *source, os.environ.get("PYTHONPATH")])),
        }
        # -P: the library of this environment, not the sources in the current folder.
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider"]
        command += ["-p", "benchmarks.compat.plugin", "--continue-on-collection-errors", *tests]
        done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True, check=False)
        if not record.exists():
            raise RuntimeError(f"{suite.target}: its tests did not run: {(done.stdout + done.stderr)[-2000:]}")
        found = json.loads(record.read_text())
    return found.pop("outcomes"), found


def compare(without: dict[str, str], those_with: dict[str, str]) -> dict[str, Any]:
    """How many tests pass without and with the patch, and which pass on one side only."""
    passed = {test for test, outcome in without.items() if outcome == "passed"}
    still = {test for test, outcome in those_with.items() if outcome == "passed"}
    others = Counter(outcome for outcome in without.values() if outcome != "passed")
    return {
        "passed without": len(passed),
        "passed with": len(still),
        "not passed without": dict(sorted(others.items())),
        "worse": sorted(passed - still),
        "better": sorted(still - passed),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "# The libraries' own tests under the patches",
        "",
        "Made by `python -m benchmarks.compat.suites FOLDER` from [suites.json](suites.json), without a network, on a "
        "CPU: the files named in [suites.py](suites.py), each run without and with the patch. Models that the tests of "
        "sentence-transformers download are random ones here ([stand_ins.py](stand_ins.py)). *Others* do not pass "
        "without the patch either: they ask for downloads, a GPU or another version. *Ours* counts the calls of "
        "patched functions that ccu_fast answered, *theirs* those that it handed over.",
        "",
    ]
    head = ("library", "version", "passed without", "passed with", "passed without only", "others", "ours", "theirs")
    found = []
    for _, row in sorted(rows.items()):
        others = ", ".join(f"{count} {outcome}" for outcome, count in row["not passed without"].items()) or "–"
        passed = [row["passed without"], row["passed with"], "<br>".join(row["worse"]) or "none"]
        found.append([row["target"], row["version"], *passed, others, row["ours"], row["theirs"]])
    lines += table_lines(head, found)
    some = next(iter(rows.values()), {})
    lines += ["", f"torch {some.get('torch')}, Python {some.get('python')}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
