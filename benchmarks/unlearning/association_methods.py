"""The rows of the comparison of associations: which methods, with what each is given, and how each is run.

Every baseline has two rows: at its own rate with the retain set alone, and *given the same* as the last row of CCU,
which has many more steps, keeps the pictures as they are and may use invented captions. What of that helps a baseline,
and at which rate, was chosen for each on a seed of no table
(:mod:`benchmarks.unlearning.association_choices`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.unlearning.salmubench import Problem, collapsed, far, joined
from ccu_fast.data.paired import PairedData
from ccu_fast.models.swapped import Swapped
from ccu_fast.unlearn.baselines.registry import BASELINES
from ccu_fast.unlearn.baselines.ssd import ssd
from ccu_fast.unlearn.config import Budget, UnlearnConfig
from ccu_fast.unlearn.loop import Run
from ccu_fast.unlearn.method import run_ccu
from ccu_fast.unlearn.model import TwoModalityModel
from ccu_fast.unlearn.parameters import buffers_of_other, parameters_of_other

CHOICES = Path(__file__).with_name("association_choices.json")
BEFORE, CLEAN = "compromised", "clean"
# Baselines that are left out, and why.
LEFT_OUT = {
    "random_label": "needs classes, of which it gives a wrong one",
    "salun": "needs classes, of which it gives a wrong one",
    "boundary_shrink": "needs classes and heads",
    "boundary_expand": "needs classes and heads",
    "contrastive_unlearning": "needs classes",
    "contrastive_unlearning_released": "needs classes",
    "mm_unlearner": "needs a head for the other modality",
}
CCU = {
    "ccu": "CCU, pictures forget",
    "ccu_captions": "CCU, captions forget",
    "ccu_invented": "CCU, captions forget, invented ones held",
}
SAME = "_given_the_same"


@dataclass(frozen=True)
class Given:
    """With what a baseline is given the same as the last row of CCU.

    Attributes:
        share: of the rate that it has elsewhere; SSD has none, but its α.
        invented: whether invented captions, with the pictures beside them, join its retain set.
    """

    share: float
    invented: bool


OWN = {name: baseline.label for name, baseline in BASELINES.items() if name not in LEFT_OUT}
# Chosen on seed 100: CHOICES.
ALPHA = 2.0  # of SSD with the retain set alone
GIVEN = {
    "fine_tune": Given(1.0, False),
    "gradient_ascent": Given(0.3, False),
    "neg_grad_plus": Given(0.1, False),
    "bad_teacher": Given(0.1, False),
    "scrub": Given(0.1, False),
    "ssd": Given(2.0, False),
    "multi_delete": Given(1.0, True),
    "clip_erase": Given(0.3, False),
    "sfr_on": Given(1.0, True),
    "null_space": Given(0.1, False),
}
# Of the last row of CCU, chosen on seeds 100 to 105. The task loss would teach that invented captions go with the
# pictures beside them.
INVENTED: dict[str, Any] = {"task": 0.0, "separation": 0.0, "anchor": 80.0, "ceiling": 0.42}
STEPS = 10  # times those of the budget

LABELS_OF_SAME = {name + SAME: f"{label}, given the same" for name, label in OWN.items()}
METHODS = OWN | LABELS_OF_SAME | CCU
LABELS = {BEFORE: "compromised (before)", CLEAN: "clean (the aim)", **METHODS}


def settings(budget: Budget) -> dict[str, Any]:
    """What decides a row besides the problem, as it is stored."""
    return {
        "ccu_invented": INVENTED,
        "longer": asdict(longer(budget)),
        "ssd": {"alpha": ALPHA},
        "given_the_same": {name: asdict(given) for name, given in GIVEN.items()},
    }


def unlearned(name: str, problem: Problem, model: TwoModalityModel, budget: Budget, seed: int) -> Run:
    """The run of a row.

    Args:
        name: of :data:`METHODS`.
        problem: its forget, retain, unseen and invented items are used, the held-out ones are not.
        model: the compromised one; not changed.
        budget: steps, learning rate and batch of all rows but those that have more steps.
        seed: of the batches.
    """
    own = name.removesuffix(SAME)
    if name != own:
        return given_the_same(own, GIVEN[own], problem, model, budget, seed)
    if name == "ssd":
        return ssd(model, problem.forget, problem.retain, alpha=ALPHA)
    if name in BASELINES:
        return BASELINES[name].run(model, problem.forget, problem.retain, "pairs", budget, seed=seed)
    config = UnlearnConfig(forget="pairs", budget=budget, seed=seed)
    if name == "ccu":
        return run_ccu(model, problem.forget, problem.retain, config, unseen=problem.unseen)
    retain = problem.retain
    if name == "ccu_invented":
        retain = joined(retain, problem.invented)
        config = replace(config, **INVENTED, budget=longer(budget))
    swapped: Any = Swapped(model)  # type: ignore[arg-type]
    done = run_ccu(swapped, problem.forget.swapped(), retain.swapped(), config, unseen=problem.unseen.swapped())
    turned: Any = done.model
    return replace(done, model=turned.model)


def given_the_same(
    name: str, given: Given, problem: Problem, model: TwoModalityModel, budget: Budget, seed: int
) -> Run:
    """A baseline with the budget of CCU's last row, the picture tower as it is, and what else is said."""
    retain = joined(problem.retain, problem.invented) if given.invented else problem.retain
    keep = of_pictures(model, problem.forget)
    if name == "ssd":
        return ssd(_without_gradients(model, keep), problem.forget, retain, alpha=given.share)
    budget = longer(budget)
    budget = replace(budget, learning_rate=given.share * budget.learning_rate)
    return BASELINES[name].run(model, problem.forget, retain, "pairs", budget, seed=seed, keep=keep)


def best(rows: Sequence[dict[str, Any]], method: str) -> Given:
    """The choice of a method that is nearest; "ssd_own" is SSD with the retain set alone."""

    def order(row: dict[str, Any]) -> tuple[bool, float]:
        found = row["figures"]
        return (True, float("inf")) if found is None else (collapsed(found["knowledge"]), far(found))

    row = min((row for row in rows if row["method"] == method), key=order)
    return Given(row["share"], row["invented"])


def longer(budget: Budget) -> Budget:
    """The budget of CCU's last row and of the baselines that are given the same."""
    return replace(budget, steps=STEPS * budget.steps)


def of_pictures(model: TwoModalityModel, data: PairedData) -> frozenset[str]:
    """What stays as it is where captions forget: the parameters and buffers that CCU keeps."""
    swapped: Any = Swapped(model)  # type: ignore[arg-type]
    exchanged = data.swapped()
    kept = parameters_of_other(swapped, exchanged) | buffers_of_other(swapped, exchanged)
    return frozenset(name.removeprefix("model.") for name in kept)


def _without_gradients(model: TwoModalityModel, names: Collection[str]) -> TwoModalityModel:
    changed = copy.deepcopy(model)
    assert isinstance(changed, nn.Module)
    for name, parameter in changed.named_parameters():
        parameter.requires_grad_(name not in names)
    return changed
