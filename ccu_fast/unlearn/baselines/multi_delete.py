"""MultiDelete: an item to forget is treated as the original treats two halves that never belonged together.

    decoupling   D( f(u_i, a_i), f⁰(u_i, b_j) )   on the forget batch, b_j the other half of a retained item
    multimodal   D( f(r_i, b_i), f⁰(r_i, b_i) )   on the retain batch
    unimodal     D( u_i, u⁰_i ) + D( a_i, a⁰_i )  on the forget batch, the embeddings
    loss = α · decoupling + β · multimodal + γ · unimodal

D is the mean squared error, f the fused prediction: the logits of the fused head, or without one the similarity of the
two embeddings. Source: Cheng & Amiri 2024 (arXiv 2311.12047), with α = β = γ = 1; its code draws b_j from the forget
batch itself, which stays in the class when a class goes. Its goal is to sever the link between the modalities while
each keeps its own knowledge, so the visual modality alone is expected to remember.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.loop import Batch, Prepare, Step, embed
from ccu_fast.unlearn.model import TwoModalityModel, heads


def multi_delete(*, alpha: float = 1.0, beta: float = 1.0, gamma: float = 1.0) -> Prepare:
    """The method; the weights ≥ 0 of decoupling, multimodal and unimodal retention."""
    for name, weight in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        check.number(name, weight, low=0)

    def prepare(frozen: TwoModalityModel, forget: PairedData, retain: PairedData) -> Step:
        u0_all, a0_all = embed(frozen, forget)
        r0_all, b0_all = embed(frozen, retain)

        def step(model: TwoModalityModel, batch: Batch) -> Tensor:
            n = len(batch.forget)
            visual = model.embed_visual(torch.cat([batch.forget.visual, batch.retain.visual]))
            other = model.embed_other(torch.cat([batch.forget.other, batch.retain.other]))
            u0, a0 = u0_all[batch.forget_rows], a0_all[batch.forget_rows]
            r0, b0 = r0_all[batch.retain_rows], b0_all[batch.retain_rows]
            # The retain batch is in random order: its items, taken in turn, are random partners.
            strangers = b0[torch.arange(n, device=b0.device) % len(b0)]
            with torch.no_grad():
                apart, kept = fused(frozen, u0, strangers), fused(frozen, r0, b0)
            decoupling = F.mse_loss(fused(model, visual[:n], other[:n]), apart)
            multimodal = F.mse_loss(fused(model, visual[n:], other[n:]), kept)
            unimodal = F.mse_loss(visual[:n], u0) + F.mse_loss(other[:n], a0)
            return alpha * decoupling + beta * multimodal + gamma * unimodal

        return step

    return prepare


def fused(model: TwoModalityModel, visual: Tensor, other: Tensor) -> Tensor:
    """What a model makes of two halves: logits ``[N, classes]`` of its fused head, or similarities ``[N]``."""
    return model.classify_fused(visual, other) if "fused" in heads(model) else (visual * other).sum(-1)
