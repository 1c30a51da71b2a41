"""Distillation of similarities in one process: a student learns the softmax of another model's similarities."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ccu_fast import check
from ccu_fast.losses import formulas
from ccu_fast.losses.functional import REDUCTIONS, arguments, reduced
from ccu_fast.ops.l2_normalize.api import l2_normalize
from ccu_fast.ops.reduce_similarity.api import reduce_similarity

# What it passes on to the reduction.
PASSED_ON = ("bias", "row_labels", "col_labels", "paired", "normalize", "backend", "workspace", "nan_policy")


@arguments(*PASSED_ON)
def distill(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor,
    teacher: tuple[Tensor, Tensor],
    teacher_scale: float | Tensor,
    symmetric: bool = True,
    reduction: str = "mean",
    **similarity: Any,
) -> Tensor:
    """Teach the similarities of one model to another: the cross-entropy of the student's softmax under the teacher's::

        target = (teacher_scale * teacher[0] @ teacher[1].mT).softmax(-1)
        logits = scale * x @ y.mT
        loss = -(target * logits.log_softmax(-1)).sum(-1).mean()
        if symmetric:
            loss = (loss + the same of the transposed logits of both) / 2

    Neither matrix is stored. The teacher gets no gradient. It is the Kullback-Leibler divergence but for the teacher's
    entropy, which has none either.

    A row comes to log(1 + exp(rest − own)) + Σ q (own − S) over the rest, with own the logit of its own pair, rest the
    log-sum-exp of the others and q the teacher's probabilities of these. So where both models are sure of the pair the
    loss keeps its digits, which the difference of lse(S) and Σ q S would not. Where they are sure of another one, or
    where rows have no pair of their own, a few units in the last place of the largest logit remain.

    Args:
        x: ``[..., N, D]`` fp32, fp16 or bf16: the student's; usually unit vectors.
        y: ``[..., M, D]``; leading dimensions broadcast, one loss for each bank.
        scale: number or one-element tensor; 1 / temperature.
        teacher: ``([..., N, Dt], [..., M, Dt])``, the teacher's features of the same items: of any width, of one float
            dtype, on the device of x.
        teacher_scale: number or one-element tensor; the teacher's 1 / temperature, applied in fp32.
        symmetric: average the losses over rows and over columns.
        reduction: "mean" or "sum" over the items, or "none".
        **similarity: bias, row_labels and col_labels (negative ones take items out of everything), paired, backend,
            workspace, nan_policy: see :func:`ccu_fast.reduce_similarity`; normalize, which makes the teacher's rows
            unit vectors too.

    Returns:
        fp32 ``[...]`` (one value per bank), or ``[..., N]`` for reduction="none". Items without a partner do not count.

    Raises:
        TypeError, ValueError: features of the teacher that do not fit, reduction="none" of a symmetric loss with N ≠ M.

    Source: CLIP-KD, Yang et al. 2023 (arXiv 2307.12732), contrastive relational distillation; TinyCLIP, Wu et al. 2023
    (arXiv 2309.12314), affinity mimicking; open_clip's DistillClipLoss.

    >>> x = torch.eye(4)
    >>> ccu_fast.distill(x, x, scale=2.0, teacher=(x, x), teacher_scale=2.0)  # log(e² + 3) − 2 e² / (e² + 3)
    tensor(0.9183)
    """
    check.one_of("reduction", reduction, REDUCTIONS)
    check.boolean("symmetric", symmetric)
    if check.boolean("normalize", similarity.get("normalize", False)):
        teacher = unit_teacher(teacher, similarity.get("backend"))
    options: dict[str, Any] = {"scale": scale, "teacher": teacher, "teacher_scale": teacher_scale, **similarity}
    sides = formulas.distill(reduce_similarity, x, y, symmetric=symmetric, **options)
    return formulas.average([reduced(side.distilled, reduction) for side in sides])


def unit_teacher(teacher: Any, backend: Any = None) -> Any:
    """A teacher's rows as unit vectors; what is no pair of tensors, or no backend, is refused later, on every rank."""
    pair = isinstance(teacher, (tuple, list))
    if not pair or not all(check.readable(t) and t.dtype in check.FLOATS and t.ndim > 1 for t in teacher):
        return teacher
    named = "reference" if backend == "reference" else "auto"
    return tuple(l2_normalize(t.detach(), backend=named) for t in teacher)
