"""InfoNCE of a small batch on a GPU: four launches forward, three backward; see :mod:`ccu_fast.small_info_nce`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ccu_fast.backends.paired import COLS, ROWS, weights
from ccu_fast.backends.problem import SimilarityProblem
from ccu_fast.backends.triton import small_batch


def _problem(x: Tensor, y: Tensor, scale: Tensor, symmetric: bool) -> SimilarityProblem:
    cols = COLS if symmetric else ()
    return SimilarityProblem(
        x.contiguous()[None], y.contiguous()[None], scale, None, None, None, None, None, True, ROWS, cols
    )


def forward(x: Tensor, y: Tensor, scale: Tensor, symmetric: bool, weight: float, keep: bool) -> tuple[Tensor, ...]:
    """The loss, the results of rows and columns ``[3 or 2, N]``, and their weights."""
    each = weights(x.shape[0], symmetric, weight, x.device)
    results = torch.empty_like(each)
    small_batch.reduce_into(_problem(x, y, scale, symmetric), results[:2], results[2:])
    return torch.dot(results.view(-1), each.view(-1)), results, each


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
    results, each = saved
    grads = each * grad
    dx, dy, dscale, _ = small_batch.backward(
        _problem(x, y, scale, symmetric), grads[:2], grads[2:], results[:2], results[2:], results, (*needs, False), 0
    )
    return dx.view(-1, x.shape[1]), dy.view(-1, y.shape[1]), dscale
