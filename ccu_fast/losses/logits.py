"""What the logits of the positives and of the negatives of a row come to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccu_fast.losses.formulas import logsumexp
from ccu_fast.ops.backend import transformed, without_autocast


class Positives(NamedTuple):
    """The positives of every row or column.

    Attributes:
        total: sum of their logits; inside: the log-sum-exp.
        number: how many they are; None: one each.
    """

    total: Tensor
    inside: Tensor
    number: Tensor | None

    @property
    def mean(self) -> Tensor:
        return self.total if self.number is None else self.total / self.number.clamp(min=1)


class Negatives(NamedTuple):
    """A set of negatives of every row or column.

    Attributes:
        lse: log-sum-exp of their logits.
        total: sum of these; number: how many they are. Both 0 where the variant does not ask.
    """

    lse: Tensor
    total: Tensor | float = 0.0
    number: Tensor | int = 0

    @staticmethod
    def union(sets: list[Negatives]) -> Negatives:
        if len(sets) == 1:
            return sets[0]
        lse = torch.broadcast_tensors(*(s.lse for s in sets))
        return Negatives(logsumexp(torch.stack(lse)), sum(s.total for s in sets), sum(s.number for s in sets))


def products_of_own(x: Tensor, others: Tensor) -> Tensor:
    """x ``[..., N, D]`` times its own ``[..., N, K, D]`` in at least fp32: ``[..., N, K]``."""
    with without_autocast(x.device):
        x, others = x.to(wide(x)), others.to(wide(others))
        if x.shape[:-1] != others.shape[:-2] or transformed(x, others):
            return torch.matmul(others, x[..., None])[..., 0]
        products: Tensor = _Own.apply(x, others)
        return products


class _Own(torch.autograd.Function):
    """Torch's own gradients of this product take twice as long: it adds up the outer ones one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, others: Tensor) -> Tensor:
        ctx.save_for_backward(x, others)
        return torch.matmul(others, x[..., None])[..., 0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, others = ctx.saved_tensors
        of_x, of_others = ctx.needs_input_grad
        return (
            torch.matmul(grad[..., None, :], others)[..., 0, :] if of_x else None,
            grad[..., None] * x[..., None, :] if of_others else None,
        )


def wide(t: Tensor) -> torch.dtype:
    """The dtype of sums: fp64 of fp64, else fp32."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def difference(a: Tensor, b: Tensor) -> Tensor:
    """a − b, and −inf of two empty sets."""
    empty = b == -torch.inf
    return torch.where(empty, -torch.inf, torch.where(empty, 0, a) - torch.where(empty, 0, b))


def log_of_number(count: Tensor | int, like: Tensor) -> Tensor:
    """The logarithm of a number of negatives; of none it is 0, for what is added to −inf."""
    return torch.as_tensor(count, device=like.device).clamp(min=1).to(like.dtype).log()
