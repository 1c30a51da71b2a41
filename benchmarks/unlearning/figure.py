"""What each loss of CCU does, on digits-halves: losses.json beside this file and the figure of docs/unlearn.md.

python -m benchmarks.unlearning.figure           train, unlearn, measure and draw: half a minute on one core
python -m benchmarks.unlearning.figure --page    draw from the file alone
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.drawing import GREY, figure_of, save
from benchmarks.results import store
from ccu_fast.data.paired import PairedData
from ccu_fast.runs.provenance import versions
from ccu_fast.unlearn.loop import embed
from ccu_fast.unlearn.method import run_ccu
from ccu_fast.unlearn.model import TwoModalityModel
from ccu_fast.unlearn.objective import class_log_odds
from ccu_fast.unlearn.study.tasks import SCENARIOS, TASKS, Task, make_scenario
from ccu_fast.unlearn.study.train import trained

HERE = Path(__file__).parent
RESULTS, FIGURE = HERE / "losses.json", HERE.parents[1] / "docs" / "figures" / "losses.svg"
DEPTH = 3
SEED = 0
POINTS = 21  # of a curve: the quantiles of a set of items
VARIANTS: dict[str, dict[str, Any]] = {
    "ccu": {},
    "trained, held by (b)": {"keep": "trained"},
    "trained, without (b)": {"keep": "trained", "retention": 0.0},
    "without (c)": {"separation": 0.0},
}
FORGOTTEN, KEPT, THIRD = "#d9772b", "#3b7dd8", "#2f9e6b"
LOOKS = {
    "forgotten, before": (FORGOTTEN, "--"),
    "forgotten, after": (FORGOTTEN, "-"),
    "unseen, after: the levels": (GREY, ":"),
    "unseen of the class, after": (GREY, ":"),
    "retained, before": (KEPT, "--"),
    "retained, after": (KEPT, "-"),
    "trained, without (b)": (FORGOTTEN, "-"),
    "trained, held by (b)": (THIRD, "-"),
    "exact": (KEPT, "-"),
    "with (c)": (KEPT, "-"),
    "without (c)": (FORGOTTEN, "-"),
}


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


def draw(stored: dict[str, Any], path: Path) -> None:
    """Four plots, one below the other; nothing without matplotlib."""
    curves = list(stored["curves"].values())
    titles = [
        "(a) instances go to the level of unseen ones",
        "(a) a class goes to nothing",
        '(b) keep="exact": the other modality stays',
        "(c) retained items stay nearer to their places",
    ]
    labels = ["log-odds of its class", "log-odds of its class", "‖a − a₀‖", "similarity to own place"]
    with figure_of(path, (4.2, 8.6)) as figure:
        if figure is None:
            return
        for axes, lines, title, label in zip(figure.subplots(4, 1), curves, titles, labels, strict=True):
            for name, values in lines.items():
                colour, style = LOOKS[name]
                share = [100 * i / (len(values) - 1) for i in range(len(values))]
                axes.plot(share, values, style, color=colour, linewidth=1.6, label=name)
            axes.set_title(title, fontsize=9, loc="left")
            axes.set(ylabel=label, xlim=(0, 100))
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8, frameon=False, labelspacing=0.2)
        axes.set_xlabel("% of the items that lie below")
        save(figure, path, digest(stored))


def digest(stored: dict[str, Any]) -> str:
    """What tells the figures that a picture was drawn from."""
    return "sha256:" + hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


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
        store(RESULTS, measure(TASKS["digits-halves"]), DEPTH)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    draw(json.loads(RESULTS.read_text()), FIGURE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
