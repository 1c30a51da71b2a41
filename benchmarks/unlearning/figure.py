"""What each loss of CCU does, on digits-halves: losses.json beside this file and the figures of docs/unlearn.md.

python -m benchmarks.unlearning.figure           train, unlearn, measure and draw: half a minute on one core
python -m benchmarks.unlearning.figure --page    draw from the file alone
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.charts import FIGURES, Line, Scale, even, lines
from ccu_fast.data.paired import PairedData
from ccu_fast.runs.provenance import versions
from ccu_fast.unlearn.loop import embed
from ccu_fast.unlearn.method import run_ccu
from ccu_fast.unlearn.model import TwoModalityModel
from ccu_fast.unlearn.objective import class_log_odds
from ccu_fast.unlearn.study.tasks import SCENARIOS, TASKS, Task, make_scenario
from ccu_fast.unlearn.study.train import trained

HERE = Path(__file__).parent
RESULTS = HERE / "losses.json"
DEPTH = 3
SEED = 0
POINTS = 21  # of a curve: the quantiles of a set of items
VARIANTS: dict[str, dict[str, Any]] = {
    "ccu": {},
    "trained, held by (b)": {"keep": "trained"},
    "trained, without (b)": {"keep": "trained", "retention": 0.0},
    "without (c)": {"separation": 0.0},
}
# The colour of a curve, and whether it is what the others are read against.
LOOKS = {
    "forgotten, before": (1, True),
    "forgotten, after": (1, False),
    "unseen, after: the levels": (4, True),
    "unseen of the class, after": (4, True),
    "retained, before": (0, True),
    "retained, after": (0, False),
    "trained, without (b)": (1, False),
    "trained, held by (b)": (2, False),
    "exact": (0, False),
    "with (c)": (0, False),
    "without (c)": (1, False),
}
# For each group of curves the end of the file's name, the axis, and what is seen.
FIGURES_OF = (
    (
        "instances",
        "log-odds of its class",
        "Log-odds of instances: forgotten ones fall from where retained ones are to where unseen ones are.",
    ),
    (
        "class",
        "log-odds of its class",
        "Log-odds of a class: forgotten items, trained on or not, fall far below zero, retained ones do not.",
    ),
    (
        "other",
        "‖a − a₀‖, the other modality",
        "Distance of the other modality's embeddings to the original's: zero with keep=\"exact\"; trained ones move, "
        "and without (b) some of them far.",
    ),
    (
        "places",
        "similarity to its own place",
        "Similarity of retained items to their frozen places: those that moved most moved less "
        "with (c) than without it.",
    ),
)


def measure(task: Task) -> dict[str, Any]:
    """The curves: quantiles over the items of a set, from the lowest to the highest."""
    original = trained(task, make_scenario(task, "class", SEED), "original", SEED).model
    odds, places, same, nearest = {}, {}, {}, {}
    for scenario in SCENARIOS:
        split = make_scenario(task, scenario, SEED)
        config = replace(task.ccu[scenario], seed=SEED)
        held_out = split.held_out
        assert held_out is not None  # an embedded task has some
        unseen = None if scenario == "class" else held_out
        runs = {
            name: run_ccu(original, split.forget, split.retain, replace(config, **changed), unseen=unseen).model
            for name, changed in VARIANTS.items()
        }
        strangers, called = (
            (held_out, "unseen, after: the levels")
            if split.forget_test is None
            else (split.forget_test, "unseen of the class, after")
        )
        odds[scenario] = {
            "forgotten, before": _log_odds(original, split.forget),
            "forgotten, after": _log_odds(runs["ccu"], split.forget),
            called: _log_odds(runs["ccu"], strangers),
            "retained, before": _log_odds(original, split.retain),
            "retained, after": _log_odds(runs["ccu"], split.retain),
        }
        if scenario == "class":
            others = {name: embed(model, split.train)[1] for name, model in runs.items()}
            was = embed(original, split.train)[1]
            same = {name: torch.equal(other, was) for name, other in others.items() if name != "without (c)"}
            kept = {
                name: _quantiles((others[run] - was).norm(dim=1))
                for name, run in (("trained, without (b)",) * 2, ("trained, held by (b)",) * 2, ("exact", "ccu"))
            }
        else:
            frozen = embed(original, split.retain)[0]
            for name, run in (("with (c)", "ccu"), ("without (c)", "without (c)")):
                similarity = embed(runs[run], split.retain)[0] @ frozen.T
                places[name] = _quantiles(similarity.diagonal())
                own = similarity.argmax(1) == torch.arange(len(frozen))
                nearest[name] = round(own.double().mean().item(), 4)
    return {
        "versions": versions(),
        "setting": {"task": task.name, "seed": SEED, "points": POINTS, "variants": VARIANTS},
        "same to the bit": same,
        "own place is the nearest": nearest,
        "curves": {
            "log-odds, instances": odds["instances"],
            "log-odds, class": odds["class"],
            "distance of the other embedding to the original's, class": kept,
            "similarity of a retained item to its own place, instances": places,
        },
    }


def pictures(stored: dict[str, Any]) -> dict[str, str]:
    """A picture for each group of curves, by the name of its file."""
    drawn = {}
    for (name, label, told), curves in zip(FIGURES_OF, stored["curves"].values(), strict=True):
        found = []
        for curve, values in curves.items():
            kind, against = LOOKS[curve]
            share = [100 * i / (len(values) - 1) for i in range(len(values))]
            found.append(Line(curve, list(zip(share, values, strict=True)), kind, dashed=against))
        x = Scale("% of the items that lie below", (0, 20, 40, 60, 80, 100), log=False)
        y = Scale(label, even([value for values in curves.values() for value in values]), log=False)
        drawn[f"losses-{name}.svg"] = lines(told, x, y, found)
    return drawn


def _draw(stored: dict[str, Any]) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, text in pictures(stored).items():
        results.replace(FIGURES / name, text)


def _log_odds(model: TwoModalityModel, data: PairedData) -> list[float]:
    with torch.no_grad():
        return _quantiles(class_log_odds(model.classify_visual(embed(model, data)[0]), data.labels))


def _quantiles(values: Tensor) -> list[float]:
    found = values.double().quantile(torch.linspace(0, 1, POINTS, dtype=torch.float64))
    return [round(value, 4) for value in found.tolist()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure unless only the picture is asked for, and draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unlearning.figure", description=__doc__.split("\n")[0])
    parser.add_argument("--page", action="store_true", help="draw from the file alone")
    if not parser.parse_args(arguments).page:
        torch.set_num_threads(1)
        results.store(RESULTS, measure(TASKS["digits-halves"]), DEPTH)
    _draw(json.loads(RESULTS.read_text()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
