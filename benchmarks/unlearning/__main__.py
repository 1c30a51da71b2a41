"""Compare all methods of unlearning; write ``results.json`` and ``README.md`` beside this file.

    python -m benchmarks.unlearning                      the embedded tasks: about an hour on one core; resumes
    python -m benchmarks.unlearning --packages DIR       those and the tasks of pictograms, see ccu_fast.data.pictograms
    python -m benchmarks.unlearning --tasks digit-features --seeds 0 --out part.json --work runs/part
                                                         a part of it, for several processes; --methods, --scenarios too
    python -m benchmarks.unlearning --merge part.json    what such parts hold, into the file of all
    python -m benchmarks.unlearning --page               regenerate the page from the files

What is measured takes the place of the same task, scenario and seed (and, with --methods, method) in the file; the rest
of the file stays. Processes at work at once may write one file, but each needs a --work of its own. Runs on one thread,
so that seconds are those of one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import store
from benchmarks.unlearning import winners
from benchmarks.unlearning.stored import alone, by_seed, in_rows, merged
from benchmarks.unlearning.tasks import pictogram_tasks
from benchmarks.unlearning.winners import markdown
from ccu_fast.cli.report.tables import depth_table, unlearn_tables
from ccu_fast.files import write_whole
from ccu_fast.unlearn.study.compare import compare
from ccu_fast.unlearn.study.run import METHODS
from ccu_fast.unlearn.study.tasks import SCENARIOS, TASKS

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.json", HERE / "README.md"
SEEDS = (0, 1, 2)
KEPT_BACK = [task.name for task in (*TASKS.values(), *pictogram_tasks(Path()).values()) if task.kept_back]


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
    parser.add_argument("--page", action="store_true", help="write the page from the files alone")
    options = parser.parse_args(arguments)
    known = {**TASKS, **(pictogram_tasks(options.packages) if options.packages else {})}
    for name in options.tasks or ():
        if name not in known:
            hint = "" if options.packages else "; those of pictograms need --packages"
            parser.error(f"--tasks: expected some of {', '.join(known)}, got {name}{hint}")
    tasks = {name: known[name] for name in options.tasks or known}
    torch.set_num_threads(1)
    if options.merge:
        for file in options.merge:
            _put(options.out or RESULTS, by_seed(json.loads(file.read_text())), some_methods=True)
    elif not options.page:
        asked = {"scenarios": options.scenarios, "seeds": options.seeds, "methods": options.methods}
        compare(options.work, tasks=tasks, progress=_say, **asked)
        found = json.loads((options.work / "results.json").read_text())
        _put(options.out or RESULTS, found, some_methods=options.methods is not None)
    if options.out is None:
        write_whole(PAGE, page(by_seed(json.loads(RESULTS.read_text()))))
    return 0


def _put(file: Path, found: dict[str, Any], *, some_methods: bool) -> None:
    """What was found into a file of figures, which is made if needed."""
    with alone(file):
        there = by_seed(json.loads(file.read_text())) if file.exists() else {**found, "unlearn": {}}
        store(file, in_rows(merged(there, found, some_methods=some_methods)), depth=2)


def page(results: dict[str, Any]) -> str:
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
        'is forgotten than was asked). "Gold, another seed" is retrained as gold is, with other initial weights and '
        "batches: its gaps are what chance alone makes. As published, no baseline is told to keep the other half of a "
        'forgotten item; "told" ones have the cross-entropy of the other head on the forget set added '
        "(`keep_other=1.0`). Seconds are CPU time of one thread, which excludes other work on the machine. Where "
        "instances are forgotten CCU gets the task's held-out items, which no model was trained on, as its unseen "
        'ones; "without unseen items" has blends of retained items instead. Learning rates of the baselines: '
        "`python -m benchmarks.unlearning.rates`.",
        "",
        *winners.lines(results["unlearn"]),
    ]
    kept_back = [name for name in results["unlearn"] if name in KEPT_BACK]
    if kept_back:
        lines += [
            "",
            "CCU has its defaults everywhere. They were chosen on other seeds of the other tasks; nothing was chosen "
            f"by looking at {', '.join(kept_back)}.",
        ]
    for by_scenario in results["unlearn"].values():
        for scenario, seeds in by_scenario.items():
            for table in (*unlearn_tables(scenario, seeds), depth_table(seeds)):
                lines += ["", *markdown(table)] if table else []
    return "\n".join(lines) + "\n"


def _say(stage: str, done: int, total: int, note: str) -> None:
    if done in (0, total):
        print(f"{stage} {done}/{total} {note}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
