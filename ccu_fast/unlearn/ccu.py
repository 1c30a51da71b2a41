"""CCU as a method of the loop: the three losses plus the task on the retain set.

    loss = forgetting · L_a + retention · (L_b + CE(other head, forget set)) + separation · L_c
           + task · (CE of the visual, other and fused heads on the retain set)

This project's definition, with weights 3, 1, 1, 1; arXiv 2509.23895 publishes no formula.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.config import UnlearnConfig
from ccu_fast.unlearn.loop import Batch, Prepare, Step, embed
from ccu_fast.unlearn.objective import forgetting_loss, retention_loss, separation_loss
from ccu_fast.unlearn.protocol import TwoModalityModel, task_loss


def ccu_method(config: UnlearnConfig) -> Prepare:
    """The method for :func:`ccu_fast.unlearn.loop.run`."""

    def prepare(frozen: TwoModalityModel, forget: PairedData, retain: PairedData) -> Step:
        # The frozen model sees every item once, not once in every step.
        u0_all, a0_all = embed(frozen, forget)
        r0_all, b0_all = embed(frozen, retain)

        def step(model: TwoModalityModel, batch: Batch) -> Tensor:
            u0, a0 = u0_all[batch.forget_rows], a0_all[batch.forget_rows]
            r0, b0 = r0_all[batch.retain_rows], b0_all[batch.retain_rows]
            n = len(batch.forget)
            visual = model.embed_visual(torch.cat([batch.forget.visual, batch.retain.visual]))
            other = model.embed_other(torch.cat([batch.forget.other, batch.retain.other]))
            return _loss(model, batch, visual[:n], visual[n:], other, (u0, a0, r0, b0), config)

        return step

    return prepare


def _loss(
    model: TwoModalityModel,
    batch: Batch,
    u: Tensor,
    r: Tensor,
    other: Tensor,
    frozen: tuple[Tensor, Tensor, Tensor, Tensor],
    config: UnlearnConfig,
) -> Tensor:
    u0, a0, r0, b0 = frozen
    forget, retain = batch.forget, batch.retain
    scale = 1 / config.temperature
    total = config.task * task_loss(model, r, other[len(u) :], retain.labels)
    if config.forgetting:
        what = "labels" if config.forget == "class" else "ids"
        roles = {f"forget_{what}": getattr(forget, what), f"retain_{what}": getattr(retain, what)}
        total = total + config.forgetting * forgetting_loss(u, r, u0=u0, a0=a0, b0=b0, scale=scale, **roles)
    if config.retention:
        keys = torch.cat([a0, b0])
        kept = retention_loss(other, keys, keys, scale=scale)
        kept = kept + F.cross_entropy(model.classify_other(other[: len(u)]), forget.labels)
        total = total + config.retention * kept
    if config.separation:
        apart = separation_loss(
            r, r0, u, scale=scale, weight=config.forgotten_weight,
            retain_labels=retain.labels, forget_labels=forget.labels,
        )  # fmt: skip
        total = total + config.separation * apart
    return total
