"""Associations to forget by SALMUBench's protocol; associations.json and ASSOCIATIONS.md beside this file.

    python -m benchmarks.unlearning.associations --packages DIR       six seeds of pictograms, minutes each
    python -m benchmarks.unlearning.associations --page               regenerate the page from the file
    python -m benchmarks.unlearning.associations --salmubench FOLDER --compromised FILE --clean FILE --out found.json
                                                                      the benchmark's own files and models

The first is ``python -m benchmarks.unlearning --task associations --packages DIR`` too. A finished seed is kept in
--work, and the same command goes on after it. Runs on one thread, so that seconds are those of one core. Nothing
is committed of SALMUBench's own files, which are work for a GPU: --device, --most, --learning-rate are for them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.console import say, say_ends
from benchmarks.results import replace as put
from benchmarks.results import store
from benchmarks.unlearning.association_methods import BEFORE, CLEAN, METHODS, settings, unlearned
from benchmarks.unlearning.association_page import page
from benchmarks.unlearning.salmubench import Problem, pictogram_problem, published_problem
from ccu_fast.data.paired import PairedData
from ccu_fast.models.named import named_model
from ccu_fast.runs import cache
from ccu_fast.runs.provenance import json_hash, versions
from ccu_fast.unlearn.config import Budget
from ccu_fast.unlearn.loop import Run
from ccu_fast.unlearn.study.tasks import TrainConfig
from ccu_fast.unlearn.study.train import train

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "associations.json", HERE / "ASSOCIATIONS.md"
DEPTH = 2  # a line for a row
FORMAT = 2  # of a kept seed; raise it when the same settings and versions give other figures
SEEDS = (3, 4, 5, 6, 7, 8)  # 0 to 2 were looked at before the last choice
ARCHITECTURE = "open_clip:ViT-B-16"  # of SALMUBench's models
TRAINING = TrainConfig(epochs=12, batch=128, learning_rate=2e-3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.unlearning.associations", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--packages", type=Path, help="folder of the npm packages")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="SEED")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--work", type=Path, default=Path("runs/associations"), help="finished seeds, for resuming")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of figures, instead of the one beside this program")
    parser.add_argument("--page", action="store_true", help="write the page from the file alone")
    own = parser.add_argument_group("SALMUBench's own files")
    own.add_argument("--salmubench", type=Path, metavar="FOLDER", help="the unpacked data set")
    own.add_argument("--compromised", type=Path, metavar="FILE", help="open_clip weights")
    own.add_argument("--clean", type=Path, metavar="FILE", help="open_clip weights")
    own.add_argument("--model", default=ARCHITECTURE, help="of both, default %(default)s")
    own.add_argument("--most", type=int, default=2000, help="rows of each split, default %(default)s; 0 for all")
    own.add_argument("--device", default="cpu")
    own.add_argument("--steps", type=int, default=Budget().steps, help="default %(default)s")
    own.add_argument("--batch", type=int, default=Budget().batch, help="default %(default)s")
    own.add_argument("--learning-rate", type=float, default=1e-5, help="default %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.salmubench:
        for name in ("compromised", "clean", "out"):
            if getattr(options, name) is None:
                parser.error(f"--{name}: expected a file with --salmubench, got none")
        found = _published(options)
    elif options.page:
        found = json.loads((options.out or RESULTS).read_text())
    elif options.packages is None:
        parser.error("--packages: expected the folder of the npm packages, which pictograms are read from, got none")
    elif options.out is None and (options.seeds != list(SEEDS) or set(options.methods) != set(METHODS)):
        parser.error("--out: expected a file for other seeds or some methods, which would replace all rows, got none")
    else:
        found = measure(options.packages, options.seeds, options.methods, options.work)
    if not options.page:
        store(options.out or RESULTS, found, DEPTH)
    text = page(found)
    if options.out is None:
        put(PAGE, text)
    else:
        print(text)
    return 0


def measure(
    packages: Path,
    seeds: Sequence[int],
    methods: Sequence[str],
    work: Path,
    *,
    training: TrainConfig = TRAINING,
    budget: Budget | None = None,
    **sizes: int,
) -> dict[str, Any]:
    """All seeds of pictograms: what is stored.

    Args:
        packages, sizes: of :func:`benchmarks.unlearning.salmubench.pictogram_problem`.
        seeds: each with its own things, attributes, models and batches.
        methods: of :data:`METHODS`; both models are always measured.
        work: folder of finished seeds.
        training: of the compromised model; the clean one takes as many steps on the base alone.
        budget: of every method; None for the default.
    """
    budget = Budget() if budget is None else budget
    setting = {
        "task": "associations of pictograms",
        "training": asdict(training),
        "budget": asdict(budget),
        **settings(budget),
        **sizes,
    }
    rows = []
    for seed in seeds:

        def compute(seed: int = seed) -> dict[str, Any]:
            problem, everything, make = pictogram_problem(packages, seed, **sizes)
            before, clean = models_of(problem, everything, make, training, seed)
            return {"rows": compared(problem, before, clean, methods, budget, seed)}

        key = json_hash([FORMAT, versions(), setting, seed, list(methods)])
        rows += cache.part(work / f"seed{seed}-{key[:12]}.json", key, compute)["rows"]
    return {"versions": versions(), "seeds": list(seeds), "setting": setting, "rows": rows}


def models_of(
    problem: Problem, everything: PairedData, make: Callable[[], Any], training: TrainConfig, seed: int
) -> tuple[Run, Run]:
    """The compromised model and the clean one, which takes as many steps on the base alone."""
    config = replace(training, seed=seed)
    longer = replace(config, epochs=round(config.epochs * len(everything) / len(problem.retain)))
    before = train(make, everything, config, progress=say_ends, stage=f"seed {seed}, {BEFORE}")
    return before, train(make, problem.retain, longer, progress=say_ends, stage=f"seed {seed}, {CLEAN}")


def compared(
    problem: Problem, before: Run, clean: Run, methods: Sequence[str], budget: Budget, seed: int
) -> list[dict[str, Any]]:
    """A row for each model: its figures and what it cost."""
    runs = {BEFORE: lambda: before, CLEAN: lambda: clean}
    runs |= {name: partial(unlearned, name, problem, before.model, budget, seed) for name in methods}
    rows = []
    for name, make in runs.items():
        done = make()
        cost = {"steps": done.steps, "cpu_seconds": done.cpu_seconds}
        rows.append({"seed": seed, "method": name, "figures": problem.judge(done.model), **cost})
        say(f"seed {seed} {len(rows)}/{len(runs)} {name}")
    return rows


def _published(options: argparse.Namespace) -> dict[str, Any]:
    """The same of SALMUBench's files."""
    named = {name: named_model(options.model, getattr(options, name), argument=name) for name in (BEFORE, CLEAN)}
    seed = options.seeds[0]
    problem = published_problem(options.salmubench, named[BEFORE], most=options.most or None, seed=seed)
    problem = problem.to(options.device)
    before, clean = [Run(model.factory().eval().to(options.device), 0, 0, 0.0, 0.0, []) for model in named.values()]  # type: ignore[attr-defined]
    budget = Budget(steps=options.steps, batch=options.batch, learning_rate=options.learning_rate)
    rows = compared(problem, before, clean, options.methods, budget, seed)
    setting = {"task": "SALMUBench", "model": options.model, "most": options.most, "budget": asdict(budget)}
    setting |= settings(budget)
    return {"versions": versions(), "seeds": [seed], "setting": setting, "rows": rows}


if __name__ == "__main__":
    raise SystemExit(main())
