"""The files of one run in its folder: what may be replaced, and what a run leaves that failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ccu_fast.files import write_whole
from ccu_fast.runs.checkpoint import read_state
from ccu_fast.runs.kept import remove
from ccu_fast.unlearn.method import KEPT_FILES
from ccu_fast.unlearn.settings import Job

WRITTEN = ("checkpoint.pt", "model.safetensors", "results.json", "card.md", "report.html")  # the last by the command


def take(out: Path, job: Job, fresh: bool) -> None:
    """Remove the files of an earlier run that cannot go on.

    Args:
        out: the folder.
        job: whose weights are not to be replaced.
        fresh: whether an earlier run that could go on is to be removed too.

    Raises:
        OSError: see :func:`earlier_run`.
    """
    there, failed = earlier_run(out, job)
    if fresh or failed:
        for file in there:
            file.unlink()
        remove(out / "checkpoint.pt", KEPT_FILES)


def earlier_run(out: Path, job: Job) -> tuple[list[Path], bool]:
    """The files of an earlier run, and whether it failed before its first state; makes sure that they are of a run.

    Raises:
        OSError: the files that are there are of no run, or the job's own weights.
    """
    files = [out / name for name in WRITTEN]
    there = [file for file in files if file.exists()]
    for file in there:
        if file.is_dir():
            raise IsADirectoryError(f"out: expected a file {file.name} or none in {out}, got a folder")
        if job.weights is not None and file.samefile(job.weights):
            raise FileExistsError(f"out: expected another folder than that of the weights, {file}, got {out}")
    checkpoint = out / "checkpoint.pt"
    if {file.name for file in there} <= {"results.json", "report.html"} and _failed(out / "results.json"):
        return there, True
    if there and not (checkpoint.exists() and "key" in read_state(checkpoint, "checkpoint")):
        raise FileExistsError(f"out: expected a folder without {there[0].name}, or an earlier run's, got {out}")
    return there, False


def write_failure(failure: dict[str, Any], out: Path, report: Callable[[dict[str, Any]], None] | None) -> None:
    """Write what there is to say of a run that ended without a model: "alarm" alone."""
    remove(out / "checkpoint.pt", KEPT_FILES)
    write_whole(out / "results.json", json_of(failure))
    if report is not None:
        report(failure)


def _failed(results: Path) -> bool:
    """Whether the file is what :func:`write_failure` leaves."""
    if not results.is_file():
        return False
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and found.keys() == {"alarm"}


def json_of(result: dict[str, Any]) -> str:
    """The text of a JSON file."""
    return json.dumps(result, indent=1) + "\n"
