"""Gradient ascent on the loss of the items to forget.

The visual head's cross-entropy, negated; no retain data. Without a floor it destroys the model when it runs long,
which is its known weakness, so its learning rate is far below the common one: 1e-4 for a class, 3e-5 for instances,
the best of 1e-5, 3e-5 and 1e-4 on held-out digits-halves. Source: Graves et al. 2020 (arXiv 2010.10981) and Thudi
et al. 2021 (arXiv 2109.13398).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.loop import Batch, Step
from ccu_fast.unlearn.protocol import TwoModalityModel

LEARNING_RATE = {"class": 1e-4, "instances": 3e-5}


def gradient_ascent(frozen: TwoModalityModel, forget: PairedData, retain: PairedData) -> Step:
    """Minus the cross-entropy of the visual head on the forget batch."""

    def step(model: TwoModalityModel, batch: Batch) -> Tensor:
        logits = model.classify_visual(model.embed_visual(batch.forget.visual))
        return -F.cross_entropy(logits, batch.forget.labels)

    return step
