"""NegGrad+: descent on the retain set and ascent on the forget set in one step.

    loss = α · task(retain batch) − (1 − α) · CE(forget batch)

Source: Kurmanji et al. 2023, Towards Unbounded Machine Unlearning (arXiv 2302.09880), and its released code
(``train_negrad``), which has this weighting; α is tuned there. Default here: 0.95. Changed for two modalities: the
ascent is on the heads that see the visual modality, the descent on all.
"""

from __future__ import annotations

from torch import Tensor

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.loop import Batch, Prepare, Step
from ccu_fast.unlearn.model import TwoModalityModel, forget_loss, task_loss


def neg_grad_plus(*, alpha: float = 0.95) -> Prepare:
    """The method; ``alpha`` in [0, 1] is the weight of the retain set."""
    check.number("alpha", alpha, low=0, high=1)

    def prepare(frozen: TwoModalityModel, forget: PairedData, retain: PairedData) -> Step:
        def step(model: TwoModalityModel, batch: Batch) -> Tensor:
            kept = batch.retain
            task = task_loss(model, model.embed_visual(kept.visual), model.embed_other(kept.other), kept.labels)
            return alpha * task - (1 - alpha) * forget_loss(model, batch.forget)

        return step

    return prepare
