"""Measures alternatives for the open choices side by side: one table says what to change.

    python -m benchmarks.visit.tune --out tune --device cuda --minutes 8

A question is a case whose providers are variants of ours; the first is the current one. All run in turn in one process,
and a variant that is off from float64 by more than the rule allows is not timed. tune.md ends each question with its
answer, tune.json has the rows.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, results
from benchmarks.console import say
from benchmarks.registry import Shape, Tensors, label
from benchmarks.results import Row
from benchmarks.runner import run
from benchmarks.visit import kernels
from benchmarks.visit.questions import AS_IT_IS, Question, questions

WORTH = 0.03  # of the time; less is noise
SECONDS = 1.0
SHOWN = 12  # kernels


# --- the answers -----------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What one question's rows say."""

    question: str
    rows: list[Row]
    parts: dict[str, dict[str, float]]
    kernels: list[kernels.Kernel]  # as it is

    def text(self) -> str:
        """That a variant is better and by how much, "keep", or why nothing can be said."""
        ours = {r.provider: r for r in self.rows if r.role == "ours" and r.p50_ms is not None}
        if len(ours) == len([r for r in self.rows if r.role == "ours"]) == 1:
            return f"{sum(k.count for k in self.kernels):.0f} launches, {time_of(next(iter(ours.values()))):.3g} ms"
        if AS_IT_IS not in ours or len(ours) < 2:
            return "no answer: " + "; ".join(
                f"{r.provider} {r.status}: {r.reason}" for r in self.rows if r.status != "ok"
            )
        now = time_of(ours[AS_IT_IS])
        best = min(ours, key=lambda name: time_of(ours[name]))
        gain = 1 - time_of(ours[best]) / now
        return f"change to {best}, −{gain:.0%}" if gain > WORTH else "keep"


def time_of(row: Row) -> float:
    """Milliseconds; of a CUDA graph where the call is short enough for one."""
    return row.graph_ms or row.p50_ms or math.inf


def answer(question: Question, facts: dict[str, Any], seconds: float) -> Answer:
    """Measure one question."""
    case = question.case
    inputs = case.inputs()
    if case.device.type == "cuda":
        case = replace(case, op=replace(case.op, make=partial(_made, inputs)))
    # On a CPU kernels are interpreted: measuring memory in separate processes would take longest and tell nothing.
    rows = run(case, facts, seconds=seconds, say=say, with_memory=case.device.type == "cuda")
    found = {}
    for provider in case.providers():
        if next(r for r in rows if r.provider == provider.name).status == "ok" and provider.role == "ours":
            found[provider.name] = kernels.profile(provider.build(inputs, case.shape), case.device)
    parts = {name: kernels.of_parts(profile) for name, profile in found.items()}
    return Answer(question.about, rows, parts, found.get(AS_IT_IS, [])[:SHOWN])


def _made(inputs: Tensors, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Inputs that are there already: making them in fp64 takes longer than measuring."""
    return inputs


def page(answers: Sequence[Answer], left: Sequence[Question], where: dict[str, Any]) -> str:
    """tune.md."""
    commit = (where.get("git_sha") or "no commit")[:12] + (" with changes" if where.get("dirty") else "")
    text = [
        f"# Tuning on {where['device']}",
        "",
        f"`python -m benchmarks.visit --only tune` at {commit}, torch {where['torch']}, triton {where['triton']}, "
        f"{where['measured']}. ms are medians of calls in turn, each from a cold cache, checked against float64 "
        "first; behind them what the kernels of one call take.",
        "",
        "| question | shape | answer |",
        "|---|---|---|",
    ]
    text += [f"| {a.question} | {label(a.rows[0].shape)} | {a.text()} |" for a in answers]
    text += [f"| {q.about} | {label(q.case.shape)} | not run: out of time |" for q in left]
    for a in answers:
        names = list(dict.fromkeys(name for parts in a.parts.values() for name in parts))
        head = ["variant", "ms", "extra MB", *names]
        text += ["", f"## {a.question}, {a.rows[0].op} {label(a.rows[0].shape)}", ""]
        text += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for row in a.rows:
            parts = a.parts.get(row.provider, {})
            ms = f"{time_of(row):.4g}" if row.p50_ms else f"{row.status}: {row.reason}".replace("|", "/")[:120]
            extra = "–" if row.peak_extra_bytes is None else f"{row.peak_extra_bytes / 1e6:.0f}"
            cells = [row.provider, ms, extra, *(f"{parts[n]:.3g}" if n in parts else "–" for n in names)]
            text.append("| " + " | ".join(cells) + " |")
        if a.kernels:
            text += ["", f"As it is, {sum(k.count for k in a.kernels):.0f} launches of these:", ""]
            text += ["| kernel | launches | ms |", "|---|---|---|"]
        text += [f"| {k.name.replace('|', '/')} | {k.count:.0f} | {k.ms:.3g} |" for k in a.kernels]
    return "\n".join(text) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Answer the questions, writing after each; exit code 1 if none could be."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.visit.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no question later than this")
    parser.add_argument("--tiny", action="store_true", help="small shapes; with TRITON_INTERPRET=1 on a CPU")
    arguments = parser.parse_args(argv)
    facts = environment.describe(torch.device(arguments.device))
    deadline = time.monotonic() + 60 * arguments.minutes
    todo = questions(arguments.device, tiny=arguments.tiny)
    answers: list[Answer] = []
    arguments.out.mkdir(parents=True, exist_ok=True)
    while todo and time.monotonic() < deadline:
        answers.append(answer(todo.pop(0), facts, 0.02 if arguments.tiny else SECONDS))
        results.replace(arguments.out / "tune.md", page(answers, todo, facts))
        results.store(arguments.out / "tune.json", [asdict(a) for a in answers], depth=3)
    said = [f"{a.question} {label(a.rows[0].shape)}: {a.text()}" for a in answers]
    said += [f"{question.about} {label(question.case.shape)}: not run: out of time" for question in todo]
    print("\n".join(said))
    unanswered = sum(a.text().startswith("no answer") for a in answers)
    print(f"{len(answers)} of {len(said)} questions measured, {unanswered} without an answer")
    return int(not answers or unanswered > 0)


if __name__ == "__main__":
    sys.exit(main())
