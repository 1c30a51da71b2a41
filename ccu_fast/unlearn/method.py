"""CCU as a method of the loop: damage, then the three losses plus the task on the retain set.

    before the first step   w ← dampened w (Selective Synaptic Dampening, from a sample of both sets)
    loss = forgetting · (L_a + unclassify of the visual and fused heads at u and at u0, for a class)
           + neighbours · (pull towards the retained item that looks most alike)
           + retention · (L_b + CE(other head, forget set)) + anchor · L_anchor
           + separation · L_c + task · (CE of the heads on the retain set; InfoNCE without heads)

This project's definition; arXiv 2509.23895 publishes no formula.

The model is damaged first because losses at the output teach the last layers to hide what the earlier ones still know,
and a few steps of training bring that back. Weights that mattered more to the forget set than to the rest no longer
know once they are made small, and the losses repair the rest. The heads are told about u0, where the forgotten items
used to be, because a head that keeps the old direction of their class brings them back to it as quickly.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.baselines.bad_teacher import reinitialised
from ccu_fast.unlearn.baselines.ssd import dampen
from ccu_fast.unlearn.config import UnlearnConfig
from ccu_fast.unlearn.loop import Batch, Run, embed, embed_visual, nearest, run
from ccu_fast.unlearn.model import TwoModalityModel, heads, logits_of, task_loss
from ccu_fast.unlearn.objective import (
    KeyBank,
    anchor_loss,
    forgetting_loss,
    neighbour_loss,
    retention_loss,
    separation_loss,
    unclassify_loss,
)


def run_ccu(
    original: TwoModalityModel, forget: PairedData, retain: PairedData, config: UnlearnConfig, **options: Any
) -> Run:
    """CCU in the loop with all that its configuration says; the options are those of :func:`.loop.run`."""
    return run(
        original,
        forget,
        retain,
        partial(CcuStep, config),
        config.budget,
        seed=config.seed,
        trainable=config.trainable,
        saliency=config.saliency,
        start=partial(damage, config, forget, retain) if config.dampen else None,
        **options,
    )


def damage(config: UnlearnConfig, forget: PairedData, retain: PairedData, model: TwoModalityModel) -> None:
    """Dampen, in place, the weights that matter to the forget set more than to the rest, as a sample of both tells."""
    samples = []
    for data in (forget, retain):
        count = max(1, round(config.dampen_items * len(data) / (len(forget) + len(retain))))
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(config.seed))
        samples.append(data.batch(order[:count].to(data.labels.device)))
    dampen(model, *samples, alpha=config.dampen)


class CcuStep:
    """The loss of a step, from frozen embeddings that are computed once and not in every step."""

    def __init__(
        self, config: UnlearnConfig, frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int
    ) -> None:
        self.config, self.retain = config, retain
        self.u0, self.a0 = embed(frozen, forget)
        self.r0, self.b0 = embed(frozen, retain)
        # Found again by a resumed run: the same copy of the same model.
        self.neighbour = nearest_retained(frozen, forget, retain, seed) if config.neighbours else None
        self.bank: KeyBank | None = None
        if config.bank:
            keys = torch.cat([self.r0, self.b0, self.u0, self.a0])
            labels = torch.cat([retain.labels, retain.labels, forget.labels, forget.labels])
            ids = torch.cat([retain.ids, retain.ids, forget.ids, forget.ids]) // config.group
            self.bank = KeyBank(keys, labels, ids).draw(config.bank, seed)

    def __call__(self, model: TwoModalityModel, batch: Batch) -> Tensor:
        config, forget, retain = self.config, batch.forget, batch.retain
        u0, a0 = self.u0[batch.forget_rows], self.a0[batch.forget_rows]
        r0, b0 = self.r0[batch.retain_rows], self.b0[batch.retain_rows]
        other0 = torch.cat([a0, b0])
        n, scale = len(forget), 1 / config.temperature
        visual, other = batch.embed(model)
        u, r, a, b = visual[:n], visual[n:], other[:n], other[n:]
        total = config.task * task_loss(model, r, b, retain.labels)
        if config.forgetting:
            roles: dict[str, Any] = {"forget_labels": forget.labels, "retain_labels": retain.labels}
            if config.forget != "class":
                roles = {"forget_ids": forget.ids // config.group, "retain_ids": retain.ids // config.group}
            gone = forgetting_loss(u, r, u0=u0, a0=a0, b0=b0, scale=scale, bank=self.bank, **roles)
            if config.forget == "class":
                for head in heads(model, visual_only=True):
                    # The other modality is kept: it must not learn to hide the class from the fused head.
                    for place in (u, u0):
                        gone = gone + unclassify_loss(logits_of(model, head, place, a.detach()), forget.labels)
            total = total + config.forgetting * gone
        if self.neighbour is not None:
            alike = embed_visual(model, self.retain.visual[self.neighbour[batch.forget_rows]])
            total = total + config.neighbours * neighbour_loss(u, alike)
        if config.retention:
            keys = other0 if self.bank is None else self.bank.keys
            kept = retention_loss(other, other0, keys, scale=scale)
            if "other" in heads(model) and forget.labelled:
                kept = kept + F.cross_entropy(model.classify_other(a), forget.labels)
            total = total + config.retention * kept
        if config.anchor:
            total = total + config.anchor * (anchor_loss(other, other0) + anchor_loss(r, r0))
        if config.separation:
            labels = {"retain_labels": retain.labels, "forget_labels": forget.labels}
            sides: dict[str, Any] = {"retain_ids": retain.ids} if config.forget == "pairs" else labels
            apart = separation_loss(r, r0, u, scale=scale, weight=config.forgotten_weight, **sides)
            total = total + config.separation * apart
        return total


def nearest_retained(model: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> Tensor:
    """For each item to forget the retained item that looks most like it to a network that has learned nothing::

        fresh = reinitialised(model, seed)
        (fresh.embed_visual(forget.visual) @ fresh.embed_visual(retain.visual).T).argmax(1)

    Nearness is measured before any training because the trained model's is what must go.

    Args:
        model: not changed; its architecture is what matters. Parameters outside of layers with a ``reset_parameters``
            stay as they were trained.
        forget, retain: on the device of the model.
        seed: of the fresh weights.

    Returns:
        int64 ``[len(forget)]``, rows of ``retain``.

    Raises:
        ValueError: no layer can be initialised anew.
    """
    fresh = reinitialised(model, seed)
    return nearest(embed_visual(fresh, forget.visual), embed_visual(fresh, retain.visual))
