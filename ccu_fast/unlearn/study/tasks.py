"""The embedded tasks: real data, a model for it, and how both are trained and unlearned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from ccu_fast.data.halves import CLASSES, PIXELS, Halves, load_halves
from ccu_fast.data.views import SIZE, STRIDE, load_views
from ccu_fast.models.fusion import ConvFusionModel, FusionModel
from ccu_fast.unlearn.config import Budget, UnlearnConfig
from ccu_fast.unlearn.model import TwoModalityModel
from ccu_fast.unlearn.study.train import TrainConfig


@dataclass(frozen=True)
class Task:
    """A data set with its model.

    Attributes:
        name: as users and files call it.
        load: from a seed to training, test and held-out items.
        make_model: a fresh model.
        training: of the original and of the retrained models; its seed is replaced.
        ccu: by scenario CCU's settings, chosen on held-out items of seeds from 100 on; their budget is every method's.
        group: items whose ``ids // group`` are equal are views of one thing and are forgotten together.
        describe: one sentence for reports.
        left_out: methods that a comparison does not run here unless they are named.
    """

    name: str
    load: Callable[[int], Halves]
    make_model: Callable[[], TwoModalityModel]
    training: TrainConfig
    ccu: Mapping[str, UnlearnConfig]
    group: int
    describe: str
    left_out: tuple[str, ...] = ()


# What is to be forgotten is visual: the other modality's tower stays as it is, and costs no backward pass.
BUT_OTHER_TOWER = ("visual_*", "projector.*", "other_head.*", "fused_head.*")
TASKS = {
    task.name: task
    for task in (
        Task(
            "digits-halves",
            load_halves,
            partial(FusionModel, PIXELS, PIXELS, CLASSES),
            TrainConfig(),
            {
                "class": UnlearnConfig(
                    forget="class", anchor=3.0, neighbours=5.0, dampen=7.0, trainable=BUT_OTHER_TOWER
                ),
                "instances": UnlearnConfig(forget="instances", forgetting=6.0, trainable=BUT_OTHER_TOWER),
            },
            1,
            "scikit-learn's 8×8 digits cut in two: the left half is the visual modality, the right half the other; "
            "MLP towers",
        ),
        Task(
            "digit-views",
            load_views,
            partial(ConvFusionModel, SIZE, CLASSES, channels=32),
            TrainConfig(epochs=15),
            {
                "class": UnlearnConfig(
                    forget="class",
                    anchor=3.0,
                    neighbours=10.0,
                    task=5.0,
                    dampen=5.0,
                    dampen_items=200,
                    trainable=BUT_OTHER_TOWER,
                    budget=Budget(steps=30, learning_rate=2e-3),
                    group=STRIDE,
                ),
                "instances": UnlearnConfig(
                    forget="instances",
                    forgetting=10.0,
                    forgotten_weight=0.5,
                    trainable=BUT_OTHER_TOWER,
                    budget=Budget(steps=40, learning_rate=1.5e-3),
                    group=STRIDE,
                ),
            },
            STRIDE,
            "the same digits seen eight times each, every half moved, turned, scaled and with noise of its own; "
            "convolutional towers; all views of a digit are forgotten together",
            # A second retraining, which no method is measured against.
            left_out=("gold_drop",),
        ),
    )
}
