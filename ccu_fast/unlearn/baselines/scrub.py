"""SCRUB: a student that disobeys the original on the forget set and obeys it on the retain set, in turns.

    max step:   loss = −KL_T(original ‖ student on forget batch)
    min step:   loss = γ · task(retain batch) + α · KL_T(original ‖ student on retain batch)

Source: Kurmanji et al. 2023, Towards Unbounded Machine Unlearning (arXiv 2302.09880), algorithm 1. Defaults here are
those of the released code's large experiments: γ = 0.99, α = 0.001, temperature T = 4 (the KL times T²), max steps in
the first 2 of 3 passes; its small ones have γ = 1, α = 0.5, T = 2, max steps in the first 3 of 10 passes, Adam at 5e-4.
There a whole pass over the forget set goes before a whole pass over the retain set; here max and min steps alternate
one by one during the first two thirds of the budget and only min steps follow, so that any budget holds both. Changed
for two modalities: the max step is on the heads that see the visual modality. Rewinding (SCRUB+R) is not included.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.baselines.predictions import distillation_loss, predictions
from ccu_fast.unlearn.loop import Batch, Prepare, Step
from ccu_fast.unlearn.model import TwoModalityModel, task_loss


def scrub(*, gamma: float = 0.99, alpha: float = 0.001, temperature: float = 4.0, max_share: float = 2 / 3) -> Prepare:
    """The method.

    Args:
        gamma, alpha: ≥ 0, weights of the task and of the distillation in a min step.
        temperature: > 0, of the KL.
        max_share: share of the budget, from its start, in which every other step is a max step; in [0, 1].
    """
    check.number("gamma", gamma, low=0)
    check.number("alpha", alpha, low=0)
    check.number("temperature", temperature, low=1e-6)
    check.number("max_share", max_share, low=0, high=1)

    def prepare(frozen: TwoModalityModel, forget: PairedData, retain: PairedData) -> Step:
        def step(model: TwoModalityModel, batch: Batch) -> Tensor:
            maximise = is_max_step(batch.step, batch.steps, max_share)
            part = batch.forget if maximise else batch.retain
            visual, other = model.embed_visual(part.visual), model.embed_other(part.other)
            with torch.no_grad():
                taught = predictions(
                    frozen, frozen.embed_visual(part.visual), frozen.embed_other(part.other), visual_only=maximise
                )
            said = predictions(model, visual, other, visual_only=maximise)
            apart = distillation_loss(said, taught, temperature)
            if maximise:
                return -apart
            return gamma * task_loss(model, visual, other, part.labels) + alpha * apart

        return step

    return prepare


def is_max_step(step: int, steps: int, max_share: float) -> bool:
    """Every other step from the first on, until ``max_share`` of the steps are taken."""
    return step % 2 == 0 and step < max_share * steps
