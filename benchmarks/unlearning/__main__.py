"""Compare all methods of unlearning; write ``results.json`` and ``README.md`` beside this file.

    python -m benchmarks.unlearning [--work FOLDER]      about 40 minutes on one core; resumes where it was stopped
    python -m benchmarks.unlearning --told               the baselines told to keep the other modality: told.json
    python -m benchmarks.unlearning --page               regenerate the page from the files

Runs on one thread, so that seconds are those of one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import store
from benchmarks.unlearning import winners
from benchmarks.unlearning.winners import markdown
from ccu_fast.cli.report.tables import depth_table, unlearn_tables
from ccu_fast.files import write_whole
from ccu_fast.unlearn.audit import audit, average_gap, over_seeds
from ccu_fast.unlearn.baselines.registry import BASELINES
from ccu_fast.unlearn.method import run_ccu
from ccu_fast.unlearn.study.compare import compare
from ccu_fast.unlearn.study.tasks import SCENARIOS, TASKS, Task, make_scenario
from ccu_fast.unlearn.study.train import trained

HERE = Path(__file__).parent
RESULTS, TOLD, PAGE = HERE / "results.json", HERE / "told.json", HERE / "README.md"
SEEDS = (0, 1, 2)
PART = ("task", "scenario", "seed")  # of a part's setting: what tells it from the others
TOLD_METHODS = (
    "random_label",
    "salun",
    "neg_grad_plus",
    "scrub",
    "bad_teacher",
    "boundary_shrink",
    "contrastive_unlearning",
    "clip_erase",
)
DEEP_TASK = "digits-halves"  # where the features of the told baselines are probed too


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unlearning", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--work", type=Path, default=Path("runs/unlearning"), help="parts and models, kept for resuming"
    )
    parser.add_argument("--told", action="store_true", help="the baselines told to keep the other modality")
    parser.add_argument("--page", action="store_true", help="write the page from the files alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.told:
        store(TOLD, told(options.work), depth=3)
    elif not options.page:
        compare(options.work, seeds=SEEDS, progress=_say)
        store(RESULTS, in_rows(json.loads((options.work / "results.json").read_text())), depth=2)
    text = page(by_seed(json.loads(RESULTS.read_text())), json.loads(TOLD.read_text()) if TOLD.exists() else None)
    write_whole(PAGE, text)
    return 0


def in_rows(results: dict[str, Any]) -> dict[str, Any]:
    """What is stored: a row for each method of each task, scenario and seed, and what its part has in common."""
    parts = [
        part for scenarios in results["unlearn"].values() for seeds in scenarios.values() for part in seeds.values()
    ]
    rows = [
        {
            **{key: part["setting"][key] for key in PART},
            "method": method,
            "metrics": metrics,
            "cost": part["cost"][method],
        }
        for part in parts
        for method, metrics in part["metrics"].items()
    ]
    return {
        "versions": results["versions"],
        "seeds": results["seeds"],
        "parts": [{key: value for key, value in part.items() if key not in ("metrics", "cost")} for part in parts],
        "rows": rows,
    }


def by_seed(stored: dict[str, Any]) -> dict[str, Any]:
    """The same by task, scenario and seed again, as :func:`ccu_fast.unlearn.study.compare.compare` gives it."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    unlearn: dict[str, dict[str, dict[str, Any]]] = {}
    for part in stored["parts"]:
        task, scenario, seed = where = tuple(part["setting"][key] for key in PART)
        found[where] = {**part, "metrics": {}, "cost": {}}
        unlearn.setdefault(task, {}).setdefault(scenario, {})[str(seed)] = found[where]
    for row in stored["rows"]:
        for kind in ("metrics", "cost"):
            found[tuple(row[key] for key in PART)][kind][row["method"]] = row[kind]
    return {"versions": stored["versions"], "seeds": stored["seeds"], "unlearn": unlearn}


def told(work: Path) -> dict[str, Any]:
    """Baselines as published and with cross-entropy of the other head on the forget set; by task and scenario."""
    result: dict[str, Any] = {}
    for task in TASKS.values():
        for kind in SCENARIOS:
            figures: dict[str, list[Any]] = {}
            for seed in SEEDS:
                for name, values in _told(task, kind, seed, work / "models").items():
                    figures.setdefault(name, []).append(values)
                _say(f"told, {task.name}, {kind}", seed + 1, len(SEEDS), "")
            means = {name: over_seeds(values) for name, values in figures.items()}
            result.setdefault(task.name, {})[kind] = means
    return result


def _told(task: Task, kind: str, seed: int, models: Path) -> dict[str, Any]:
    split = make_scenario(task, kind, seed)
    config = replace(task.ccu[kind], seed=seed)
    original, gold = (trained(task, split, name, seed, folder=models).model for name in ("original", "gold_mask"))
    done = {"gold_mask": gold, "ccu": run_ccu(original, split.forget, split.retain, config).model}
    for name in TOLD_METHODS:
        for keep in (0.0, 1.0):
            run = BASELINES[name].run(
                original, split.forget, split.retain, kind, config.budget, seed=seed, keep_other=keep
            )
            done[f"{name}, told" if keep else name] = run.model
    audits = {name: audit(model, **split.judged, deep=task.name == DEEP_TASK) for name, model in done.items()}
    for values in audits.values():
        values["average_gap"] = average_gap(values, audits["gold_mask"])
    return audits


def page(results: dict[str, Any], told_figures: dict[str, Any] | None) -> str:
    """All tables in Markdown."""
    lines = [
        f"# Unlearning: {len(results['unlearn'])} tasks, {len(results['seeds'])} seeds, all methods",
        "",
        "Made by `python -m benchmarks.unlearning` from [results.json](results.json). Mean ± sample deviation over the "
        "seeds. Gold is a model retrained with the visual half of the forget set masked; the average gap compares with "
        "it, in points, over the accuracies of each modality and the membership attack. Most of these figures hardly "
        "move, so a small average can hide a large difference: the worst gap is the largest single one, of the means "
        "over the seeds. The verdict counts a difference of the means if it is larger than 2 points and than two "
        "standard errors of independent items; its words are those of SALMUBench (arXiv 2603.26316): catastrophic "
        "(retained knowledge collapses), ineffective (what was to be forgotten is still known), over-generalised (more "
        "is forgotten than was asked). Seconds are CPU time of one "
        "thread, which excludes other work on the machine. (c) repels forgotten items from retained ones of their own "
        "class: for a whole class there is no such pair, and it then only keeps retained items close to their class.",
        "",
        *winners.lines(results["unlearn"], told_figures),
    ]
    for by_scenario in results["unlearn"].values():
        for scenario, seeds in by_scenario.items():
            for table in (*unlearn_tables(scenario, seeds), depth_table(seeds)):
                lines += ["", *markdown(table)] if table else []
    if told_figures is not None:
        lines += [
            "",
            "## Told to keep the other modality",
            "",
            "As published, no baseline is told to keep the other half of a forgotten item. Here the cross-entropy of "
            "the other head on the forget set is added (`keep_other=1.0`; `--told`, [told.json](told.json)):",
        ]
        for task, by_kind in told_figures.items():
            for kind, methods in by_kind.items():
                lines += ["", f"{task}, {kind}:", "", *_told_table(methods)]
    return "\n".join(lines) + "\n"


def _told_table(methods: dict[str, Any]) -> list[str]:
    columns: dict[str, tuple[str, ...]] = {
        "average gap": ("average_gap",),
        "visual U": ("visual", "forget_train"),
        "other U": ("other", "forget_train"),
        "visual R, test": ("visual", "retain_test"),
    }
    if "probe" in methods["gold_mask"]:
        columns |= {"probe U": ("probe", "forget"), "relearn steps": ("relearn_steps",)}
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, figures in methods.items():
        cells = []
        for keys in columns.values():
            value: Any = figures
            for key in keys:
                value = value[key]
            cells.append(f"{value['mean']:.3g} ± {value['spread']:.2g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _say(stage: str, done: int, total: int, note: str) -> None:
    if done in (0, total):
        print(f"{stage} {done}/{total} {note}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
