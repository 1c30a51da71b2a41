"""Boundary expansion: the items to forget move to a shadow class, which is then removed.

    the heads that see the visual modality get one more, random, class K
    loss = CE(forget batch, K)                                                         # no retain data
    afterwards class K goes

Source: Chen et al. 2023, Boundary Unlearning (arXiv 2303.11570): 10 passes over the forget set at learning
rate 1e-5. Changed for two modalities: the visual and the fused head are widened, the other head is not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.config import Budget
from ccu_fast.unlearn.loop import Batch, Prepare, Run, Step, run
from ccu_fast.unlearn.model import HEADS, TwoModalityModel, heads


class ShadowClass(nn.Module):
    """A model whose visual and fused heads have one class more, with weights of its own, at the end."""

    def __init__(self, model: TwoModalityModel, embedding: int, seed: int, like: Tensor) -> None:
        super().__init__()
        self.model = model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.visual_shadow = nn.Linear(embedding, 1).to(like)
            self.fused_shadow = nn.Linear(2 * embedding, 1).to(like)

    def embed_visual(self, visual: Tensor) -> Tensor:
        return self.model.embed_visual(visual)

    def embed_other(self, other: Tensor) -> Tensor:
        return self.model.embed_other(other)

    def classify_visual(self, visual: Tensor) -> Tensor:
        return torch.cat([self.model.classify_visual(visual), self.visual_shadow(visual)], -1)

    def classify_other(self, other: Tensor) -> Tensor:
        return self.model.classify_other(other)

    def classify_fused(self, visual: Tensor, other: Tensor) -> Tensor:
        shadow = self.fused_shadow(torch.cat([visual, other], -1))
        return torch.cat([self.model.classify_fused(visual, other), shadow], -1)


def to_shadow(frozen: TwoModalityModel, forget: PairedData, retain: PairedData) -> Step:
    """The cross-entropy of the widened heads with the shadow class, on the forget batch."""

    def step(model: TwoModalityModel, batch: Batch) -> Tensor:
        visual, other = model.embed_visual(batch.forget.visual), model.embed_other(batch.forget.other)
        logits = (model.classify_visual(visual), model.classify_fused(visual, other))
        # −log p(K), for the last class whatever their number.
        return torch.stack([-value.log_softmax(-1)[:, -1].mean() for value in logits]).sum()

    return step


def boundary_expand(
    original: TwoModalityModel,
    forget: PairedData,
    retain: PairedData,
    budget: Budget,
    *,
    seed: int = 0,
    prepare: Prepare = to_shadow,
    **options: Any,
) -> Run:
    """Widen, move, narrow again.

    Args:
        original: with all three heads; not changed.
        forget, retain, budget, seed, **options: see :func:`ccu_fast.unlearn.loop.run`; the seed also draws the shadow
            class's first weights.
        prepare: what the widened model learns.

    Raises:
        ValueError: the model lacks a head.
    """
    if set(heads(original)) != set(HEADS):
        raise ValueError(f"model: expected the heads {', '.join(HEADS)}, got {', '.join(heads(original)) or 'none'}")
    with torch.no_grad():
        embedding = original.embed_visual(forget.visual[:1])
    wide = ShadowClass(original, embedding.shape[-1], seed, embedding)
    wide.train(original.training)
    done = run(wide, forget, retain, prepare, budget, seed=seed, **options)
    assert isinstance(done.model, ShadowClass)
    return replace(done, model=done.model.model)
