"""What a model learns from datasets on a disk: victims trained from scratch, measured on clean pairs."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.data.captions import DiskSource, Listing, Options, list_pairs
from ccu_fast.data.captions.listing import MANIFEST
from ccu_fast.data.pictures import encode_png
from ccu_fast.files import read_json
from ccu_fast.mem.job.treatments import Treatment
from ccu_fast.mem.retrieval import groups, guessing, retrieval
from ccu_fast.mem.source import PairSource
from ccu_fast.mem.surrogate import pixels
from ccu_fast.mem.victim import Recipe, train_victim
from ccu_fast.models.named import Model
from ccu_fast.runs.progress import Progress, silent

_CHUNK = 256
_AS_PUBLISHED = Treatment("", None, ())


def _forget(result: dict[str, Any], whole: bool) -> None:
    """What is called with figures and keeps none."""


def evaluate_datasets(
    train: Mapping[str, Path],
    test: Path,
    model: Callable[[Sequence[str]], Model],
    *,
    recipe: Recipe | None = None,
    seeds: Sequence[int] = (0,),
    treatments: Sequence[str] = (),
    zero_shot: Path | None = None,
    options: Options | None = None,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    samples: int = 0,
    progress: Progress = silent,
    keep: Callable[[dict[str, Any], bool], None] = _forget,
) -> dict[str, Any]:
    """Train a model from random weights on each dataset and let it retrieve among the test pairs after every epoch.

    The vocabulary is that of all captions together, and a seed's victims begin with the same weights. Pictures are
    held in memory.

    Args:
        train: name → dataset, see :func:`ccu_fast.data.captions.list_pairs`.
        test: clean pairs.
        model: all captions → the victim's architecture and tokenizer.
        recipe: of the training.
        seeds: one victim for each dataset and seed.
        treatments: of pictures (see :func:`ccu_fast.mem.robustness.treat`), "no-trigger" (the trigger words cut off, as
            many as the dataset's manifest names), "some-trigger" (half of them cut off, rounded up, others from each
            caption), or some of these with a plus, as "no-trigger+jpeg": for each, further victims are trained on what
            it leaves of a dataset, named "NAME, TREATMENT". Of a dataset without trigger words there are no victims of
            a treatment of these.
        zero_shot: pictures whose captions name their class ("a photo of a dog"): each picks the nearest of the distinct
            captions.
        options: how to read the datasets that this package did not publish.
        threads: decoders.
        device: of the victims.
        samples: how many pairs of each dataset to return.
        progress: called as ``progress(stage, done, total, note)``.
        keep: called as ``keep(result, whole)`` whenever the victims of a dataset, treated or not, are trained, with all
            that was found so far, to keep it; ``whole`` when they were the last ones of that dataset.

    Returns:
        A dict that ``json.dumps`` takes: ``guessing`` (R@k of a random order, image to text and text to image, and
        zero_shot of a random class) and ``datasets[name]``: ``seeds[seed]`` with ``last`` and ``best`` (epoch with the
        highest R@1, mean of both directions: the protector's worst case), ``curve`` and ``train_loss``; ``mean`` and
        ``spread`` (standard deviation; None for one seed) of last and best. An epoch has R@k as shares, median ranks
        and, where asked for, ``zero_shot``, the share of pictures that pick their class. ``samples[name]``: pairs as
        trained on, ``caption`` and ``png`` (base64).

    Raises:
        BadData: something in a dataset cannot be read.
        ImportError: a treatment needs a package that is missing.
        ValueError: naming the argument.

    Source: Liu et al. 2024 (arXiv 2407.16307).

    >>> from pathlib import Path
    >>> from ccu_fast.mem import choose_model
    >>> train = {"clean": Path("train.csv"), "mem": Path("protected")}
    >>> found = ccu_fast.mem.evaluate_datasets(train, Path("test.csv"), choose_model("small"))  # doctest: +SKIP
    """
    recipe = recipe or Recipe()
    asked = [Treatment.parse(treatment) for treatment in dict.fromkeys(treatments)]
    for treatment in asked:
        taken = [name for name in train if f"{name}, {treatment.name}" in train]
        if taken:
            raise ValueError(
                f"train: expected no dataset named {taken[0]}, {treatment.name}: so are victims of {taken[0]} named"
            )
    check.integer("samples", samples, low=0)
    where = check.device("device", device)
    prefixes = {name: trigger_words(path) for name, path in train.items()}
    progress("reading the datasets", 0, 1, "")
    listings = {name: list_pairs(path, options, "train").whole() for name, path in train.items()}
    clean = list_pairs(test, options, "test").whole()
    for argument, listing in (*(("train", item) for item in listings.values()), ("test", clean)):
        if listing.n_images < 2:
            raise ValueError(f"{argument}: expected at least two images, got {listing.n_images} in {listing.root}")
    classes = None if zero_shot is None else list_pairs(zero_shot, options, "zero_shot").whole()
    victim = model([text for listing in (*listings.values(), clean, classes) if listing for text in listing.captions])
    with ExitStack() as stack:

        def opened(listing: Listing) -> DiskSource:
            return stack.enter_context(closing(DiskSource(listing, victim.image_shape, threads=threads)))

        progress("reading the test pictures", 0, 1, "")
        exam = _Exam(opened(clean), None if classes is None else opened(classes), victim, where)
        result: dict[str, Any] = {
            "test": {"path": str(test), "images": len(exam.image), "captions": len(exam.tokens)},
            "recipe": asdict(recipe),
            "model": victim.about,
            "guessing": exam.guessing(),
            "datasets": {},
            "samples": {},
        }
        for name, listing in listings.items():
            source = opened(listing)
            progress(f"reading the pictures of {name}", 0, 1, "")
            published = _whole(source)
            if samples:
                result["samples"][name] = _samples(published, source, samples)
            plain = victim.tokenizer.encode(source.captions)
            here = [_AS_PUBLISHED, *(t for t in asked if prefixes[name] or not t.needs_triggers)]
            for treatment in here:
                label = f"{name}, {treatment.name}" if treatment.name else name
                runs: dict[str, dict[str, Any]] = {}
                for seed in seeds:
                    tokens = plain
                    if treatment.captions is not None:
                        left = treatment.of_captions(source.captions, prefixes[name], seed)
                        tokens = victim.tokenizer.encode(left)
                    if treatment.name:
                        progress(f"treating {name}: {treatment.name}", 0, 1, "")
                    trained = train_victim(
                        treatment.of_images(published, seed)[source.image_of],
                        tokens,
                        victim.factory,
                        exam.take,
                        eot=victim.tokenizer.eot,
                        recipe=recipe,
                        seed=seed,
                        stage=f"victim of {label}, seed {seed}",
                        progress=progress,
                        device=where,
                    )
                    runs[str(seed)] = {
                        **trained.last_and_best(),
                        "train_loss": trained.train_loss,
                        "curve": trained.curve,
                    }
                result["datasets"][label] = {
                    "path": str(train[name]),
                    "rows": len(plain),
                    "seeds": runs,
                    **_summary(runs),
                }
                keep(result, treatment is here[-1])
    return result


class _Exam:
    """The test pairs and, where there are any, pictures with classes; pictures wait on the CPU."""

    def __init__(self, source: DiskSource, labelled: DiskSource | None, model: Model, device: torch.device) -> None:
        self.device = device
        self.image = pixels(_whole(source))
        self.tokens = model.tokenizer.encode(source.captions)
        self.text_group = groups(source.captions, source.image_of)
        self.image_group = torch.zeros(source.n_images, dtype=torch.int64)
        self.image_group[source.image_of] = self.text_group
        self.labelled: tuple[Tensor, Tensor, Tensor] | None = None
        if labelled is not None:
            classes = {caption: i for i, caption in enumerate(dict.fromkeys(labelled.captions))}
            label = torch.full((labelled.n_images,), -1, dtype=torch.int64)
            label[labelled.image_of] = torch.tensor([classes[caption] for caption in labelled.captions])
            if len(labelled.captions) != labelled.n_images or len(classes) < 2:
                raise ValueError(
                    "zero_shot: expected one caption for each picture, of at least two classes, got "
                    f"{len(labelled.captions)} captions of {labelled.n_images} pictures, {len(classes)} different ones"
                )
            self.labelled = (pixels(_whole(labelled)), model.tokenizer.encode(list(classes)), label)

    def take(self, model: Any) -> dict[str, Any]:
        image, text = self._encode(model.encode_image, self.image), self._encode(model.encode_text, self.tokens)
        figures = retrieval(image, text, self.image_group, self.text_group)
        if self.labelled is not None:
            shown, prompts, label = self.labelled
            score = self._encode(model.encode_image, shown) @ self._encode(model.encode_text, prompts).mT
            figures["zero_shot"] = float((score.argmax(1) == label).double().mean())
        return figures

    def _encode(self, encoder: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        return torch.cat([encoder(part.to(self.device)).float().cpu() for part in inputs.split(_CHUNK)])

    def guessing(self) -> dict[str, float]:
        shares: dict[str, float] = {}
        for side, query, gallery in (
            ("i2t", self.image_group, self.text_group),
            ("t2i", self.text_group, self.image_group),
        ):
            by_k = guessing(query, gallery, ks=tuple(k for k in (1, 5, 10) if k <= len(gallery)))
            shares |= {f"{side}_r{k}": share for k, share in by_k.items()}
        return shares if self.labelled is None else {**shares, "zero_shot": 1 / len(self.labelled[1])}


def trigger_words(dataset: Path) -> int:
    """The number of trigger words in front of a dataset's captions, by its manifest.

    0 without a manifest, and for triggers by the authors' decisions (``compat``), which need not be words.
    """
    folder = dataset if dataset.is_dir() else dataset.parent
    if not (folder / MANIFEST).is_file():
        return 0
    told = read_json(folder / MANIFEST, "train")
    return 0 if told.get("settings", {}).get("compat") else int(told.get("method", {}).get("triggers", 0))


def _whole(source: PairSource) -> Tensor:
    return torch.cat([source.images(part) for part in torch.arange(source.n_images).split(_CHUNK)])


def _samples(images: Tensor, source: PairSource, count: int) -> list[dict[str, str]]:
    """The first rows, as they were trained on."""
    rows = range(min(count, len(source.captions)))
    pictures = [encode_png(images[int(source.image_of[row])]) for row in rows]
    return [{"caption": source.captions[row], "png": base64.b64encode(pictures[row]).decode()} for row in rows]


def _summary(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of every figure of last and best."""
    result: dict[str, Any] = {"mean": {}, "spread": {}}
    for which in ("last", "best"):
        names = next(iter(runs.values()))[which]
        values = {name: [run[which][name] for run in runs.values()] for name in names}
        result["mean"][which] = {name: statistics.fmean(v) for name, v in values.items()}
        result["spread"][which] = {name: statistics.stdev(v) if len(v) > 1 else None for name, v in values.items()}
    return result
