"""Selective Synaptic Dampening: weights that matter more to the forget set than to everything are made smaller, once.

    F_D = mean over the items of D of (grad of the loss)²,   F_f = the same over the forget set
    where F_f > α · F_D:   θ ← θ · min(λ · F_D / F_f, 1)

No training. D is the forget and the retain set together. Source: Foster et al. 2024 (arXiv 2308.07707);
defaults of the paper and its released code: α = 10, λ = 1; the code squares the mean gradient of 64 items at a time,
the formula that of each. Changed for two modalities: the loss is the cross-entropy of the heads that see the visual
modality.

Because D holds the forget set, F_f ≤ F_D · |D| / |forget|: with a tenth of the data to forget α = 10 selects nothing.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.runs.progress import Clock
from ccu_fast.unlearn.loop import Run
from ccu_fast.unlearn.model import TwoModalityModel, forget_loss


def ssd(
    original: TwoModalityModel,
    forget: PairedData,
    retain: PairedData,
    *,
    alpha: float = 10.0,
    strength: float = 1.0,
    batch: int = 1,
) -> Run:
    """A copy with its weights dampened. The run has no step and no loss; its items are those of the gradients.

    Args:
        original: not changed; parameters that require no gradient stay as they are.
        forget, retain: the two sets, on the device of the model.
        alpha: > 0; how many times more a weight must matter to the forget set to be selected.
        strength: λ > 0; smaller dampens more.
        batch: items whose mean gradient is squared; 1 is the paper's formula, more takes less time.
    """
    check.number("alpha", alpha, low=1e-12)
    check.number("strength", strength, low=1e-12)
    check.integer("batch", batch, low=1)
    clock = Clock()
    model = copy.deepcopy(original).eval()
    of_forget, n_forget = _sum_of_squares(model, forget, batch)
    of_retain, n_retain = _sum_of_squares(model, retain, batch)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                everything = (of_forget[name] + of_retain[name]) / (n_forget + n_retain)
                parameter.mul_(dampening(everything, of_forget[name] / n_forget, alpha, strength))
    model.train(original.training)
    return Run(model, 0, len(forget) + len(retain), *clock.read(), [])


def dampening(everything: Tensor, forget: Tensor, alpha: float, strength: float) -> Tensor:
    """The factor of each weight, in (0, 1], from its importances F_D and F_f."""
    factor = (strength * everything / forget).clamp(max=1)
    return torch.where(forget > alpha * everything, factor, 1.0)


def _sum_of_squares(model: TwoModalityModel, data: PairedData, batch: int) -> tuple[dict[str, Tensor], int]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    parts = torch.arange(len(data), device=data.labels.device).split(batch)
    for rows in parts:
        loss = forget_loss(model, data.batch(rows))
        gradients: Any = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient.square()
    return total, len(parts)
