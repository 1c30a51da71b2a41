"""What a text alone tells of its pair: precision and recall of the audit without pictures, before and after unlearning.

    python -m benchmarks.unlearning.text_membership                 digits-halves: a minute on one core
    python -m benchmarks.unlearning.text_membership --packages DIR  pictogram-words too: some minutes more
    python -m benchmarks.unlearning.text_membership --page          the page from the figures alone

Writes text_membership.json and TEXT_MEMBERSHIP.md beside this file. The models are those of the comparison
(``python -m benchmarks.unlearning``): those it trained in the same --work are taken from there, others are
trained first, which is not in these times. A killed run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.console import say, say_ends
from benchmarks.results import store
from benchmarks.unlearning.tasks import pictogram_tasks, refuse_others
from benchmarks.unlearning.winners import markdown
from ccu_fast.cli.report.tables import Table, spread
from ccu_fast.data.paired import PairedData
from ccu_fast.files import write_whole
from ccu_fast.runs import cache as kept
from ccu_fast.runs.provenance import json_hash, versions
from ccu_fast.unlearn.audit import gibberish_of, text_membership, told_apart
from ccu_fast.unlearn.study.compare import FORMAT as COMPARED_FORMAT
from ccu_fast.unlearn.study.run import METHODS, run_all
from ccu_fast.unlearn.study.tasks import TASKS, Scenario, Task, make_scenario
from ccu_fast.unlearn.study.train import FORMAT as TRAINED_FORMAT

DEPTH = 2  # a line for a model
RESULTS = Path(__file__).parent / "text_membership.json"
PAGE = RESULTS.with_name("TEXT_MEMBERSHIP.md")
SCENARIO = "instances"  # of a forgotten class every text is an anomaly, trained on or not
SEEDS = {"digits-halves": (0, 1, 2), "pictogram-words": (0,)}
# Besides these CCU and the three baselines that the comparison has nearest to retraining on digits-halves.
MODELS = ("original", "gold_mask", "gold_again", "sfr_on", "sfr_on, told", "scrub, told", "ccu")
GIBBERISH, RESTARTS, STEPS, CHUNK = 128, 4, 40, 256
AREAS = ("auc", "similarity_auc")
FIGURES = ("precision", "recall", "false_alarms", *AREAS)
FORMAT = 1  # of the kept parts; raise it when the audit gives other figures


def questions(task: Task, split: Scenario, seed: int) -> tuple[Tensor, Tensor]:
    """Texts of forgotten and of as many unseen things, one for each thing, and which of them are forgotten."""
    gone, unseen = (_one_each(part, task.group) for part in (split.forget, split.retain_test))
    count = min(len(gone), len(unseen))
    rng = torch.Generator().manual_seed(seed)
    texts = torch.cat([part.other[torch.randperm(len(part), generator=rng)[:count]] for part in (gone, unseen)])
    return texts, torch.arange(2 * count) < count


def measure(task: Task, seed: int, name: str, split: Scenario, work: Path) -> dict[str, Any]:
    """The row of one model."""
    assert split.held_out is not None  # a task has some
    texts, forgotten = questions(task, split, seed)
    gibberish = gibberish_of(split.held_out.other, GIBBERISH, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    starts = torch.rand(RESTARTS, *split.forget.visual.shape[1:], generator=rng)
    config = replace(task.ccu[SCENARIO], seed=seed)
    names = list(dict.fromkeys(["original", name]))
    model = run_all(names, task, split, config, work / "models", say_ends)[name].model
    found = text_membership(model, texts, gibberish, starts, steps=STEPS, seed=seed, chunk=CHUNK, progress=say_ends)
    half = len(texts) // 2
    row = {"task": task.name, "seed": seed, "method": name, "forgotten": half, "unseen": half}
    return {**row, "flagged": int(found.flags.sum()), **told_apart(found, forgotten)}


def rows_of(task: Task, seed: int, work: Path) -> Iterator[dict[str, Any]]:
    """:func:`measure` of every model, each kept in the folder of the work."""
    settings = [asdict(task.ccu[SCENARIO]), asdict(task.training), task.group, GIBBERISH, RESTARTS, STEPS, CHUNK]
    formats = {"own": FORMAT, "compare": COMPARED_FORMAT, "trained": TRAINED_FORMAT}
    split = cache(lambda: make_scenario(task, SCENARIO, seed))  # read only when something is to be done
    for name in MODELS:
        key = json_hash([formats, versions(), task.name, seed, name, settings])
        path = work / "text_membership" / f"{task.name}-seed{seed}-{name}.json"
        yield kept.part(path, key, lambda name=name: measure(task, seed, name, split(), work))  # type: ignore[misc]
        say(f"{task.name}, seed {seed}: {name}")


def page(stored: dict[str, Any]) -> str:
    """The page of the figures."""
    rows = stored["rows"]
    by_task = {
        task: [row for row in rows if row["task"] == task] for task in dict.fromkeys(row["task"] for row in rows)
    }
    lines = [
        "# Membership from text alone",
        "",
        said(by_task),
        "",
        "Made by `python -m benchmarks.unlearning.text_membership --packages DIR` from "
        "[text_membership.json](text_membership.json). Each model is asked of forgotten items and of as many unseen "
        "ones, from their text alone (digits-halves: the right half; pictogram-words: the words), whether they were "
        "trained on: `ccu_fast.unlearn.audit.text_membership` with "
        f"{stored['settings']['restarts']} restarts of {stored['settings']['steps']} steps and "
        f"{stored['settings']['gibberish']} gibberish texts. Precision is the share of forgotten items among the "
        "flagged ones, 0.5 by chance; recall is the share of forgotten items that are flagged, false alarms that of "
        "unseen ones; where these two are equal nothing is told. The areas under the curve are those of the detectors' "
        "score and of the similarity that the search reaches, 0.5 by chance. After retraining the forgotten items' "
        "text has still been trained on, their visual half has not. Mean ± sample deviation over the seeds, of "
        "precision over those in which something was flagged; one view of each thing.",
    ]
    for task, of_task in by_task.items():
        table = [
            [METHODS[name], *(spread([row[figure] for row in of_task if row["method"] == name]) for figure in FIGURES)]
            for name in dict.fromkeys(row["method"] for row in of_task)
        ]
        seeds = sorted({row["seed"] for row in of_task})
        caption = (
            f"{task}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}, "
            f"{of_task[0]['forgotten']} forgotten and {of_task[0]['unseen']} unseen items each"
        )
        columns = ["model", "precision", "recall", "false alarms", "AUC of score", "AUC of similarity"]
        lines += ["", *markdown(Table(caption, columns, table))]
    return "\n".join(lines) + "\n"


def said(by_task: dict[str, list[dict[str, Any]]]) -> str:
    """What the figures of the model before unlearning come to, in a sentence: what there is to be forgotten at all."""
    told, named = [], []
    for task, rows in by_task.items():
        before = [row for row in rows if row["method"] == "original"]
        areas, error = [fmean(row[key] for row in before) for key in AREAS], two_errors(before)
        known = [row["precision"] for row in before if row["precision"] is not None]
        precision = f"precision {fmean(known):.2f}" if known else "nothing flagged"
        both = " and ".join(f"{area:.2f}" for area in areas)
        named.append(f"{task}: {precision}, AUC {both}, chance 0.50 ± {error:.2f}")
        told += [task] * any(abs(area - 0.5) > error for area in areas)
    figures = "; ".join(named)
    if not told:
        return (
            "**Text alone tells nothing on these data, not even of the model before unlearning** "
            f"({figures}): there is nothing here that unlearning could take away. {outside(by_task)} "
            "That the audit finds members where a model betrays them is shown by "
            "`tests/unlearn/audit/test_text_membership.py`, on names and pictures learned by heart."
        )
    rest = [task for task in by_task if task not in told]
    nothing = f", and nothing on {', '.join(rest)}" if rest else ""
    return f"**Text alone tells members of {', '.join(told)} before unlearning{nothing}** ({figures})."


def outside(by_task: dict[str, list[dict[str, Any]]]) -> str:
    """Which areas of all models are further from chance than two standard errors, beside how many would be by luck."""
    found, areas = [], 0
    for task, rows in by_task.items():
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            for key in AREAS:
                area, areas = fmean(row[key] for row in own), areas + 1
                if abs(area - 0.5) > two_errors(own):
                    what = "score" if key == "auc" else "similarity"
                    found.append(f"{METHODS[method]} on {task} ({what} {area:.2f})")
    named = f": {', '.join(found)}" if found else ""
    luck = f"{areas / 22:.1f} would by luck"  # a normal value is beyond two deviations once in 22 times
    return f"Of the {areas} areas of all models {len(found)} differ from chance by more, {luck}{named}."


def two_errors(rows: list[dict[str, Any]]) -> float:
    """Two standard errors of the mean area of a score that tells nothing (Mann & Whitney's)."""
    squares = [(row["forgotten"] + row["unseen"] + 1) / (12 * row["forgotten"] * row["unseen"]) for row in rows]
    return 2 * math.sqrt(sum(squares)) / len(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unlearning.text_membership")
    parser.add_argument("--work", type=Path, default=Path("runs/unlearning"), help="models and parts, kept")
    parser.add_argument("--packages", type=Path, help="folder of the npm packages, for pictogram-words")
    parser.add_argument("--page", action="store_true", help="write the page from the figures alone")
    options = parser.parse_args(arguments)
    if not options.page:
        torch.set_num_threads(1)
        if options.packages:
            refuse_others(parser, options.packages)
        known = {**TASKS, **(pictogram_tasks(options.packages) if options.packages else {})}
        rows = [
            row
            for name, seeds in SEEDS.items()
            if name in known
            for seed in seeds
            for row in rows_of(known[name], seed, options.work)
        ]
        settings = {"scenario": SCENARIO, "gibberish": GIBBERISH, "restarts": RESTARTS, "steps": STEPS}
        about = {"versions": versions(), "settings": settings}
        there = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if {name: there.get(name) for name in about} == about:  # figures of a task that was not asked for stay
            rows += [row for row in there["rows"] if row["task"] not in known]
        store(RESULTS, {**about, "rows": rows}, depth=DEPTH)
    write_whole(PAGE, page(json.loads(RESULTS.read_text())))
    return 0


def _one_each(data: PairedData, group: int) -> PairedData:
    """The first view of each thing."""
    things, number = torch.unique(data.ids // group, return_inverse=True)
    first = torch.full((len(things),), len(data)).scatter_reduce(0, number, torch.arange(len(data)), "amin")
    return data[first.sort().values]


if __name__ == "__main__":
    raise SystemExit(main())
