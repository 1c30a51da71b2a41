"""Compare all methods of unlearning; write ``results.json`` and ``README.md`` beside this file.

    python -m benchmarks.unlearning                      the embedded tasks: about an hour on one core; resumes
    python -m benchmarks.unlearning --packages DIR       those and the tasks of pictograms, see ccu_fast.data.pictograms
    python -m benchmarks.unlearning --tasks digit-features --seeds 0 --out part.json --work runs/part
                                                         a part of it, for several processes; --methods, --scenarios too
    python -m benchmarks.unlearning --merge part.json    what such parts hold, into the file of all
    python -m benchmarks.unlearning --told               the baselines told to keep the other modality: told.json
    python -m benchmarks.unlearning --page               regenerate the page from the files

What is measured takes the place of the same task, scenario and seed (and, with --methods, method) in the file; the rest
of the file stays. Processes at work at once may write one file, but each needs a --work of its own. Runs on one thread,
so that seconds are those of one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import store
from benchmarks.unlearning.stored import alone, by_seed, in_rows, merged
from benchmarks.unlearning.tasks import pictogram_tasks
from ccu_fast.cli.report.tables import Table, depth_table, unlearn_table
from ccu_fast.files import write_whole
from ccu_fast.unlearn.audit import audit, average_gap, over_seeds
from ccu_fast.unlearn.baselines.registry import BASELINES
from ccu_fast.unlearn.method import run_ccu
from ccu_fast.unlearn.study.compare import compare
from ccu_fast.unlearn.study.run import METHODS
from ccu_fast.unlearn.study.tasks import SCENARIOS, TASKS, Task, make_scenario
from ccu_fast.unlearn.study.train import trained

HERE = Path(__file__).parent
RESULTS, TOLD, PAGE = HERE / "results.json", HERE / "told.json", HERE / "README.md"
SEEDS = (0, 1, 2)
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
KEPT_BACK = [task.name for task in (*TASKS.values(), *pictogram_tasks(Path()).values()) if task.kept_back]
DEEP_TASK = "digits-halves"  # where the features of the told baselines are probed too


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unlearning", description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--work", type=Path, default=Path("runs/unlearning"), help="parts and models, kept for resuming"
    )
    parser.add_argument("--packages", type=Path, help="folder of the npm packages, for the tasks of pictograms")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all, those of pictograms with --packages")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="SEED")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), metavar="METHOD", help="default: all")
    parser.add_argument("--out", type=Path, metavar="FILE", help="of figures, instead of the one beside this program")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE", help="put what these hold into --out")
    parser.add_argument("--told", action="store_true", help="the baselines told to keep the other modality")
    parser.add_argument("--page", action="store_true", help="write the page from the files alone")
    options = parser.parse_args(arguments)
    known = {**TASKS, **(pictogram_tasks(options.packages) if options.packages else {})}
    for name in options.tasks or ():
        if name not in known:
            hint = "" if options.packages else "; those of pictograms need --packages"
            parser.error(f"--tasks: expected some of {', '.join(known)}, got {name}{hint}")
    tasks = {name: known[name] for name in options.tasks or known}
    torch.set_num_threads(1)
    if options.told:
        _put_told(options.out or TOLD, told(options.work, tasks, options.seeds))
    elif options.merge:
        for file in options.merge:
            _put(options.out or RESULTS, by_seed(json.loads(file.read_text())), some_methods=True)
    elif not options.page:
        asked = {"scenarios": options.scenarios, "seeds": options.seeds, "methods": options.methods}
        compare(options.work, tasks=tasks, progress=_say, **asked)
        found = json.loads((options.work / "results.json").read_text())
        _put(options.out or RESULTS, found, some_methods=options.methods is not None)
    if options.out is None:
        text = page(by_seed(json.loads(RESULTS.read_text())), json.loads(TOLD.read_text()) if TOLD.exists() else None)
        write_whole(PAGE, text)
    return 0


def _put(file: Path, found: dict[str, Any], *, some_methods: bool) -> None:
    """What was found into a file of figures, which is made if needed."""
    with alone(file):
        there = by_seed(json.loads(file.read_text())) if file.exists() else {**found, "unlearn": {}}
        store(file, in_rows(merged(there, found, some_methods=some_methods)), depth=2)


def _put_told(file: Path, found: dict[str, Any]) -> None:
    with alone(file):
        there = json.loads(file.read_text()) if file.exists() else {}
        store(file, {**there, **found}, depth=3)


def told(work: Path, tasks: Mapping[str, Task], seeds: Sequence[int]) -> dict[str, Any]:
    """Baselines as published and with cross-entropy of the other head on the forget set; by task and scenario."""
    result: dict[str, Any] = {}
    for task in tasks.values():
        for kind in SCENARIOS:
            figures: dict[str, list[Any]] = {}
            for done, seed in enumerate(seeds, start=1):
                for name, values in _told(task, kind, seed, work / "models").items():
                    figures.setdefault(name, []).append(values)
                _say(f"told, {task.name}, {kind}", done, len(seeds), "")
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
        "# Unlearning: all methods compared",
        "",
        "Made by `python -m benchmarks.unlearning` from [results.json](results.json). Mean ± sample deviation over the "
        "seeds. Gold is a model retrained with the visual half of the forget set masked; the average gap compares with "
        "it, in points, over the accuracies of each modality and the membership attack. Seconds are CPU time of one "
        "thread, which excludes other work on the machine. (c) repels forgotten items from retained ones of their own "
        "class: for a whole class there is no such pair, and it then only keeps retained items close to their class.",
    ]
    kept_back = [name for name in results["unlearn"] if name in KEPT_BACK]
    if kept_back:
        lines += [
            "",
            f"Nothing was chosen by looking at {', '.join(kept_back)}: there CCU has its defaults. The other tasks' "
            "settings were chosen on held-out items.",
        ]
    for by_scenario in results["unlearn"].values():
        for scenario, seeds in by_scenario.items():
            lines += ["", *_markdown(unlearn_table(scenario, seeds))]
            deep = depth_table(seeds)
            lines += ["", *_markdown(deep)] if deep else []
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


def _markdown(table: Table) -> list[str]:
    return [
        table.caption + ":",
        "",
        "| " + " | ".join(table.columns) + " |",
        "|---" * len(table.columns) + "|",
        *("| " + " | ".join(row) + " |" for row in table.rows),
    ]


def _say(stage: str, done: int, total: int, note: str) -> None:
    if done in (0, total):
        print(f"{stage} {done}/{total} {note}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
