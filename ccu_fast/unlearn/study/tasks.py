"""The embedded tasks: real data, a model for it, how both are trained and unlearned, and what is forgotten."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ccu_fast import check
from ccu_fast.data.features import EDGES, WAVES, load_features
from ccu_fast.data.halves import CLASSES, PIXELS, Halves, load_halves
from ccu_fast.data.paired import PairedData
from ccu_fast.data.views import SIZE, STRIDE, load_views
from ccu_fast.models.fusion import ConvFusionModel, FusionModel
from ccu_fast.unlearn.config import UnlearnConfig
from ccu_fast.unlearn.model import TwoModalityModel

SCENARIOS = ("class", "instances")
FORGET_CLASS = 3
FORGET_SHARE = 0.1  # of the training items, where instances are forgotten


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        epochs, batch: at least 1.
        learning_rate: of Adam at the start, > 0; it falls to 0 along a cosine.
        seed: of the initial weights and the batches, at least 0.
    """

    epochs: int = check.field(60, low=1)
    batch: int = check.field(128, low=1)
    learning_rate: float = check.field(3e-3, low=1e-12)
    seed: int = check.field(0, low=0)

    def __post_init__(self) -> None:
        check.fields(self)


@dataclass(frozen=True)
class Task:
    """A data set with its model.

    Attributes:
        name: as users and files call it.
        load: from a seed to training, test and held-out items.
        make_model: a fresh model.
        training: of the original and of the retrained models; its seed is replaced.
        ccu: by scenario CCU's settings, its defaults but for what the data ask for; their budget is every method's.
        group: items whose ``ids // group`` are equal are views of one thing and are forgotten together.
        describe: one sentence for reports.
        left_out: methods that a comparison does not run here unless they are named.
        kept_back: the task judges and is not to be learned from: CCU's settings are its defaults, and no choice may
            look at any part of it.
    """

    name: str
    load: Callable[[int], Halves]
    make_model: Callable[[], TwoModalityModel]
    training: TrainConfig
    ccu: Mapping[str, UnlearnConfig]
    group: int
    describe: str
    left_out: tuple[str, ...] = ()
    kept_back: bool = False


def default_settings(group: int) -> dict[str, UnlearnConfig]:
    """By scenario CCU's defaults, but for what the data ask for."""
    return {name: UnlearnConfig(forget=name, group=group) for name in SCENARIOS}


TASKS = {
    task.name: task
    for task in (
        Task(
            "digits-halves",
            load_halves,
            partial(FusionModel, PIXELS, PIXELS, CLASSES),
            TrainConfig(),
            default_settings(1),
            1,
            "scikit-learn's 8×8 digits cut in two: the left half is the visual modality, the right half the other; "
            "MLP towers",
        ),
        Task(
            "digit-views",
            load_views,
            partial(ConvFusionModel, SIZE, CLASSES, channels=32),
            TrainConfig(epochs=15),
            default_settings(STRIDE),
            STRIDE,
            "the same digits seen eight times each, every half moved, turned, scaled and with noise of its own; "
            "convolutional towers; all views of a digit are forgotten together",
            # A second retraining, which no method is measured against.
            left_out=("gold_drop",),
        ),
        Task(
            "digit-features",
            load_features,
            partial(FusionModel, WAVES, EDGES, CLASSES),
            TrainConfig(),
            default_settings(1),
            1,
            "the same digits without any image: their spectrum is the visual modality, the directions of their edges "
            "the other; MLP towers",
            kept_back=True,
        ),
    )
}


@dataclass(frozen=True)
class Scenario:
    """Forget and retain set with the unseen items each is judged by.

    Attributes:
        name: "class" or "instances".
        train: the original training set, forget and retain together.
        forget, retain: its two parts.
        retain_test: unseen items of the classes that stay.
        forget_test: unseen items of the forgotten class; None when instances are forgotten.
        held_out: more unseen items of the classes that stay, which are neither trained on nor tested: what unlearning
            may be measured by while it goes on; None without any.
    """

    name: str
    train: PairedData
    forget: PairedData
    retain: PairedData
    retain_test: PairedData
    forget_test: PairedData | None
    held_out: PairedData | None

    @property
    def judged(self) -> dict[str, Any]:
        """The four sets that :func:`ccu_fast.unlearn.audit.audit` and ``linear_probe`` take."""
        names = ("forget", "retain", "retain_test", "forget_test")
        return {name: getattr(self, name) for name in names}


def make_scenario(task: Task, name: str, seed: int) -> Scenario:
    """Load the task and split it: class 3, or a random tenth of the training items, is to be forgotten.

    Raises:
        ValueError: unknown name.
    """
    check.one_of("scenario", name, SCENARIOS)
    halves = task.load(seed)
    train, test, held_out = halves.train, halves.test, halves.held_out
    if name == "class":
        gone, gone_test, gone_held_out = (part.labels == FORGET_CLASS for part in (train, test, held_out))
        return Scenario(
            name, train, train[gone], train[~gone], test[~gone_test], test[gone_test], held_out[~gone_held_out]
        )
    # All views of a thing are drawn together.
    things, thing_of = torch.unique(train.ids // task.group, return_inverse=True)
    drawn = torch.zeros(len(things), dtype=torch.bool)
    order = torch.randperm(len(things), generator=torch.Generator().manual_seed(seed))
    drawn[order[: round(FORGET_SHARE * len(things))]] = True
    gone = drawn[thing_of]
    return Scenario(name, train, train[gone], train[~gone], test, None, held_out)
