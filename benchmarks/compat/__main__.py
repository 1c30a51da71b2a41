"""Build an environment for each library and version, run its tests and its page's examples there, write the tables.

    python -m benchmarks.compat [--only NAME] [--root FOLDER] [--pages | --report]

Writes ``results.json`` and ``README.md`` beside this file, and the tables of the pages in docs/libraries. Rows of
libraries that were not selected stay.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.compat import pages
from benchmarks.compat.environments import ENVIRONMENTS, Environment, build
from build_support.docs.generated import table_lines
from ccu_fast import patch
from ccu_fast.files import write_whole

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
SPEED = ("what", "ratio", "ms", "megabytes")
RESULTS, TABLE = HERE / "results.json", HERE / "README.md"


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; 1 when a test failed or an environment could not be built."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compat", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", metavar="NAME", help="one target, or one target-version")
    parser.add_argument("--root", type=Path, default=CHECKOUT / ".venv-compat", help="where the environments are made")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--pages", action="store_true", help="run the examples of the pages alone; other figures stay")
    part.add_argument("--report", action="store_true", help="run nothing: write the tables from results.json")
    options = parser.parse_args(arguments)
    chosen = [e for e in ENVIRONMENTS if options.only in (None, e.target, e.name)]
    if not chosen:
        parser.error(f"--only: expected one of {sorted({e.target for e in ENVIRONMENTS})}, got {options.only!r}")
    rows: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.report:
        chosen = []
    for environment in chosen:
        if options.pages and environment.name not in rows:
            print(f"{environment.name}: no results yet that the page's could go with", file=sys.stderr)
            continue
        print(f"{environment.name} …", file=sys.stderr)
        row = rows[environment.name] if options.pages else run(environment, options.root)
        rows[environment.name] = row = {**row, "page": run_page(environment, options.root)}
        print(f"{environment.name}: {row['outcome']}, its page {row['page']['outcome']}", file=sys.stderr)
        results.store(RESULTS, dict(sorted(rows.items())), depth=1)
    write_whole(TABLE, table(rows))
    pages.write_tables(rows)
    of_chosen = [rows[e.name] for e in chosen if e.name in rows]
    return int(any(row["outcome"] != "passed" or row["page"]["outcome"] != "passed" for row in of_chosen))


def run_page(environment: Environment, root: Path) -> dict[str, Any]:
    """What becomes of the examples of the library's page."""
    try:
        python = build(environment, root)
    except subprocess.CalledProcessError as error:
        print(error, file=sys.stderr)
        return {"outcome": "not built"}
    return pages.run(environment.target, python)


def run(environment: Environment, root: Path) -> dict[str, Any]:
    """One row of the results: what passed, what was measured, with which versions."""
    row: dict[str, Any] = {
        "target": environment.target,
        "version": environment.version,
        "replaces": patch.targets()[environment.target],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    try:
        python = build(environment, root)
    except subprocess.CalledProcessError as error:
        return {**row, "outcome": f"not built: {error}"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "record.jsonl"
        tests = sorted((CHECKOUT / "tests" / "patch").glob(f"test_{environment.target}*.py"))
        command = [str(python), "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", *map(str, tests)]
        names = {"CCU_FAST_COMPAT_RECORD": str(log), "CCU_FAST_COMPAT_VERSION": environment.version}
        done = subprocess.run(
            command, cwd=CHECKOUT, env={**os.environ, **names}, capture_output=True, text=True, check=False
        )
        measured = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if done.returncode:
        print(done.stdout[-4000:], file=sys.stderr)
    checks = [m["check"] for m in measured]
    return {
        **row,
        "outcome": "passed" if done.returncode == 0 else "failed",
        "summary": done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr.strip()[-200:],
        "numbers": checks.count("numbers"),
        "training": max((m["difference"] for m in measured if m["check"] == "training"), default=None),
        "speed": [{name: m[name] for name in SPEED} for m in measured if m["check"] == "speed"],
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "# Drop-in patches against the real libraries",
        "",
        "Made by `make compat` from [results.json](results.json). *Numbers*: how many comparisons of loss and "
        "gradients (for token scoring: tokens) with the library's own passed, judged by the library in float64. "
        "*Training*: the largest difference between the losses of 100 steps with and without the patch, 0 where tokens "
        "are chosen. *Speed*: the library's time over the patched one's, median of rounds in turns, on a CPU; "
        "behind it what one call takes beyond its inputs, with the library and patched.",
        "",
    ]
    found = []
    for _, row in sorted(rows.items()):
        speed = "<br>".join(map(_speed, row.get("speed", []))) or "–"
        training = "–" if row.get("training") is None else f"{row['training']:.1e}"
        numbers = f"{row.get('numbers', 0)} equal" if row["outcome"] == "passed" else row["outcome"]
        found.append([row["target"], str(row["version"]), row["replaces"], numbers, training, speed])
    lines += table_lines(("library", "version", "replaced", "numbers", "training", "speed and memory"), found)
    some = next(iter(rows.values()), {})
    lines += ["", f"torch {some.get('torch')}, Python {some.get('python')}, {some.get('threads')} threads.", ""]
    return "\n".join(lines)


def _speed(row: dict[str, Any]) -> str:
    """What the table says of one comparison."""
    megabytes = row["megabytes"]
    return f"{row['ratio']:.2f}× {row['what']} ({megabytes['library']:.0f} → {megabytes['patched']:.0f} MB)"


if __name__ == "__main__":
    raise SystemExit(main())
