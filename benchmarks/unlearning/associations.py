"""Associations to forget by SALMUBench's protocol; associations.json and ASSOCIATIONS.md beside this file.

    python -m benchmarks.unlearning.associations --packages DIR       three seeds of pictograms, minutes each
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
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.console import say, say_ends
from benchmarks.results import replace as put
from benchmarks.results import store
from benchmarks.unlearning.salmubench import (
    AIM,
    COLLAPSE,
    FAILURES,
    HELD_OUT,
    POINT,
    REMAINS,
    Problem,
    aims,
    failures,
    joined,
    lost,
    pictogram_problem,
    published_problem,
    remaining,
)
from benchmarks.unlearning.winners import markdown
from ccu_fast.cli.report.tables import Table
from ccu_fast.models.named import named_model
from ccu_fast.models.swapped import Swapped
from ccu_fast.runs import cache
from ccu_fast.runs.provenance import json_hash, versions
from ccu_fast.unlearn.baselines.registry import BASELINES
from ccu_fast.unlearn.config import Budget, UnlearnConfig
from ccu_fast.unlearn.loop import Run
from ccu_fast.unlearn.method import run_ccu
from ccu_fast.unlearn.model import TwoModalityModel
from ccu_fast.unlearn.study.tasks import TrainConfig
from ccu_fast.unlearn.study.train import train

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "associations.json", HERE / "ASSOCIATIONS.md"
DEPTH = 2  # a line for a row
FORMAT = 1  # of a kept seed; raise it when the same settings and versions give other figures
SEEDS = (0, 1, 2)
ARCHITECTURE = "open_clip:ViT-B-16"  # of SALMUBench's models
TRAINING = TrainConfig(epochs=12, batch=128, learning_rate=2e-3)
BEFORE, CLEAN = "compromised", "clean"
# Baselines that are left out, and why.
LEFT_OUT = {
    "random_label": "needs classes, of which it gives a wrong one",
    "salun": "needs classes, of which it gives a wrong one",
    "boundary_shrink": "needs classes and heads",
    "boundary_expand": "needs classes and heads",
    "contrastive_unlearning": "needs classes",
    "contrastive_unlearning_released": "needs classes",
    "ssd": "with its α = 5 changes nothing where more than a fifth of all pairs is to be forgotten, as here",
    "mm_unlearner": "needs a head for the other modality",
}
CCU = {
    "ccu": "CCU, pictures forget",
    "ccu_captions": "CCU, captions forget",
    "ccu_invented": "CCU, captions forget, invented ones held",
}
METHODS = {name: baseline.label for name, baseline in BASELINES.items() if name not in LEFT_OUT} | CCU
LABELS = {BEFORE: "compromised (before)", CLEAN: "clean (the aim)", **METHODS}
# Chosen on seed 100. The task loss would teach that invented captions go with the pictures beside them.
INVENTED = {"task": 0.0, "anchor": 30.0}
INVENTED_STEPS = 10  # times those of the budget


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
        "invented": {**INVENTED, "steps": INVENTED_STEPS * budget.steps},
        **sizes,
    }
    rows = []
    for seed in seeds:

        def compute(seed: int = seed) -> dict[str, Any]:
            problem, everything, make = pictogram_problem(packages, seed, **sizes)
            config = replace(training, seed=seed)
            longer = replace(config, epochs=round(config.epochs * len(everything) / len(problem.retain)))
            before = train(make, everything, config, progress=say_ends, stage=f"seed {seed}, {BEFORE}")
            clean = train(make, problem.retain, longer, progress=say_ends, stage=f"seed {seed}, {CLEAN}")
            return {"rows": compared(problem, before, clean, methods, budget, seed)}

        key = json_hash([FORMAT, versions(), setting, seed, list(methods)])
        rows += cache.part(work / f"seed{seed}-{key[:12]}.json", key, compute)["rows"]
    return {"versions": versions(), "seeds": list(seeds), "setting": setting, "rows": rows}


def compared(
    problem: Problem, before: Run, clean: Run, methods: Sequence[str], budget: Budget, seed: int
) -> list[dict[str, Any]]:
    """A row for each model: its figures and what it cost."""
    runs = {BEFORE: lambda: before, CLEAN: lambda: clean}
    runs |= {name: partial(_unlearned, name, problem, before.model, budget, seed) for name in methods}
    rows = []
    for name, make in runs.items():
        done = make()
        cost = {"steps": done.steps, "cpu_seconds": done.cpu_seconds}
        rows.append({"seed": seed, "method": name, "figures": problem.judge(done.model), **cost})
        say(f"seed {seed} {len(rows)}/{len(runs)} {name}")
    return rows


def _unlearned(name: str, problem: Problem, model: TwoModalityModel, budget: Budget, seed: int) -> Run:
    forget, retain, unseen = problem.forget, problem.retain, problem.unseen
    if name in BASELINES:
        return BASELINES[name].run(model, forget, retain, "pairs", budget, seed=seed)
    config = UnlearnConfig(forget="pairs", budget=budget, seed=seed)
    if name == "ccu":
        return run_ccu(model, forget, retain, config, unseen=unseen)
    if name == "ccu_invented":
        retain = joined(retain, problem.invented)
        config = replace(config, **INVENTED, budget=replace(budget, steps=INVENTED_STEPS * budget.steps))  # type: ignore[arg-type]
    swapped: Any = Swapped(model)  # type: ignore[arg-type]
    done = run_ccu(swapped, forget.swapped(), retain.swapped(), config, unseen=unseen.swapped())
    turned: Any = done.model
    return replace(done, model=turned.model)


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
    return {"versions": versions(), "seeds": [seed], "setting": setting, "rows": rows}


def page(results: dict[str, Any]) -> str:
    """The page of what is stored."""
    found = _by_method(results["rows"])
    seeds = len(results["seeds"])
    setting = results["setting"]
    steps = setting["budget"]["steps"]
    pictograms = setting["task"] != "SALMUBench"
    command = "--packages DIR" if pictograms else "--salmubench FOLDER --compromised FILE --clean FILE"
    lines = [
        f"# {setting['task'][0].upper()}{setting['task'][1:]} to forget, by SALMUBench's protocol",
        "",
        _who_manages(found, seeds),
        "",
        f"Made by `python -m benchmarks.unlearning.associations {command}` from "
        "[associations.json](associations.json). "
        f"Mean ± sample deviation over {seeds} seeds. The protocol is that of SALMUBench (arXiv 2603.26316): of two "
        "models trained from scratch the compromised one knows, besides the base of both, private attributes of "
        "persons; a part of these is to be forgotten, and no method sees the others, those of other persons (holdout "
        "identity) and other ones of the same persons (holdout association). "
        + (
            "Here persons are pictograms, their portraits three artists' drawings moved a little, the attributes "
            "invented, the model a small CLIP (`ccu_fast/data/associations.py`). "
            if pictograms
            else ""
        )
        + "Association left: the mean cosine of the portraits and captions to forget, 100 % as compromised, 0 % as "
        "clean. Retrieval: the mean reciprocal rank of the true attribute. Held-out sets: change of the mean cosine, "
        "in points (0.01). "
        + (
            "Zero-shot: change of the share of a fourth artist's drawings that are named right, in points. "
            if pictograms
            else "Zero-shot: change of the share of retained pictures whose caption comes first, in points. "
        )
        + "Seconds are CPU time of one thread.",
        "",
        f"Failures, in how many of the seeds. The paper's kinds; the bounds are ours: catastrophic, zero-shot falls by "
        f"more than {100 * COLLAPSE:.0f} points; over-generalised, more than {100 * REMAINS:.0f} % of what the "
        f"compromised model knows of a held-out set and the clean one does not is lost, or the association to forget "
        f"ends more than {100 * REMAINS:.0f} % below the clean model's; ineffective, more than {100 * REMAINS:.0f} % "
        "of it is left.",
        "",
        *markdown(Table("All methods", _COLUMNS, [_cells(name, found, seeds) for name in found])),
        "",
        f"Asked for was more: the association within {100 * AIM:.0f} % of the clean model's, both held-out sets and "
        f"zero-shot within {100 * POINT:.0f} point of the compromised one's. In how many of the {seeds} seeds:",
        "",
        *_aims(found),
        "",
        f'Baselines and the first two rows of CCU have the same {steps} steps and the retain set alone; "{CCU["ccu"]}" '
        f'and "{CCU["ccu_captions"]}" are the defaults for pairs, with associations of persons of whom neither model '
        "was told anything as unseen items. A portrait is shared by all captions of a person, so its place cannot be "
        "moved away from one of them and left near the others; a caption belongs to one association alone, which is "
        "why it is the better side to forget (`ccu_fast.models.swapped.Swapped`). "
        f'"{CCU["ccu_invented"]}" adds captions '
        "that tell attributes of nobody to the retain set, so that what the model makes of such captions stays, with "
        f"`task = {INVENTED['task']:g}`, `anchor = {INVENTED['anchor']:g}` and {INVENTED_STEPS} times the steps; no "
        "baseline was given these. They were chosen on seed 100.",
        "",
        "Not applicable to such pairs: "
        + "; ".join(f"{BASELINES[name].label} {why}" for name, why in LEFT_OUT.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


_COLUMNS = [
    "method",
    "association left, %",
    "retrieval",
    "holdout identity",
    "holdout association",
    "zero-shot",
    "failures",
    "CPU s",
]


def _by_method(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each method, each with what it is judged against."""
    models = {(row["seed"], row["method"]): row["figures"] for row in rows}
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        against = models[row["seed"], BEFORE], models[row["seed"], CLEAN]
        judged = {
            "left": 100 * remaining(row["figures"], *against),
            "lost": 100 * max(lost(name, row["figures"], *against) for name in HELD_OUT),
            "retrieval": row["figures"]["retrieval"],
            **{
                name: 100 * (row["figures"][name] - against[0][name])
                for name in (*(f"strength_{part}" for part in HELD_OUT), "knowledge")
            },
            "failures": failures(row["figures"], *against),
            "aims": aims(row["figures"], *against),
            "seconds": row["cpu_seconds"],
        }
        found.setdefault(row["method"], []).append(judged)
    return found


def _failed(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """In how many seeds, by kind; kinds that do not occur are left out."""
    counts = {kind: sum(row["failures"][kind] for row in rows) for kind in FAILURES}
    return {kind: count for kind, count in counts.items() if count}


def _seconds(rows: Sequence[dict[str, Any]]) -> float:
    return statistics.fmean(row["seconds"] for row in rows)


def _who_manages(found: dict[str, list[dict[str, Any]]], seeds: int) -> str:
    """The first line."""
    methods = [name for name in found if name not in (BEFORE, CLEAN)]
    able = sorted((name for name in methods if not _failed(found[name])), key=lambda name: _seconds(found[name]))
    if able:
        first, *others = able
        said = [f"With none of the three failures in any seed at the least time: **{LABELS[first]}**, "]
        said += [f"{_seconds(found[first]):.1f} CPU seconds"]
        said += [", then " + ", ".join(f"{LABELS[n]} ({_seconds(found[n]):.1f} s)" for n in others)] if others else []
        said += [". No other method does."]
    else:
        said = ["**No method is without one of the three failures in every seed.**", *_nearest(found, methods)]
    for name in CCU:
        if name in found and name not in able:
            told = ", ".join(f"{kind} in {count} of {seeds} seeds" for kind, count in _failed(found[name]).items())
            said.append(f" {LABELS[name]}, does not manage: {told}.")
    return "".join(said)


def _nearest(found: dict[str, list[dict[str, Any]]], methods: Sequence[str]) -> list[str]:
    """Of methods that keep general knowledge that whose worse share of the two, left and lost, is the smallest."""
    means = {
        name: {key: statistics.fmean(row[key] for row in found[name]) for key in ("left", "lost", "knowledge")}
        for name in methods
    }
    kept = [name for name in methods if means[name]["knowledge"] >= -100 * COLLAPSE]
    if not kept:
        return []
    first = min(kept, key=lambda name: max(abs(means[name]["left"]), means[name]["lost"]))
    of = means[first]
    return [
        f" Nearest is **{LABELS[first]}**: {of['left']:.1f} % of the association is left, {of['lost']:.1f} % of the "
        f"held-out set that suffers more is lost ({100 * REMAINS:.0f} % of each is the bound), zero-shot moves by "
        f"{of['knowledge']:+.1f} points, in {_seconds(found[first]):.1f} CPU seconds."
    ]


def _cells(name: str, found: dict[str, list[dict[str, Any]]], seeds: int) -> list[str]:
    rows = found[name]

    def cell(key: str, digits: int, sign: str = "") -> str:
        values = [row[key] for row in rows]
        text = f"{statistics.fmean(values):{sign}.{digits}f}"
        return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"

    moved = [cell(key, 1, "+") for key in (*(f"strength_{part}" for part in HELD_OUT), "knowledge")]
    failed = ", ".join(f"{kind} {count}/{seeds}" for kind, count in _failed(rows).items()) or "none"
    judged = name not in (BEFORE, CLEAN)
    return [
        LABELS[name],
        cell("left", 1),
        cell("retrieval", 3),
        *moved,
        failed if judged else "",
        cell("seconds", 1),
    ]


def _aims(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    columns = {"forget": "association", **{name: name.replace("_", " ") for name in HELD_OUT}, "knowledge": "zero-shot"}
    rows = [
        [LABELS[name], *(str(sum(row["aims"][key] for row in rows)) for key in columns)]
        for name, rows in found.items()
        if name not in (BEFORE, CLEAN)
    ]
    head = ["method", *columns.values()]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    raise SystemExit(main())
