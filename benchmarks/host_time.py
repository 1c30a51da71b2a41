"""Python's time of a GPU call of info_nce, without a GPU: ``python -m benchmarks.host_time [--against CHECKOUT]``.

Every checkout is measured in a process of its own (:mod:`benchmarks.host_time_worker` says how); the processes take
turns, and the ratio of two of them is the median of the ratios turn by turn. The result goes to
``benchmarks/host/results``.

With a real GPU the host does a little more than is timed here: the caching allocator instead of malloc, the driver's
launch, the encoding of tensor maps, and a backward pass that starts in another thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, results

FOLDER = Path(__file__).resolve().parent / "host" / "results"
BATCHES = (128, 4096)
# malloc keeps freed memory, like a GPU's caching allocator; otherwise each large buffer is a system call.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
SCRIPT = Path(__file__).with_name("host_time_worker.py")
DEPTH = 4  # a line for the times, the counts and the profile of a worker and a batch


class Worker:
    """A process with one checkout's package, on one thread, that answers a line with a line.

    Args:
        checkout: has its compiled module in it.
        command: a script and its arguments.
        variables: of its environment.
    """

    def __init__(self, checkout: Path, *command: str | Path, **variables: str) -> None:
        path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,
            env={**os.environ, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(workers: dict[str, Worker], batch: int, rounds: int, calls: int) -> dict[str, Any]:
    """Medians in µs, counts and profiles of all workers, and the ratio of the first one's time to the others'.

    "floor" is torch's own share: an autograd function of the same tensors that computes nothing, in the first worker.
    """
    first, *others = workers
    turns = [*((name, worker, "time") for name, worker in workers.items()), ("floor", workers[first], "floor")]
    taken: dict[str, dict[str, list[float]]] = {}
    for name, worker, what in turns:
        worker.ask(what=what, batch=batch, calls=calls)
        taken[name] = {"forward": [], "backward": [], "both": []}
    for turn in range(rounds):
        for name, worker, what in turns[:: 1 if turn % 2 == 0 else -1]:
            found = worker.ask(what=what, batch=batch, calls=calls)
            found["both"] = [sum(pair) for pair in zip(found["forward"], found["backward"], strict=True)]
            for direction, values in found.items():
                taken[name][direction].append(statistics.median(values) / 1000)

    def medians(name: str) -> dict[str, float]:
        return {direction: round(statistics.median(values), 1) for direction, values in taken[name].items()}

    result: dict[str, Any] = {
        name: {
            "us": medians(name),
            "counts": workers[name].ask(what="counts", batch=batch),
            "profile": workers[name].ask(what="profile", batch=batch, calls=calls),
        }
        for name in workers
    }
    result["floor"] = {"us": medians("floor")}
    for other in others:
        result[f"{first} / {other}"] = {
            direction: round(statistics.median(a / b for a, b in zip(values, taken[other][direction], strict=True)), 3)
            for direction, values in taken[first].items()
        }
    return result


def main() -> None:
    """Measure, print, and keep the result if it is to have a name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=__doc__)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, measured in turns")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--calls", type=int, default=100, help="calls a round")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--name", help="of the file in benchmarks/host/results; by default nothing is written")
    arguments = parser.parse_args()
    checkouts = {"this": environment.REPOSITORY}
    if arguments.against is not None:
        checkouts["other"] = arguments.against.resolve()
    workers = {name: Worker(checkout, SCRIPT, **MALLOC) for name, checkout in checkouts.items()}
    revisions = {
        name: subprocess.run(
            ["git", "-C", checkout, "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        for name, checkout in checkouts.items()
    }
    sizes = {str(batch): measure(workers, batch, arguments.rounds, arguments.calls) for batch in arguments.batches}
    for worker in workers.values():
        worker.close()
    report = {
        "command": f"python -m benchmarks.host_time --rounds {arguments.rounds} --calls {arguments.calls}"
        + (" --against CHECKOUT" if arguments.against is not None else ""),
        "revisions": revisions,
        "environment": environment.describe(torch.device("cpu")),
        "batch": sizes,
    }
    print(results.text(report, DEPTH))
    if arguments.name:
        FOLDER.mkdir(parents=True, exist_ok=True)
        results.store(FOLDER / f"{arguments.name}.json", report, DEPTH)


if __name__ == "__main__":
    main()
