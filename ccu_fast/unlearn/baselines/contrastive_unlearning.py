"""Contrastive Unlearning: embeddings to forget leave those of their own class and join those of the others.

    loss = λ_UL · L_UL(forget batch against retain batch) + λ_CE · task(retain batch)

Source: Lee et al. 2024 (arXiv 2401.10458). Defaults of the paper: temperature 0.7, λ_UL = 3, λ_CE = 1, four
retain batches for every forget batch, learning rate 1e-3. Its optimiser is SGD with momentum; here it gets the common
Adam, under which 60 steps move as far as those of the others. Changed for two modalities: the embeddings are the visual
ones; the task is that of all heads.

When a whole class goes no retained key shares it and the pushing term is empty; as in the authors' released code
(``unlearn_type == "single_class"``) the pull alone remains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ccu_fast.data.paired import PairedData
from ccu_fast.losses.functional import inverse_info_nce
from ccu_fast.ops.reduce_similarity.api import reduce_similarity
from ccu_fast.ops.reduce_similarity.relations import OTHER, SAME
from ccu_fast.unlearn.loop import Batch, Step
from ccu_fast.unlearn.model import TwoModalityModel, task_loss

RETAIN_PER_FORGET = 4
TEMPERATURE, UNLEARNING = 0.7, 3.0


def contrastive_unlearning(
    frozen: TwoModalityModel, forget: PairedData, retain: PairedData, seed: int, *, released: bool = False
) -> Step:
    """The method as the paper's formula has it or, with ``released``, the authors' code; see :func:`unlearning_loss`.

    Raises:
        ValueError: items without labels.
    """
    if not forget.labelled:
        raise ValueError("forget: expected labels for contrastive unlearning, got items without")
    whole_class = not bool(torch.isin(forget.labels, retain.labels).any())

    def step(model: TwoModalityModel, batch: Batch) -> Tensor:
        n, labels = len(batch.forget), batch.retain.labels
        visual = model.embed_visual(torch.cat([batch.forget.visual, batch.retain.visual]))
        other = model.embed_other(batch.retain.other)
        u, r = visual[:n], visual[n:]
        away = unlearning_loss(
            u, r, batch.forget.labels, labels, 1 / TEMPERATURE, whole_class=whole_class, released=released
        )
        return UNLEARNING * away + task_loss(model, r, other, labels)

    return step


def unlearning_loss(
    u: Tensor,
    r: Tensor,
    forget_labels: Tensor,
    retain_labels: Tensor,
    scale: float,
    *,
    whole_class: bool,
    released: bool = False,
) -> Tensor:
    """L_UL::

        S = u @ r.T / temperature;  same = forget_labels[:, None] == retain_labels[None, :]
        the formula:    mean_i( logsumexp(S[i, same]) - mean(S[i, ~same]) )
        released:       mean_i( N_r / n_i * logsumexp(S[i, same]) - mean(S[i, ~same]) ),   n_i = (~same[i]).sum()
        a whole class, either way:  mean_i( -mean(S[i, ~same]) )

    The released code subtracts the log-sum from all N_r columns, those of the same class too, and divides by the number
    of the others, hence the factor; it also shifts S by its row maximum without gradient, which moves the value and not
    the gradient and is left out here.

    Args:
        u: ``[N_u, D]``, r: ``[N_r, D]`` unit vectors; both get gradients, as in the released code.
        forget_labels: int64 ``[N_u]``, retain_labels: int64 ``[N_r]``.
        scale: 1 / temperature.
        whole_class: no retained item shares a forgotten label.
        released: as the authors' code has it, not the paper's formula.

    Returns:
        Scalar; rows without an item of their own class, or of another, count as 0.

    Source: Lee et al. 2024 (arXiv 2401.10458), eq. 1, and the authors' ``Loss_v1``.
    """
    relation: dict[str, Any] = {"row_labels": forget_labels, "col_labels": retain_labels, "paired": False}
    if whole_class:
        (pull, count), _ = reduce_similarity(u, r, scale=scale, rows=[("sum", OTHER), ("count", OTHER)], **relation)
        return -(pull / count.clamp(min=1)).mean()
    if not released:
        return inverse_info_nce(u, r, scale=scale, kind="contrastive", **relation)
    spec = [("lse", SAME), ("sum", OTHER), ("count", OTHER), ("count", SAME)]
    (push, pull, n_other, n_same), _ = reduce_similarity(u, r, scale=scale, rows=spec, **relation)
    counts = (n_other > 0) & (n_same > 0)
    n_other, n_same = n_other.clamp(min=1).to(push.dtype), n_same.to(push.dtype)
    per_row = (n_other + n_same) / n_other * torch.where(counts, push, 0) - pull / n_other
    return torch.where(counts, per_row, 0).sum() / counts.sum().clamp(min=1)
