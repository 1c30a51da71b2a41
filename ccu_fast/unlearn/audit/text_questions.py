"""What a run or a comparison asks its models by text alone: who is asked, and what the answers come to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check, extras
from ccu_fast.data.disk_rows import DiskRows, row_digests
from ccu_fast.data.paired import PairedData
from ccu_fast.models.clip import ClipEncoder
from ccu_fast.models.tokenizer import Tokenizer
from ccu_fast.runs.progress import Progress, silent
from ccu_fast.runs.provenance import tensors_hash
from ccu_fast.unlearn.audit.gibberish import gibberish_captions, gibberish_of
from ccu_fast.unlearn.audit.text_membership import (
    MINIMUM,
    NothingToMeasure,
    TextMembership,
    text_membership,
    told_apart,
)
from ccu_fast.unlearn.loop import CHUNK
from ccu_fast.unlearn.model import TwoModalityModel
from ccu_fast.unlearn.unseen import sample

AREAS = ("auc", "similarity_auc")
# Of the figures, and what tables call them.
TITLES = {
    "precision": "precision",
    "recall": "recall",
    "false_alarms": "false alarms",
    "auc": "AUC of score",
    "similarity_auc": "AUC of similarity",
    "flagged": "flagged texts",
}
FIGURES = tuple(TITLES)
LIKE = 256  # new items that say what numbers and captions are like
RATE = 0.05  # of the search, as a share of the range of the inputs
NUMBERS = 2**24  # of the inputs that are searched at once: 111 pictures of 224 x 224
FORMAT = 1  # raise it when the same questions get other figures

Answers = tuple[Tensor, ...]


@dataclass(frozen=True)
class TextAudit:
    """How much is asked: restarts x steps passes through the visual tower for each of 2 x items + gibberish texts.

    Attributes:
        items: at most so many forgotten items, and as many new ones, are asked about.
        gibberish: texts that mean nothing, at least 40.
        restarts: searches for each text, at least 2.
        steps: of a search, at least 1.
    """

    items: int = check.field(200, low=1)
    gibberish: int = check.field(128, low=MINIMUM)
    restarts: int = check.field(4, low=2)
    steps: int = check.field(40, low=1)

    def __post_init__(self) -> None:
        check.fields(self)


@dataclass(frozen=True)
class TextQuestions:
    """Texts of forgotten and of new items, and what the search needs: the same for every model.

    Attributes:
        settings: how much is asked.
        seed: of the draws and the detectors.
        texts: ``[N, ...]``, no two alike.
        members: bool ``[N]``: which are of forgotten items.
        gibberish: ``[G, ...]``.
        starts: ``[R, ...]`` floating-point visual inputs, noise.
        bounds: between which their numbers stay.
    """

    settings: TextAudit
    seed: int
    texts: Tensor
    members: Tensor
    gibberish: Tensor
    starts: Tensor
    bounds: tuple[float, float]

    @classmethod
    def of(
        cls,
        settings: TextAudit,
        model: TwoModalityModel,
        forget: PairedData,
        retain: PairedData,
        new: PairedData | None,
        *,
        tokenizer: Tokenizer | None = None,
        group: int = 1,
        seed: int = 0,
    ) -> TextQuestions:
        """Draw what is asked.

        One view of each thing is asked about. Left out are a forgotten text that a retained item has too, which stays
        trained on, and a new one that was trained on with another picture.

        Args:
            settings: how much.
            model: one of those that are asked.
            forget, retain: what the original was trained on.
            new: items of the kind of the forget set that were never trained on.
            tokenizer: of the model, where the other modality is token ids.
            group: items with equal ``ids // group`` are views of one thing.
            seed: at least 0.

        Raises:
            ValueError: no text of one kind is left; token ids without a tokenizer; visual inputs that are no
                floating-point numbers (but a CLIP takes uint8 pictures).
            ImportError: scikit-learn is not installed.
        """
        extras.require("sklearn")
        if new is None or len(new) < 2:
            count = 0 if new is None else len(new)
            raise ValueError(
                "text_membership: expected at least 2 new items of what is forgotten (of a class, of that class) to "
                f"compare with, got {count}"
            )
        _check_inputs(model, new, tokenizer)
        gone, kept, fresh = (_digests(data.other) for data in (forget, retain, new))
        rng = torch.Generator().manual_seed(seed)
        asked = []
        for what, part, digests, trained in (
            ("forgotten items whose text no retained item has", forget, gone, kept),
            ("new items whose text was not trained on", new, fresh, torch.cat([gone, kept])),
        ):
            rows = _own_texts(part.ids, digests, trained, group)
            if not len(rows):
                raise ValueError(f"text_membership: expected some {what}, got none among {len(part)} items")
            rows = rows[torch.randperm(len(rows), generator=rng)[: settings.items]].sort().values
            asked.append(part.other[rows.to(part.labels.device)])
        like = sample(new, LIKE, seed).in_memory()
        bounds = (0.0, 1.0) if isinstance(model, ClipEncoder) else _range(like.visual)
        low, high = bounds
        dtype = like.visual.dtype if like.visual.is_floating_point() else torch.float32
        starts = low + (high - low) * torch.rand(settings.restarts, *like.visual.shape[1:], generator=rng)
        if tokenizer is None:
            gibberish = gibberish_of(like.other, settings.gibberish, seed=seed)
        else:
            gibberish = gibberish_captions(tokenizer, like.other, settings.gibberish, seed=seed)
        members = torch.arange(sum(map(len, asked))) < len(asked[0])
        starts = starts.to(forget.labels.device, dtype)
        return cls(settings, seed, torch.cat(asked), members, gibberish, starts, bounds)

    @property
    def about(self) -> list[Any]:
        """What decides the answers of a model, as JSON values."""
        tensors = {"texts": self.texts, "gibberish": self.gibberish, "starts": self.starts, "members": self.members}
        return [FORMAT, asdict(self.settings), self.seed, list(self.bounds), tensors_hash(tensors)]

    @property
    def chance(self) -> dict[str, float]:
        """What a model gives away that knows nothing: "precision"; "auc" and its "error", two standard errors.

        Source: Mann & Whitney 1947, for the variance of their statistic.
        """
        n, m = int(self.members.sum()), int((~self.members).sum())
        return {"precision": n / (n + m), "auc": 0.5, "error": 2 * math.sqrt((n + m + 1) / (12 * n * m))}

    @property
    def asked(self) -> dict[str, Any]:
        """What a result says of the questions: "settings", numbers of "forgotten" and "new" items, "chance"."""
        counts = {"forgotten": int(self.members.sum()), "new": int((~self.members).sum())}
        return {"settings": asdict(self.settings), **counts, "chance": self.chance}

    def figures(
        self,
        model: TwoModalityModel,
        *,
        name: str,
        keep: Callable[[Callable[[], Answers]], Answers] = lambda make: make(),
        progress: Progress = silent,
    ) -> dict[str, float | None]:
        """Ask a model.

        Args:
            model: as that of :meth:`of`; not changed.
            name: of the model, for the progress.
            keep: gets what searches, and gives what that returned, now or earlier.
            progress: called as progress(stage, done, total, note), in inputs searched.

        Returns:
            What :func:`ccu_fast.unlearn.audit.told_apart` says, and "flagged", the number of texts that are called
            members. All None of a model that embeds everything alike or nowhere, so that there is nothing to measure.
        """
        picture = math.prod(self.starts.shape[1:])
        low, high = self.bounds

        def search() -> Answers:
            try:
                found = text_membership(
                    model,
                    self.texts,
                    self.gibberish,
                    self.starts,
                    steps=self.settings.steps,
                    rate=RATE * (high - low),
                    bounds=self.bounds,
                    seed=self.seed,
                    chunk=max(1, min(CHUNK, NUMBERS // picture)),
                    progress=lambda stage, *rest: progress(f"{stage}, {name}", *rest),
                )
            except NothingToMeasure:
                return ()
            return found.similarity, found.spread, found.votes, found.score

        answers = keep(search)
        if not answers:
            return dict.fromkeys(FIGURES)
        found = TextMembership(*(answer.cpu() for answer in answers))
        return {**told_apart(found, self.members), "flagged": int(found.flags.sum())}


def heading(asked: Mapping[str, Any]) -> str:
    """What a table of figures is of: who was asked, of :attr:`TextQuestions.asked`."""
    return f"Membership from text alone, of {asked['forgotten']} forgotten and {asked['new']} new items"


def before_and_after(
    chance: Mapping[str, float], before: Mapping[str, float | None], after: Mapping[str, float | None]
) -> str:
    """What the figures of a model before and after unlearning come to, in a sentence."""
    error, (old, now) = chance["error"], (tells(figures, chance) for figures in (before, after))
    within = f"chance is 0.50 ± {error:.2f}"
    if old is None or now is None:
        when = "before" if old is None else "after"
        return f"Nothing could be measured {when} unlearning: the model embeds all inputs alike, or nowhere."
    was, is_now = areas(before), areas(after)
    if too_few(chance):
        return f"{meaning(chance)[:-1]} (before {was}, after {is_now})."
    if old and now:
        return (
            f"Text alone tells forgotten items from new ones after unlearning too (AUC {is_now}, before {was}; "
            f"{within}); whether a retrained model would show as much, only a comparison with one can say."
        )
    if old:
        return (
            f"After unlearning the AUC is within chance ({is_now}; {within}): text alone no longer tells a forgotten "
            f"item from one that was never trained on, as it did before ({was})."
        )
    if now:
        return (
            f"Text alone tells forgotten items from new ones after unlearning (AUC {is_now}; {within}) and did not "
            f"before ({was}): the unlearning may have left a trace (by chance one of two AUCs is as far off in up to 9 "
            "of 100 cases)."
        )
    return (
        f"The AUC is within chance before unlearning and after ({was}, then {is_now}; {within}): text alone told "
        "nothing of these items to begin with, so there was nothing to take away."
    )


def compared(chance: Mapping[str, float], models: Mapping[str, Mapping[str, float | None]]) -> str:
    """What the figures of several models come to, by their labels: :func:`meaning`, and who is beyond chance."""
    if too_few(chance):
        return meaning(chance)
    told = [f"{label} ({areas(figures)})" for label, figures in models.items() if tells(figures, chance)]
    rest = f"Outside it: {', '.join(told)}." if told else "No model is outside it, not even before unlearning."
    return f"{meaning(chance)} {rest}"


def meaning(chance: Mapping[str, float]) -> str:
    """What an AUC within chance means, in a sentence."""
    if too_few(chance):
        return (
            f"There are too few items to tell anything by: chance is 0.50 ± {chance['error']:.2f}, and no AUC can be "
            "outside it."
        )
    return (
        f"An AUC within chance, 0.50 ± {chance['error']:.2f}, means that text alone tells no forgotten item from one "
        "that was never trained on."
    )


def too_few(chance: Mapping[str, float]) -> bool:
    """Whether even areas of 0 and 1 are within chance, as with one item of a kind."""
    return chance["error"] >= 0.5


def tells(figures: Mapping[str, float | None], chance: Mapping[str, float]) -> bool | None:
    """Whether one of the areas is further from chance than two standard errors; None where none was measured."""
    found = [figures[name] for name in AREAS]
    if any(area is None for area in found):
        return None
    return any(abs(area - chance["auc"]) > chance["error"] for area in found if area is not None)


def areas(figures: Mapping[str, float | None]) -> str:
    """Both areas as text."""
    return " and ".join(f"{figures[name]:.2f}" for name in AREAS)


def _check_inputs(model: TwoModalityModel, new: PairedData, tokenizer: Tokenizer | None) -> None:
    if not (new.visual.is_floating_point() or (isinstance(model, ClipEncoder) and new.visual.dtype == torch.uint8)):
        raise ValueError(
            "text_membership: expected floating-point visual inputs, which a search can move, got "
            f"{str(new.visual.dtype).removeprefix('torch.')}"
        )
    if tokenizer is None and not new.other.is_floating_point():
        raise ValueError(
            "text_membership: expected floating-point numbers as other, or the name of a CLIP, whose tokenizer makes "
            f"gibberish, got {str(new.other.dtype).removeprefix('torch.')}"
        )


def _own_texts(ids: Tensor, digests: Tensor, trained: Tensor, group: int) -> Tensor:
    """Rows of one view of each thing and one item of each text, without the texts that were trained on, by digests."""
    rows = _first_of_each(ids.cpu() // group)
    digests = digests[rows]
    own = ~torch.isin(digests, trained)
    return rows[own][_first_of_each(digests[own])]


def _first_of_each(values: Tensor) -> Tensor:
    """The position of the first of each value, in order."""
    different, number = torch.unique(values, return_inverse=True)
    first = torch.full((len(different),), len(values)).scatter_reduce(0, number, torch.arange(len(values)), "amin")
    return first.sort().values


def _digests(inputs: Tensor | DiskRows) -> Tensor:
    """int64 ``[N]``, equal for equal rows, and for others but by an accident of 1 in 2**64."""
    whole = inputs.digests() if isinstance(inputs, DiskRows) else row_digests(inputs)
    return whole[:, :8].contiguous().view(torch.int64)[:, 0]


def _range(visual: Tensor) -> tuple[float, float]:
    """The least and the greatest number of visual inputs."""
    low, high = (float(end) for end in visual.aminmax())
    if not low < high:
        raise ValueError(f"text_membership: expected visual inputs that differ, got {low} everywhere")
    return low, high
