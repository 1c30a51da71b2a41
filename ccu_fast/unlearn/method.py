"""CCU as a method of the loop: what forgets, what keeps the other modality, what keeps the rest apart.

    before the first step, for a class: w ← dampened w (Selective Synaptic Dampening, from a sample of both sets)
    loss = forgetting · L_a + neighbours · (pull towards where the retained item lies that looks most alike)
           + retention · L_b + anchor · L_anchor
           + separation · L_c + task · (CE of the heads on the retain set; InfoNCE without heads)

(a) A class goes to nothing: the inverse contrastive loss at the embeddings, and the mean of the same at the visual and
    the fused head, there where the items are and where they were. An instance or a pair goes to the level of one never
    seen and no further (:mod:`ccu_fast.unlearn.unseen`): a forgotten picture is not to be less known than a new one.
(b) The other modality is kept by leaving every parameter alone that it depends on (``keep="exact"``): it is the same to
    the bit, and nothing of it needs training. With ``keep="trained"`` it is trained and held by the loss.
(c) Each retained item stays at its own frozen place, apart from all others and from the forgotten ones.

This project's definition; arXiv 2509.23895 publishes no formula.

A class is damaged first because losses at the output teach the last layers to hide what the earlier ones still know,
and a few steps of training bring that back. Weights that mattered more to the forget set than to the rest no longer
know once they are made small, and the losses repair the rest. The heads are told about u0, where the forgotten items
used to be, because a head that keeps the old direction of their class brings them back to it as quickly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.runs.kept import Kept, remove
from ccu_fast.runs.provenance import Hashes
from ccu_fast.unlearn.alarms import NothingTrainable
from ccu_fast.unlearn.baselines.ssd import dampen
from ccu_fast.unlearn.config import UnlearnConfig
from ccu_fast.unlearn.loop import Batch, Run, embed, embed_visual, run
from ccu_fast.unlearn.lora import adaptable, attach
from ccu_fast.unlearn.model import TwoModalityModel, evaluating, heads, logits_of, task_loss
from ccu_fast.unlearn.objective import (
    KeyBank,
    anchor_loss,
    forgetting_loss,
    level_loss,
    neighbour_loss,
    retention_loss,
    separation_loss,
    unclassify_loss,
)
from ccu_fast.unlearn.parameters import (
    buffers_of_other,
    left_to_train,
    matches,
    parameters_of_other,
    parameters_of_visual,
)
from ccu_fast.unlearn.unseen import POOL, Levels, check_levels, comparable, nearest, sample

# What a run keeps until it is over.
KEPT_FILES = ("forget", "retain", "judged", "levels", "neighbours", "text_before", "text_after")
BELOW = 0.2  # weight of what is below a ceiling, against 1 of what is above
DAMPENED_AT_ONCE = 32  # items whose mean gradient is squared: as good as one by one, in a tenth of the time


def run_ccu(
    original: TwoModalityModel,
    forget: PairedData,
    retain: PairedData,
    config: UnlearnConfig,
    *,
    unseen: PairedData | None = None,
    kept: Kept | None = None,
    fixed: Fixed | None = None,
    **options: Any,
) -> Run:
    """CCU in the loop with all that its configuration says; the options are those of :func:`.loop.run`.

    What the original model says is ``kept`` (:func:`keep_embeddings`) for a run that goes on after it was killed; by
    default until this one ends, where there is a checkpoint. ``fixed`` is of :func:`check_run`, where that was called.

    Raises:
        ValueError: see :func:`check_run`.
    """
    fixed = check_run(original, forget, retain, config, unseen=unseen) if fixed is None else fixed
    own, checkpoint = kept is None, options.get("checkpoint")
    if kept is None and checkpoint is not None:
        options["hashes"] = hashes = options.get("hashes") or Hashes()
        group = options.get("group")
        kept = keep_embeddings(checkpoint.path, original, forget, retain, config, unseen, group, hashes=hashes)
    done = run(
        original,
        forget,
        retain,
        partial(CcuStep, config, unseen=unseen, kept=kept),
        config.budget,
        seed=config.seed,
        trainable=config.trainable,
        keep=fixed.keep,
        saliency=config.saliency,
        start=partial(damage, config, forget, retain) if config.used("dampen") else None,
        more=asdict(config),
        adapt=None if config.lora is None else partial(adapt, config, fixed.leave),
        unseen=unseen,
        **options,
    )
    if own and checkpoint is not None:
        remove(checkpoint.path, KEPT_FILES)
    return done


def keep_embeddings(
    checkpoint: Path,
    original: TwoModalityModel,
    forget: PairedData,
    retain: PairedData,
    config: UnlearnConfig,
    unseen: PairedData | None,
    group: dist.ProcessGroup | None = None,
    dtype: str = "fp32",
    hashes: Hashes | None = None,
) -> Kept:
    """Where a run keeps what the original model says, beside its checkpoint, under the names :data:`KEPT_FILES`.

    The first process of a group writes it; all of them read it. ``dtype`` is that of the forward passes, ``hashes`` are
    those that are known.
    """
    parts = [part for part in (forget, retain, unseen) if part is not None]
    return Kept(
        checkpoint,
        original,
        parts,
        [config.seed, config.group, dtype],
        writes=group is None or dist.get_rank(group) == 0,
        device=forget.labels.device,
        hashes=hashes,
    )


@dataclass(frozen=True)
class Fixed:
    """What of a model a run leaves as it is: names of its parameters and buffers.

    Attributes:
        keep: they stay to the bit: with keep="exact" what the other modality uses.
        leave: weights that no low-rank matrix is added to, those of the other modality; none without ``lora``.
    """

    keep: frozenset[str] = frozenset()
    leave: frozenset[str] = frozenset()


def check_run(
    original: TwoModalityModel,
    forget: PairedData,
    retain: PairedData,
    config: UnlearnConfig,
    *,
    unseen: PairedData | None = None,
) -> Fixed:
    """Raise, before any work, what a run could not do with these settings on this model and these sets.

    The model is looked into, and is afterwards as it was.

    Raises:
        ValueError: a pull to neighbours among inputs that have no nearness; no unseen items where stand-ins cannot be
            made.
        NothingTrainable: see :func:`.left_to_train` and :func:`.lora.adaptable`; the visual embeddings depend on
            nothing that may change but what the other modality uses, and only heads could then hide what they tell.
    """
    if config.neighbours and not comparable(forget.visual):
        raise ValueError(
            f"neighbours: expected 0 for visual inputs of {str(forget.visual.dtype).removeprefix('torch.')}, which "
            f"have no nearness, got {config.neighbours}"
        )
    if config.forget != "class" and config.forgetting:
        check_levels(original, forget, retain, unseen, group=config.group)
    exact, lora = config.keep == "exact", config.lora is not None
    of_other = parameters_of_other(original, forget) if exact or lora else frozenset()
    of_visual = parameters_of_visual(original, forget) if exact or lora else frozenset()
    keep: frozenset[str] = frozenset()
    if exact:
        trained = {
            p for p, value in original.named_parameters() if value.requires_grad and matches(p, config.trainable)
        }
        visual = of_visual & trained
        if visual and visual <= of_other:
            raise NothingTrainable(
                'keep: expected keep="trained" for a model whose visual embeddings depend on no trainable parameter '
                'that the other modality does not depend on, got "exact"'
            )
        keep = of_other | buffers_of_other(original, forget)
    fixed = Fixed(keep, of_other - of_visual if lora else frozenset())
    free = left_to_train(cast(nn.Module, original), config.trainable, keep)
    if lora:
        adaptable(cast(nn.Module, original), fixed.leave, free)
    return fixed


def adapt(config: UnlearnConfig, leave: frozenset[str], model: TwoModalityModel) -> Callable[[], None]:
    """Train adapters of the visual modality's linear layers; what is returned merges them."""
    return attach(cast(nn.Module, model), config.lora or 0, leave, config.seed)


def damage(config: UnlearnConfig, forget: PairedData, retain: PairedData, model: TwoModalityModel) -> None:
    """Dampen, in place, the weights that matter to the forget set more than to the rest, as a sample of both tells."""
    samples = []
    for data in (forget, retain):
        count = max(1, round(config.dampen_items * len(data) / (len(forget) + len(retain))))
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed))
        samples.append(data.batch(order[:count].to(data.labels.device)))
    dampen(model, *samples, alpha=config.used("dampen"), at_once=DAMPENED_AT_ONCE)


class CcuStep:
    """The loss of a step. What the frozen model says is computed once, of the forget set and of what else is used."""

    def __init__(
        self,
        config: UnlearnConfig,
        frozen: TwoModalityModel,
        forget: PairedData,
        retain: PairedData,
        seed: int,
        *,
        unseen: PairedData | None = None,
        kept: Kept | None = None,
    ) -> None:
        kept = Kept() if kept is None else kept
        self.config, self.retained = config, Frozen(frozen, retain, config.budget.steps * config.budget.batch, kept)
        self.scale = 1 / config.temperature
        self.u0, self.a0 = kept.of("forget", partial(embed, frozen, forget), about=len(forget))
        self.levels: Levels | None = None
        if config.forget != "class" and config.forgetting:
            sets = forget, retain, self.u0, self.a0
            more: dict[str, Any] = {"group": config.group, "seed": seed, "kept": kept}
            self.levels = Levels(frozen, *sets, unseen, **more, ceiling=config.ceiling)
        self.neighbour: Tensor | None = None
        self.pull: float = config.used("neighbours")
        # Without a word for inputs such as token ids, which have no nearness: there it is only the default.
        if self.pull and comparable(forget.visual):
            (self.neighbour,) = kept.of("neighbours", partial(_neighbours, frozen, forget, retain, seed))
        self.bank: KeyBank | None = None
        if config.bank and (config.forget == "class" or config.keep == "trained"):  # nothing else asks it
            r0, b0 = kept.of("retain", partial(embed, frozen, retain), about=len(retain))
            keys = torch.cat([r0, b0, self.u0, self.a0])
            labels = torch.cat([retain.labels, retain.labels, forget.labels, forget.labels])
            ids = torch.cat([retain.ids, retain.ids, forget.ids, forget.ids]) // config.group
            self.bank = KeyBank(keys, labels, ids).draw(config.bank, seed)

    def __call__(self, model: TwoModalityModel, batch: Batch) -> Tensor:
        config, forget, retain, scale = self.config, batch.forget, batch.retain, self.scale
        n, trained = len(forget), config.keep == "trained"
        u0, a0 = (kept.index_select(0, batch.forget_rows) for kept in (self.u0, self.a0))
        r0, b0 = self.retained.of(batch.retain_rows, retain)
        sizes = n, len(retain)
        u, r = model.embed_visual(torch.cat([forget.visual, retain.visual])).split(sizes)
        a, b = a0, b0
        if trained:
            other = model.embed_other(torch.cat([forget.other, retain.other]))
            other0 = torch.cat([a0, b0])
            a, b = other.split(sizes)
        # An untrained head for the other modality has nothing to learn from its untrained embeddings.
        if config.task:
            total = config.task * task_loss(model, r, b, retain.labels, visual_only=not trained)
        else:
            total = 0 * r.sum()
        if config.forgetting:
            total = total + config.forgetting * self._gone(model, batch, u, r, u0, a0, b0, a)
        if self.neighbour is not None:
            total = total + self.pull * neighbour_loss(u, self.neighbour.index_select(0, batch.forget_rows))
        if config.retention and trained:
            keys = other0 if self.bank is None else self.bank.keys
            kept = retention_loss(other, other0, keys, scale=scale)
            if "other" in heads(model) and forget.labelled:
                kept = kept + F.cross_entropy(model.classify_other(a), forget.labels)
            total = total + config.retention * kept
        if config.anchor:
            held = anchor_loss(r, r0)
            total = total + config.anchor * (held + anchor_loss(other, other0) if trained else held)
        if config.separation:
            apart = separation_loss(r, r0, u, scale=scale, weight=config.forgotten_weight, retain_ids=retain.ids)
            total = total + config.separation * apart
        return total

    def _gone(
        self,
        model: TwoModalityModel,
        batch: Batch,
        u: Tensor,
        r: Tensor,
        u0: Tensor,
        a0: Tensor,
        b0: Tensor,
        a: Tensor,
    ) -> Tensor:
        """L_a."""
        if self.levels is not None:
            now = self.levels.log_odds(model, u, a0, batch.forget)
            levels = self.levels.of(model, batch.forget_rows)
            if self.config.ceiling is None:
                return level_loss(now, levels)
            above, below = torch.maximum(now, levels), torch.minimum(now, levels)
            return level_loss(above, levels) + BELOW * level_loss(below, levels)
        forget, retain = batch.forget.labels, batch.retain.labels
        gone = forgetting_loss(
            u, r, u0=u0, a0=a0, b0=b0, scale=self.scale, bank=self.bank, forget_labels=forget, retain_labels=retain
        )
        # The other modality is kept: it must not learn to hide the class from the fused head.
        told = [
            unclassify_loss(logits_of(model, head, place, a.detach()), forget)
            for head in heads(model, visual_only=True)
            for place in (u, u0)
        ]
        return torch.stack([gone, *told]).mean()


def _neighbours(frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> tuple[Tensor]:
    """Where the retained item lies that looks most like each item to forget."""
    pool = sample(retain, POOL, seed)
    alike, place = nearest(forget.visual, pool.visual).unique(return_inverse=True)
    return (embed_visual(frozen, pool.select(alike).visual)[place],)


class Frozen:
    """Both embeddings of retained items under the frozen model.

    Where a run uses as many rows as there are items, all are embedded once; where it uses fewer, those of each batch:
    its time then does not depend on the size of the retain set.
    """

    def __init__(self, model: TwoModalityModel, data: PairedData, used: int, kept: Kept | None = None) -> None:
        self.model, kept = model, Kept() if kept is None else kept
        self.whole = kept.of("retain", partial(embed, model, data), about=len(data)) if len(data) <= used else None

    def of(self, rows: Tensor, batch: PairedData) -> tuple[Tensor, Tensor]:
        """The visual and the other embeddings of these rows, which are the items of ``batch``."""
        if self.whole is not None:
            visual, other = self.whole
            return visual.index_select(0, rows), other.index_select(0, rows)
        with evaluating(self.model):
            return self.model.embed_visual(batch.visual), self.model.embed_other(batch.other)
