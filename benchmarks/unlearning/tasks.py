"""The tasks that need a folder of npm packages; the embedded ones are in ccu_fast.unlearn.study.tasks.

They were made to judge settings that were chosen on other data.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from ccu_fast.data.pictogram_pairs import (
    GROUPS,
    WORDS,
    load_pictogram_pairs,
    load_pictogram_speech,
    load_pictogram_words,
)
from ccu_fast.data.pictograms import SIDE, things
from ccu_fast.data.spectrogram import FRAMES, MELS
from ccu_fast.data.views import STRIDE
from ccu_fast.models.fusion import ConvFusionModel, TwoTowerClassifier, conv_tower, mlp_tower
from ccu_fast.unlearn.study.tasks import Task, TrainConfig, default_settings

CHANNELS = 16
HIDDEN = 128
LEFT_OUT = ("gold_drop",)  # a retraining of minutes, which no method is measured against


def refuse_others(parser: ArgumentParser, packages: Path) -> None:
    """End the program, before any work, if a folder does not hold the packages."""
    try:
        things(packages)
    except (OSError, ValueError) as error:
        parser.error(f"--{error}")


def pictogram_tasks(
    packages: Path, *, speech: Path | None = None, progress: Callable[[str, int, int, str], object] | None = None
) -> dict[str, Task]:
    """Three tasks in colour, by name. Of pictograms seed 100 was looked at when CCU's defaults were chosen.

    Args:
        packages: the folder with the unpacked packages, see :mod:`ccu_fast.data.pictograms`.
        speech: folder where spoken names are kept; None keeps none.
        progress: of the speaking, called as progress(stage, done, total, note).
    """
    tasks = (
        Task(
            "pictograms",
            partial(load_pictogram_pairs, packages),
            partial(ConvFusionModel, (SIDE, SIDE), len(GROUPS), channels=CHANNELS, hidden=HIDDEN, inputs=3),
            TrainConfig(epochs=12),
            default_settings(STRIDE),
            STRIDE,
            "two artists' drawings of one thing in 32×32 colour pixels, each moved a little; its group is the label; "
            "eight pairs of a thing, which are forgotten together; convolutional towers",
            left_out=LEFT_OUT,
        ),
        Task(
            "pictogram-words",
            partial(load_pictogram_words, packages),
            drawing_and_words,
            TrainConfig(epochs=30),
            default_settings(STRIDE),
            STRIDE,
            "a drawing of a thing is the visual modality, words of its name and keywords the other; four drawings of a "
            "thing, which are forgotten together; a convolutional tower and an MLP",
            left_out=LEFT_OUT,
            kept_back=True,
        ),
        Task(
            "pictogram-speech",
            partial(load_pictogram_speech, packages, cache=speech, progress=progress),
            drawing_and_speech,
            TrainConfig(epochs=20),
            default_settings(STRIDE),
            STRIDE,
            "a drawing of a thing is the visual modality, a synthetic speaker's spectrogram of its name the other; "
            "four of each for a thing, which are forgotten together; convolutional towers",
            left_out=LEFT_OUT,
            kept_back=True,
        ),
    )
    return {task.name: task for task in tasks}


def drawing_and_words() -> TwoTowerClassifier:
    """A convolutional tower on colour pictures, an MLP on which words occur."""
    return TwoTowerClassifier(_drawing_tower(), mlp_tower(WORDS, HIDDEN), HIDDEN, len(GROUPS))


def drawing_and_speech() -> TwoTowerClassifier:
    """A convolutional tower on colour pictures, another on spectrograms."""
    speech = conv_tower((MELS, FRAMES), channels=CHANNELS, hidden=HIDDEN)
    return TwoTowerClassifier(_drawing_tower(), speech, HIDDEN, len(GROUPS))


def _drawing_tower() -> nn.Sequential:
    return conv_tower((SIDE, SIDE), channels=CHANNELS, hidden=HIDDEN, inputs=3)
