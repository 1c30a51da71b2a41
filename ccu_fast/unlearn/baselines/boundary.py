"""Boundary Unlearning: the items to forget move across the boundary of their class, to one there is or to a new one.

Source: Chen et al. 2023 (arXiv 2303.11570): 10 passes over the forget set at learning rate 1e-5, no retain data.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.baselines.predictions import predictions
from ccu_fast.unlearn.baselines.random_label import is_wrong
from ccu_fast.unlearn.config import Budget
from ccu_fast.unlearn.loop import Batch, Prepare, Run, Step, run
from ccu_fast.unlearn.model import HEADS, TwoModalityModel, embed_both, heads, task_loss

CHUNK = 256
BOUND = 0.1


def boundary_shrink(frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> Step:
    """Boundary shrink, where every item to forget is taught the wrong class whose boundary is nearest::

        x' = x + ε · sign(grad_x CE(original(x), y));   nearest = argmax over the classes ≠ y of original(x')
        loss = CE(forget batch, nearest)

    One FGSM step with ε = 0.1, in the paper on pixels in [0, 1]. Where the attack does not cross a boundary, the
    released code teaches the true class again; here, as in the paper, the label is always an incorrect one, and of the
    retain set. x' is not clamped: inputs need not be pixels. Changed for two modalities: the attack is on the visual
    input through the visual head (or, without one, the fused head), and the heads that see the visual modality learn
    its result.

    Raises:
        TypeError: the visual input is not floating point, so that it has no gradient.
        ValueError: the retain set has no class besides the forgotten item's own.
    """
    nearest = nearest_labels(frozen, forget, retain.labels.unique(), BOUND)

    def step(model: TwoModalityModel, batch: Batch) -> Tensor:
        return task_loss(model, *embed_both(model, batch.forget), nearest[batch.forget_rows], visual_only=True)

    return step


def nearest_labels(model: TwoModalityModel, data: PairedData, classes: Tensor, bound: float) -> Tensor:
    """The most likely of ``classes`` but the true one after a step of size ``bound`` across the boundary, int64 [N]."""
    check.tensor("visual", data.visual)
    wrong = is_wrong(data.labels, classes)

    def logits(visual: Tensor, other: Tensor) -> Tensor:
        said = predictions(model, model.embed_visual(visual), model.embed_other(other), visual_only=True)
        return next(iter(said.values()))

    found = []
    for rows in torch.arange(len(data), device=data.labels.device).split(CHUNK):
        part = data.batch(rows)
        visual = part.visual.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits(visual, part.other), part.labels), visual)
        with torch.no_grad():
            across = logits(part.visual + bound * gradient.sign(), part.other)[:, classes]
        found.append(classes[across.masked_fill(~wrong[rows], -torch.inf).argmax(1)])
    return torch.cat(found)


def boundary_expand(
    original: TwoModalityModel,
    forget: PairedData,
    retain: PairedData,
    prepare: Prepare,
    budget: Budget,
    *,
    seed: int = 0,
    **options: Any,
) -> Run:
    """Boundary expansion, where the items to forget move to a shadow class, which is then removed::

        the heads that see the visual modality get one more, random, class K
        loss = CE(forget batch, K)
        afterwards class K goes

    Args:
        original: with all three heads; not changed.
        forget, retain, budget, seed, **options: see :func:`ccu_fast.unlearn.loop.run`; the seed also draws the shadow
            class's first weights.
        prepare: what the widened model learns, :func:`to_shadow`.

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


def to_shadow(frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> Step:
    """The cross-entropy of the widened heads with the shadow class, on the forget batch."""

    def step(model: TwoModalityModel, batch: Batch) -> Tensor:
        said = predictions(model, *embed_both(model, batch.forget), visual_only=True)
        # −log p(K), for the last class whatever their number.
        return torch.stack([-logits.log_softmax(-1)[:, -1].mean() for logits in said.values()]).sum()

    return step


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
