"""Random labels for the items to forget, the true ones for the rest.

    loss = CE(forget batch, wrong labels) + task(retain batch)

Every item of the forget set gets one wrong class, drawn once among the classes of the retain set. Source: Graves et al.
2020, Amnesiac Machine Learning (arXiv 2010.10981), and Golatkar et al. 2020 (arXiv 1911.04933). Changed for two
modalities: the heads that see the visual modality learn the wrong labels.

SalUn is the same loss under a mask: only the half of the weights changes on which the forget set depends most
(:func:`ccu_fast.unlearn.parameters.salient`). Source: Fan et al. 2024 (arXiv 2310.12508); half is the default of the
paper and of its released code. That code draws the new label among all classes, the true one included, and does so anew
in every epoch; here, as in the paper, it is a wrong one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.loop import Batch, Step
from ccu_fast.unlearn.model import TwoModalityModel, task_loss

SALIENCY = 0.5  # of SalUn


def random_label(frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> Step:
    """The method; the seed is that of the wrong labels.

    Raises:
        ValueError: the retain set has one class, and it is the one to forget.
    """
    wrong = wrong_labels(forget.labels, retain.labels.unique(), seed)

    def step(model: TwoModalityModel, batch: Batch) -> Tensor:
        n = len(batch.forget)
        visual, other = batch.embed(model)
        relabelled = task_loss(model, visual[:n], other[:n], wrong[batch.forget_rows], visual_only=True)
        return relabelled + task_loss(model, visual[n:], other[n:], batch.retain.labels)

    return step


def wrong_labels(labels: Tensor, classes: Tensor, seed: int) -> Tensor:
    """For every label another one of ``classes``, uniformly. int64, shape of ``labels``."""
    wrong = is_wrong(labels, classes)
    draw = torch.rand(wrong.shape, generator=torch.Generator().manual_seed(seed)).to(labels.device)
    return classes[draw.masked_fill(~wrong, -1).argmax(1)]


def is_wrong(labels: Tensor, classes: Tensor) -> Tensor:
    """Whether each of ``classes`` is another than the label, bool ``[N, classes]``; every label must have one."""
    wrong = classes[None, :] != labels[:, None]
    if not bool(wrong.any(1).all()):
        raise ValueError("retain: expected at least one class besides each forgotten item's own, got none")
    return wrong
