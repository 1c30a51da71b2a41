"""Tasks from data to figures: protect with every method, train a victim on each, measure it on clean test pairs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.data.pictograms import load_pictograms
from ccu_fast.data.strips import LENGTH, caption, load_strips
from ccu_fast.files import new_folder
from ccu_fast.mem.config import Method, Settings
from ccu_fast.mem.fidelity import noise_report
from ccu_fast.mem.job.treatments import Treatment
from ccu_fast.mem.protection import protect
from ccu_fast.mem.publish.memory import export
from ccu_fast.mem.retrieval import groups, guessing, reading, retrieval
from ccu_fast.mem.surrogate import ModelFactory, generator, pixels
from ccu_fast.mem.tokenizer import LetterTokenizer, WordTokenizer
from ccu_fast.mem.triggers import insert_triggers, random_triggers
from ccu_fast.mem.victim import Recipe, Victim, train_victim
from ccu_fast.models.dual_encoder import DualEncoder, SmallDualEncoder
from ccu_fast.models.tokenizer import Tokenizer
from ccu_fast.runs.progress import Progress, silent

EXAMPLES = 6
# Other models than the surrogate's: with a vision transformer and three text blocks; wider by 32 channels; that reads
# letters instead of words.
STRANGERS = ("other towers", "wider", "letters")


@dataclass(frozen=True)
class Task:
    """Pairs to protect, clean pairs of the same kind to be tested on, and the models that learn.

    Attributes:
        name: what reports call it.
        images: uint8 ``[N, C, H, W]``, to be protected.
        captions: N strings.
        test_images: uint8 ``[M, C, H, W]``.
        test_captions: M strings.
        tokenizer: of the surrogate and the victim.
        width: of their towers.
        digits: int64 ``[M, 4]``, what the test strips show; None for pictures that are no strips.
    """

    name: str
    images: Tensor
    captions: list[str]
    test_images: Tensor
    test_captions: list[str]
    tokenizer: WordTokenizer
    width: int = 96
    digits: Tensor | None = None

    def factory(self, **options: Any) -> ModelFactory:
        """Makes the surrogate, and the victim; ``options`` of :class:`SmallDualEncoder` make it another."""
        options = {"width": self.width, "dim": self.width, **options}
        tokenizer = options.pop("tokenizer", self.tokenizer)
        channels, height, width = self.images.shape[1:]
        return partial(
            SmallDualEncoder,
            len(tokenizer),
            tokenizer.eot,
            image_size=(height, width),
            channels=channels,
            context=tokenizer.context,
            **options,
        )

    def stranger(self, name: str) -> tuple[ModelFactory, Tokenizer]:
        """One of :data:`STRANGERS`, and what it reads captions with."""
        if name == "letters":
            letters = LetterTokenizer()
            return self.factory(tokenizer=letters), letters
        options = {"image_tower": "patches", "text_depth": 3} if name == "other towers" else {"width": self.width + 32}
        return self.factory(**options), self.tokenizer


def digit_strips(seed: int = 0, *, n_train: int = 2048, n_test: int = 500, width: int = 96) -> Task:
    """Strips of four real digits whose captions read them; see :func:`ccu_fast.data.strips.load_strips`.

    Args:
        seed: of the split.
        n_train, n_test: numbers of strips.
        width: of both towers.

    >>> digit_strips(n_train=4, n_test=2).images.shape
    torch.Size([4, 1, 16, 64])
    """
    train, test = load_strips(n_train, n_test, seed=seed)
    tokenizer = WordTokenizer.for_strips()
    return Task("digit-strips", train.images, train.captions, test.images, test.captions, tokenizer, width, test.digits)


def pictograms(packages: str | Path, seed: int = 0, *, width: int = 96, **options: Any) -> Task:
    """Two artists' drawings to learn from, a third one's to be tested on.

    Args:
        packages: the folder with the npm packages; see :func:`ccu_fast.data.pictograms.load_pictograms`.
        seed: of the things and their captions.
        width: of both towers.
        options: of :func:`ccu_fast.data.pictograms.load_pictograms`.

    >>> pictograms("packages", n_things=10, n_test=5).name  # doctest: +SKIP
    'pictograms'
    """
    train, test = load_pictograms(packages, seed=seed, **options)
    tokenizer = WordTokenizer.for_captions([*train.captions, *test.captions])
    return Task("pictograms", train.images, train.captions, test.images, test.captions, tokenizer, width)


def run_digit_strips(
    seed: int = 0,
    methods: Sequence[str] = ("clean", "em", "mem"),
    progress: Progress | None = None,
    out: str | Path | None = None,
    *,
    n_train: int = 2048,
    n_test: int = 500,
    width: int = 96,
    **options: Any,
) -> dict[str, Any]:
    """Run :func:`run_task` on :func:`digit_strips`.

    Args:
        seed, methods, progress, out, options: as for :func:`run_task`.
        n_train, n_test: numbers of strips.
        width: of both towers.

    Returns:
        As :func:`run_task`.

    Raises:
        ValueError, OSError: as :func:`run_task`.

    Source: the protocol of Liu et al. 2024 (arXiv 2407.16307) on this project's small task.

    >>> small = {"n_train": 32, "n_test": 10, "recipe": ccu_fast.mem.Recipe(epochs=1)}  # some seconds
    >>> list(ccu_fast.mem.run_digit_strips(methods=["clean"], **small)["methods"])  # doctest: +SKIP
    ['clean']
    """
    check.integer("seed", seed, low=0)
    make = partial(digit_strips, seed, n_train=n_train, n_test=n_test, width=width)
    return run_task(make, seed, methods, progress, out, **options)


def run_task(
    make: Callable[[], Task],
    seed: int,
    methods: Sequence[str],
    progress: Progress | None = None,
    out: str | Path | None = None,
    *,
    settings: Settings | None = None,
    recipe: Recipe | None = None,
    transfer: Sequence[str] = (),
    treatments: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Protect a task with each method, train a fresh victim on what is published, evaluate it on clean test pairs.

    The victim has the surrogate's architecture but other random weights; its weights and batches are the same for
    every method. The same arguments give the same figures (for the same number of threads).

    Args:
        make: makes the task, after the other arguments were checked.
        seed: of surrogate and victim.
        methods: names for :meth:`ccu_fast.mem.config.Method.parse`, each at most once.
        progress: called as ``progress(stage, done, total, note)``.
        out: when given, the datasets are also written to ``out/<method>`` (see :func:`ccu_fast.mem.export`).
        settings: budget and schedule of the generator.
        recipe: the victim's training.
        transfer: of :data:`STRANGERS`: for each a victim of that kind is trained, too.
        treatments: see :class:`ccu_fast.mem.job.treatments.Treatment`; for each a victim is trained on what it leaves,
            for those of trigger words only where there are some.
        labels: what progress calls methods, where that is not their name.

    Returns:
        A dict that ``json.dumps`` takes. ``guessing``: R@k of a random order. ``methods[name]``:

        - ``last``, ``best``: retrieval on clean test pairs (R@k as shares, median ranks) after the last epoch and
          after the epoch with the highest R@1 (mean of both directions; the protector's worst case), with ``epoch``
        - ``prefixed``: after the last epoch, retrieval when test captions carry random trigger words (None without
          triggers): how much of the damage comes from captions that look different
        - ``reading``: after the last epoch zero-shot reading (None for pictures that are no strips)
        - ``transfer[name]``, ``robustness[treatment]``: ``last`` and ``best`` of the victim of another kind, and of the
          one trained on treated pairs
        - ``train_loss``, ``curve``: of the victim, for each epoch; ``surrogate_loss``: of the generator, for each round
        - ``noise``: ``eps_255`` (largest change, in 1/255) and ``psnr_db``
        - ``examples``: ``caption``, ``published`` (caption with triggers) and ``clean``, ``protected``, ``noise`` as
          nested lists ``[H][W]`` of ints, of the first channel

    Raises:
        ValueError: unknown or repeated method, an unknown kind or treatment.
        OSError: a folder below ``out`` has contents or cannot be written.

    Source: the protocol of Liu et al. 2024 (arXiv 2407.16307).

    >>> make = lambda: digit_strips(n_train=32, n_test=10)
    >>> list(run_task(make, 0, ["clean"], recipe=ccu_fast.mem.Recipe(epochs=1))["methods"])  # doctest: +SKIP
    ['clean']
    """
    parsed = [Method.parse(name) for name in methods]
    if len(set(methods)) != len(parsed):
        raise ValueError(f"methods: expected each method once, got {list(methods)}")
    check.integer("seed", seed, low=0)
    for name in transfer:
        check.one_of("transfer", name, STRANGERS)
    for name in treatments:
        Treatment.parse(name)
    if out is not None:
        for method in parsed:
            new_folder(Path(out) / method.name)
    progress, labels = silent if progress is None else progress, labels or {}
    settings = Settings() if settings is None else settings
    recipe = Recipe() if recipe is None else recipe
    task = make()
    exam = _Exam(task, task.tokenizer, seed)
    result: dict[str, Any] = {
        "task": task.name,
        "seed": seed,
        "train": len(task.images),
        "test": len(task.test_images),
        "width": task.width,
        "settings": asdict(settings),
        "recipe": asdict(recipe),
        "guessing": {f"r{k}": share for k, share in guessing(exam.groups, exam.groups).items()},
        "methods": {},
    }
    victims = _Victims(task, recipe, seed, progress)
    for method in parsed:
        label = labels.get(method.name, method.name)
        protected = protect(
            task.images,
            task.captions,
            task.tokenizer,
            task.factory(),
            method=method,
            settings=settings,
            seed=seed,
            stage=f"protecting, {label}",
            progress=progress,
        )
        if out is not None:
            export(protected, Path(out) / method.name, seed=seed)
        published = (protected.images, protected.captions)
        victim = victims.train(label, *published)
        robustness = {}
        for name in treatments:
            treatment = Treatment.parse(name)
            if treatment.needs_triggers and not method.triggers:
                continue
            left = (
                treatment.of_images(protected.images, seed),
                treatment.of_captions(protected.captions, method.triggers, seed),
            )
            robustness[name] = victims.train(f"{label}, {name}", *left).last_and_best()
        result["methods"][method.name] = {
            **victim.last_and_best(),
            "reading": exam.reading(victim.model),
            "prefixed": exam.prefixed(victim.model, method.triggers),
            "train_loss": victim.train_loss,
            "curve": victim.curve,
            "surrogate_loss": protected.losses,
            "noise": noise_report(protected.noise),
            "examples": [
                {
                    "caption": task.captions[i],
                    "published": protected.captions[i],
                    "clean": task.images[i, 0].tolist(),
                    "protected": protected.images[i, 0].tolist(),
                    "noise": protected.noise[i, 0].tolist(),
                }
                for i in range(min(EXAMPLES, len(task.images)))
            ],
            "transfer": {
                name: victims.train(f"{label}, {name}", *published, stranger=name).last_and_best() for name in transfer
            },
            "robustness": robustness,
        }
    return result


class _Victims:
    """Trains victims on what is published of a task."""

    def __init__(self, task: Task, recipe: Recipe, seed: int, progress: Progress) -> None:
        self._task, self._recipe, self._seed, self._progress = task, recipe, seed, progress

    def train(self, name: str, images: Tensor, captions: Sequence[str], stranger: str | None = None) -> Victim:
        task = self._task
        factory, tokenizer = (task.factory(), task.tokenizer) if stranger is None else task.stranger(stranger)
        return train_victim(
            images,
            tokenizer.encode(captions),
            factory,
            _Exam(task, tokenizer, self._seed).retrieval,
            eot=tokenizer.eot,
            recipe=self._recipe,
            seed=self._seed,
            stage=f"victim of {name}",
            progress=self._progress,
        )


class _Exam:
    """The clean test pairs, tokenised once."""

    def __init__(self, task: Task, tokenizer: Tokenizer, seed: int) -> None:
        self.task, self.tokenizer, self.seed = task, tokenizer, seed
        self.images = pixels(task.test_images)
        self.tokens = tokenizer.encode(task.test_captions)
        self.groups = groups(task.test_captions, torch.arange(len(task.test_captions)))

    def retrieval(self, model: DualEncoder, tokens: Tensor | None = None) -> dict[str, float]:
        text = self._encode(model.encode_text, self.tokens if tokens is None else tokens)
        return retrieval(self._encode(model.encode_image, self.images), text, self.groups, self.groups)

    def prefixed(self, model: DualEncoder, length: int) -> dict[str, float] | None:
        if length == 0:
            return None
        rng = generator(self.seed, "test prefix")
        words = random_triggers(len(self.tokens), length, self.tokenizer.allowed().nonzero().mT, rng)
        return self.retrieval(model, insert_triggers(self.tokens, words, self.tokenizer))

    def reading(self, model: DualEncoder) -> dict[str, Any] | None:
        if self.task.digits is None:
            return None
        every = self.tokenizer.encode([caption(list(d)) for d in itertools.product(range(10), repeat=LENGTH)])
        classes = self._encode(model.encode_text, every)
        return reading(self._encode(model.encode_image, self.images), classes, self.task.digits)

    @staticmethod
    @torch.no_grad()
    def _encode(encoder: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        return torch.cat([encoder(part) for part in inputs.split(256)])
