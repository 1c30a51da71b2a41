"""InfoNCE of a small batch on a GPU: four launches forward, three backward; see api.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem
from ccu_fast.ops.reduce_similarity.triton import configs, small
from ccu_fast.ops.small_info_nce.api import COLS, ROWS, Inputs, weights
from ccu_fast.ops.triton.launch import specialised_on

_NO_BIAS_NO_KEYS = (None,) * 5


def _problem(x: Tensor, y: Tensor, scale: Tensor, symmetric: bool) -> SimilarityProblem:
    return SimilarityProblem(x[None], y[None], scale, *_NO_BIAS_NO_KEYS, True, ROWS, COLS if symmetric else ())


def forward(x: Tensor, y: Tensor, scale: Tensor, symmetric: bool, weight: float, keep: bool) -> tuple[Tensor, ...]:
    """The loss; the results ``[3N or 2N]``, again those of the columns alone, and the weights of the results."""
    x, y = x.contiguous(), y.contiguous()
    items = x.shape[0]
    with configs.on_device(x):
        each = weights(items, symmetric, weight, x.device)
        results = torch.empty_like(each)
        cols = results[2 * items :]
        device = configs.device()
        signature = ("small InfoNCE forward", x.shape, symmetric, specialised_on(x, y, scale))
        launch = device.plans.get(signature) or device.keep(
            signature, small.forward_launch(_problem(x, y, scale, symmetric), device)
        )
        launch(x, y, scale, *_NO_BIAS_NO_KEYS, results, cols)
        return torch.dot(results, each), results, cols, each


def backward(
    inputs: Inputs, saved: Sequence[Tensor], grad: Tensor, needs: Sequence[bool], symmetric: bool, weight: float
) -> tuple[Tensor | None, ...]:
    """Gradients of x, y and scale; None where not needed."""
    results, cols, each = saved
    x, y, scale = inputs[0].contiguous(), inputs[1].contiguous(), inputs[2]
    with configs.on_device(x):
        grads = each * grad
        device = configs.device()
        signature = ("small InfoNCE backward", x.shape, symmetric, needs, specialised_on(x, y, scale, results, cols))
        made = device.plans.get(signature) or device.keep(
            signature, small.Backward(_problem(x, y, scale, symmetric), (*needs, False), device)
        )
        col_grads = grads[2 * x.shape[0] :]
        return made(x, y, (x, y, scale, *_NO_BIAS_NO_KEYS, grads, col_grads, results, cols))[:3]
