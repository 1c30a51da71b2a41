"""The methods by name, under one signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.runs.progress import Progress
from ccu_fast.unlearn.baselines.bad_teacher import bad_teacher
from ccu_fast.unlearn.baselines.boundary import boundary_expand, boundary_shrink, to_shadow
from ccu_fast.unlearn.baselines.clip_erase import clip_erase
from ccu_fast.unlearn.baselines.contrastive_unlearning import RETAIN_PER_FORGET, contrastive_unlearning
from ccu_fast.unlearn.baselines.mm_unlearner import masked, mm_unlearner
from ccu_fast.unlearn.baselines.multi_delete import multi_delete
from ccu_fast.unlearn.baselines.null_space import projected
from ccu_fast.unlearn.baselines.plain_losses import fine_tune, gradient_ascent, neg_grad_plus
from ccu_fast.unlearn.baselines.random_label import SALIENCY, random_label
from ccu_fast.unlearn.baselines.scrub import scrub
from ccu_fast.unlearn.baselines.sfr_on import salient_and_slow, sfr_on
from ccu_fast.unlearn.baselines.ssd import ssd
from ccu_fast.unlearn.config import Budget
from ccu_fast.unlearn.loop import Batch, Prepare, PrepareUpdate, Run, Step, run
from ccu_fast.unlearn.model import TwoModalityModel, heads


@dataclass(frozen=True)
class Baseline:
    """A method to compare with.

    Attributes:
        label: its name in tables.
        prepare: its loss; None where it takes no steps.
        rates: what share of the budget's learning rate it gets to forget a class, and to forget items.
        retain_per_forget: see :class:`ccu_fast.unlearn.config.Budget`.
        saliency: the share of weights that may change.
        update: what it does in a step besides its loss.
        loop: :func:`ccu_fast.unlearn.loop.run` or what has its signature.
    """

    label: str
    prepare: Prepare | None
    rates: tuple[float, float] = (1.0, 1.0)
    retain_per_forget: int = 1
    saliency: float = 1.0
    update: PrepareUpdate | None = None
    loop: Callable[..., Run] = run

    def run(
        self,
        original: TwoModalityModel,
        forget: PairedData,
        retain: PairedData,
        kind: str,
        budget: Budget,
        *,
        keep_other: float = 0.0,
        **options: Any,
    ) -> Run:
        """Unlearn a copy of ``original``.

        Args:
            original: the trained model; it is not changed.
            forget, retain: the two sets.
            kind: "class", "instances" or "pairs".
            budget: of CCU and of all methods.
            keep_other: weight of a term that the method does not have as published, see :func:`keeping_other`.
            options: those of :func:`ccu_fast.unlearn.loop.run`.
        """
        rate = self.rates[0 if kind == "class" else 1]
        budget = replace(budget, learning_rate=budget.learning_rate * rate, retain_per_forget=self.retain_per_forget)
        prepare = self.prepare
        if keep_other and prepare is not None:
            prepare = keeping_other(prepare, keep_other)
        return self.loop(
            original, forget, retain, prepare, budget, saliency=self.saliency, update=self.update, **options
        )


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

    def prepared(frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> Step:
        step = prepare(frozen, forget, retain, seed)
        if "other" not in heads(frozen) or not forget.labelled:
            raise ValueError(
                "keep_other: expected labels and a head for the other modality, got a model or data without"
            )

        def kept(model: TwoModalityModel, batch: Batch) -> Tensor:
            logits = model.classify_other(model.embed_other(batch.forget.other))
            return step(model, batch) + weight * F.cross_entropy(logits, batch.forget.labels)

        return kept

    return prepared


def _ssd(
    original: TwoModalityModel,
    forget: PairedData,
    retain: PairedData,
    *_: Any,
    progress: Progress | None = None,
    stage: str = "unlearn",
    **options: Any,
) -> Run:
    done = ssd(original, forget, retain, alpha=5.0)
    if progress is not None:
        progress(stage, 1, 1, "dampened")
    return done


# The rates are shares of the common learning rate, at which a small network may collapse: of 1, 0.5, 0.3, 0.1, 0.05,
# 0.03 and 0.01 those nearest to a retrained model on digits-halves, seeds 100 to 102
# (benchmarks/unlearning/rates.json), and SSD's α of those from 1.1 to 10.
BASELINES = {
    "fine_tune": Baseline("fine-tuning", fine_tune),
    "gradient_ascent": Baseline("gradient ascent", gradient_ascent, rates=(0.1, 0.01)),
    "neg_grad_plus": Baseline("NegGrad+", neg_grad_plus, rates=(0.5, 1.0)),
    "random_label": Baseline("random labels", random_label, rates=(1.0, 0.03)),
    "salun": Baseline("SalUn", random_label, saliency=SALIENCY, rates=(0.5, 0.03)),
    "bad_teacher": Baseline("bad teacher", bad_teacher, rates=(0.1, 0.03)),
    "scrub": Baseline("SCRUB", scrub, rates=(0.5, 0.3)),
    "ssd": Baseline("SSD", None, loop=_ssd),
    "boundary_shrink": Baseline("boundary shrink", boundary_shrink, rates=(0.1, 0.01)),
    "boundary_expand": Baseline("boundary expansion", to_shadow, loop=boundary_expand, rates=(0.1, 0.01)),
    "contrastive_unlearning": Baseline(
        "Contrastive Unlearning", contrastive_unlearning, retain_per_forget=RETAIN_PER_FORGET, rates=(1.0, 0.03)
    ),
    "contrastive_unlearning_released": Baseline(
        "Contrastive Unlearning, released",
        partial(contrastive_unlearning, released=True),
        retain_per_forget=RETAIN_PER_FORGET,
        rates=(1.0, 0.03),
    ),
    "multi_delete": Baseline("MultiDelete", multi_delete, rates=(1.0, 0.3)),
    "clip_erase": Baseline("CLIPErase-style", clip_erase, rates=(1.0, 0.3)),
    "sfr_on": Baseline("SFR-on", sfr_on, update=salient_and_slow, rates=(1.0, 0.5)),
    "mm_unlearner": Baseline("MMUnlearner", mm_unlearner, update=masked),
    "null_space": Baseline("NegGrad+ in null space", neg_grad_plus, update=projected, rates=(1.0, 0.5)),
}
