"""One of the package's commands on a GPU and in half precision: does it run, and does it end where a CPU does?

    python -m benchmarks.visit.commands unlearn --device cuda --dtype bf16

``unlearn`` takes a class from a small trained model, ``protect`` protects 96 strips of real digits. The last line is
JSON: the command's exit status, its seconds and the figures that it wrote.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.visit.steps import last_line

CLOSE = 0.1  # of a CPU's figure above 1, else of 1: runs differ in the last digits, and go apart from there
UNLEARN = "[forget]\nclasses = [1]\n[budget]\nsteps = 30\nlearning_rate = 5e-3\nbatch = 20\n"
PROTECT = (
    "--size 16x64 --grey --model small:32 --rounds 2 --pgd-steps 2 --step 4 --surrogate-steps 2 --trigger-rounds 1 "
    "--candidates 4 --batch 32"
)
Figures = dict[str, float]


def unlearn(folder: Path, device: str, dtype: str) -> tuple[int, Callable[[], Figures]]:
    """Forget a class of the toy: accuracies, and how much the embeddings of the rest are as before."""
    import numpy as np

    from ccu_fast.cli.main import main as ccu_fast
    from tests.support import toy_unlearn

    data, out = toy_unlearn.toy(), folder / "out"
    toy_unlearn.saved(folder)
    np.savez(folder / "pairs.npz", visual=data.visual, other=data.other, labels=data.labels)
    settings = folder / "settings.toml"
    settings.write_text(toy_unlearn.SETTINGS + UNLEARN)
    words = [str(settings), "--out", str(out), "--device", device, "--dtype", dtype, "--quiet"]
    status = ccu_fast(["unlearn", *words])

    def figures() -> Figures:
        return {name: after for name, _, after in json.loads((out / "results.json").read_text())["rows"]}

    return status, figures


def protect(folder: Path, device: str, dtype: str) -> tuple[int, Callable[[], Figures]]:
    """Protect strips of digits: the last losses, and how far the pictures are from the originals."""
    from ccu_fast.cli.main import main as ccu_fast
    from ccu_fast.data.strips import write_strips

    out = folder / "out"
    data = write_strips(folder / "digits", n_train=96, n_test=20)
    words = [str(data / "train.csv"), "--out", str(out), *PROTECT.split(), "--device", device, "--quiet"]
    status = ccu_fast(["protect", *words, *([] if dtype == "fp32" else ["--autocast", dtype])])

    def figures() -> Figures:
        told = json.loads((out / "manifest.json").read_text())
        return {**{f"loss, {phase}": losses[-1] for phase, losses in told["losses"].items()}, **told["measured"]}

    return status, figures


COMMANDS = {"unlearn": unlearn, "protect": protect}


def compare(logs: Sequence[Path]) -> tuple[str, str]:
    """Each run beside the same command's on a CPU in fp32: a status and what to say."""
    runs, bad, good = [], [], []
    for log in logs:
        command, *lines = log.read_text(errors="replace").splitlines()
        try:
            runs.append(json.loads(lines[-1]))
        except (IndexError, ValueError):
            bad.append(f"{command.partition('commands ')[2]}: {last_line(log)}")
    right = {run["command"]: run["figures"] for run in runs if (run["device"], run["dtype"]) == ("cpu", "fp32")}
    for run in runs:
        name = f"{run['command']} {run['device']} {run['dtype']}"
        wrong = differing(run["figures"], right.get(run["command"], {}))
        if run["status"] or wrong:
            bad.append(f"{name}: exit status {run['status']} {', '.join(wrong)}".rstrip())
        else:
            good.append(f"{name} {run['seconds']:.1f} s")
    return "failed" if bad else "ok", "; ".join([*bad, *good])


def differing(figures: Figures, right: Figures) -> list[str]:
    """The figures that are not close."""
    return [
        f"{name} {figures.get(name)} instead of {value:.4g}"
        for name, value in right.items()
        if not abs(figures.get(name, float("nan")) - value) <= CLOSE * max(1.0, abs(value))
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one; the exit code is the command's."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.visit.commands", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=tuple(COMMANDS))
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32")
    asked = parser.parse_args(argv)
    told: dict[str, Any] = vars(asked)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        status, figures = COMMANDS[asked.command](Path(folder), asked.device, asked.dtype)
        told |= {"seconds": round(time.monotonic() - start, 1), "status": status}
        told["figures"] = figures() if status == 0 else {}
    print(json.dumps(told))
    return status


if __name__ == "__main__":
    sys.exit(main())
