"""The methods by name, under one signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.runs.progress import Progress
from ccu_fast.unlearn.baselines import contrastive_unlearning as contrastive
from ccu_fast.unlearn.baselines.bad_teacher import bad_teacher
from ccu_fast.unlearn.baselines.boundary_expand import boundary_expand, to_shadow
from ccu_fast.unlearn.baselines.boundary_shrink import boundary_shrink
from ccu_fast.unlearn.baselines.clip_erase import clip_erase
from ccu_fast.unlearn.baselines.fine_tune import fine_tune
from ccu_fast.unlearn.baselines.gradient_ascent import gradient_ascent
from ccu_fast.unlearn.baselines.multi_delete import multi_delete
from ccu_fast.unlearn.baselines.neg_grad_plus import neg_grad_plus
from ccu_fast.unlearn.baselines.random_label import random_label
from ccu_fast.unlearn.baselines.salun import salun, salun_mask
from ccu_fast.unlearn.baselines.scrub import scrub
from ccu_fast.unlearn.baselines.ssd import ssd
from ccu_fast.unlearn.config import Budget
from ccu_fast.unlearn.loop import Batch, Prepare, Run, Step, run
from ccu_fast.unlearn.model import TwoModalityModel, heads
from ccu_fast.unlearn.parameters import Mask

Make = Callable[[str, int], Prepare]
"""From the kind of forgetting and the seed to the method."""


# Where a method collapses a small network at the common learning rate it gets a fraction of it, and SSD an α: of the
# rates 1, 0.3, 0.1, 0.05, 0.03, 0.01 and of α from 1.1 to 10 those nearest to a retrained model on held-out
# digits-halves, seeds 100 and up.
ASCENT = {"class": 0.1, "instances": 0.03, "pairs": 0.03}
BOUNDARY = {"class": 0.3, "instances": 0.03, "pairs": 0.03}
RELABEL = {"class": 1.0, "instances": 0.05, "pairs": 0.05}
TEACHER = {"class": 1.0, "instances": 0.1, "pairs": 0.1}
SSD_ALPHA = {"class": 5.0, "instances": 5.0, "pairs": 5.0}


@dataclass(frozen=True)
class Baseline:
    """A method to compare with.

    Attributes:
        label: its name in tables.
        run: ``run(original, forget, retain, kind, budget, *, seed=0, keep_other=0.0, **options)`` → Run, where kind is
            "class", "instances" or "pairs" and the options are those of :func:`ccu_fast.unlearn.loop.run`. With
            ``keep_other`` > 0 the step gets a term it does not have as published, see :func:`keeping_other`.
        needs_labels: it cannot forget pairs without classes.
        trains: it takes steps; without, the budget, keep_other and the options mean nothing to it.
    """

    label: str
    run: Callable[..., Run]
    needs_labels: bool = False
    trains: bool = True


def keeping_other(prepare: Prepare, weight: float) -> Prepare:
    """A method that is told to keep the other modality of the forget set, as CCU is::

        loss + weight * cross_entropy(other head, forget batch)

    The methods as published do not know that half of a forgotten item stays; without this term their loss in the other
    modality says as much about the question they were asked as about them.

    Raises:
        ValueError: weight below 0; when the run starts, the model has no head for the other modality or the items have
            no labels.
    """
    check.number("keep_other", weight, low=0)

    def prepared(frozen: TwoModalityModel, forget: PairedData, retain: PairedData) -> Step:
        step = prepare(frozen, forget, retain)
        if "other" not in heads(frozen) or not forget.labelled:
            raise ValueError(
                "keep_other: expected labels and a head for the other modality, got a model or data without"
            )

        def kept(model: TwoModalityModel, batch: Batch) -> Tensor:
            logits = model.classify_other(model.embed_other(batch.forget.other))
            return step(model, batch) + weight * F.cross_entropy(logits, batch.forget.labels)

        return kept

    return prepared


def _looped(
    make: Make,
    *,
    rate: Mapping[str, float] | float = 1.0,
    retain_per_forget: int = 1,
    mask: Mask | None = None,
) -> Callable[..., Run]:
    """A method of the loop at ``rate`` times the budget's learning rate (a number, or one by kind of forgetting)."""

    def unlearn(
        original: TwoModalityModel,
        forget: PairedData,
        retain: PairedData,
        kind: str,
        budget: Budget,
        *,
        seed: int = 0,
        keep_other: float = 0.0,
        **options: Any,
    ) -> Run:
        learning_rate = budget.learning_rate * (rate if isinstance(rate, float) else rate[kind])
        own = replace(budget, learning_rate=learning_rate, retain_per_forget=retain_per_forget)
        prepare = make(kind, seed)
        if keep_other:
            prepare = keeping_other(prepare, keep_other)
        return run(original, forget, retain, prepare, own, seed=seed, **{"mask": mask, **options})

    return unlearn


def _ssd(
    original: TwoModalityModel,
    forget: PairedData,
    retain: PairedData,
    kind: str,
    budget: Budget,
    *,
    progress: Progress | None = None,
    stage: str = "unlearn",
    **options: Any,
) -> Run:
    done = ssd(original, forget, retain, alpha=SSD_ALPHA[kind])
    if progress is not None:
        progress(stage, 1, 1, "dampened")
    return done


def _boundary_expand(
    original: TwoModalityModel,
    forget: PairedData,
    retain: PairedData,
    kind: str,
    budget: Budget,
    *,
    keep_other: float = 0.0,
    **options: Any,
) -> Run:
    own = replace(budget, learning_rate=budget.learning_rate * BOUNDARY[kind])
    prepare = keeping_other(to_shadow, keep_other) if keep_other else to_shadow
    return boundary_expand(original, forget, retain, own, prepare=prepare, **options)


BASELINES = {
    "fine_tune": Baseline("fine-tuning", _looped(lambda kind, seed: fine_tune)),
    "gradient_ascent": Baseline("gradient ascent", _looped(lambda kind, seed: gradient_ascent, rate=ASCENT)),
    "neg_grad_plus": Baseline("NegGrad+", _looped(lambda kind, seed: neg_grad_plus())),
    "random_label": Baseline(
        "random labels", _looped(lambda kind, seed: random_label(seed), rate=RELABEL), needs_labels=True
    ),
    "salun": Baseline(
        "SalUn", _looped(lambda kind, seed: salun(seed), rate=RELABEL, mask=salun_mask()), needs_labels=True
    ),
    "bad_teacher": Baseline("bad teacher", _looped(lambda kind, seed: bad_teacher(seed), rate=TEACHER)),
    "scrub": Baseline("SCRUB", _looped(lambda kind, seed: scrub())),
    "ssd": Baseline("SSD", _ssd, trains=False),
    "boundary_shrink": Baseline(
        "boundary shrink", _looped(lambda kind, seed: boundary_shrink(), rate=BOUNDARY), needs_labels=True
    ),
    "boundary_expand": Baseline("boundary expansion", _boundary_expand, needs_labels=True),
    "contrastive_unlearning": Baseline(
        "Contrastive Unlearning",
        _looped(
            lambda kind, seed: contrastive.contrastive_unlearning(kind),
            retain_per_forget=contrastive.RETAIN_PER_FORGET,
        ),
        needs_labels=True,
    ),
    "contrastive_unlearning_released": Baseline(
        "Contrastive Unlearning, released",
        _looped(
            lambda kind, seed: contrastive.contrastive_unlearning(kind, variant="released"),
            retain_per_forget=contrastive.RETAIN_PER_FORGET,
        ),
        needs_labels=True,
    ),
    "multi_delete": Baseline("MultiDelete", _looped(lambda kind, seed: multi_delete())),
    "clip_erase": Baseline("CLIPErase-style", _looped(lambda kind, seed: clip_erase())),
}
"""The methods that start from the trained model; retraining is in :mod:`ccu_fast.unlearn.baselines.retrain`."""
