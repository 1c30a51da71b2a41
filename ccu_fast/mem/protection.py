"""The generator: surrogate steps, trigger pass, noise pass, round by round; it can stop and go on after any batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ccu_fast import check
from ccu_fast.mem.compat import CompatRound
from ccu_fast.mem.config import Execution, Method, Settings, check_together
from ccu_fast.mem.noise import random_noise, within_pixels
from ccu_fast.mem.placing import gaps, place_among
from ccu_fast.mem.round import Phase, Round
from ccu_fast.mem.source import PairSource, TensorSource
from ccu_fast.mem.surrogate import ModelFactory, generator
from ccu_fast.mem.text_noise import TextNoise
from ccu_fast.mem.triggers import first_triggers, survivors, with_triggers
from ccu_fast.mem.view_round import ViewRound
from ccu_fast.mem.views import Pictures
from ccu_fast.mem.words import alphabet, words_of_the_look
from ccu_fast.models.tokenizer import Tokenizer
from ccu_fast.ops.noise_store.api import NoiseStore
from ccu_fast.runs.progress import Progress, silent


@dataclass(frozen=True)
class Protected:
    """A protected dataset, as :func:`protect` returns it.

    Attributes:
        method, settings: what made it.
        images: uint8 ``[N, C, H, W]``, ready to be published.
        noise: int8 ``[N, C, H, W]``, images minus originals.
        triggers: int64 ``[N, n]``.
        captions: the captions with their triggers.
        losses: the surrogate's mean loss in each round on the protected data: {"surrogate": after its steps,
            "triggers": after the trigger pass, "noise": in the noise pass, before the last step of each batch}.

    >>> images, no_triggers = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, 0, dtype=torch.int64)
    >>> method, settings = ccu_fast.mem.Method.parse("clean"), ccu_fast.mem.Settings()
    >>> ccu_fast.mem.Protected(method, settings, images, images.char(), no_triggers, ["one", "two"]).losses
    {}
    """

    method: Method
    settings: Settings
    images: Tensor
    noise: Tensor
    triggers: Tensor
    captions: list[str]
    losses: dict[str, list[float]] = field(default_factory=dict)


class Protection:
    """One run of a generator over a source of pairs (MEM; EM without triggers; the others of :meth:`Method.parse`).

    Each round: the surrogate takes optimiser steps on the protected pairs; in the first rounds HotFlip improves every
    row's trigger words; PGD improves every image's noise. All of them minimise the same symmetric InfoNCE, so noise
    and trigger become each other's best predictors and a model trained on the pairs has no need of the pictures::

        run = Protection(source, tokenizer, factory, method=Method.parse("mem"))
        for i in range(run.next_round, run.rounds):
            run.round(i)

    :meth:`advance` does a batch of a round; :meth:`state_dict` may be taken after any.

    Args:
        source: the pairs; a :class:`ccu_fast.mem.source.Part` where processes share a dataset, a
            :class:`ccu_fast.mem.views.Pictures` where pictures keep their size.
        tokenizer: captions ↔ ids, and the ids triggers may use.
        factory: makes a surrogate, with random weights or from a checkpoint.
        method: what to make; "clean" returns the data as it is.
        settings: budget and schedule.
        seed: everything random depends on it alone; the patterns of text-noise on the pictures.
        noise_store: int8, one row for each image (for "uap" one row): where the noise is kept, and what a continued
            run starts from; "random" and "text-noise" write it anew. Default: a new one on ``device``.
        device: of surrogate and noise.
        execution: autocast, memory order, compilation.
        shard: number of this process's part. Surrogates start alike in every shard; orders and captions differ.
        average: called with the surrogate's parameters before each of its optimiser steps, to average gradients.
        gather: where processes share a dataset: one's object → those of all.
        captions: where processes share a dataset: all of its captions, from which all choose the same words, and their
            places.
        resumed: :meth:`load_state_dict` follows, so pictures need not be looked at for their first trigger words.
        progress: called as ``progress(stage, done, total, note)`` while they are.

    Raises:
        TypeError, ValueError: naming the argument.

    Source: Liu et al. 2024 (arXiv 2407.16307). Unlike the authors' code, unless ``settings.compat``: an image has one
    noise however many captions it has, each row chooses its own trigger words, only words that are read back from
    publication as the same ids are chosen, the last batch is not dropped, cut captions keep EOT, trigger words may
    come from a small alphabet, captions may be shuffled in all parts of a round, the surrogate may start again.

    >>> source = ccu_fast.mem.protection.TensorSource(torch.zeros(3, 1, 16, 64, dtype=torch.uint8), ["one"] * 3)
    >>> words = ccu_fast.mem.WordTokenizer.for_strips()  # random noise needs no surrogate, hence no factory
    >>> run = ccu_fast.mem.Protection(source, words, None, method=ccu_fast.mem.Method.parse("random"))
    >>> run.rounds, run.published_images(torch.arange(3)).shape
    (0, torch.Size([3, 1, 16, 64]))
    """

    def __init__(
        self,
        source: PairSource,
        tokenizer: Tokenizer,
        factory: ModelFactory,
        *,
        method: Method,
        settings: Settings | None = None,
        seed: int = 0,
        noise_store: NoiseStore | None = None,
        device: torch.device | str | None = None,
        execution: Execution | None = None,
        shard: int = 0,
        average: Callable[[Iterable[nn.Parameter]], None] | None = None,
        gather: Callable[[Any], list[Any]] | None = None,
        captions: Sequence[str] | None = None,
        resumed: bool = False,
        progress: Progress = silent,
    ) -> None:
        settings = Settings() if settings is None else settings
        check.integer("seed", seed, low=0)
        check_together(method, settings)
        if source.n_images < 2:
            raise ValueError(f"images: expected at least 2, got {source.n_images}")
        self.source, self.tokenizer, self.method, self.settings = source, tokenizer, method, settings
        self.universal = method.noise == "universal"
        self.pictures = source if isinstance(source, Pictures) else None
        shape = source.image_shape if self.pictures is None else self.pictures.noise_shape
        rows = 1 if self.universal else source.n_images
        if settings.compat:
            if self.pictures is not None:
                raise ValueError("compat: expected pictures of the model's size, got some that keep their own")
            if len(source.image_of) < settings.batch:
                raise ValueError(
                    f"batch: expected at most the {len(source.image_of)} rows with compat, got {settings.batch}"
                )
            rows = len(source.image_of)
        self.device = torch.device(device or (noise_store.device if noise_store is not None else "cpu"))
        self.store = NoiseStore(rows, shape, device=self.device) if noise_store is None else noise_store
        if (self.store.rows, self.store.item_shape, self.store.dtype) != (rows, shape, torch.int8):
            raise ValueError(f"noise_store: expected int8 with {rows} rows of {list(shape)}, got {self.store}")
        if method.triggers or method.generates:
            progress("preparing captions and words", 0, 1, "")
        self.tokens = tokenizer.encode(source.captions)
        every = self.tokens if captions is None else tokenizer.encode(captions)
        self.alphabet = alphabet(tokenizer, every, method, settings, seed)
        rng = generator(seed, "generate" if shard == 0 else f"generate {shard}")
        self.triggers = self._first_triggers(rng, gather, seed, look=not resumed, progress=progress)
        self.gaps: Tensor | None = None
        if settings.place == "among" and method.triggers:
            every_caption = source.captions if captions is None else captions
            self.gaps = gaps(every_caption, len(source.captions), method.triggers, seed, shard)
        self.next_round = 0
        self._steps: Iterator[None] | None = None  # of a round that was begun
        kind = CompatRound if settings.compat else Round if self.pictures is None else ViewRound
        self.worker = kind(
            source=source,
            tokenizer=tokenizer,
            factory=factory,
            method=method,
            settings=settings,
            seed=seed,
            rng=rng,
            store=self.store,
            tokens=self.tokens,
            triggers=self.triggers,
            alphabet=self.alphabet,
            gaps=self.gaps,
            device=self.device,
            execution=Execution() if execution is None else execution,
            average=average,
        )
        if method.noise == "random":
            self._draw(self._random_noise(seed, shard))
        if method.noise == "words":
            self._draw(self._text_noise(gather, progress))

    @property
    def rounds(self) -> int:
        """How many rounds there are; 0 where no surrogate is needed."""
        only_words = self.method.noise == "none" and not self.settings.search_rounds
        return self.settings.rounds if self.method.generates and not only_words else 0

    @property
    def losses(self) -> dict[str, list[float]]:
        """See :class:`Protected`."""
        return self.worker.losses

    def round(self, index: int) -> None:
        """Advance by round ``index``, the next one.

        Raises:
            ValueError: another round is next.
            FloatingPointError: the surrogate's loss is not finite: its gradients protected nothing.
        """
        if index != self.next_round or index >= self.rounds:
            raise ValueError(f"index: expected the next round, {self.next_round} of {self.rounds}, got {index}")
        while self.next_round == index:
            self.advance()

    def advance(self) -> None:
        """Advance by a batch: a step of the surrogate, or better triggers or noise for some pairs.

        How many there are :meth:`phases` tells.

        Raises:
            ValueError: all rounds are done.
            FloatingPointError: see :meth:`round`.
        """
        if self.next_round >= self.rounds:
            raise ValueError(f"rounds: expected one that is not done, got all {self.rounds} done")
        if self._steps is None:
            self._steps = self.worker.steps(self.next_round)
        try:
            next(self._steps)
        except StopIteration:
            self._steps = None
            self.next_round += 1
        except BaseException:
            self._steps = None  # a generator that raised is over, the round is not
            raise

    def phases(self, index: int) -> dict[Phase, int]:
        """How many batches each phase of a round has, in their order."""
        return self.worker.phases(index)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the noise, which the store holds; tensors are copies."""
        return deepcopy(self.state())

    def state(self) -> dict[str, Any]:
        """The same without copies, to be written at once."""
        worker = self.worker.state()  # first: it takes over the triggers that were found
        return {"next_round": self.next_round, "triggers": self.triggers, "worker": worker}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, with the same source, method, settings and seed, and the noise of that time.

        Raises:
            ValueError: triggers of another number of rows or words.
        """
        check.shape("triggers", state["triggers"], tuple(self.triggers.shape))
        self._steps = None
        self.worker.load_state_dict(state["worker"])
        self.triggers.copy_(state["triggers"])
        self.next_round = int(state["next_round"])

    def published_images(self, index: Tensor) -> Tensor:
        """int64 ``[n]`` image numbers (rows with compat) → uint8 ``[n, C, H, W]`` on the CPU, the noise added.

        Raises:
            ValueError: pictures keep their size; :func:`ccu_fast.mem.publish.whole.published_picture` makes one.
        """
        if self.pictures is not None:
            raise ValueError("index: expected images of the model's size, got pictures that keep their own")
        images = self.source.images(self.source.image_of[index] if self.settings.compat else index)
        return self.store.add_to(images, torch.zeros_like(index) if self.universal else index).cpu()

    def noise_of(self, image: int) -> Tensor:
        """Its noise, int8 ``[C, H, W]`` or on the grid, on the CPU."""
        return self.store.gather(torch.tensor([0 if self.universal else image]), dtype=torch.int8)[0].cpu()

    def published_captions(self, rows: Tensor) -> list[str]:
        """int64 ``[n]`` row numbers → captions with triggers.

        Raises:
            RuntimeError: a caption whose ids are not those that were optimised (never with the tokenizers here).
        """
        captions = [self.source.captions[row] for row in rows.tolist()]
        triggers = self.triggers[rows]
        if self.gaps is not None:
            return place_among(captions, self.tokenizer.decode(triggers), self.gaps[rows])
        if triggers.shape[1] and not self.settings.compat:
            lost = (~survivors(captions, self.tokens[rows], triggers, self.tokenizer)).nonzero()
            if len(lost):
                row = int(rows[lost[0, 0]])
                raise RuntimeError(f"row {row}: its trigger does not come back from decode and encode")
        return with_triggers(captions, triggers, self.tokenizer)

    def _seen(self, index: Tensor) -> Tensor:
        """What the model sees of clean pictures."""
        if self.pictures is None:
            return self.source.images(index)
        return self.pictures.views(index, torch.empty(0, len(index), 3)).pixels[0]

    def _first_triggers(
        self,
        rng: torch.Generator,
        gather: Callable[[Any], list[Any]] | None,
        seed: int,
        *,
        look: bool,
        progress: Progress,
    ) -> Tensor:
        method, settings = self.method, self.settings
        if settings.first == "random" or settings.compat or not (look and method.looks):
            return first_triggers(len(self.tokens), method.triggers, self.alphabet, self.tokenizer, rng, settings)
        return words_of_the_look(self._seen, self.source.n_images, self.alphabet, seed, gather, progress)[
            self.source.image_of
        ]

    def _draw(self, drawn: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Keep noise that needs no surrogate, ``(image numbers, noise)`` in turn."""
        for index, noise in drawn:
            if self.pictures is None:
                noise = within_pixels(self.source.images(index), noise)
            self.store.scatter_(index, noise.to(self.device, torch.int8))

    def _random_noise(self, seed: int, shard: int) -> Iterator[tuple[Tensor, Tensor]]:
        rng = generator(seed, "random noise" if shard == 0 else f"random noise {shard}")
        for index in torch.arange(self.source.n_images).split(1024):
            yield index, random_noise((len(index), *self.store.item_shape), self.settings.eps, rng)

    def _text_noise(
        self, gather: Callable[[Any], list[Any]] | None, progress: Progress
    ) -> Iterator[tuple[Tensor, Tensor]]:
        source = self.source
        captions = self.published_captions(torch.arange(len(source.captions)))
        made = TextNoise(captions, source.image_of, source.n_images, self._seen, gather, progress)
        return made.of_all(self.store.item_shape, self.settings.eps)


def protect(
    images: Tensor,
    captions: list[str],
    tokenizer: Tokenizer,
    factory: ModelFactory,
    *,
    method: Method,
    settings: Settings | None = None,
    seed: int = 0,
    stage: str = "protecting",
    progress: Progress = silent,
) -> Protected:
    """Make image-caption pairs in memory that teach a model less: a whole :class:`Protection`.

    Args:
        images: uint8 ``[N, C, H, W]``.
        captions: N strings.
        tokenizer, factory, method, settings, seed: see :class:`Protection`.
        stage: what progress is told first.
        progress: called as ``progress(stage, done, total, note)``.

    Returns:
        :class:`Protected`.

    Raises:
        TypeError, ValueError: naming the argument.
        FloatingPointError: the surrogate's loss is not finite.

    Source: Liu et al. 2024 (arXiv 2407.16307); see :class:`Protection`.

    >>> images, captions = torch.full((3, 1, 16, 64), 128, dtype=torch.uint8), ["one", "two", "three"]
    >>> words = ccu_fast.mem.WordTokenizer.for_strips()  # random noise needs no surrogate, hence no factory
    >>> made = ccu_fast.mem.protect(images, captions, words, None, method=ccu_fast.mem.Method.parse("random-2"))
    >>> int(made.noise.abs().max()), [len(caption.split()) for caption in made.captions]
    (8, [3, 3, 3])
    """
    run = Protection(TensorSource(images, captions), tokenizer, factory, method=method, settings=settings, seed=seed)
    note = ""
    for i in range(run.rounds):
        progress(stage, i, run.rounds, note)
        run.round(i)
        note = f"surrogate loss {run.losses['noise'][-1]:.3f}"
    if run.rounds:
        progress(stage, run.rounds, run.rounds, note)
    everything = torch.arange(len(images))
    published = run.published_images(everything)
    noise = (published.short() - images.short()).to(torch.int8)
    return Protected(
        method, run.settings, published, noise, run.triggers, run.published_captions(everything), run.losses
    )
