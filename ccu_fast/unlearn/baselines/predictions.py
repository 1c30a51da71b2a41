"""What a model says about a batch, head by head: the quantity that several of the methods here train or distil."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ccu_fast.unlearn.model import CLIP_SCALE, TwoModalityModel, heads, logits_of


def predictions(
    model: TwoModalityModel, visual: Tensor, other: Tensor, *, visual_only: bool = False
) -> dict[str, Tensor]:
    """Logits of every head, from the embeddings ``[N, D]`` of both modalities.

    Args:
        model: with or without heads.
        visual, other: the embeddings of the same N items.
        visual_only: leave out the head that does not see the visual modality, which is to keep what it knows.

    Returns:
        ``{"visual": [N, classes], "other": …, "fused": …}`` as far as the model has these heads. A model without heads
        predicts which item of the batch is the other half: ``{"pairs": [N, N], "pairs_back": [N, N]}``, the scaled
        similarities in both directions.
    """
    if not heads(model):
        similarity = getattr(model, "scale", CLIP_SCALE) * visual @ other.mT
        return {"pairs": similarity, "pairs_back": similarity.mT}
    return {head: logits_of(model, head, visual, other) for head in heads(model, visual_only=visual_only)}


def distillation_loss(student: dict[str, Tensor], teacher: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """How far a student is from a teacher, summed over the student's heads::

        sum_heads  temperature**2 * mean_i KL( softmax(teacher_i / temperature) || softmax(student_i / temperature) )

    Args:
        student, teacher: logits ``[N, classes]`` by head; the teacher's get no gradient.
        temperature: > 0.

    Source: Hinton et al. 2015 (arXiv 1503.02531); the factor keeps the gradient's size when the temperature changes.
    """
    parts = [
        F.kl_div(
            (student[head] / temperature).log_softmax(-1),
            (teacher[head].detach() / temperature).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        for head in student
    ]
    return temperature**2 * torch.stack(parts).sum()
