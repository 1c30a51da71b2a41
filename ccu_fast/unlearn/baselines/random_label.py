"""Random labels for the items to forget, the true ones for the rest.

    loss = CE(forget batch, wrong labels) + task(retain batch)

Every item of the forget set gets one wrong class, drawn once among the classes of the retain set. Defaults: the common
budget. Source: Graves et al. 2020, Amnesiac Machine Learning (arXiv 2010.10981), and Golatkar et al. 2020
(arXiv 1911.04933). Changed for two modalities: the heads that see the visual modality learn the wrong labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.baselines.predictions import relabelled_loss
from ccu_fast.unlearn.loop import Batch, Prepare, Step
from ccu_fast.unlearn.model import TwoModalityModel, task_loss


def random_label(seed: int) -> Prepare:
    """The method, with the seed of the wrong labels.

    Raises:
        ValueError: the retain set has one class, and it is the one to forget.
    """

    def prepare(frozen: TwoModalityModel, forget: PairedData, retain: PairedData) -> Step:
        wrong = wrong_labels(forget.labels, retain.labels.unique(), seed)

        def step(model: TwoModalityModel, batch: Batch) -> Tensor:
            n = len(batch.forget)
            visual = model.embed_visual(torch.cat([batch.forget.visual, batch.retain.visual]))
            other = model.embed_other(torch.cat([batch.forget.other, batch.retain.other]))
            return relabelled_loss(model, visual[:n], other[:n], wrong[batch.forget_rows]) + task_loss(
                model, visual[n:], other[n:], batch.retain.labels
            )

        return step

    return prepare


def wrong_labels(labels: Tensor, classes: Tensor, seed: int) -> Tensor:
    """For every label another one of ``classes``, uniformly. int64, shape of ``labels``."""
    allowed = classes[None, :] != labels[:, None]
    if not bool(allowed.any(1).all()):
        raise ValueError("retain: expected at least one class besides each forgotten item's own, got none")
    draw = torch.rand(allowed.shape, generator=torch.Generator().manual_seed(seed)).to(labels.device)
    return classes[draw.masked_fill(~allowed, -1).argmax(1)]
