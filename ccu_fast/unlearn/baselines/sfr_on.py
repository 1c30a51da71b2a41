"""SFR-on: ascent on what is still well remembered, under a mask of saliency, and repair on the retain set, in turns.

    w_i ∝ L_i^−λ, with mean 1 over the forget batch, no gradient through it;   α_t = α · (1 + cos(π t / T)) / 2
    mask = F_forget / F_retain ≥ γ,   F = mean over batches of (grad of the batch's loss)²
    θ′ = θ moved by mask ⊙ grad of −α_t · mean_i w_i · L_i      fast, on the forget batch
    θ″ = θ′ moved by grad of task(retain batch)                 fast, repair
    θ ← θ + β · (θ″ − θ)                                        slow

An item whose loss has grown counts less. The repair after each ascent stands for the Hessian of the retained loss in
the paper's direction of descent, which is too large to compute. Source: Huang et al. 2024, Unified Gradient-Based
Machine Unlearning with Remain Geometry Enhancement (arXiv 2409.19732), and its released code, which the formulas and
settings here follow: λ = 0.5, γ = 1; for a diffusion model on CIFAR-10, with Adam, an ascent and a repair take turns,
α = 10 and all gradients are clipped at norm 1, as here. For its ResNet, with SGD, α is 25, five repairs follow an
ascent, and ascents alone are clipped, at 7. β is 1 for the ResNet, and the diffusion model has no slow weights, so that
the slow step is the whole of the fast one; so it is here. Importances are of batches of 128, as for the ResNet.

Changed for two modalities: L_i and F_forget are of the heads that see the visual modality, summed over the heads of the
item, F_retain and the repair are of all heads. A model without heads has the InfoNCE of the pairs, each way.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.baselines.importance import exceeds, shuffled, sum_of_squares, trainable_copy
from ccu_fast.unlearn.loop import Batch, Move, Step, Update
from ccu_fast.unlearn.model import CLIP_SCALE, TwoModalityModel, embed_both, heads, logits_of, loss_on

ALPHA, LAMBDA, BETA, MAX_NORM = 10.0, 0.5, 1.0, 1.0
EPSILON = 1e-15  # of the coefficients, as in the released code


def sfr_on(frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> Step:
    """The method; its other half is :func:`salient_and_slow`."""

    def step(model: TwoModalityModel, batch: Batch) -> Tensor:
        if not ascends(batch):
            return loss_on(model, batch.retain)
        alpha = ALPHA * (1 + math.cos(math.pi * batch.step / batch.steps)) / 2
        losses = item_losses(model, batch.forget)
        return -alpha * (coefficients(losses) * losses).mean()

    return step


def ascends(batch: Batch) -> bool:
    """Every other step from the first on, but for the last step of all: what is broken is repaired."""
    return batch.step % 2 == 0 and batch.step + 1 < batch.steps


def item_losses(model: TwoModalityModel, data: PairedData) -> Tensor:
    """What each item loses when it is forgotten, ``[N]``; its mean is ``loss_on(…, visual_only=True)``."""
    visual, other = embed_both(model, data)
    own = heads(model, visual_only=True)
    if own and data.labelled:
        return torch.stack(
            [F.cross_entropy(logits_of(model, head, visual, other), data.labels, reduction="none") for head in own]
        ).sum(0)
    similarity = getattr(model, "scale", CLIP_SCALE) * visual @ other.mT
    partner = torch.arange(len(data), device=similarity.device)
    there, back = (F.cross_entropy(s, partner, reduction="none") for s in (similarity, similarity.mT))
    return (there + back) / 2


def coefficients(losses: Tensor) -> Tensor:
    """w_i ∝ L_i^−λ with mean 1, without gradient."""
    weight = 1 / (losses.detach() ** LAMBDA + EPSILON)
    return weight / weight.mean()


def salient_and_slow(
    frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int, *, beta: float = BETA
) -> Update:
    """The mask of the ascents, the clipping of all gradients, and the slow weights where β is below 1."""
    model = trainable_copy(frozen)
    visual_loss = partial(loss_on, visual_only=True)
    gone, kept = (
        {name: total / len(batches) for name, total in sum_of_squares(model, loss, batches).items()}
        for loss, batches in ((visual_loss, shuffled(forget, seed)), (loss_on, shuffled(retain, seed)))
    )
    mask = exceeds(gone, kept, model)

    def update(model: TwoModalityModel, batch: Batch, move: Move, memory: dict[str, Tensor]) -> None:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if ascends(batch):
            for name, parameter in named.items():
                # What the loss does not reach is as what the mask hides: Adam goes on with what it remembers.
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = gradient * mask[name]
                if beta < 1:
                    memory[name] = parameter.detach().clone()
        nn.utils.clip_grad_norm_(named.values(), MAX_NORM)
        move()
        if memory and not ascends(batch):
            with torch.no_grad():
                for name, parameter in named.items():
                    parameter.copy_(memory[name].lerp(parameter, beta))
            memory.clear()

    return update
