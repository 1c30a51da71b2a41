"""What a model learns from datasets on a disk: victims trained from scratch, measured on clean pairs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.mem.data import DiskSource, Options, list_pairs
from ccu_fast.mem.evaluate import guessing, retrieval
from ccu_fast.mem.job.model import Model
from ccu_fast.mem.job.protect import BadData
from ccu_fast.mem.robustness import treat
from ccu_fast.mem.settings import Progress, silent
from ccu_fast.mem.source import PairSource
from ccu_fast.mem.surrogate import generator, pixels
from ccu_fast.mem.victim import Recipe, Victim, train_victim

PICTURE_TREATMENTS = ("jpeg", "blur", "crop")
_CHUNK = 256


def evaluate_datasets(
    train: Mapping[str, Path],
    test: Path,
    model: Callable[[Sequence[str]], Model],
    *,
    recipe: Recipe | None = None,
    seeds: Sequence[int] = (0,),
    treatments: Sequence[str] = (),
    options: Options | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train a model from random weights on each dataset and let it retrieve among the test pairs after every epoch.

    The vocabulary is that of all captions together, and a seed's victims begin with the same weights. Pictures are
    held in memory.

    Args:
        train: name → dataset, see :func:`ccu_fast.mem.data.list_pairs`.
        test: clean pairs.
        model: all captions → the victim's architecture and tokenizer.
        recipe: of the training.
        seeds: one victim for each dataset and seed.
        treatments: some of "jpeg" (quality 75), "blur" (1 px) and "crop" (90 % of each side): for each, further victims
            are trained on what it leaves of every dataset, named "NAME, TREATMENT".
        options: how to read the datasets that this package did not publish.
        threads: decoders.
        progress: called as ``progress(stage, done, total, note)``.

    Returns:
        A dict that ``json.dumps`` takes: ``guessing`` (R@k of a random order, image to text and text to image) and
        ``datasets[name]``: ``seeds[seed]`` with ``last`` and ``best`` (epoch with the highest R@1, mean of both
        directions: the protector's worst case), ``curve`` and ``train_loss``; ``mean`` and ``spread`` (standard
        deviation; None for one seed) of last and best.

    Raises:
        BadData: something in a dataset cannot be read.
        ValueError: naming the argument.
    """
    recipe = recipe or Recipe()
    for asked in treatments:
        check.one_of("treatments", asked, PICTURE_TREATMENTS)
    listings = {name: list_pairs(path, options) for name, path in [*train.items(), ("", test)]}
    for listing in listings.values():
        if listing.bad:
            raise BadData(listing.bad)
    victim = model([caption for listing in listings.values() for caption in listing.captions])
    sources = {name: DiskSource(listing, victim.image_shape, threads=threads) for name, listing in listings.items()}
    try:
        exam = _Exam(sources.pop(""), victim)
        result: dict[str, Any] = {
            "test": {"path": str(test), "images": len(exam.image), "captions": len(exam.tokens)},
            "recipe": asdict(recipe),
            "model": victim.about,
            "guessing": exam.guessing(),
            "datasets": {},
        }
        for name, source in sources.items():
            published, tokens = _whole(source), victim.tokenizer.encode(source.captions)
            for treatment in (None, *treatments):
                label = name if treatment is None else f"{name}, {treatment}"
                runs: dict[str, dict[str, Any]] = {}
                for seed in seeds:
                    images = published
                    if treatment is not None:
                        images, _ = treat(treatment, published, [], [], generator(seed, f"treat {treatment}"))
                    trained = train_victim(
                        images[source.image_of], tokens, victim.factory, exam.take, eot=victim.tokenizer.eot,
                        recipe=recipe, seed=seed, stage=f"victim of {label}, seed {seed}", progress=progress,
                    )  # fmt: skip
                    runs[str(seed)] = _run(trained)
                result["datasets"][label] = {
                    "path": str(train[name]), "rows": len(tokens), "seeds": runs, **_summary(runs)
                }  # fmt: skip
    finally:
        for source in sources.values():
            source.close()
    return result


def _run(trained: Victim) -> dict[str, Any]:
    curve = trained.curve
    best = max(range(len(curve)), key=lambda i: curve[i]["i2t_r1"] + curve[i]["t2i_r1"])
    return {
        "last": {"epoch": len(curve), **curve[-1]},
        "best": {"epoch": best + 1, **curve[best]},
        "train_loss": trained.train_loss,
        "curve": curve,
    }


class _Exam:
    """The test pairs."""

    def __init__(self, source: DiskSource, model: Model) -> None:
        self.image = pixels(_whole(source))
        self.tokens = model.tokenizer.encode(source.captions)
        self.text_group = groups(source.captions, source.image_of)
        self.image_group = torch.zeros(source.n_images, dtype=torch.int64)
        self.image_group[source.image_of] = self.text_group
        source.close()

    def take(self, model: Any) -> dict[str, Any]:
        image = torch.cat([model.encode_image(part) for part in self.image.split(_CHUNK)])
        text = torch.cat([model.encode_text(part) for part in self.tokens.split(_CHUNK)])
        return retrieval(image, text, self.image_group, self.text_group)

    def guessing(self) -> dict[str, float]:
        sides = {"i2t": (self.image_group, self.text_group), "t2i": (self.text_group, self.image_group)}
        found = {
            side: guessing(*pair, ks=tuple(k for k in (1, 5, 10) if k <= len(pair[1]))) for side, pair in sides.items()
        }
        return {f"{side}_r{k}": share for side, shares in found.items() for k, share in shares.items()}


def groups(captions: Sequence[str], image_of: Tensor) -> Tensor:
    """Which captions are right for the same images: int64 ``[rows]``. Rows belong together that share an image or have
    equal captions, also over others.
    """
    parent = list(range(len(captions)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[object, int] = {}
    for row, (caption, image) in enumerate(zip(captions, image_of.tolist(), strict=True)):
        for key in (caption, image):
            parent[root(row)] = root(first.setdefault(key, row))
    return torch.tensor([root(row) for row in range(len(captions))], dtype=torch.int64)


def _whole(source: PairSource) -> Tensor:
    return torch.cat([source.images(part) for part in torch.arange(source.n_images).split(_CHUNK)])


def _summary(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of every figure of last and best."""
    result: dict[str, Any] = {"mean": {}, "spread": {}}
    for which in ("last", "best"):
        names = next(iter(runs.values()))[which]
        values = {name: [run[which][name] for run in runs.values()] for name in names}
        result["mean"][which] = {name: statistics.fmean(v) for name, v in values.items()}
        result["spread"][which] = {name: statistics.stdev(v) if len(v) > 1 else None for name, v in values.items()}
    return result
