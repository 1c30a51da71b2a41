"""digit-strips from data to report: protect with every method, train a victim on each, measure it on clean strips."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.data.strips import LENGTH, StripSet, caption, load_strips
from ccu_fast.files import new_folder
from ccu_fast.mem.config import Method, Settings
from ccu_fast.mem.fidelity import noise_report
from ccu_fast.mem.protection import protect
from ccu_fast.mem.publish.memory import export
from ccu_fast.mem.retrieval import groups, guessing, reading, retrieval
from ccu_fast.mem.robustness import TREATMENTS as IMAGE_TREATMENTS
from ccu_fast.mem.robustness import treat
from ccu_fast.mem.surrogate import ModelFactory, generator, pixels
from ccu_fast.mem.tokenizer import WordTokenizer
from ccu_fast.mem.triggers import insert_triggers, random_triggers
from ccu_fast.mem.victim import Recipe, Victim, train_victim
from ccu_fast.models.dual_encoder import DualEncoder, SmallDualEncoder
from ccu_fast.runs.progress import Progress, silent

EXAMPLES = 6
TREATMENTS = (*IMAGE_TREATMENTS, "no trigger")


def run_digit_strips(
    seed: int = 0,
    methods: Sequence[str] = ("clean", "em", "mem"),
    progress: Progress | None = None,
    out: str | Path | None = None,
    *,
    settings: Settings | None = None,
    recipe: Recipe | None = None,
    n_train: int = 2048,
    n_test: int = 500,
    width: int = 96,
    transfer: bool = False,
    treatments: Sequence[str] = (),
) -> dict[str, Any]:
    """Protect digit-strips with each method, train a fresh victim on what is published, evaluate it on clean strips.

    The victim has the surrogate's architecture but other random weights; its weights and batches are the same for
    every method. The same arguments give the same figures (for the same number of threads).

    Args:
        seed: of everything: data split, surrogate, victim.
        methods: names for :meth:`ccu_fast.mem.config.Method.parse`, each at most once.
        progress: called as ``progress(stage, done, total, note)``.
        out: when given, the datasets are also written to ``out/<method>`` (see :func:`ccu_fast.mem.export`).
        settings: budget and schedule of the generator.
        recipe: the victim's training.
        n_train, n_test: numbers of strips.
        width: of both towers.
        transfer: also train a victim with another image tower (a vision transformer) and a deeper text tower.
        treatments: of :data:`TREATMENTS`: those of :func:`ccu_fast.mem.robustness.treat`, or captions without triggers;
            for each a victim is trained on what it leaves.

    Returns:
        A dict that ``json.dumps`` takes. ``guessing``: R@k of a random order. ``methods[name]``:

        - ``last``, ``best``: retrieval on clean test strips (R@k as shares, median ranks) after the last epoch and
          after the epoch with the highest R@1 (mean of both directions; the protector's worst case), with ``epoch``
        - ``reading``, ``prefixed``: after the last epoch zero-shot reading, and retrieval when test captions carry
          random trigger words (None without triggers): how much of the damage comes from captions that look different
        - ``transfer``, ``robustness[treatment]``: ``last`` and ``best`` of the victim of another architecture (None
          when not asked for), and of the one trained on treated pairs
        - ``train_loss``, ``curve``: of the victim, for each epoch; ``surrogate_loss``: of the generator, for each round
        - ``noise``: ``eps_255`` (largest change, in 1/255) and ``psnr_db``
        - ``examples``: ``caption``, ``published`` (caption with triggers) and ``clean``, ``protected``, ``noise`` as
          nested lists ``[16][64]`` of ints

    Raises:
        ValueError: unknown or repeated method.
        OSError: a folder below ``out`` has contents or cannot be written.

    Source: the protocol of Liu et al. 2024 (arXiv 2407.16307) on this project's small task.

    >>> small = {"n_train": 32, "n_test": 10, "recipe": ccu_fast.mem.Recipe(epochs=1)}  # some seconds
    >>> list(ccu_fast.mem.run_digit_strips(methods=["clean"], **small)["methods"])  # doctest: +SKIP
    ['clean']
    """
    parsed = [Method.parse(name) for name in methods]
    if len(set(methods)) != len(parsed):
        raise ValueError(f"methods: expected each method once, got {list(methods)}")
    check.integer("seed", seed, low=0)
    if out is not None:
        for method in parsed:
            new_folder(Path(out) / method.name)
    progress = silent if progress is None else progress
    settings = Settings() if settings is None else settings
    recipe = Recipe() if recipe is None else recipe
    train, test = load_strips(n_train, n_test, seed=seed)
    tokenizer = WordTokenizer.for_strips()
    factory = partial(SmallDualEncoder, len(tokenizer), tokenizer.eot, width=width, dim=width)
    stranger = partial(factory, image_tower="patches", text_depth=3)
    for name in treatments:
        check.one_of("treatments", name, TREATMENTS)
    exam = _Exam(test, tokenizer, seed)
    result: dict[str, Any] = {
        "task": "digit-strips",
        "seed": seed,
        "train": n_train,
        "test": n_test,
        "width": width,
        "settings": asdict(settings),
        "recipe": asdict(recipe),
        "guessing": {f"r{k}": share for k, share in guessing(exam.groups, exam.groups).items()},
        "methods": {},
    }

    def attack(name: str, images: Tensor, captions: list[str], model: ModelFactory = factory) -> Victim:
        return train_victim(
            images,
            tokenizer.encode(captions),
            model,
            exam.retrieval,
            eot=tokenizer.eot,
            recipe=recipe,
            seed=seed,
            stage=f"victim {name}",
            progress=progress,
        )

    for method in parsed:
        protected = protect(
            train.images,
            train.captions,
            tokenizer,
            factory,
            method=method,
            settings=settings,
            seed=seed,
            progress=progress,
        )
        if out is not None:
            export(protected, Path(out) / method.name, seed=seed)

        images, captions = protected.images, protected.captions
        victim = attack(method.name, images, captions)
        other = attack(f"{method.name}, other towers", images, captions, stranger) if transfer else None
        robustness = {}
        for name in treatments:
            if name == "no trigger":
                left = images, train.captions
            else:
                left = treat(name, images, generator(seed, f"treat {name}")), captions
            robustness[name] = attack(f"{method.name}, {name}", *left).last_and_best()
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
                    "caption": train.captions[i],
                    "published": protected.captions[i],
                    "clean": train.images[i, 0].tolist(),
                    "protected": protected.images[i, 0].tolist(),
                    "noise": protected.noise[i, 0].tolist(),
                }
                for i in range(min(EXAMPLES, len(train)))
            ],
            "transfer": None if other is None else other.last_and_best(),
            "robustness": robustness,
        }
    return result


class _Exam:
    """The clean test strips, tokenised once."""

    def __init__(self, test: StripSet, tokenizer: WordTokenizer, seed: int) -> None:
        self.test, self.tokenizer, self.seed = test, tokenizer, seed
        self.images = pixels(test.images)
        self.tokens = tokenizer.encode(test.captions)
        self.groups = groups(test.captions, torch.arange(len(test.captions)))

    def retrieval(self, model: DualEncoder, tokens: Tensor | None = None) -> dict[str, float]:
        text = self._encode(model.encode_text, self.tokens if tokens is None else tokens)
        return retrieval(self._encode(model.encode_image, self.images), text, self.groups, self.groups)

    def prefixed(self, model: DualEncoder, length: int) -> dict[str, float] | None:
        if length == 0:
            return None
        rng = generator(self.seed, "test prefix")
        words = random_triggers(len(self.tokens), length, self.tokenizer.trigger_ids, rng)
        return self.retrieval(model, insert_triggers(self.tokens, words, self.tokenizer))

    def reading(self, model: DualEncoder) -> dict[str, Any]:
        every = self.tokenizer.encode([caption(list(d)) for d in itertools.product(range(10), repeat=LENGTH)])
        classes = self._encode(model.encode_text, every)
        return reading(self._encode(model.encode_image, self.images), classes, self.test.digits)

    @staticmethod
    @torch.no_grad()
    def _encode(encoder: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        return torch.cat([encoder(part) for part in inputs.split(256)])
