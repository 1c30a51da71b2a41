"""``python -m benchmarks.distributed WHAT``: count, print, store under benchmarks/distributed/results/."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, results
from benchmarks.distributed import measured, model

FOLDER = Path(__file__).parent / "results"
MOST = 0.55
DEPTH = 2  # a line for each row


def equality() -> tuple[list[dict[str, Any]], bool]:
    """Every difference is below 1e-6 (the gradients' as they are, the loss and dscale of about 1)."""
    rows, met = [], True
    for world in measured.WORLDS:
        for mode in ("gather", "ring"):
            answers = measured.on_ranks(world, measured.equality, mode)
            worst = {name: max(answer[name] for answer in answers) for name in answers[0]}
            rows.append({"ranks": world, "mode": mode, **worst})
            met = met and max(worst.values()) <= 1e-6
    return rows, met


def volume() -> tuple[list[dict[str, Any]], bool]:
    """Gathered, a rank sends at most 0.55 of what open_clip's local_loss with gather_with_grad does."""
    rows = [
        {"ranks": world, "mode": mode, **measured.on_ranks(world, measured.volume, mode)[0]}
        for world in measured.WORLDS
        for mode in ("gather", "ring")
    ]
    return rows, all(row["ratio"] <= MOST for row in rows if row["mode"] == "gather")


def flops() -> tuple[list[dict[str, Any]], bool]:
    """With the default workspace a rank multiplies at most 0.55 of what open_clip's local_loss does; without, 0.67."""
    rows = [
        {"ranks": world, "mode": mode, "workspace": room, **measured.on_ranks(world, measured.flops, mode, room)[0]}
        for world in measured.WORLDS
        for mode, room in (("gather", None), ("gather", 0), ("ring", None))
    ]
    return rows, all(row["ratio"] <= MOST for row in rows if row["mode"] == "gather" and row["workspace"] is None)


def memory() -> tuple[list[dict[str, Any]], bool]:
    """Four times the batch takes at most four times the memory that grows with it, not sixteen."""
    rows = [{"ranks": 2, "items": n, **measured.on_ranks(2, measured.memory, n)[0]} for n in (1024, 2048, 4096)]
    growth = [row["ccu_fast"] / rows[0]["ccu_fast"] for row in rows]
    return rows, growth[-1] <= 4.5


COMMANDS = {"equality": equality, "volume": volume, "flops": flops, "memory": memory}


def main() -> int:
    """Run one command; the exit code says whether its bar is met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("what", choices=(*COMMANDS, "model"))
    what = parser.parse_args().what
    FOLDER.mkdir(parents=True, exist_ok=True)
    if what == "model":
        print(model.markdown())
        results.replace(FOLDER / "model.md", model.markdown())
        return 0
    rows, met = COMMANDS[what]()
    for row in rows:
        print(row)
    print(COMMANDS[what].__doc__, "Met." if met else "NOT MET.")
    stored = {
        "bar": COMMANDS[what].__doc__,
        "met": met,
        "rows": rows,
        "environment": environment.describe(torch.device("cpu")),
    }
    results.store(FOLDER / f"{what}.json", stored, DEPTH)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
