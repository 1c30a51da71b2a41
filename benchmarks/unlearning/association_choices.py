"""With what each baseline forgets associations best, if it is given the same as CCU: chosen on a seed of no table.

    python -m benchmarks.unlearning.association_choices --packages DIR     about 12 minutes on one core

Writes association_choices.json beside this file. Every baseline takes the steps of CCU's last row at shares of the rate
that it has elsewhere, with and without invented captions in its retain set; SSD has values of α instead, and its own
row too. Nearest is what keeps general knowledge and leaves, of the association and of what is lost of the held-out set
that suffers more, the smaller of the larger two. A finished method is kept in --work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.console import say
from benchmarks.results import store
from benchmarks.unlearning.association_methods import CHOICES, GIVEN, Given, best, given_the_same, longer
from benchmarks.unlearning.associations import TRAINING, models_of
from benchmarks.unlearning.salmubench import Problem, judged, pictogram_problem
from ccu_fast.runs import cache
from ccu_fast.runs.provenance import json_hash, versions
from ccu_fast.unlearn.alarms import NotFinite
from ccu_fast.unlearn.baselines.ssd import ssd
from ccu_fast.unlearn.config import Budget
from ccu_fast.unlearn.loop import Run
from ccu_fast.unlearn.model import TwoModalityModel

DEPTH = 2
FORMAT = 1  # of a kept method
SEED = 100
SHARES = (1.0, 0.3, 0.1)
ALPHAS = (1.05, 1.2, 1.5, 2.0, 3.0, 5.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and store."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.unlearning.association_choices", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--packages", type=Path, required=True, help="folder of the npm packages")
    parser.add_argument("--methods", nargs="+", choices=tuple(GIVEN), default=list(GIVEN), metavar="METHOD")
    parser.add_argument("--work", type=Path, default=Path("runs/associations"), help="finished methods, for resuming")
    parser.add_argument("--out", type=Path, default=CHOICES, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.out == CHOICES and set(options.methods) != set(GIVEN):
        parser.error("--out: expected a file for some methods, which would replace all rows, got none")
    torch.set_num_threads(1)
    store(options.out, measure(options.packages, options.methods, options.work), DEPTH)
    return 0


def measure(
    packages: Path, methods: Sequence[str], work: Path, *, budget: Budget | None = None, **sizes: Any
) -> dict[str, Any]:
    """The figures of every choice of these methods; ``sizes`` are the problem's, and the models' ``training``."""
    budget = Budget() if budget is None else budget
    training = sizes.pop("training", TRAINING)
    setting = {"training": asdict(training), "budget": asdict(longer(budget)), **sizes}
    made: list[tuple[Problem, TwoModalityModel, list[dict[str, float]]]] = []
    rows = []
    for name in methods:

        def compute(name: str = name) -> dict[str, Any]:
            if not made:
                problem, everything, make = pictogram_problem(packages, SEED, **sizes)
                before, clean = models_of(problem, everything, make, training, SEED)
                made.append((problem, before.model, [problem.judge(run.model) for run in (before, clean)]))
            return {"rows": _tried(name, *made[0], budget)}

        key = json_hash([FORMAT, versions(), setting, name, SHARES, ALPHAS])
        rows += cache.part(work / f"choice-{name}-{key[:12]}.json", key, compute)["rows"]
        say(f"{name}: {best(rows, name)}")
    return {"versions": versions(), "seed": SEED, "setting": setting, "rows": rows}


def _tried(
    name: str, problem: Problem, model: TwoModalityModel, against: Sequence[dict[str, float]], budget: Budget
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for invented in (False, True):
        for share in ALPHAS if name == "ssd" else SHARES:
            given = Given(share, invented)
            row = {"method": name, **asdict(given)}
            try:
                done = given_the_same(name, given, problem, model, budget, SEED)
            except NotFinite:
                rows.append({**row, "figures": None})
            else:
                rows.append({**row, **_judged(problem, done, against)})
    if name == "ssd":
        for alpha in ALPHAS:
            done = ssd(model, problem.forget, problem.retain, alpha=alpha)
            rows.append({"method": "ssd_own", **asdict(Given(alpha, False)), **_judged(problem, done, against)})
    return rows


def _judged(problem: Problem, done: Run, against: Sequence[dict[str, float]]) -> dict[str, Any]:
    found = judged(problem.judge(done.model), *against)
    del found["aims"], found["failures"]
    return {"figures": found, "cpu_seconds": done.cpu_seconds}


if __name__ == "__main__":
    raise SystemExit(main())
