"""Membership inference from the model alone: scores that tell what was trained on from what was not."""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.loop import Answers, answers
from ccu_fast.unlearn.model import TwoModalityModel
from ccu_fast.unlearn.objective import class_log_odds

ATTACKS = ("confidence", "entropy")


def membership_auc(
    model: TwoModalityModel, members: PairedData, unseen: PairedData, *, attack: str = "confidence"
) -> float:
    """Measure how well an attack on the visual head tells members from unseen items::

        P(score of a member > score of an unseen item) + P(equal) / 2            # the area under the ROC curve

    0.5 is not at all. Compare with a retrained model's value, not with 0: far below 0.5 tells the items apart as well
    as far above.

    Args:
        model: the model under attack. Without a visual head the confidence is the cosine of the pair's two embeddings.
        members: items that may have been trained on.
        unseen: similar items that were not.
        attack: "confidence" (the probability of the true class) or "entropy" (:func:`modified_entropy`, negated).

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: unknown attack; an empty set; "entropy" without a visual head or labels.

    Source: Yeom et al. 2018 (arXiv 1709.01604), Song & Mittal 2021 (arXiv 2003.10595), as rankings; for pairs Ko et
    al. 2023 (arXiv 2310.00108).

    >>> from ccu_fast.models.fusion import FusionModel
    >>> data = ccu_fast.unlearn.PairedData(torch.rand(8, 3), torch.rand(8, 3), torch.arange(8) % 4)
    >>> ccu_fast.unlearn.membership_auc(FusionModel(3, 3, classes=4), data, data)
    0.5
    """
    check.one_of("attack", attack, ATTACKS)
    score = confidence if attack == "confidence" else certainty
    return auc(score(answers(model, members)), score(answers(model, unseen)))


def confidence(found: Answers) -> Tensor:
    """How sure the visual head is of the true class, fp64 ``[N]``::

        log(p_y / (1 - p_y)) = z_y - logsumexp(z_others)          # orders as p_y does, without rounding to 1

    For a model without a visual head, or items without labels: the cosine of each pair.
    """
    if "visual" not in found.logits:
        return (found.visual.double() * found.other.double()).sum(1)
    return class_log_odds(found.logits["visual"].double(), found.data.labels)


def certainty(found: Answers) -> Tensor:
    """The negated :func:`modified_entropy` of the visual head, fp64 ``[N]``."""
    if "visual" not in found.logits:
        raise ValueError("attack: expected a visual head and labels for 'entropy', got a model or data without")
    return -modified_entropy(found.logits["visual"], found.data.labels)


def modified_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The entropy attack that knows the label; small for a confident, right prediction::

        p = softmax(logits);   -(1 - p_y) log(p_y) - sum_{i != y} p_i log(1 - p_i)

    With log(p_i) in the second term, a common slip, it would be large where the model is confidently wrong but also
    where p_i is tiny, and would no longer fall monotonically with p_y.

    Args:
        logits: ``[N, C]``, C ≥ 2.
        labels: int64 ``[N]``.

    Returns:
        fp64 ``[N]`` ≥ 0.

    Source: Song & Mittal 2021 (arXiv 2003.10595).
    """
    check.tensor("logits", logits, ndim=2)
    check.shape("labels", check.tensor("labels", labels, dtypes=check.INTEGERS), [len(logits)])
    z = logits.double()
    log_p = z.log_softmax(1)
    log_not_p = _log_of_the_rest(z) - z.logsumexp(1, keepdim=True)
    own = torch.zeros_like(z, dtype=torch.bool).scatter(1, labels.long()[:, None], True)
    return torch.where(own, -log_not_p.exp() * log_p, -log_p.exp() * log_not_p).sum(1)


def auc(positive: Tensor, negative: Tensor) -> float:
    """P(positive > negative) + P(equal) / 2 over all pairs of two score vectors.

    Raises:
        ValueError: one of them is empty.
    """
    for name, scores in (("positive", positive), ("negative", negative)):
        if len(scores) == 0:
            raise ValueError(f"{name}: expected at least one score, got none")
    ordered, positive = negative.sort().values, positive.contiguous()
    below, not_above = (torch.searchsorted(ordered, positive, right=right) for right in (False, True))
    return (below + not_above).double().mean().item() / (2 * len(negative))


def _log_of_the_rest(z: Tensor) -> Tensor:
    """log sum_{j != i} exp(z_j) for every i, without cancellation where p_i is nearly 1."""
    columns = [torch.cat([z[:, :i], z[:, i + 1 :]], 1).logsumexp(1) for i in range(z.shape[1])]
    return torch.stack(columns, 1)
