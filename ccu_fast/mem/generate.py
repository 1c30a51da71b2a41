"""The generator: surrogate steps, trigger pass, noise pass, round by round."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.losses import info_nce
from ccu_fast.mem.noise import add_noise, minimise_error, random_noise
from ccu_fast.mem.settings import Method, Progress, Settings, silent
from ccu_fast.mem.surrogate import ModelFactory, batches, fresh, generator, optimizer_for, pixels, train_step
from ccu_fast.mem.tokenizer import WordTokenizer, insert_triggers, trim
from ccu_fast.mem.triggers import improve_triggers, random_triggers
from ccu_fast.models.dual_encoder import DualEncoder


@dataclass(frozen=True)
class Protected:
    """A protected dataset.

    Attributes:
        method, settings: what made it.
        images: uint8 ``[N, C, H, W]``, ready to be published.
        noise: int8 ``[N, C, H, W]``, images minus originals.
        triggers: int64 ``[N, n]``.
        captions: the captions with their triggers.
        losses: the surrogate's mean loss in each round on the protected data: {"surrogate": after its steps,
            "triggers": after the trigger pass, "noise": after the noise pass}.
    """

    method: Method
    settings: Settings
    images: Tensor
    noise: Tensor
    triggers: Tensor
    captions: list[str]
    losses: dict[str, list[float]] = field(default_factory=dict)


def protect(
    images: Tensor,
    captions: list[str],
    tokenizer: WordTokenizer,
    factory: ModelFactory,
    *,
    method: Method,
    settings: Settings | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Protected:
    """Make image-caption pairs that teach a model less (MEM; EM without triggers).

    Each round: the surrogate takes optimiser steps on the protected pairs; in the first rounds HotFlip improves every
    row's trigger words; PGD improves every image's noise. All of them minimise the same symmetric InfoNCE, so noise
    and trigger become each other's best predictors and a model trained on the pairs has no need of the pictures.

    Args:
        images: uint8 ``[N, C, H, W]``.
        captions: N strings in the tokenizer's words.
        tokenizer: words ↔ ids, and the words triggers may use.
        factory: makes a surrogate with random weights.
        method: what to make; "clean" returns the data as it is.
        settings: budget and schedule.
        seed: the same seed gives the same bits.
        progress: called as ``progress(stage, done, total, note)``.

    Raises:
        TypeError, ValueError: naming the argument.

    Source: Liu et al. 2024 (arXiv 2407.16307). Different from the authors' code: noise and clamps in pixel space, each
    row chooses its own trigger words, the last batch is not dropped, trigger words come from a small alphabet
    (``Settings.trigger_words``), captions are shuffled in all parts of a round (``Settings.shuffle``) instead of in the
    noise steps alone, and the surrogate starts anew at times (``Settings.restart``).
    """
    settings = Settings() if settings is None else settings
    check.tensor("images", images, dtypes=(torch.uint8,), ndim=4)
    if len(captions) != len(images):
        raise ValueError(f"captions: expected {len(images)} strings (one for each image), got {len(captions)}")
    if len(images) < 2:
        raise ValueError(f"images: expected at least 2, got {len(images)}")
    words = min(len(tokenizer.trigger_ids), settings.trigger_words)
    if method.triggers and words < settings.candidates:
        raise ValueError(f"tokenizer: expected at least {settings.candidates} trigger words (candidates), got {words}")
    run = _Run(images, tokenizer.encode(captions), tokenizer, factory, method, settings, seed)
    if method.noise == "random":
        run.noise = random_noise(images, settings.eps, generator(seed, "random noise"))
    if method.generates:
        for i in range(settings.rounds):
            progress(f"generate {method.name}", i, settings.rounds, run.note())
            run.round(i)
        progress(f"generate {method.name}", settings.rounds, settings.rounds, run.note())
    published = tokenizer.decode(insert_triggers(run.tokens, run.triggers))
    return Protected(method, settings, add_noise(images, run.noise), run.noise, run.triggers, published, run.losses)


class _Run:
    """The state of one run: surrogate, triggers, noise."""

    def __init__(
        self,
        images: Tensor,
        tokens: Tensor,
        tokenizer: WordTokenizer,
        factory: ModelFactory,
        method: Method,
        settings: Settings,
        seed: int,
    ) -> None:
        self.images, self.tokens, self.tokenizer = images, tokens, tokenizer
        self.factory, self.method, self.settings, self.seed = factory, method, settings, seed
        self.rng = generator(seed, "generate")
        self.noise = torch.zeros_like(images, dtype=torch.int8)
        words = torch.randperm(len(tokenizer.trigger_ids), generator=self.rng)[: settings.trigger_words]
        self.alphabet = tokenizer.trigger_ids[words]
        self.triggers = random_triggers(len(images), method.triggers, self.alphabet, self.rng)
        self.losses: dict[str, list[float]] = {"surrogate": [], "triggers": [], "noise": []}

    def note(self) -> str:
        return f"surrogate loss {self.losses['noise'][-1]:.3f}" if self.losses["noise"] else ""

    def round(self, index: int) -> None:
        s = self.settings
        if index == 0 or (s.restart and index % s.restart == 0):
            self.model: DualEncoder = fresh(self.factory, self.seed, f"surrogate {index}")
            self.optimizer = optimizer_for(self.model, s.lr, s.weight_decay)
        self._train_surrogate()
        if self.method.triggers and index < s.trigger_rounds:
            self._improve_triggers()
        self._improve_noise()

    def _train_surrogate(self) -> None:
        losses = []
        todo: list[Tensor] = []
        for _ in range(self.settings.surrogate_steps):
            todo = todo or batches(len(self.images), self.settings.batch, self.rng)
            rows = todo.pop()
            losses.append(train_step(self.model, self.optimizer, pixels(self._protected(rows)), self._text(rows)))
        self.losses["surrogate"].append(_mean(losses[-8:]))

    def _improve_triggers(self) -> None:
        losses = []
        allowed = torch.zeros(len(self.tokenizer), dtype=torch.bool)
        allowed[self.alphabet] = True
        for rows in batches(len(self.images), self.settings.batch, self.rng):
            with torch.no_grad():
                image = self.model.encode_image(pixels(self._protected(rows)))
            self.triggers[rows], steps = improve_triggers(
                self.model,
                image,
                self._text(rows),
                self.method.triggers,
                allowed=allowed,
                candidates=self.settings.candidates,
            )
            losses.append(steps[-1])
        self.losses["triggers"].append(_mean(losses))

    def _improve_noise(self) -> None:
        s = self.settings
        losses = []
        steps = s.pgd_steps if self.method.noise == "minimise" else 0
        for rows in batches(len(self.images), s.batch, self.rng):
            with torch.no_grad():
                text = self.model.encode_text(self._text(rows))
            self.noise[rows] = minimise_error(
                self.model, self.images[rows], self.noise[rows], text, eps=s.eps, step=s.step, steps=steps
            )
            with torch.no_grad():
                image = self.model.encode_image(pixels(self._protected(rows)))
                losses.append(info_nce(image, text, scale=self.model.scale))
        self.losses["noise"].append(_mean(losses))

    def _protected(self, rows: Tensor) -> Tensor:
        return add_noise(self.images[rows], self.noise[rows])

    def _text(self, rows: Tensor) -> Tensor:
        """Captions with triggers; in a share of the calls another row's caption behind one's own trigger."""
        captions = self.tokens[rows]
        if self.method.triggers and torch.rand((), generator=self.rng) < self.settings.shuffle:
            captions = captions[torch.randperm(len(rows), generator=self.rng)]
        return trim(insert_triggers(captions, self.triggers[rows]), self.tokenizer.eot)


def _mean(losses: list[Tensor]) -> float:
    return float(torch.stack(losses).mean()) if losses else float("nan")
