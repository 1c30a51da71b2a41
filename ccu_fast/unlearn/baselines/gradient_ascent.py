"""Gradient ascent on the loss of the items to forget.

The visual head's cross-entropy, negated; no retain data. Without a floor it destroys the model when it runs long,
which is its known weakness, so its learning rate is a tenth of the common one. Source: Graves et al. 2020
(arXiv 2010.10981) and Thudi et al. 2021 (arXiv 2109.13398); the learning rate was chosen on held-out digits-halves.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.config import Budget
from ccu_fast.unlearn.loop import Batch, Step

BUDGET = Budget(learning_rate=1e-4)


def gradient_ascent(frozen: nn.Module, forget: PairedData, retain: PairedData) -> Step:
    """Minus the cross-entropy of the visual head on the forget batch."""

    def step(model: nn.Module, batch: Batch) -> Tensor:
        logits = model.classify_visual(model.embed_visual(batch.forget.visual))
        return -F.cross_entropy(logits, batch.forget.labels)

    return step
