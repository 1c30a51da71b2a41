"""What a protection run does: the method, its budget and its schedule."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from ccu_fast import check

NOISE_KINDS = ("none", "random", "words", "minimise", "maximise", "mislead", "universal")


@dataclass(frozen=True)
class Method:
    """One way to protect.

    Attributes:
        name: what reports call it.
        noise: "none"; "random" (uniform within ±eps, the control; its triggers are random too); "words" (a pattern for
            each word of the caption, see :mod:`ccu_fast.mem.text_noise`); "minimise"
            (error-minimising PGD); "universal" (the same, one noise for all images); "maximise" and "mislead" (PGD
            against a surrogate trained on the clean pairs: away from the image's caption, or towards another's).
        triggers: trigger words in front of each caption, 0 for none.

    >>> ccu_fast.mem.Method.parse("mem-5")
    Method(name='mem-5', noise='minimise', triggers=5)
    """

    name: str
    noise: str
    triggers: int = check.field(0, low=0)

    def __post_init__(self) -> None:
        check.one_of("noise", self.noise, NOISE_KINDS)
        check.fields(self)

    @property
    def generates(self) -> bool:
        """Whether a surrogate is needed."""
        return self.noise in NOISE_KINDS[3:] or (self.noise == "none" and self.triggers > 0)

    @property
    def looks(self) -> bool:
        """Whether trigger words may tell of the look."""
        return self.triggers > 0 and self.noise != "random"

    @property
    def attacks_clean_model(self) -> bool:
        """TAP: the surrogate is trained once, on the pairs as they came."""
        return self.noise in ("maximise", "mislead")

    @staticmethod
    def parse(name: str) -> Method:
        """Read a name.

        - ``clean``: the data as they came
        - ``random``, ``random-n``: uniform noise, and n random trigger words: the control
        - ``em``: error-minimising noise (Huang et al. 2021)
        - ``mem``, ``mem-n``: error-minimising noise and n trigger words (three)
        - ``trigger``, ``trigger-n``: the trigger words alone (three)
        - ``text-noise``, ``text-noise-n``: noise that the caption's words make, and n trigger words
        - ``uap``: one error-minimising noise for all images
        - ``tap``, ``tap-targeted``: adversarial poisons (Fowl et al. 2021)

        Raises:
            ValueError: an unknown name.
        """
        plain, worded = r"clean|em|uap|tap-targeted|tap", r"(random|mem|trigger|text-noise)(?:-([1-9]\d?))?"
        match = re.fullmatch(f"({plain})|{worded}", str(name))
        if match is None:
            raise ValueError(
                "method: expected clean, random[-n], em, mem[-n], trigger[-n], text-noise[-n], uap, tap or "
                f"tap-targeted, got {name!r}"
            )
        kind, length = match[1] or match[2], match[3]
        default = 3 if kind in ("mem", "trigger") else 0
        return Method(name, _NOISE[kind], int(length or default))


_NOISE = {
    "clean": "none",
    "trigger": "none",
    "random": "random",
    "text-noise": "words",
    "em": "minimise",
    "mem": "minimise",
    "uap": "universal",
    "tap": "maximise",
    "tap-targeted": "mislead",
}


@dataclass(frozen=True)
class Settings:
    """The schedule of a protection run; the defaults are those of ``digit-strips``.

    Attributes:
        eps: largest change of a pixel, in 1/255.
        step: PGD step, in 1/255. Both are integers, so the noise is lossless in uint8.
        pgd_steps: PGD steps for each batch and round.
        rounds: surrogate steps, then a trigger pass, then a noise pass.
        trigger_rounds: the first rounds, in which HotFlip changes trigger words. None: none where they tell of the
            look, which the search does not ask for, else three.
        first: where trigger words start. "look": they name what a picture looks like, each word another side of it
            and from words of its own, see :mod:`ccu_fast.mem.look`; "random".
        words: what they are. "captions": words that captions have, of the middle of their frequencies, so that those
            of a caption and the trigger contradict each other; "everyday": words that they have not.
        place: where they stand. "front": in front of the caption, as MEM has them; "among": between its words, other
            places for each caption, so that they are not cut off with its first words, see
            :mod:`ccu_fast.mem.placing`. They are not searched for there.
        trigger_words: size of the alphabet that the run draws from the tokenizer's trigger words. A small one is
            easier to learn: each word and the noise that goes with it then occur often. None, or 0: all of them.
        candidates: words tried at each trigger position.
        surrogate_steps: optimiser steps of the surrogate in each round.
        restart: rounds after which the surrogate starts again from new random weights; 0 for never. A victim starts
            there too, so noise should be easy to learn for more than one young model.
        shuffle: share of the generator's steps in which captions change places within the batch while triggers stay
            with their image, so that noise and trigger must predict each other without the caption's help.
        batch: pairs in a batch.
        lr: learning rate of the surrogate.
        weight_decay: of the surrogate's matrices.
        beta2: AdamW's second decay rate.
        same_captions: pairs of a batch with equal captions are no negatives of each other when the surrogate learns.
        view_area: of pictures that keep their size the model sees its own centre crop and, drawn anew for each batch,
            smaller windows of the same aspect anywhere: with at least this share of the area of the largest one. 1:
            the centre crop alone.
        grid: of pictures that keep their size: the noise has this many values for each pixel of the model and axis.
        compat: decide as the authors' code does, see :mod:`ccu_fast.mem.compat`.

    >>> ccu_fast.mem.Settings(eps=16).rounds
    9
    """

    eps: int = check.field(8, "Largest change of a pixel, in 1/255.", low=0, high=127)
    step: int = check.field(1, "Step of the noise, in 1/255.", low=1, high=127)
    pgd_steps: int = check.field(6, "Steps of the noise for each batch and round.", low=0)
    rounds: int = check.field(9, "Surrogate steps, trigger pass, noise pass.", low=1)
    trigger_rounds: int | None = check.field(
        None, "First rounds, in which triggers change; 0 if they tell of the look, else 3.", low=0
    )
    first: str = check.field(
        "look", "look: trigger words tell what a picture looks like; or random.", allowed=("look", "random")
    )
    words: str = check.field(
        "captions",
        "captions: trigger words are some that captions have; everyday: others.",
        allowed=("captions", "everyday"),
    )
    place: str = check.field(
        "front",
        "front: trigger words stand before the caption; among: between its words.",
        allowed=("front", "among"),
    )
    trigger_words: int | None = check.field(
        16, "Words that triggers are made of, drawn for the run; 0: all there are.", low=0
    )
    candidates: int = check.field(8, "Words tried at each trigger position.", low=1)
    surrogate_steps: int = check.field(32, "Steps of the surrogate in each round.", low=0)
    restart: int = check.field(3, "Rounds after which the surrogate starts anew; 0: never.", low=0)
    shuffle: float = check.field(
        1.0, "Share of the steps in which captions change places and triggers stay.", low=0.0, high=1.0
    )
    batch: int = check.field(128, "Pairs in a batch (of each process).", low=2)
    lr: float = check.field(1e-3, "Learning rate of the surrogate.", low=0.0)
    weight_decay: float = check.field(0.1, "Of the surrogate's matrices.", low=0.0)
    beta2: float = check.field(0.98, "Second decay rate of the surrogate's AdamW.", low=0.0, high=0.99999)
    same_captions: bool = check.field(False, "Pairs with equal captions are no negatives of each other in training.")
    view_area: float = check.field(
        0.8, "Pictures that keep their size: least share of the area that the model's windows have.", low=0.01, high=1.0
    )
    grid: int = check.field(
        1, "Pictures that keep their size: values of the noise for each pixel of the model, per axis.", low=1
    )
    compat: bool = check.field(False, "Decide as the authors' code does; with --size alone.")

    def __post_init__(self) -> None:
        check.fields(self)
        if self.trigger_words == 0:  # a flag and a settings file have no None
            object.__setattr__(self, "trigger_words", None)
        if self.place == "among" and (self.compat or self.search_rounds):
            why = "compat" if self.compat else f"trigger_rounds={self.search_rounds}"
            raise ValueError(f"place: expected 'front' with {why}, which searches in front of captions, got 'among'")

    @property
    def search_rounds(self) -> int:
        """``trigger_rounds``, or what takes its place."""
        if self.trigger_rounds is not None:
            return self.trigger_rounds
        return 0 if self.first == "look" and not self.compat else 3


def check_together(method: Method, settings: Settings) -> None:
    """What a method cannot do.

    Raises:
        ValueError: naming the setting.
    """
    if settings.compat and method.noise not in ("none", "minimise"):
        raise ValueError(f"method: expected clean, em, mem or trigger with compat, got {method.name!r}")
    if method.noise == "words" and method.triggers and settings.search_rounds:
        raise ValueError(
            f"trigger_rounds: expected 0 with {method.name}, which has no surrogate to search words with, got "
            f"{settings.search_rounds}"
        )


# The rows of benchmarks/protection that have the same settings say what each does.
STRENGTHS: dict[str, dict[str, Any]] = {
    "light": {"method": "trigger-3", "trigger_words": 8},
    "medium": {"method": "mem-8", "trigger_words": 8},
    "strong": {"method": "mem-12", "trigger_words": 8, "place": "among"},
}


def strength(name: str) -> dict[str, Any]:
    """The method's name and the settings that a strength stands for; all others are the defaults.

    Args:
        name: "light", "medium" or "strong".

    Returns:
        ``{"method": …}`` for :meth:`Method.parse`, and fields of :class:`Settings` by their names.

    Raises:
        ValueError: another name.

    Source: this project; what each leaves of a victim is in benchmarks/protection.

    >>> ccu_fast.mem.strength("light")
    {'method': 'trigger-3', 'trigger_words': 8}
    """
    check.one_of("strength", name, tuple(STRENGTHS))
    return dict(STRENGTHS[name])


@dataclass(frozen=True)
class Execution:
    """How a run computes; what it computes stays the same up to rounding.

    Attributes:
        autocast: dtype of the encoders' matrix products, bf16 or fp16; None for full precision. Losses stay fp32.
        channels_last: memory order of the images and of the surrogate's convolutions.
        compile: None, or the mode of ``torch.compile`` for the image tower; "reduce-overhead" replays CUDA graphs.

    >>> ccu_fast.mem.Execution(autocast=torch.bfloat16).channels_last
    False
    """

    autocast: torch.dtype | None = None
    channels_last: bool = check.field(False, "Memory order of the pictures.")
    compile: str | None = check.field(
        None,
        "default, reduce-overhead (CUDA graphs) or max-autotune: torch.compile the image tower.",
        allowed=("default", "reduce-overhead", "max-autotune"),
    )

    def __post_init__(self) -> None:
        check.fields(self)
        if self.autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast: expected None, torch.bfloat16 or torch.float16, got {self.autocast!r}")
