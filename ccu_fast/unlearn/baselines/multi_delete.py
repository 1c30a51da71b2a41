"""MultiDelete: an item to forget is treated as the original treats two halves that never belonged together.

    decoupling   D( f(u_i, a_i), f⁰(u_i, b_j) )   on the forget batch, b_j the other half of a retained item
    multimodal   D( f(r_i, b_i), f⁰(r_i, b_i) )   on the retain batch
    unimodal     D( u_i, u⁰_i ) + D( a_i, a⁰_i )  on the forget batch, the embeddings
    loss = decoupling + multimodal + unimodal

D is the mean squared error, f the fused prediction: the logits of the fused head, or without one the similarity of the
two embeddings. Source: Cheng & Amiri 2024 (arXiv 2311.12047), with all weights 1; its code draws b_j from the forget
batch itself, which stays in the class when a class goes. Its goal is to sever the link between the modalities while
each keeps its own knowledge, so the visual modality alone is expected to remember.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.loop import Batch, Step, embed
from ccu_fast.unlearn.model import TwoModalityModel, heads


def multi_delete(frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> Step:
    """The method."""
    u0_all, a0_all = embed(frozen, forget)
    r0_all, b0_all = embed(frozen, retain)

    def step(model: TwoModalityModel, batch: Batch) -> Tensor:
        n = len(batch.forget)
        visual, other = batch.embed(model)
        u0, a0 = u0_all[batch.forget_rows], a0_all[batch.forget_rows]
        r0, b0 = r0_all[batch.retain_rows], b0_all[batch.retain_rows]
        # The retain batch is in random order: its items, taken in turn, are random partners.
        strangers = b0[torch.arange(n, device=b0.device) % len(b0)]
        decoupling = F.mse_loss(fused(model, visual[:n], other[:n]), fused(frozen, u0, strangers))
        multimodal = F.mse_loss(fused(model, visual[n:], other[n:]), fused(frozen, r0, b0))
        unimodal = F.mse_loss(visual[:n], u0) + F.mse_loss(other[:n], a0)
        return decoupling + multimodal + unimodal

    return step


def fused(model: TwoModalityModel, visual: Tensor, other: Tensor) -> Tensor:
    """What a model makes of two halves: logits ``[N, classes]`` of its fused head, or similarities ``[N]``."""
    return model.classify_fused(visual, other) if "fused" in heads(model) else (visual * other).sum(-1)
