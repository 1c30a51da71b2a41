"""Methods that go down the loss the model was trained on, up it, or both."""

from __future__ import annotations

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.loop import Step
from ccu_fast.unlearn.model import TwoModalityModel, loss_on

ALPHA = 0.95  # of NegGrad+


def fine_tune(frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> Step:
    """Fine-tuning on the retain set alone, in the hope that the rest fades (catastrophic forgetting)::

        loss = task(retain batch)

    Source: the "fine-tune" baseline of Golatkar et al. 2020 (arXiv 1911.04933), whose own learning rate and epochs
    belong to its networks and are not used here.
    """
    return lambda model, batch: loss_on(model, batch.retain)


def gradient_ascent(frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> Step:
    """Gradient ascent on the loss of the items to forget::

        loss = -CE(forget batch)          # of the heads that see the visual modality; no retain data

    Without a floor it destroys the model when it runs long, which is its known weakness, so it gets a fraction of the
    common learning rate. Source: Graves et al. 2020 (arXiv 2010.10981) and Thudi et al. 2021 (arXiv 2109.13398).
    """
    return lambda model, batch: -loss_on(model, batch.forget, visual_only=True)


def neg_grad_plus(frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> Step:
    """NegGrad+, descent on the retain set and ascent on the forget set in one step::

        loss = α · task(retain batch) − (1 − α) · CE(forget batch)

    Source: Kurmanji et al. 2023, Towards Unbounded Machine Unlearning (arXiv 2302.09880), and its released code
    (``train_negrad``), which has this weighting; α is tuned there and 0.95 here. Changed for two modalities: the ascent
    is on the heads that see the visual modality, the descent on all.
    """
    return lambda model, batch: (
        ALPHA * loss_on(model, batch.retain) - (1 - ALPHA) * loss_on(model, batch.forget, visual_only=True)
    )
