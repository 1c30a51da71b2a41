"""The likelihood-ratio attack: is the model's confidence in an item like that of models trained on it?

Shadow models, trained as the original was on random halves of a pool, tell for each item how confident models are that
saw it (in) and that did not (out). The attack on an unlearned model asks whether it still looks like one of the first
kind; a retrained model gives the answer to compare with. It does not simulate the unlearning itself on the shadows (as
U-LiRA, Hayes et al. 2024, arXiv 2403.01218, does): an attacker who knows the method can do no worse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.audit.membership import confidence
from ccu_fast.unlearn.config import Progress
from ccu_fast.unlearn.protocol import TwoModalityModel
from ccu_fast.unlearn.training import TrainConfig, train

VARIANTS = ("online", "offline")


@dataclass(frozen=True)
class Shadows:
    """What K shadow models say about N items.

    Attributes:
        ids: int64 ``[N]``, the items.
        inside: bool ``[K, N]``: this model was trained on this item.
        confidence: fp64 ``[K, N]``, log(p_y / (1 − p_y)) of the visual head.
    """

    ids: Tensor
    inside: Tensor
    confidence: Tensor

    def of(self, data: PairedData) -> tuple[Tensor, Tensor]:
        """inside and confidence of these items, in their order.

        Raises:
            ValueError: an item is not in the pool.
        """
        where = {int(item): position for position, item in enumerate(self.ids.tolist())}
        absent = [item for item in data.ids.tolist() if item not in where]
        if absent:
            raise ValueError(f"shadows: expected every item in their pool, got none with id {absent[0]}")
        columns = torch.tensor([where[item] for item in data.ids.tolist()], device=self.inside.device)
        return self.inside[:, columns], self.confidence[:, columns]


def train_shadows(
    make_model: Callable[[], TwoModalityModel],
    pool: PairedData,
    config: TrainConfig,
    *,
    count: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Shadows:
    """Train ``count`` models, each on half of the pool; each item is in exactly half of the trainings.

    Args:
        make_model: called once for each model.
        pool: the original's training set and unseen items alike, with ids of their own.
        config: that of the original; each shadow gets a seed of its own.
        count: even, at least 2. The paper takes up to 256; under 64 one variance for all items is the better estimate,
            and :func:`lira_scores` uses it.
        seed: of the halves and the trainings.
        progress: see :func:`ccu_fast.unlearn.training.train`.

    Raises:
        ValueError: count is odd or below 2.
    """
    check.integer("count", count, low=2)
    check.integer("seed", seed, low=0)
    if count % 2:
        raise ValueError(f"count: expected an even number, so that each item is in half of the trainings, got {count}")
    generator = torch.Generator().manual_seed(seed)
    inside = torch.rand(count, len(pool), generator=generator).argsort(0).argsort(0) < count // 2
    inside = inside.to(pool.labels.device)
    said = []
    for number, members in enumerate(inside):
        own = replace(config, seed=seed * 1000 + 1 + number)
        stage = f"shadow {number + 1} of {count}"
        model = train(make_model, pool[members], own, progress=progress, stage=stage).model
        said.append(confidence(model, pool))
    return Shadows(pool.ids, inside, torch.stack(said))


def lira_scores(target: Tensor, shadows: Tensor, inside: Tensor, *, variant: str = "online") -> Tensor:
    """How much more the target's confidence speaks for membership than against it::

        mu_in, mu_out = mean over the shadows trained with and without the item          # per item
        var_in, var_out = mean squared deviation from these means                        # over all items together
        "online":   log N(target; mu_in, var_in) - log N(target; mu_out, var_out)
        "offline":  log P(Z <= target),  Z ~ N(mu_out, var_out)                          # needs no model that saw it

    Args:
        target: ``[N]`` confidences of the model under attack.
        shadows: ``[K, N]``, those of the shadow models.
        inside: bool ``[K, N]``; every item needs at least one shadow outside and, online, one inside.
        variant: "online" or "offline".

    Returns:
        fp64 ``[N]``; larger is more likely a member.

    Raises:
        ValueError: unknown variant, shapes that do not match, an item without the shadows it needs.

    Source: Carlini et al. 2022 (arXiv 2112.03570), algorithm 1, its offline variant, and fixed variance.
    """
    check.one_of("variant", variant, VARIANTS)
    check.tensor("target", target, ndim=1)
    check.shape("shadows", check.tensor("shadows", shadows, ndim=2), [len(shadows), len(target)])
    check.shape("inside", check.tensor("inside", inside, dtypes=(torch.bool,)), list(shadows.shape))
    for name, mask in (("outside", ~inside), ("inside", inside)):
        if (name == "outside" or variant == "online") and not bool(mask.any(0).all()):
            raise ValueError(f"inside: expected a shadow {name} for every item, got none for some")
    x, phi = target.double(), shadows.double()
    if variant == "offline":
        mean, variance = _normal(phi, ~inside)
        # log of the normal distribution function; accurate in the far tail, where 1 - erf would round to 0.
        return torch.special.log_ndtr((x - mean) / variance.sqrt())
    scores = []
    for mask in (inside, ~inside):
        mean, variance = _normal(phi, mask)
        scores.append(-((x - mean) ** 2) / (2 * variance) - variance.log() / 2)
    return scores[0] - scores[1]


def _normal(phi: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    count = mask.sum(0)
    mean = torch.where(mask, phi, 0).sum(0) / count.clamp(min=1)
    squares = torch.where(mask, (phi - mean) ** 2, 0).sum()
    # Each item spends one degree of freedom on its mean.
    freedom = (count - 1).clamp(min=0).sum().clamp(min=1)
    return mean, (squares / freedom).clamp(min=1e-12)
