"""Relearning time: knowledge that comes back faster than it would be learned was still there."""

from __future__ import annotations

import copy

import torch
from torch.nn import functional as F

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.loop import embed_visual, epochs_of_rows
from ccu_fast.unlearn.model import TwoModalityModel, evaluating


def relearn_steps(
    model: TwoModalityModel,
    forget: PairedData,
    retain: PairedData,
    *,
    level: float = 0.9,
    learning_rate: float = 1e-4,
    batch: int = 128,
    max_steps: int = 1000,
    seed: int = 0,
) -> int:
    """Steps of fine-tuning until the visual head names ``level`` of the forget set right again.

    Each Adam step takes a batch of the forget set and one of the retain set, with the cross-entropy of the visual head
    on both; the accuracy on the whole forget set is taken before the first step and after each one. Compare the number
    with a retrained model's: a ratio of 1 means that nothing was left.

    Args:
        model: not changed; all its parameters learn.
        forget: what to bring back.
        retain: what must not be lost on the way.
        level: the accuracy that counts as back, in (0, 1].
        learning_rate: > 0; small enough for the steps to be worth counting.
        batch: items of each set in a step, at least 1.
        max_steps: at least 1; returned when the level is not reached.
        seed: of the batches.

    Returns:
        The number of steps, in [0, max_steps].

    Source: relearning time as in Golatkar et al. 2020 (arXiv 1911.04933), there in epochs; its ratio to a retrained
    model's as in the anamnesis index of Chundawat et al. 2022 (arXiv 2201.05629).
    """
    check.number("level", level, low=1e-9, high=1)
    check.number("learning_rate", learning_rate, low=1e-12)
    check.integer("max_steps", max_steps, low=1)
    model = copy.deepcopy(model).train().requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    device = forget.labels.device
    rows = [
        epochs_of_rows(len(data), batch, torch.Generator().manual_seed(2 * seed + number))
        for number, data in enumerate((forget, retain))
    ]
    for step in range(max_steps):
        visual = embed_visual(model, forget.visual)
        with evaluating(model):
            right = model.classify_visual(visual).argmax(-1) == forget.labels
        if right.double().mean().item() >= level:
            return step
        u, r = (data.batch(next(order).to(device)) for data, order in zip((forget, retain), rows, strict=True))
        logits = model.classify_visual(model.embed_visual(torch.cat([u.visual, r.visual])))
        # Two means, not one: the share of the forget set in the batch must not decide the pace.
        loss = F.cross_entropy(logits[: len(u)], u.labels) + F.cross_entropy(logits[len(u) :], r.labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return max_steps
