"""One round of the generator: train the surrogate, improve the triggers, improve the noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ccu_fast.losses.functional import info_nce
from ccu_fast.mem.config import Execution, Method, Settings
from ccu_fast.mem.noise import pgd
from ccu_fast.mem.source import PairSource, read_ahead
from ccu_fast.mem.surrogate import ModelFactory, batches, fresh, frozen, optimizer_for, pixels, train_step
from ccu_fast.mem.triggers import improve_triggers, insert_triggers, survivors, trim
from ccu_fast.mem.views import Views
from ccu_fast.models.dual_encoder import DualEncoder
from ccu_fast.models.tokenizer import Tokenizer
from ccu_fast.ops.machine import moved
from ccu_fast.ops.noise_store.api import NoiseStore
from ccu_fast.ops.topk_flips.api import TokenTable

Purpose = Literal["train", "look", "change"]  # the surrogate, triggers, noise: what a batch is read for


@dataclass
class Round:
    """What the rounds of a :class:`ccu_fast.mem.protection.Protection` share. Tokens and triggers stay on the CPU."""

    source: PairSource
    tokenizer: Tokenizer
    factory: ModelFactory
    method: Method
    settings: Settings
    seed: int
    rng: torch.Generator
    store: NoiseStore
    tokens: Tensor
    triggers: Tensor
    alphabet: Tensor
    device: torch.device
    execution: Execution
    average: Callable[[Iterable[nn.Parameter]], None] | None = None
    losses: dict[str, list[float]] = field(default_factory=lambda: {"surrogate": [], "triggers": [], "noise": []})
    todo: list[Tensor] = field(default_factory=list)
    model: DualEncoder | None = None

    def run(self, index: int) -> None:
        """Round ``index``."""
        s, clean = self.settings, self.method.attacks_clean_model
        if index == 0 or (s.restart and index % s.restart == 0 and not clean):
            self.renew(f"surrogate {index}")
        if not clean or index == 0:
            self.train_surrogate(s.surrogate_steps * (s.rounds if clean else 1))
        with self.precision():
            if self.method.triggers and index < s.search_rounds:
                self.improve_triggers()
            self.improve_noise()

    def renew(self, purpose: str) -> None:
        """A surrogate as the factory makes it, and its optimiser."""
        s = self.settings
        self.model = fresh(self.factory, self.seed, purpose, self.device)
        if self.execution.channels_last:
            cast(nn.Module, self.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = optimizer_for(self.surrogate, s.lr, s.weight_decay, s.beta2)
        self.encode_image: Callable[[Tensor], Tensor] = self.surrogate.encode_image
        if self.execution.compile is not None:
            self.encode_image = torch.compile(self.encode_image, mode=self.execution.compile, dynamic=False)

    @property
    def surrogate(self) -> DualEncoder:
        assert self.model is not None, "no round was run"
        return self.model

    def precision(self) -> AbstractContextManager[Any]:
        dtype = self.execution.autocast
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def train_surrogate(self, steps: int) -> None:
        """Optimiser steps on random batches of rows; an order of all rows is used up before the next is drawn."""
        plan = []
        for _ in range(steps):
            self.todo = self.todo or self._order()
            plan.append(self.todo.pop())
        losses, same = [], self.settings.same_captions
        self.surrogate.train()
        for rows, images in self._read(plan, self.source.image_of, "train"):
            shown, text = self._shown(images, rows), self._text(rows)
            with self.precision():
                step = train_step(self.surrogate, self.optimizer, shown, text, self.average, same_captions=same)
            losses.append(step)
        self._note("surrogate", losses[-8:])

    def improve_triggers(self) -> None:
        """One pass over all rows."""
        matrix = self.surrogate.embedding_matrix.detach()
        tables = [TokenTable(matrix, allowed=ids.to(self.device)) for ids in self.alphabet]
        losses, waiting = [], []
        plan = batches(len(self.tokens), self.settings.batch, self.rng)
        for rows, images in self._read(plan, self.source.image_of, "look"):
            with torch.no_grad(), frozen(self.surrogate):
                image = self.encode_image(self._shown(images, rows))
            found, steps = improve_triggers(
                self.surrogate,
                image,
                self._text(rows),
                self.method.triggers,
                tables=tables,
                candidates=self.settings.candidates,
                eot=self.tokenizer.eot,
            )
            waiting.append((rows, found))
            losses.append(steps[-1])
        for rows, found in waiting:
            self._keep(rows, found.cpu())
        self._note("triggers", losses)

    def improve_noise(self) -> None:
        """One pass over all images, each with one of its captions."""
        s, universal = self.settings, self.method.noise == "universal"
        steps = 0 if self.method.noise == "none" else s.pgd_steps
        row_of = self._one_row_for_each_image()
        losses = []
        for index, images in self._read(batches(self.source.n_images, s.batch, self.rng), None, "change"):
            where = torch.zeros(1, dtype=torch.int64) if universal else index
            with torch.no_grad(), frozen(self.surrogate):
                text = self.surrogate.encode_text(self._text(row_of[index]))
            target = text.roll(1, 0) if self.method.noise == "mislead" else text
            images = images.to(self.device) if isinstance(images, Views) else moved(images, self.device)
            noise = pgd(
                self.surrogate,
                images,
                self.store.gather(where, dtype=torch.int8),
                target,
                eps=s.eps,
                step=s.step,
                steps=steps,
                maximise=self.method.noise == "maximise",
                encode=self.encode_image,
            )
            if steps:
                self.store.scatter_(where, noise)
            with torch.no_grad(), frozen(self.surrogate):
                image = self.encode_image(self._pixels(images, index))
                losses.append(info_nce(image, text, scale=self.surrogate.scale))
        self._note("noise", losses)

    def state_dict(self) -> dict[str, Any]:
        """Surrogate, optimiser, random state, losses; copies."""
        state: dict[str, Any] = {"rng": self.rng.get_state(), "losses": self.losses, "todo": self.todo}
        if self.model is not None:
            state |= {"model": cast(nn.Module, self.model).state_dict(), "optimizer": self.optimizer.state_dict()}
        return deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        if "model" in state:
            self.renew("surrogate 0")
            cast(nn.Module, self.model).load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.rng.set_state(state["rng"])
        self.losses.update({name: list(values) for name, values in state["losses"].items()})
        self.todo = list(state["todo"])

    def _order(self) -> list[Tensor]:
        """All rows in random batches for the surrogate, the last one first."""
        return batches(len(self.tokens), self.settings.batch, self.rng)

    def _read(
        self, plan: list[Tensor], image_of: Tensor | None, purpose: Purpose
    ) -> Iterator[tuple[Tensor, Tensor | Views]]:
        """Each part of a plan, rows or (without ``image_of``) images, with what the model sees of it without noise."""
        return read_ahead(self.source, plan, image_of)

    def _shown(self, images: Tensor | Views, rows: Tensor) -> Tensor:
        """The rows' images with their noise, as the model takes them."""
        return self._pixels(images, self.source.image_of[rows])

    def _pixels(self, images: Tensor | Views, index: Tensor) -> Tensor:
        """Images of the given numbers with their noise, as the model takes them."""
        if self.method.noise == "universal":
            index = torch.zeros_like(index)
        out = pixels(self._noisy(images, index), self.surrogate.embedding_matrix.dtype)
        return out.to(memory_format=torch.channels_last) if self.execution.channels_last else out

    def _noisy(self, images: Any, index: Tensor) -> Tensor:
        """With the noise of these rows of the store, 0..255."""
        if self.method.attacks_clean_model and not self.losses["surrogate"]:
            return cast(Tensor, images.to(self.device))
        return self.store.add_to(moved(images, self.device), index)

    def _text(self, rows: Tensor) -> Tensor:
        """Captions with triggers; in a share of the calls another row's caption behind one's own trigger."""
        captions = self.tokens[rows]
        if self.method.triggers and torch.rand((), generator=self.rng) < self.settings.shuffle:
            captions = captions[torch.randperm(len(rows), generator=self.rng)]
        return self._ids(captions, rows)

    def _ids(self, captions: Tensor, rows: Tensor) -> Tensor:
        tokens = insert_triggers(captions, self.triggers[rows], self.tokenizer)
        return moved(trim(tokens, self.tokenizer.eot), self.device)

    def _keep(self, rows: Tensor, found: Tensor) -> None:
        """Take new triggers where they come back from publication as the same ids."""
        captions = [self.source.captions[row] for row in rows.tolist()]
        good = survivors(captions, self.tokens[rows], found, self.tokenizer)
        self.triggers[rows[good]] = found[good]

    def _one_row_for_each_image(self) -> Tensor:
        """int64 ``[n_images]``: a random row of each image."""
        order = torch.randperm(len(self.tokens), generator=self.rng)
        images, place = self.source.image_of[order].sort(stable=True)
        first = torch.ones_like(images, dtype=torch.bool)
        first[1:] = images[1:] != images[:-1]
        return order[place[first]]

    def _note(self, phase: str, losses: list[Tensor]) -> None:
        mean = float(torch.stack(losses).float().mean()) if losses else float("nan")
        if losses and not mean < float("inf"):
            raise FloatingPointError(f"the surrogate's loss ({phase}) is {mean}: nothing was protected by it")
        self.losses[phase].append(mean)
