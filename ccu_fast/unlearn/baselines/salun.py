"""SalUn: random labels, learned only by the weights on which the forget set depends most.

    mask = |grad of CE(forget set)| among the largest ``share`` of all weights        # once, at the original weights
    loss = CE(forget batch, wrong labels) + retain_weight · task(retain batch);  grad ← mask · grad

Source: Fan et al. 2024, SalUn (arXiv 2310.12508); default of the paper and its released code: half of the
weights. The released code draws the new label among all classes, the true one included, and does so anew in every
epoch; here, as in the paper, it is a wrong one. Changed for two modalities: both terms of the forget set are on the
heads that see the visual modality.
"""

from __future__ import annotations

from ccu_fast.unlearn.baselines.random_label import random_label
from ccu_fast.unlearn.loop import Prepare
from ccu_fast.unlearn.parameters import Mask, saliency

SHARE = 0.5


def salun(seed: int) -> Prepare:
    """The loss, with the seed of the wrong labels; to be run under :func:`salun_mask`."""
    return random_label(seed)


def salun_mask(share: float = SHARE) -> Mask:
    """Which weights may change; see :func:`ccu_fast.unlearn.parameters.saliency`."""
    return saliency(share)
