"""Bad teacher: the student imitates a random network on what is to go and the original on what is to stay.

    loss = ( N_u · KL(random ‖ student on forget batch) + N_r · KL(original ‖ student on retain batch) ) / (N_u + N_r)

Source: Chundawat et al. 2023, Can Bad Teaching Induce Forgetting? (arXiv 2205.08096), and its released code:
temperature 1, Adam with learning rate 1e-4, one epoch over the forget set and 30 % of the retain set. Here the common
budget. Changed for two modalities: on the forget set only the heads that see the visual modality imitate the random
network.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.baselines.predictions import distillation_loss, predictions
from ccu_fast.unlearn.loop import Batch, Step
from ccu_fast.unlearn.model import TwoModalityModel, embed_both


def bad_teacher(frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int) -> Step:
    """The method; the seed is that of the random network.

    Raises:
        ValueError: the model has no layer that can be initialised again.
    """
    incompetent = reinitialised(frozen, seed)

    def step(model: TwoModalityModel, batch: Batch) -> Tensor:
        terms = []
        for part, teacher, visual_only in ((batch.forget, incompetent, True), (batch.retain, frozen, False)):
            said, taught = (predictions(m, *embed_both(m, part), visual_only=visual_only) for m in (model, teacher))
            terms.append(len(part) * distillation_loss(said, taught))
        return (terms[0] + terms[1]) / (len(batch.forget) + len(batch.retain))

    return step


def reinitialised(model: TwoModalityModel, seed: int) -> TwoModalityModel:
    """A copy whose layers have drawn their weights anew, in evaluation mode; the global random state stays.

    Every module with a ``reset_parameters`` of its own (linear, convolution, embedding, normalisation) is reset.
    Parameters outside such modules, such as a temperature, stay.
    """
    fresh = copy.deepcopy(model)
    assert isinstance(fresh, nn.Module)
    layers = [layer for layer in fresh.modules() if callable(getattr(layer, "reset_parameters", None))]
    if not layers:
        raise ValueError("model: expected layers with reset_parameters for a random teacher, got none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            layer.reset_parameters()  # type: ignore[operator]
    return fresh.eval().requires_grad_(False)
