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
from ccu_fast.unlearn.model import HEADS, TwoModalityModel, heads

# What a method may need besides two towers, and how a report says it.
NEEDS = {
    "labels": "needs items with labels",
    "classes": "needs items with labels and a head that sees the visual modality",
    "heads": "needs a model with a visual, an other and a fused head",
    "other": "needs items with labels and a head for the other modality",
}


@dataclass(frozen=True)
class Baseline:
    """A method to compare with.

    Attributes:
        label: its name in tables.
        does: what it does, as a part of a sentence.
        source: the paper.
        prepare: its loss; None where it takes no steps.
        needs: a key of :data:`NEEDS`; None for two towers alone.
        rates: what share of the budget's learning rate it gets to forget a class, and to forget items.
        retain_per_forget: see :class:`ccu_fast.unlearn.config.Budget`.
        saliency: the share of weights that may change.
        update: what it does in a step besides its loss.
        loop: :func:`ccu_fast.unlearn.loop.run` or what has its signature.
    """

    label: str
    does: str
    source: str
    prepare: Prepare | None
    needs: str | None = None
    rates: tuple[float, float] = (1.0, 1.0)
    retain_per_forget: int = 1
    saliency: float = 1.0
    update: PrepareUpdate | None = None
    loop: Callable[..., Run] = run

    def lacks(self, model: TwoModalityModel, forget: PairedData, *, told: bool = False) -> str | None:
        """What the method needs and the model or the items do not have, in words; None where it can run.

        Args:
            model, forget: of :meth:`run`.
            told: it is also to keep the other modality.
        """
        own = heads(model)
        there = {
            "labels": forget.labelled,
            "classes": forget.labelled and bool(heads(model, visual_only=True)),
            "heads": set(own) == set(HEADS),
            "other": forget.labelled and "other" in own,
        }
        wanted = [need for need in (self.needs, "other" if told else None) if need is not None]
        return next((NEEDS[need] for need in wanted if not there[need]), None)

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
    "fine_tune": Baseline(
        "fine-tuning",
        "trains on the retain set alone, so that the rest may fade",
        "Golatkar et al. 2020, arXiv 1911.04933",
        fine_tune,
    ),
    "gradient_ascent": Baseline(
        "gradient ascent",
        "ascends the loss of the forget set",
        "Graves et al. 2020, arXiv 2010.10981; Thudi et al. 2021, arXiv 2109.13398",
        gradient_ascent,
        rates=(0.1, 0.01),
    ),
    "neg_grad_plus": Baseline(
        "NegGrad+",
        "descends on the retain set and ascends on the forget set in one step",
        "Kurmanji et al. 2023, arXiv 2302.09880",
        neg_grad_plus,
        rates=(0.5, 1.0),
    ),
    "random_label": Baseline(
        "random labels",
        "teaches wrong labels for the forget set",
        "Graves et al. 2020, arXiv 2010.10981; Golatkar et al. 2020, arXiv 1911.04933",
        random_label,
        needs="classes",
        rates=(1.0, 0.03),
    ),
    "salun": Baseline(
        "SalUn",
        "random labels on the half of the weights that matter most to the forget set",
        "Fan et al. 2024, arXiv 2310.12508",
        random_label,
        needs="classes",
        saliency=SALIENCY,
        rates=(0.5, 0.03),
    ),
    "bad_teacher": Baseline(
        "bad teacher",
        "imitates a random network on the forget set and the original on the rest",
        "Chundawat et al. 2023, arXiv 2205.08096",
        bad_teacher,
        rates=(0.1, 0.03),
    ),
    "scrub": Baseline(
        "SCRUB",
        "leaves the original's answers on the forget set and stays at them on the rest, in turns",
        "Kurmanji et al. 2023, arXiv 2302.09880",
        scrub,
        rates=(0.5, 0.3),
    ),
    "ssd": Baseline(
        "SSD",
        "dampens the weights that matter more to the forget set than to the rest, without training",
        "Foster et al. 2024, arXiv 2308.07707",
        None,
        loop=_ssd,
    ),
    "boundary_shrink": Baseline(
        "boundary shrink",
        "teaches each forgotten item the wrong class whose boundary is nearest",
        "Chen et al. 2023, arXiv 2303.11570",
        boundary_shrink,
        needs="classes",
        rates=(0.1, 0.01),
    ),
    "boundary_expand": Baseline(
        "boundary expansion",
        "moves the forget set to a class of its own, which is then removed",
        "Chen et al. 2023, arXiv 2303.11570",
        to_shadow,
        needs="heads",
        loop=boundary_expand,
        rates=(0.1, 0.01),
    ),
    "contrastive_unlearning": Baseline(
        "Contrastive Unlearning",
        "pushes forgotten embeddings away from their own class and towards the others",
        "Lee et al. 2024, arXiv 2401.10458",
        contrastive_unlearning,
        needs="labels",
        retain_per_forget=RETAIN_PER_FORGET,
        rates=(1.0, 0.03),
    ),
    "contrastive_unlearning_released": Baseline(
        "Contrastive Unlearning, released",
        "the same as its authors' code has it, which is not the paper's formula",
        "Lee et al. 2024, arXiv 2401.10458",
        partial(contrastive_unlearning, released=True),
        needs="labels",
        retain_per_forget=RETAIN_PER_FORGET,
        rates=(1.0, 0.03),
    ),
    "multi_delete": Baseline(
        "MultiDelete",
        "treats the two halves of a forgotten item as halves that never belonged together",
        "Cheng & Amiri 2024, arXiv 2311.12047",
        multi_delete,
        rates=(1.0, 0.3),
    ),
    "clip_erase": Baseline(
        "CLIPErase-style",
        "makes the two halves of a forgotten item dissimilar",
        "Yang et al. 2025, arXiv 2410.23330",
        clip_erase,
        rates=(1.0, 0.3),
    ),
    "sfr_on": Baseline(
        "SFR-on",
        "ascends on what is still well remembered, under a mask of saliency, and repairs the rest, in turns",
        "Huang et al. 2024, arXiv 2409.19732",
        sfr_on,
        update=salient_and_slow,
        rates=(1.0, 0.5),
    ),
    "mm_unlearner": Baseline(
        "MMUnlearner",
        "ascends on the forget set and descends on the rest, on the weights that little else depends on",
        "Huo et al. 2025, arXiv 2502.11051",
        mm_unlearner,
        needs="other",
        update=masked,
    ),
    "null_space": Baseline(
        "NegGrad+ in null space",
        "NegGrad+ kept out of the directions that retained items use in each layer",
        "Kurmanji et al. 2023, arXiv 2302.09880; Liu et al. 2025, arXiv 2503.14963",
        neg_grad_plus,
        update=projected,
        rates=(1.0, 0.5),
    ),
}
