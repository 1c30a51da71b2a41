"""SCRUB: a student that disobeys the original on the forget set and obeys it on the retain set, in turns.

    max step:   loss = −KL_T(original ‖ student on forget batch)
    min step:   loss = γ · task(retain batch) + α · KL_T(original ‖ student on retain batch)

Source: Kurmanji et al. 2023, Towards Unbounded Machine Unlearning (arXiv 2302.09880), algorithm 1. The weights here are
those of the released code's large experiments: γ = 0.99, α = 0.001, temperature T = 4 (the KL times T²), max steps in
the first 2 of 3 passes; its small ones have γ = 1, α = 0.5, T = 2, max steps in the first 3 of 10 passes, Adam at 5e-4.
There a whole pass over the forget set goes before a whole pass over the retain set; here max and min steps alternate
one by one during the first two thirds of the budget and only min steps follow, so that any budget holds both. Changed
for two modalities: the max step is on the heads that see the visual modality. Rewinding (SCRUB+R) is not included.
"""

from __future__ import annotations

from torch import Tensor

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.baselines.predictions import distillation_loss, predictions
from ccu_fast.unlearn.loop import Batch, Step
from ccu_fast.unlearn.model import TwoModalityModel, embed_both, task_loss

GAMMA, ALPHA, TEMPERATURE = 0.99, 0.001, 4.0
MAX_SHARE = 2 / 3  # of the budget, from its start, in which every other step is a max step


def scrub(frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> Step:
    """The method."""

    def step(model: TwoModalityModel, batch: Batch) -> Tensor:
        maximise = batch.step % 2 == 0 and batch.step < MAX_SHARE * batch.steps
        part = batch.forget if maximise else batch.retain
        visual, other = embed_both(model, part)
        said = predictions(model, visual, other, visual_only=maximise)
        taught = predictions(frozen, *embed_both(frozen, part), visual_only=maximise)
        apart = distillation_loss(said, taught, TEMPERATURE)
        if maximise:
            return -apart
        return GAMMA * task_loss(model, visual, other, part.labels) + ALPHA * apart

    return step
