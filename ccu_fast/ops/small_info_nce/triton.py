"""InfoNCE of a small batch on a GPU: two launches forward, three backward; see api.py."""

# mypy: disable-error-code="no-untyped-def"
# Triton functions are a language of their own: typed when they are compiled.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem
from ccu_fast.ops.reduce_similarity.triton import configs, small
from ccu_fast.ops.reduce_similarity.triton.tile import LOG2E, softplus
from ccu_fast.ops.small_info_nce.api import COLS, ROWS, Inputs
from ccu_fast.ops.triton.launch import Launch, specialised_on

_NO_BIAS_NO_KEYS = (None,) * 5


@triton.jit
def loss_kernel(results, each, loss, N, weight, SIDES: tl.constexpr, BLOCK: tl.constexpr):
    """The loss from ``results`` ``[2 or 3, N]`` (lse of rows, own, lse of columns), and its gradient ``each``::

        z = results[::2] - results[1];  loss = weight * softplus(z).sum()
        each[::2] = weight * sigmoid(z);  each[1] = -each[::2].sum(0)

    One program: 1024 items are the most.
    """
    index = tl.arange(0, BLOCK)
    inside = index < N
    own = tl.load(results + N + index, mask=inside, other=0.0)
    value = tl.zeros((BLOCK,), tl.float32)
    pull = tl.zeros((BLOCK,), tl.float32)
    for side in tl.static_range(SIDES):
        at = 2 * side * N + index
        t = (tl.load(results + at, mask=inside, other=float("-inf")) - own) * LOG2E
        value += softplus(t)
        push = weight / (1.0 + tl.exp2(-t))
        tl.store(each + at, push, mask=inside)
        pull += push
    tl.store(each + N + index, -pull, mask=inside)
    tl.store(loss, weight * tl.sum(value, 0))


class _Forward:
    """The launches of a forward pass."""

    def __init__(
        self, x: Tensor, y: Tensor, scale: Tensor, symmetric: bool, weight: float, device: configs.Device
    ) -> None:
        items = x.shape[0]
        self.results = small.forward_launch(_problem(x, y, scale, symmetric), device)
        block = max(triton.next_power_of_2(items), 16)
        constants = {"SIDES": 2 if symmetric else 1, "BLOCK": block, "num_warps": 4}
        self.loss = Launch(loss_kernel, 1, (items, weight), index=device.index, **constants)


def _problem(x: Tensor, y: Tensor, scale: Tensor, symmetric: bool) -> SimilarityProblem:
    return SimilarityProblem(x[None], y[None], scale, *_NO_BIAS_NO_KEYS, True, ROWS, COLS if symmetric else ())


def forward(x: Tensor, y: Tensor, scale: Tensor, symmetric: bool, weight: float, keep: bool) -> tuple[Tensor, ...]:
    """The loss; the results ``[3N or 2N]``, again those of the columns alone, and the gradient of the results."""
    x, y = x.contiguous(), y.contiguous()
    items = x.shape[0]
    with configs.on_device(x):
        results = x.new_empty(((3 if symmetric else 2) * items,), dtype=torch.float32)
        each, loss = torch.empty_like(results), results.new_empty(())
        cols = results[2 * items :]
        device = configs.device()
        signature = ("small InfoNCE forward", x.shape, symmetric, weight, specialised_on(x, y, scale))
        made = device.plans.get(signature) or device.keep(signature, _Forward(x, y, scale, symmetric, weight, device))
        made.results(x, y, scale, *_NO_BIAS_NO_KEYS, results, cols)
        made.loss(results, each, loss)
        return loss, results, cols, each


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
