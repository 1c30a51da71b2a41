"""``python -m benchmarks.protection``: results.json beside this file, or in ``--out``.

Runs every method on every seed, then (protected again, with the same bits) victims of another architecture and victims
of treated data. Every finished part is stored at once, and the command resumes after it. The file holds one setting
only: a different one is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks import environment, results
from ccu_fast.mem import Recipe, Settings, run_digit_strips
from ccu_fast.mem.study import TREATMENTS

DEPTH = 2  # a line for a method and a seed
METHODS = ("clean", "random-3", "random-12", "mem-3", "em", "trigger-3", "mem-5", "mem-12")
SETTINGS = Settings(
    eps=16, step=2, rounds=10, surrogate_steps=64, restart=0, trigger_rounds=2, pgd_steps=6, shuffle=0.5
)
# Methods whose robustness is tested: what each treatment leaves of a protection, and of no protection.
TREATED = ("clean", "mem-3", "mem-5")


def main(argv: Sequence[str] | None = None) -> int:
    """Compute what is missing, then print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.protection", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--show", action="store_true", help="print the table of what there is")
    arguments = parser.parse_args(argv)
    setting = {"settings": asdict(SETTINGS), "recipe": asdict(Recipe())}
    stored: dict[str, Any] = {"setting": setting, "environment": {}, "parts": {}}
    if arguments.out.exists():
        stored = json.loads(arguments.out.read_text())
        if stored["setting"] != setting:
            print(f"{arguments.out} holds another setting; name another --out", file=sys.stderr)
            return 2
    wanted = [(kind, seed, m) for kind in ("", "/extra") for seed in arguments.seeds for m in arguments.methods]
    for kind, seed, method in [] if arguments.show else wanted:
        name = f"{method}/{seed}{kind}"
        if name not in stored["parts"]:
            stored["parts"][name] = _part(method, seed, extra=bool(kind))
            machine = environment.describe(torch.device("cpu"))
            # That of the first part, and of those that another machine or commit has added.
            stored["environment"] = stored["environment"] or machine
            if machine != stored["environment"]:
                stored["parts"][name]["environment"] = machine
            results.store(arguments.out, stored, DEPTH)
            print(name, f"{stored['parts'][name]['seconds']:.0f} s", flush=True)
    print(table(stored["parts"]))
    return 0


def _part(method: str, seed: int, *, extra: bool) -> dict[str, Any]:
    started = time.perf_counter()
    treatments = [t for t in TREATMENTS if method in TREATED and (t != "no trigger" or method != "clean")]
    value = run_digit_strips(seed, (method,), settings=SETTINGS, transfer=extra, treatments=treatments if extra else ())
    measured = {k: v for k, v in value["methods"][method].items() if k != "examples"}
    return {"guessing": value["guessing"], **measured, "seconds": time.perf_counter() - started}


def table(parts: dict[str, Any]) -> str:
    """R@1 image→text / text→image, mean ± spread over the seeds that are there."""
    lines = ["victim trained on | seeds | best R@1 i→t | t→i | last R@1 i→t | t→i | R@10 i→t | t→i"]
    by_method: dict[str, list[dict[str, Any]]] = {}
    plain: dict[str, list[dict[str, Any]]] = {}
    for name, part in parts.items():
        by_method.setdefault(name.split("/")[0], []).append(part)
        if name.count("/") == 1:
            plain.setdefault(name.split("/")[0], []).append(part)
    for method, seen in by_method.items():
        extra = [p for p in seen if p["transfer"] is not None]
        rows = {method: plain.get(method, [])}
        if extra:
            rows[f"{method}, other towers"] = [p["transfer"] for p in extra]
            for treatment in extra[0]["robustness"]:
                rows[f"{method}, {treatment}"] = [p["robustness"][treatment] for p in extra]
        for label, values in rows.items():
            keys = [("best", "i2t_r1"), ("best", "t2i_r1"), ("last", "i2t_r1"), ("last", "t2i_r1")]
            keys += [("last", "i2t_r10"), ("last", "t2i_r10")]
            cells = [_spread([v[when][key] for v in values]) for when, key in keys]
            lines.append(" | ".join([label, str(len(values)), *cells]))
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
