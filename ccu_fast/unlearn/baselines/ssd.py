"""Selective Synaptic Dampening: weights that matter more to the forget set than to everything are made smaller, once.

    F_D = mean over the items of D of (grad of the loss)²,   F_f = the same over the forget set
    where F_f > α · F_D:   θ ← θ · min(λ · F_D / F_f, 1)

No training. D is the forget and the retain set together. Source: Foster et al. 2024 (arXiv 2308.07707); α = 10, λ = 1
in the paper and its released code, λ = 1 here; the code squares the mean gradient of 64 items at a time, the formula
that of each. Changed for two modalities: the loss is the cross-entropy of the heads that see the visual modality.

Because D holds the forget set, F_f ≤ F_D · |D| / |forget|: with a tenth of the data to forget α = 10 selects nothing.

Where an item's loss is that of finding its partner among those beside it, one item alone has the loss 0 and no
gradient: there the mean gradient of 64 items is squared, as in the released code.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ccu_fast.data.paired import PairedData
from ccu_fast.runs.progress import Clock
from ccu_fast.unlearn.baselines.importance import sum_of_squares
from ccu_fast.unlearn.loop import Run
from ccu_fast.unlearn.model import TwoModalityModel, evaluating, heads, loss_on

TOGETHER = 64  # items whose mean gradient is squared where one alone has none


def ssd(original: TwoModalityModel, forget: PairedData, retain: PairedData, *, alpha: float) -> Run:
    """A dampened copy, see :func:`dampen`. The run has no step and no loss; its items are those of the gradients."""
    clock = Clock()
    model = copy.deepcopy(original)
    alone = forget.labelled and heads(original, visual_only=True)
    dampen(model, forget, retain, alpha=alpha, at_once=1 if alone else TOGETHER)
    return Run(model, 0, len(forget) + len(retain), *clock.read(), [])


def dampen(model: TwoModalityModel, forget: PairedData, retain: PairedData, *, alpha: float, at_once: int = 1) -> None:
    """Make the weights smaller on which the forget set depends most.

    Args:
        model: changed in place; parameters that require no gradient stay as they are.
        forget, retain: the two sets, on the device of the model.
        alpha: > 0; how many times more a weight must matter to the forget set to be selected.
        at_once: items whose mean gradient is squared, at least 1. The formula has 1; more of them cost fewer passes.
    """
    with evaluating(model):
        parts = [_parts(data, at_once) for data in (forget, retain)]
        of_forget, of_retain = (sum_of_squares(model, _visual_loss, batches) for batches in parts)
        for name, parameter in model.named_parameters():
            if name in of_forget:
                everything = (of_forget[name] + of_retain[name]) / sum(map(len, parts))
                parameter.mul_(dampening(everything, of_forget[name] / len(parts[0]), alpha))


def dampening(everything: Tensor, forget: Tensor, alpha: float) -> Tensor:
    """The factor of each weight, in (0, 1], from its importances F_D and F_f."""
    return torch.where(forget > alpha * everything, (everything / forget).clamp(max=1), 1.0)


def _visual_loss(model: TwoModalityModel, data: PairedData) -> Tensor:
    return loss_on(model, data, visual_only=True)


def _parts(data: PairedData, at_once: int) -> list[PairedData]:
    """All items, in parts of nearly one size."""
    rows = torch.arange(len(data), device=data.labels.device)
    return [data.batch(part) for part in rows.tensor_split(-(-len(data) // at_once))]
