"""The three losses of Cross-modal Contrastive Unlearning (CCU), each over reduce_similarity.

The formulas of CCU's paper (arXiv 2509.23895) are not public. These are this project's definition, and no figure of the
paper is claimed for them.

Letters: u, a are the visual and other embeddings of the items to forget, r, b those of the items to retain; a 0 marks
the frozen original model. All are unit vectors of one space, rows of ``[N, D]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ccu_fast import check
from ccu_fast.losses.formulas import attract, softplus
from ccu_fast.losses.functional import inverse_info_nce
from ccu_fast.ops.reduce_similarity.api import reduce_similarity
from ccu_fast.ops.reduce_similarity.relations import ALL, OTHER, SAME, SELF


@dataclass(frozen=True)
class KeyBank:
    """Frozen embeddings, with the labels and ids that decide their role.

    The keys come from the frozen model and never go stale, so they are drawn once and stay.

    Attributes:
        keys: ``[K, D]`` unit vectors, without gradients.
        labels: int64 ``[K]``; negative = none.
        ids: int64 ``[K]``.

    Raises:
        TypeError, ValueError: labels or ids of another length.

    >>> ids = torch.arange(4)
    >>> len(ccu_fast.unlearn.KeyBank(keys=torch.eye(4), labels=ids % 2, ids=ids).draw(2, seed=0))
    2
    """

    keys: Tensor
    labels: Tensor
    ids: Tensor

    def __post_init__(self) -> None:
        check.tensor("keys", self.keys, ndim=2)
        for name in ("labels", "ids"):
            check.tensor(name, getattr(self, name), dtypes=check.INTEGERS)
            check.shape(name, getattr(self, name), [len(self.keys)])
        object.__setattr__(self, "keys", self.keys.detach())

    def __len__(self) -> int:
        return len(self.keys)

    def draw(self, size: int, seed: int) -> KeyBank:
        """``size`` of the keys at random, each at most once; all of them where there are fewer."""
        check.integer("size", size, low=0)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:size]
        rows = order.sort().values.to(self.keys.device)
        return KeyBank(self.keys[rows], self.labels[rows], self.ids[rows])


def forgetting_loss(
    u: Tensor,
    r: Tensor,
    *,
    u0: Tensor,
    a0: Tensor,
    b0: Tensor,
    scale: float | Tensor,
    forget_labels: Tensor | None = None,
    retain_labels: Tensor | None = None,
    forget_ids: Tensor | None = None,
    retain_ids: Tensor | None = None,
    bank: KeyBank | None = None,
    backend: str = "auto",
) -> Tensor:
    """Push the visual embeddings to forget away from what they meant, part (a)::

        keys = torch.cat([r.detach(), b0, a0, u0])                           # and those of the bank
        S = scale * u @ keys.T
        mean_i( logsumexp(S[i, all]) - logsumexp(S[i, not positive]) )       # >= 0, fades once forgotten

    Positive is a key of the same label (to forget a class) or of the same id (to forget instances: label roles would
    make the model forget the rest of their class too). The frozen a0 and u0 make the loss work when a whole class goes:
    among the retained keys alone no row would have a positive, and the loss would be 0.

    Args:
        u: ``[N_u, D]`` live visual embeddings of the forget batch; the only argument that gets a gradient here.
        r: ``[N_r, D]`` visual embeddings of the retain batch.
        u0, a0: ``[N_u, D]`` the frozen visual and other embeddings of the forget batch.
        b0: ``[N_r, D]`` the frozen other embeddings of the retain batch.
        scale: number or one-element tensor; 1 / temperature.
        forget_labels, retain_labels: int64 ``[N_u]`` and ``[N_r]``: roles by class. A negative label takes its row
            and its keys out.
        forget_ids, retain_ids: int64 ``[N_u]`` and ``[N_r]``: roles by instance.
        bank: further frozen keys with their labels and ids. backend: see :func:`ccu_fast.reduce_similarity`.

    Returns:
        fp32 scalar (fp64 for fp64 inputs).

    Raises:
        ValueError: not exactly one of the two kinds of role is given.

    Source: this project's definition (see the module's first lines); the bounded form is that of
    :func:`ccu_fast.inverse_info_nce`.

    >>> z, kept = torch.eye(4)[:2], torch.eye(4)[2:]
    >>> ids = {"forget_ids": torch.tensor([0, 1]), "retain_ids": torch.tensor([2, 3])}
    >>> ccu_fast.unlearn.forgetting_loss(z, kept, u0=z, a0=z, b0=kept, scale=2.0, **ids)  # log((2e² + 6) / 6)
    tensor(1.2421)
    """
    by_label = _both("forget_labels", forget_labels, "retain_labels", retain_labels)
    if by_label == _both("forget_ids", forget_ids, "retain_ids", retain_ids):
        raise ValueError(
            "forget_labels, forget_ids: expected the labels (forget a class) or the ids (forget instances), got "
            + ("both" if by_label else "neither")
        )
    row, retained = (forget_labels, retain_labels) if by_label else (forget_ids, retain_ids)
    assert row is not None and retained is not None
    keys = torch.cat([r.detach(), b0.detach(), a0.detach(), u0.detach()])
    columns = torch.cat([retained, retained, row, row])
    roles = "labels" if by_label else "ids"
    batch: dict[str, Any] = {"scale": scale, "paired": False, "backend": backend}
    batch |= {f"row_{roles}": row, f"col_{roles}": columns}
    if bank is None:
        return inverse_info_nce(u, keys, **batch)
    # Two banks are two calls whose log-sum-exps are joined: the large one is not copied.
    spec = [("lse", SELF | SAME), ("lse", OTHER), ("count", OTHER), ("count", SELF | SAME)]
    one, _ = reduce_similarity(u, keys, rows=spec, **batch)
    two, _ = reduce_similarity(u, bank.keys, rows=spec, **{**batch, f"col_{roles}": getattr(bank, roles)})
    counts = (one[2] + two[2] > 0) & (one[3] + two[3] > 0)
    positive, other = (
        torch.logaddexp(torch.where(counts, one[i], 0), torch.where(counts, two[i], 0)) for i in range(2)
    )
    return torch.where(counts, softplus(positive - other), 0).sum() / counts.sum().clamp(min=1)


def retention_loss(
    rows: Tensor,
    frozen_rows: Tensor,
    keys: Tensor,
    *,
    scale: float | Tensor,
    backend: str = "auto",
) -> Tensor:
    """Keep how the other modality's embeddings relate to the frozen ones, part (b)::

        T = softmax(scale * frozen_rows @ keys.T, dim=1)                     # the frozen relations
        S = scale * rows @ keys.T
        mean_i( logsumexp(S[i]) - sum_j T[i, j] S[i, j] )                    # cross-entropy of softmax(S) against T

    Σ_j T_ij s_ij is linear in the row, scale · rows_i · (T keys)_i, and T keys is the derivative of the frozen
    log-sum-exp, so neither S nor T is stored.

    Args:
        rows: ``[N, D]`` live embeddings, [a; b] in CCU.
        frozen_rows: ``[N, D]`` the same items under the frozen model.
        keys: ``[M, D]`` frozen embeddings, [a0; b0] in CCU.
        scale: number or one-element tensor; 1 / temperature. backend: see :func:`ccu_fast.reduce_similarity`.

    Returns:
        fp32 scalar (fp64 for fp64 inputs); its least value is the mean entropy of T. 0 for no rows.

    Raises:
        ValueError: frozen_rows is not shaped like rows.

    Source: this project's definition (see the module's first lines).

    >>> z = torch.eye(4)
    >>> ccu_fast.unlearn.retention_loss(z, z, z, scale=0.0)  # log(4), the entropy of a uniform T
    tensor(1.3863)
    """
    _alike("rows", rows, "frozen_rows", frozen_rows)
    if len(rows) == 0:
        return rows.sum()
    keys = keys.detach()
    expected_key = _mean_key(frozen_rows, keys, scale, backend)
    (lse,), _ = reduce_similarity(rows, keys, scale=scale, paired=False, rows=[("lse", ALL)], backend=backend)
    return (lse - scale * (rows * expected_key).sum(-1)).mean()


def anchor_loss(rows: Tensor, frozen_rows: Tensor) -> Tensor:
    """Keep embeddings where the frozen model has them, part (b)::

        mean_i( 1 - rows_i . frozen_rows_i )

    Args:
        rows: ``[N, D]`` live unit vectors.
        frozen_rows: ``[N, D]`` the same items under the frozen model.

    Returns:
        Scalar in [0, 2], of the dtype of rows; 0 for no rows.

    Raises:
        ValueError: frozen_rows is not shaped like rows.

    Source: this project's definition (see the module's first lines).

    >>> ccu_fast.unlearn.anchor_loss(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor(0.5000)
    """
    _alike("rows", rows, "frozen_rows", frozen_rows)
    return (1 - (rows * frozen_rows.detach()).sum(-1)).sum() / max(len(rows), 1)


def unclassify_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Push the true class out at a head, whose classes are its keys, part (a)::

        mean_i( logsumexp(logits[i]) - logsumexp(logits[i, not labels[i]]) )      # = -log(1 - p_true) >= 0

    Args:
        logits: ``[N, C]``, at least two classes.
        labels: int64 ``[N]`` in [0, C − 1].

    Returns:
        Scalar of the dtype of logits; 0 for no rows.

    Raises:
        ValueError: fewer than two classes, labels of the wrong length.

    Source: this project's definition (see the module's first lines).

    >>> ccu_fast.unlearn.unclassify_loss(torch.zeros(3, 4), torch.tensor([0, 1, 2]))  # log(4 / 3)
    tensor(0.2877)
    """
    check.tensor("logits", logits, ndim=2)
    check.tensor("labels", labels, dtypes=check.INTEGERS)
    check.shape("labels", labels, [len(logits)])
    if logits.shape[1] < 2:
        raise ValueError(f"logits: expected at least two classes, got shape {list(logits.shape)}")
    return softplus(class_log_odds(logits, labels.long())).sum() / max(len(logits), 1)


def class_log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """log(p_y / (1 - p_y)) of each row, ``[N]``: z_y − logsumexp of the other logits."""
    own = labels[:, None]
    return logits.gather(1, own).squeeze(1) - logits.scatter(1, own, -torch.inf).logsumexp(1)


def level_loss(log_odds: Tensor, levels: Tensor, *, width: float = 0.2) -> Tensor:
    """Bring what each forgotten item is to the model to its level and no further, part (a)::

        d = log_odds - levels
        mean_i( abs(d_i) - width / 2   where abs(d_i) > width,   else d_i² / (2 * width) )

    Every item has a level of its own, that of an item never seen (:mod:`ccu_fast.unlearn.unseen`): a push without end
    would make a forgotten item less known than one the model never met.

    Args:
        log_odds: ``[N]`` live, in nats.
        levels: ``[N]``, without gradients.
        width: > 0, below which the pull fades; in nats.

    Returns:
        Scalar of the dtype of log_odds; 0 for no rows.

    Raises:
        ValueError: levels is not shaped like log_odds, width is not positive.

    Source: this project's definition (see the module's first lines).

    >>> ccu_fast.unlearn.level_loss(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]))  # (2 − .1) / 2
    tensor(0.9500)
    """
    check.tensor("log_odds", log_odds, ndim=1)
    check.shape("levels", check.tensor("levels", levels), log_odds.shape)
    check.number("width", width, low=1e-12)
    levels = levels.detach().to(log_odds.dtype)
    return F.huber_loss(log_odds, levels, reduction="sum", delta=width) / width / max(len(log_odds), 1)


def separation_loss(
    r: Tensor,
    r0: Tensor,
    u: Tensor,
    *,
    scale: float | Tensor,
    retain_labels: Tensor | None = None,
    forget_labels: Tensor | None = None,
    retain_ids: Tensor | None = None,
    weight: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Hold the retained visual embeddings to their own frozen class, apart from the forgotten ones, part (c)::

        P = scale * r @ r0.T
        Q = scale * r @ u.T
        same = retain_labels[:, None] == labels_of_columns
        mean_i( logaddexp(logsumexp(P[i]), log(weight) + logsumexp(Q[i, same])) - mean(P[i, same]) )

    The forgotten items act as negatives for their own class only: repelling all of them would fight (a). When a
    whole class goes none is left and what remains is a supervised contrastive loss towards the frozen embeddings.
    Without labels ``same`` is the item itself in P and every forgotten item in Q.

    Args:
        r: ``[N_r, D]`` live visual embeddings of the retain batch.
        r0: ``[M, D]`` frozen visual embeddings of the same batch, in the same order (M = N_r).
        u: ``[N_u, D]`` visual embeddings of the forget batch; detach them to leave them where they are.
        scale: number or one-element tensor; 1 / temperature.
        retain_labels: int64 ``[N_r]``, forget_labels: int64 ``[N_u]``; negative = left out.
        retain_ids: int64 ``[N_r]``, instead of labels.
        weight: > 0, how much a forgotten item counts among the negatives.
        backend: see :func:`ccu_fast.reduce_similarity`.

    Returns:
        fp32 scalar (fp64 for fp64 inputs), the mean over rows that have a positive; 0 when none has.

    Raises:
        ValueError: weight is not positive, labels of the wrong length, not exactly one of labels and ids.

    Source: this project's definition (see the module's first lines).

    >>> r, u = torch.eye(3)[:2], torch.eye(3)[2:]
    >>> ccu_fast.unlearn.separation_loss(r, r, u, scale=2.0, retain_ids=torch.arange(2))  # log(e² + 2) − 2
    tensor(0.2395)
    """
    if check.number("weight", weight, low=0) == 0:
        raise ValueError("weight: expected a positive number, got 0")
    by_label = _both("retain_labels", retain_labels, "forget_labels", forget_labels)
    if by_label == (retain_ids is not None):
        raise ValueError(
            "retain_labels, retain_ids: expected labels or ids, got " + ("both" if by_label else "neither")
        )
    shared: dict[str, Any] = {"scale": scale, "paired": False, "backend": backend}
    own_role: dict[str, Any] = {"row_ids": retain_ids, "col_ids": retain_ids}
    forgotten_role: dict[str, Any] = {}
    positives, negatives = SELF, ALL
    if by_label:
        own_role = {"row_labels": retain_labels, "col_labels": retain_labels}
        forgotten_role = {"row_labels": retain_labels, "col_labels": forget_labels}
        positives = negatives = SAME
    spec = [("lse", ALL ^ positives), ("lse", positives), ("sum", positives), ("count", positives)]
    (retained, *own), _ = reduce_similarity(r, r0.detach(), rows=spec, **own_role, **shared)
    (forgotten,), _ = reduce_similarity(r, u, rows=[("lse", negatives)], **forgotten_role, **shared)
    has_positive = own[-1] > 0
    # −inf on both sides, where there is nothing to tell apart, has no derivative in logaddexp.
    retained = retained.clamp(min=torch.finfo(retained.dtype).min)
    rest = torch.logaddexp(retained, forgotten + math.log(weight))
    return torch.where(has_positive, attract(rest, *own), 0).sum() / has_positive.sum().clamp(min=1)


def neighbour_loss(u: Tensor, neighbours: Tensor) -> Tensor:
    """Draw each embedding to forget towards the retained item it resembles::

        mean_i( 1 - u_i . neighbours_i.detach() )

    An inverse loss alone leaves the forgotten items as a cluster of their own, which a linear probe finds. A model
    that never saw them has them where their inputs look like retained ones.

    Args:
        u: ``[N, D]`` live visual unit vectors of the forget batch; the only argument that gets a gradient.
        neighbours: ``[N, D]`` visual unit vectors of a retained item for each, in the same order: that whose input
            looks most alike.

    Returns:
        Scalar in [0, 2], of the dtype of u; 0 for no rows.

    Raises:
        ValueError: neighbours is not shaped like u.

    Source: this project's definition (see the module's first lines).

    >>> ccu_fast.unlearn.neighbour_loss(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor(0.5000)
    """
    _alike("u", u, "neighbours", neighbours)
    return (1 - (u * neighbours.detach()).sum(-1)).sum() / max(len(u), 1)


def _mean_key(frozen_rows: Tensor, keys: Tensor, scale: float | Tensor, backend: str) -> Tensor:
    """softmax(scale · frozen_rows keysᵀ) keys, as ∂lse_i / ∂(scale · frozen_rows_i)."""
    scaled = (scale * frozen_rows).detach().requires_grad_()
    with torch.enable_grad():
        (lse,), _ = reduce_similarity(scaled, keys, paired=False, rows=[("lse", ALL)], backend=backend)
        return torch.autograd.grad(lse.sum(), scaled)[0]


def _alike(name: str, rows: Tensor, other_name: str, other: Tensor) -> None:
    """Both are ``[N, D]``."""
    check.tensor(name, rows, ndim=2)
    check.tensor(other_name, other)
    check.shape(other_name, other, rows.shape)


def _both(name: str, value: Tensor | None, other_name: str, other: Tensor | None) -> bool:
    """Whether the pair is given; half a pair is an error."""
    if (value is None) != (other is None):
        missing, given = (name, other_name) if value is None else (other_name, name)
        raise ValueError(f"{missing}: expected a tensor because {given} is given, got None")
    return value is not None
