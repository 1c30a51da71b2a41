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
from ccu_fast.mem.placing import place_among
from ccu_fast.mem.source import PairSource, read_ahead
from ccu_fast.mem.surrogate import ModelFactory, batch_count, batches, fresh, frozen, optimizer_for, pixels, train_step
from ccu_fast.mem.triggers import improve_triggers, insert_triggers, survivors, trim
from ccu_fast.mem.views import Views
from ccu_fast.models.dual_encoder import DualEncoder
from ccu_fast.models.tokenizer import Tokenizer
from ccu_fast.ops.machine import moved
from ccu_fast.ops.noise_store.api import NoiseStore
from ccu_fast.ops.topk_flips.api import TokenTable

Phase = Literal["surrogate", "triggers", "noise"]


@dataclass
class Place:
    """How far a round has come: its phase, and what was drawn and found for that so far.

    Attributes:
        phase: the one that is being done.
        plan: its batches, of rows; for noise of images.
        draws: for pictures that keep their size, where the windows of each batch are.
        row_of: for noise, the row that each image is seen with.
        losses: of the batches done, by what they are told as.
        done: how many batches of the plan.
    """

    phase: Phase
    plan: list[Tensor]
    draws: list[Tensor]
    row_of: Tensor | None
    losses: dict[str, list[Tensor]]
    done: int = 0


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
    gaps: Tensor | None
    device: torch.device
    execution: Execution
    average: Callable[[Iterable[nn.Parameter]], None] | None = None
    losses: dict[str, list[float]] = field(default_factory=lambda: {"surrogate": [], "triggers": [], "noise": []})
    todo: list[Tensor] = field(default_factory=list)
    model: DualEncoder | None = None
    place: Place | None = None
    _found: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _tables: list[TokenTable] = field(default_factory=list)

    def phases(self, index: int) -> dict[Phase, int]:
        """How many batches each phase of round ``index`` has, in their order."""
        s, clean = self.settings, self.method.attacks_clean_model
        found: dict[Phase, int] = {}
        if not clean or index == 0:
            found["surrogate"] = s.surrogate_steps * (s.rounds if clean else 1)
        if self.method.triggers and index < s.search_rounds:
            found["triggers"] = batch_count(len(self.tokens), s.batch)
        found["noise"] = batch_count(self.source.n_images, s.batch)
        return found

    def cost(self, phase: Phase) -> int:
        """How much a batch costs, about: passes forward of one tower over it."""
        s = self.settings
        if phase == "surrogate":
            return 6  # a step back costs twice one forward
        if phase == "triggers":
            return 1 + self.method.triggers * (2 + s.candidates)
        return 1 + max(1, 0 if self.method.noise == "none" else 2 * s.pgd_steps)

    def changes_noise(self, phase: Phase) -> bool:
        """Whether a phase writes to the store."""
        return phase == "noise" and self.method.noise != "none"

    def steps(self, index: int) -> Iterator[None]:
        """Do round ``index``, or what is left of it, stopping after each batch but the last.

        Where it stops, :meth:`state_dict` is all there is to the rest of it.
        """
        phases = self.phases(index)
        if self.place is None:
            if self._starts_anew(index):
                self.renew(f"surrogate {index}")
            first = next(iter(phases))
            self.place = self.begin(first, phases[first])
        while True:
            yield from self.through(self.place)
            later = list(phases)[list(phases).index(self.place.phase) + 1 :]
            if not later:
                self.place = None
                return
            begun = bool(self.place.plan)
            self.place = self.begin(later[0], phases[later[0]])
            if begun:
                yield

    def _starts_anew(self, index: int) -> bool:
        restart = self.settings.restart
        return index == 0 or bool(restart and index % restart == 0 and not self.method.attacks_clean_model)

    def begin(self, phase: Phase, count: int) -> Place:
        """Draw a phase's batches; ``count`` is that of the surrogate's steps, all others follow from the data."""
        row_of, plan = None, []
        if phase == "surrogate":
            for _ in range(count):  # an order of all rows is used up before the next is drawn
                self.todo = self.todo or self._order()
                plan.append(self.todo.pop())
        elif phase == "triggers":
            plan = batches(len(self.tokens), self.settings.batch, self.rng)
        else:
            row_of = self._one_row_for_each_image()
            plan = batches(self.source.n_images, self.settings.batch, self.rng)
        return Place(phase, plan, self._draws(phase, plan), row_of, {phase: []})

    def through(self, place: Place) -> Iterator[None]:
        """Do what is left of a phase, stopping after each batch but the last."""
        self._tables = []
        if place.phase == "surrogate":
            self.surrogate.train()
        for part, images in self._read(place):
            self._batch(place, part, images)
            place.done += 1
            if place.done < len(place.plan):
                yield
        self.settle()
        for name, losses in place.losses.items():
            self._note(name, losses[-8:] if name == "surrogate" else losses)

    def recent_loss(self) -> float | None:
        """Of the last batches of the phase that is being done; else of the last noise pass. Waits for the device."""
        found = [] if self.place is None else next(iter(self.place.losses.values()))[-8:]
        if found:
            return float(torch.stack(found).float().mean())
        return self.losses["noise"][-1] if self.losses["noise"] else None

    def renew(self, purpose: str) -> None:
        """A surrogate as the factory makes it, and its optimiser."""
        s = self.settings
        if self.model is not None:  # the one before goes first, so that there are never two
            self.model = None
            del self.optimizer, self.encode_image
        self.model = fresh(self.factory, self.seed, purpose, self.device)
        if self.execution.channels_last:
            cast(nn.Module, self.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer: torch.optim.AdamW = optimizer_for(self.surrogate, s.lr, s.weight_decay, s.beta2)
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

    def _batch(self, place: Place, part: Tensor, images: Tensor | Views) -> None:
        """Do one batch of a phase."""
        if place.phase == "surrogate":
            loss = self._train(part, images)
        else:
            with self.precision():
                loss = self._search(part, images) if place.phase == "triggers" else self._perturb(place, part, images)
        place.losses[place.phase].append(loss)

    def _train(self, rows: Tensor, images: Tensor | Views) -> Tensor:
        """An optimiser step of the surrogate."""
        shown, text = self._shown(images, rows), self._text(rows)
        with self.precision():
            same = self.settings.same_captions
            return train_step(self.surrogate, self.optimizer, shown, text, self.average, same_captions=same)

    def tables(self) -> list[TokenTable]:
        """The surrogate's embeddings of each alphabet, made once in a phase, in which they do not change."""
        if not self._tables:
            matrix = self.surrogate.embedding_matrix.detach()
            self._tables = [TokenTable(matrix, allowed=ids.to(self.device)) for ids in self.alphabet]
        return self._tables

    def _search(self, rows: Tensor, images: Tensor | Views) -> Tensor:
        """Better triggers for some rows."""
        with torch.no_grad(), frozen(self.surrogate):
            image = self.encode_image(self._shown(images, rows))
        found, losses = improve_triggers(
            self.surrogate,
            image,
            self._text(rows),
            self.method.triggers,
            tables=self.tables(),
            candidates=self.settings.candidates,
            eot=self.tokenizer.eot,
        )
        self._found.append((rows, found))
        return losses[-1]

    def settle(self) -> None:
        """Take over the triggers found, for which the device is not waited for after each batch."""
        for rows, found in self._found:
            self._keep(rows, found.cpu())
        self._found = []

    def _perturb(self, place: Place, index: Tensor, images: Tensor | Views) -> Tensor:
        """Better noise for some images, each with one of its captions."""
        s = self.settings
        steps = 0 if self.method.noise == "none" else s.pgd_steps
        where = torch.zeros(1, dtype=torch.int64) if self.method.noise == "universal" else index
        assert place.row_of is not None
        with torch.no_grad(), frozen(self.surrogate):
            text = self.surrogate.encode_text(self._text(place.row_of[index]))
        target = text.roll(1, 0) if self.method.noise == "mislead" else text
        images = images.to(self.device) if isinstance(images, Views) else moved(images, self.device)
        noise, image = pgd(
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
            # Told is the loss that the last step started from: that after it would cost the tower once more. Windows
            # take turns at the steps, so the last step may not have seen the model's own, which is told.
            if image is None or isinstance(images, Views):
                image = self.encode_image(self._pixels(images, index))
            return info_nce(image, text, scale=self.surrogate.scale)

    def state_dict(self) -> dict[str, Any]:
        """Surrogate, optimiser, random state, losses, what is left of a round that was begun; copies."""
        return deepcopy(self.state())

    def state(self) -> dict[str, Any]:
        """The same without copies, which would take three times the surrogate's weights; it changes with the run."""
        self.settle()
        state: dict[str, Any] = {"rng": self.rng.get_state(), "losses": self.losses, "todo": self.todo}
        place = self.place
        state["place"] = place and {
            "phase": place.phase,
            "plan": place.plan[place.done :],
            "draws": place.draws[place.done :],
            "row_of": place.row_of,
            "losses": {n: torch.stack(losses) if losses else torch.empty(0) for n, losses in place.losses.items()},
        }
        if self.model is not None:
            state |= {"model": cast(nn.Module, self.model).state_dict(), "optimizer": self.optimizer.state_dict()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        if "model" in state:
            self.renew("surrogate 0")
            cast(nn.Module, self.model).load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.rng.set_state(state["rng"])
        self.losses.update({name: list(values) for name, values in state["losses"].items()})
        self.todo, self._found = list(state["todo"]), []
        self.place = None
        if (place := state["place"]) is not None:
            losses = {name: list(values.to(self.device)) for name, values in place["losses"].items()}
            self.place = Place(**{**place, "losses": losses})

    def _order(self) -> list[Tensor]:
        """All rows in random batches for the surrogate, the last one first."""
        return batches(len(self.tokens), self.settings.batch, self.rng)

    def _draws(self, phase: Phase, plan: list[Tensor]) -> list[Tensor]:
        """What is random about how each batch is read: nothing, but of pictures that keep their size."""
        return []

    def _read(self, place: Place) -> Iterator[tuple[Tensor, Tensor | Views]]:
        """The batches that are left, with what the model sees of them without noise."""
        rest = place.plan[place.done :]
        return read_ahead(self.source, rest, None if place.phase == "noise" else self.source.image_of)

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
        captions = rows
        if self.method.triggers and torch.rand((), generator=self.rng) < self.settings.shuffle:
            captions = rows[torch.randperm(len(rows), generator=self.rng)]
        return self._ids(captions, rows)

    def _ids(self, captions: Tensor, rows: Tensor) -> Tensor:
        """Captions of some rows with the triggers of others."""
        if self.gaps is None:
            tokens = insert_triggers(self.tokens[captions], self.triggers[rows], self.tokenizer)
        else:
            texts = [self.source.captions[row] for row in captions.tolist()]
            words = self.tokenizer.decode(self.triggers[rows])
            tokens = self.tokenizer.encode(place_among(texts, words, self.gaps[rows]))
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
