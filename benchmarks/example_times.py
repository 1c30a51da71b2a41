"""How long the programs of docs/examples take, each run once as its head says.

    pip install 'sentence-transformers[train]>=6'      # which one of them needs
    python -m benchmarks.example_times                 # all, some minutes; with names, only those

The time of processors is that of the program with all that it starts, torch's import included. It depends less on what
else a machine does than the time on the clock, which is stored beside it. Waiting threads do not spin: on a busy
machine the spinning would be most of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, results
from benchmarks.environment import REPOSITORY

FILE = Path(__file__).resolve().parent / "example_times.json"
DEPTH = 2
EXAMPLES = REPOSITORY / "docs" / "examples"
ENVIRONMENT = {"PYTHONPATH": str(REPOSITORY), "OMP_WAIT_POLICY": "passive"}
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def command(name: str) -> str:
    """What the head of an example says first about running it."""
    found = re.search(r"^Run +(.*?)(?:  |$)", (EXAMPLES / f"{name}.py").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError(f"name: expected an example whose head has a line 'Run', got {name!r}")
    return found[1]


def told(seconds: float) -> str:
    """The words for a time: to five seconds, from a minute on to ten."""
    step = 5 if seconds < 60 else 10
    return f"about {max(step, round(seconds / step) * step)} CPU seconds"


def measure(name: str) -> dict[str, Any]:
    """Run an example in an empty folder; the programs are those beside this Python."""
    program, *arguments = shlex.split(command(name))
    started = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[program]
    words = started + [str(EXAMPLES / word) if word == f"{name}.py" else word for word in arguments]
    with tempfile.TemporaryDirectory() as folder:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(words, cwd=folder, env=os.environ | ENVIRONMENT, check=True)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"command": command(name), "cpu s": round(cpu, 1), "wall s": round(wall, 1)}


def main(argv: list[str] | None = None) -> None:
    """Measure, and store what was measured beside what is there."""
    parser = argparse.ArgumentParser(description="Time the examples, each once.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"by default all: {', '.join(NAMES)}")
    names = parser.parse_args(argv).names or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"NAME: expected some of {', '.join(NAMES)}; got {', '.join(unknown)}")
    stored: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in names:
        facts = environment.describe(torch.device("cpu"))
        row = {"environment": facts, "other load": round(os.getloadavg()[0], 1), **measure(name)}
        stored[name] = row
        results.store(FILE, {name: stored[name] for name in sorted(stored)}, DEPTH)
        print(f"{name}: {row['cpu s']} s of processors, {row['wall s']} s on the clock", flush=True)


if __name__ == "__main__":
    main()
