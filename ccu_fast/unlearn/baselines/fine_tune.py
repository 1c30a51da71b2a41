"""Fine-tuning on the retain set alone and hoping that the rest fades (catastrophic forgetting).

    loss = task(retain batch)

Defaults: the common budget. Source: the "fine-tune" baseline of Golatkar et al. 2020 (arXiv 1911.04933), whose own
learning rate and epochs belong to its networks and are not used here.
"""

from __future__ import annotations

from torch import Tensor

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.loop import Batch, Step
from ccu_fast.unlearn.model import TwoModalityModel, task_loss


def fine_tune(frozen: TwoModalityModel, forget: PairedData, retain: PairedData) -> Step:
    """What the model was trained on, on the retain batch."""

    def step(model: TwoModalityModel, batch: Batch) -> Tensor:
        retain = batch.retain
        return task_loss(model, model.embed_visual(retain.visual), model.embed_other(retain.other), retain.labels)

    return step
