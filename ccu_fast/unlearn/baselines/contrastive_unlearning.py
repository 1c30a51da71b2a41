"""Contrastive Unlearning, Lee et al. 2024 (arXiv 2401.10458).

Visual embeddings to forget are pulled to retained ones of other classes and pushed from retained ones of their own;
next to it the cross-entropy on the retain batch. Defaults of the paper: temperature 0.7, λ_UL = 3, λ_CE = 1, four
retain batches for every forget batch, learning rate 1e-3. (Its optimiser is SGD with momentum; here it gets the
common Adam, under which 60 steps move as far as those of the others.)

When a whole class goes no retained key shares it and the pushing term is empty; as in the authors' released code
(``unlearn_type == "single_class"``) the pull alone remains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ccu_fast.data.paired import PairedData
from ccu_fast.losses import inverse_info_nce
from ccu_fast.relations import OTHER
from ccu_fast.similarity import reduce_similarity
from ccu_fast.unlearn.loop import Batch, Prepare, Step
from ccu_fast.unlearn.protocol import TwoModalityModel, task_loss

RETAIN_PER_FORGET = 4


def contrastive_unlearning(
    forget: str, *, temperature: float = 0.7, unlearn_weight: float = 3.0, task_weight: float = 1.0
) -> Prepare:
    """The method; ``forget`` is "class" or "instances"."""
    scale = 1 / temperature

    def prepare(frozen: TwoModalityModel, forget_set: PairedData, retain_set: PairedData) -> Step:
        def step(model: TwoModalityModel, batch: Batch) -> Tensor:
            n = len(batch.forget)
            visual = model.embed_visual(torch.cat([batch.forget.visual, batch.retain.visual]))
            other = model.embed_other(batch.retain.other)
            u, r = visual[:n], visual[n:]
            away = unlearning_loss(u, r, batch.forget.labels, batch.retain.labels, scale, whole_class=forget == "class")
            task = task_loss(model, r, other, batch.retain.labels)
            return unlearn_weight * away + task_weight * task

        return step

    return prepare


def unlearning_loss(
    u: Tensor, r: Tensor, forget_labels: Tensor, retain_labels: Tensor, scale: float, *, whole_class: bool
) -> Tensor:
    """L_UL::

        S = u @ r.T / temperature;  same = forget_labels[:, None] == retain_labels[None, :]
        mean_i( logsumexp(S[i, same]) - mean(S[i, ~same]) )          # a whole class: mean_i( -mean(S[i, ~same]) )

    Args:
        u: ``[N_u, D]``, r: ``[N_r, D]`` unit vectors; both get gradients, as in the released code.
        forget_labels: int64 ``[N_u]``, retain_labels: int64 ``[N_r]``.
        scale: 1 / temperature.
        whole_class: no retained item shares a forgotten label.
    """
    relation: dict[str, Any] = {"row_labels": forget_labels, "col_labels": retain_labels, "paired": False}
    if not whole_class:
        return inverse_info_nce(u, r, scale=scale, kind="contrastive", **relation)
    (pull, count), _ = reduce_similarity(u, r, scale=scale, rows=[("sum", OTHER), ("count", OTHER)], **relation)
    return -(pull / count.clamp(min=1)).mean()
