"""Gradient ascent on the loss of the items to forget.

    loss = −CE(forget batch)          # of the heads that see the visual modality; no retain data

Without a floor it destroys the model when it runs long, which is its known weakness, so it gets a fraction of the
common learning rate. Source: Graves et al. 2020 (arXiv 2010.10981) and Thudi et al. 2021 (arXiv 2109.13398).
"""

from __future__ import annotations

from torch import Tensor

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.loop import Batch, Step
from ccu_fast.unlearn.model import TwoModalityModel, forget_loss


def gradient_ascent(frozen: TwoModalityModel, forget: PairedData, retain: PairedData) -> Step:
    """Minus the loss of the forget batch."""

    def step(model: TwoModalityModel, batch: Batch) -> Tensor:
        return -forget_loss(model, batch.forget)

    return step
