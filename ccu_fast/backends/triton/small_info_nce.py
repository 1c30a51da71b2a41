"""InfoNCE of a small batch on a GPU: two launches forward, three backward; see :mod:`ccu_fast.small_info_nce`."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ccu_fast.backends.problem import SimilarityProblem, encode
from ccu_fast.backends.triton import small_batch
from ccu_fast.relations import ALL, SELF

_ROWS = (encode("lse", int(ALL)), encode("sum", int(SELF)))
_COLS = _ROWS[:1]


@functools.lru_cache(maxsize=16)
def _incoming(items: int, symmetric: bool, weight: float, device: torch.device) -> Tensor:
    """What the loss sends to the results of rows and columns, one after another."""
    weights = torch.full((3 if symmetric else 2, items), weight, dtype=torch.float32, device=device)
    weights[1] = -2 * weight if symmetric else -weight
    return weights


def _problem(x: Tensor, y: Tensor, scale: Tensor, symmetric: bool) -> SimilarityProblem:
    cols = _COLS if symmetric else ()
    return SimilarityProblem(
        x.contiguous()[None], y.contiguous()[None], scale, None, None, None, None, None, True, _ROWS, cols
    )


def forward(x: Tensor, y: Tensor, scale: Tensor, symmetric: bool, weight: float, keep: bool) -> tuple[Tensor, ...]:
    """The loss and the results of rows and columns ``[3 or 2, N]``."""
    weights = _incoming(x.shape[0], symmetric, weight, x.device)
    results = torch.empty_like(weights)
    small_batch.reduce_into(_problem(x, y, scale, symmetric), results[:2], results[2:])
    return torch.dot(results.view(-1), weights.view(-1)), results


def backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    saved: Sequence[Tensor],
    grad: Tensor,
    needs: Sequence[bool],
    symmetric: bool,
    weight: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y and scale; those not needed are empty."""
    (results,) = saved
    grads = _incoming(x.shape[0], symmetric, weight, x.device) * grad
    dx, dy, dscale, _ = small_batch.backward(
        _problem(x, y, scale, symmetric), grads[:2], grads[2:], results[:2], results[2:], results, (*needs, False), 0
    )
    return dx.view(-1, x.shape[1]), dy.view(-1, y.shape[1]), dscale
