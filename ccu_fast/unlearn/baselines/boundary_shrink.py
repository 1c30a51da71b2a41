"""Boundary shrink: every item to forget is taught the wrong class whose boundary is nearest.

    x' = x + ε · sign(grad_x CE(original(x), y));   nearest = argmax over the classes ≠ y of original(x')
    loss = CE(forget batch, nearest)                                                   # no retain data

Source: Chen et al. 2023, Boundary Unlearning (arXiv 2303.11570): one FGSM step with ε = 0.1 on pixels in
[0, 1] and 10 passes over the forget set at learning rate 1e-5. Where the attack does not cross a boundary, the released
code teaches the true class again; here, as in the paper, the label is always an incorrect one, and of the retain set.
x' is not clamped: inputs need not be pixels. Changed for two modalities: the attack is on the visual input through the
visual head (or, without one, the fused head), and the heads that see the visual modality learn its result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.baselines.predictions import predictions, relabelled_loss
from ccu_fast.unlearn.loop import Batch, Prepare, Step
from ccu_fast.unlearn.model import TwoModalityModel

CHUNK = 256


def boundary_shrink(*, bound: float = 0.1) -> Prepare:
    """The method; ``bound`` > 0 is ε, in the units of the visual input.

    Raises:
        TypeError: the visual input is not floating point, so that it has no gradient.
        ValueError: the retain set has no class besides the forgotten item's own.
    """
    check.number("bound", bound, low=1e-12)

    def prepare(frozen: TwoModalityModel, forget: PairedData, retain: PairedData) -> Step:
        nearest = nearest_labels(frozen, forget, retain.labels.unique(), bound)

        def step(model: TwoModalityModel, batch: Batch) -> Tensor:
            visual, other = model.embed_visual(batch.forget.visual), model.embed_other(batch.forget.other)
            return relabelled_loss(model, visual, other, nearest[batch.forget_rows])

        return step

    return prepare


def nearest_labels(model: TwoModalityModel, data: PairedData, classes: Tensor, bound: float) -> Tensor:
    """The most likely of ``classes`` but the true one after a step of size ``bound`` across the boundary, int64 [N]."""
    check.tensor("visual", data.visual)
    if not bool((classes[None] != data.labels[:, None]).any(1).all()):
        raise ValueError("retain: expected at least one class besides each forgotten item's own, got none")
    found = []
    for rows in torch.arange(len(data), device=data.labels.device).split(CHUNK):
        part = data.batch(rows)
        visual = part.visual.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            F.cross_entropy(_visual_logits(model, visual, part.other), part.labels), visual
        )
        with torch.no_grad():
            logits = _visual_logits(model, part.visual + bound * gradient.sign(), part.other)
            logits = logits[:, classes].masked_fill(classes[None] == part.labels[:, None], -torch.inf)
        found.append(classes[logits.argmax(1)])
    return torch.cat(found)


def _visual_logits(model: TwoModalityModel, visual: Tensor, other: Tensor) -> Tensor:
    said = predictions(model, model.embed_visual(visual), model.embed_other(other), visual_only=True)
    return next(iter(said.values()))
