"""What a protection run does: the method, its budget and its schedule."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ccu_fast import check

Progress = Callable[[str, int, int, str], None]
"""``progress(stage, done, total, note)``."""

NOISE_KINDS = ("none", "random", "minimise")


def silent(stage: str, done: int, total: int, note: str) -> None:
    """The progress callback that says nothing."""


@dataclass(frozen=True)
class Method:
    """One way to protect.

    Attributes:
        name: what reports call it.
        noise: "none", "random" (uniform within ±eps, the control; its triggers are random too) or "minimise"
            (error-minimising PGD).
        triggers: trigger words in front of each caption, 0 for none.
    """

    name: str
    noise: str
    triggers: int = 0

    def __post_init__(self) -> None:
        check.one_of("noise", self.noise, NOISE_KINDS)
        check.integer("triggers", self.triggers, low=0)

    @property
    def generates(self) -> bool:
        """Whether a surrogate is needed."""
        return self.noise == "minimise" or (self.noise == "none" and self.triggers > 0)

    @staticmethod
    def parse(name: str) -> Method:
        """Read "clean", "random", "random-3", "em", "mem" (three trigger words), "mem-5", "trigger-3", …

        Raises:
            ValueError: an unknown name.
        """
        match = re.fullmatch(r"(clean|em|random|mem|trigger)(?:-([1-9]\d?))?", str(name))
        if match is None or (match[1] in ("clean", "em") and match[2]):
            raise ValueError(f"method: expected clean, random[-n], em, mem[-n] or trigger[-n], got {name!r}")
        kind, length = match.groups()
        noise = {"clean": "none", "em": "minimise", "random": "random", "mem": "minimise", "trigger": "none"}[kind]
        default = 3 if kind in ("mem", "trigger") else 0
        return Method(name, noise, int(length or default))


@dataclass(frozen=True)
class Settings:
    """The schedule of a protection run; the defaults are those of ``digit-strips``.

    Attributes:
        eps: largest change of a pixel, in 1/255.
        step: PGD step, in 1/255. Both are integers, so the noise is lossless in uint8.
        pgd_steps: PGD steps for each batch and round.
        rounds: surrogate steps, then a trigger pass, then a noise pass.
        trigger_rounds: the first rounds, in which triggers are still changed.
        trigger_words: size of the alphabet that the run draws from the tokenizer's trigger words. A small one is the
            easier lesson: each word and the noise that goes with it then occur often.
        candidates: words tried at each trigger position.
        surrogate_steps: optimiser steps of the surrogate in each round.
        restart: rounds after which the surrogate starts again from new random weights; 0 for never. A victim starts
            there too, so noise should be easy to learn for more than one young model.
        shuffle: share of the generator's steps in which captions change places within the batch while triggers stay
            with their image, so that noise and trigger must predict each other without the caption's help.
        batch: pairs in a batch.
        lr: learning rate of the surrogate.
        weight_decay: of the surrogate's matrices.
    """

    eps: int = 8
    step: int = 1
    pgd_steps: int = 6
    rounds: int = 9
    trigger_rounds: int = 3
    trigger_words: int = 16
    candidates: int = 8
    surrogate_steps: int = 32
    restart: int = 3
    shuffle: float = 1.0
    batch: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        check.integer("eps", self.eps, low=0, high=127)
        check.integer("step", self.step, low=1, high=127)
        check.integer("batch", self.batch, low=2)
        for name in ("rounds", "candidates", "trigger_words"):
            check.integer(name, getattr(self, name), low=1)
        for name in ("pgd_steps", "trigger_rounds", "surrogate_steps", "restart"):
            check.integer(name, getattr(self, name), low=0)
        check.number("shuffle", self.shuffle, low=0.0, high=1.0)
        check.number("lr", self.lr, low=0.0)
        check.number("weight_decay", self.weight_decay, low=0.0)
