"""InfoNCE of a small paired batch as one operator, because there the calls take the time and not the arithmetic.

The general way makes reductions, their differences, means and sums one after another, each with its node in the graph.
Here one node holds all of it::

    z_i = logsumexp(S[i, j] for j != i) - S[i, i]          # the same of columns
    loss = w * softplus(z).sum()
    ∂loss/∂S[i, j] = w * sigmoid(z_i) * exp(S[i, j] - logsumexp(S[i, j] for j != i))
    ∂loss/∂S[i, i] = -w * sigmoid(z_i)

so that nothing cancels however sure the pairs are. Under autocast x and y are rounded inside the operator, which needs
no copies, and their gradients are as exact as those of rounded inputs can be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.ops.backend import autocast_dtype, load, outside_transforms, reverse_mode_alone, without_autocast
from ccu_fast.ops.operator import twice_differentiable
from ccu_fast.ops.reduce_similarity.api import as_scalar
from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem, encode
from ccu_fast.ops.reduce_similarity.relations import OTHER, SELF

# The loss as reductions of rows and of columns.
ROWS = (encode("lse", int(OTHER)), encode("sum", int(SELF)))
COLS = ROWS[:1]
Inputs = tuple[Tensor, Tensor, Tensor]  # x, y, scale


def small_info_nce(x: Tensor, y: Tensor, scale: float | Tensor, *, symmetric: bool, mean: bool, backend: str) -> Tensor:
    """The loss, fp32 0-dim, of arguments that :func:`ccu_fast.info_nce` gives to ``backend``."""
    if not check.readable(scale) or (scale.ndim, scale.dtype, scale.device) != (0, torch.float32, x.device):
        scale = as_scalar("scale", scale, x)
    reverse_mode_alone("info_nce", x, y, scale)
    keep = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or scale.requires_grad)
    weight = (1 / x.shape[0] if mean else 1.0) / (2 if symmetric else 1)
    cast = autocast_dtype(x.device.type)
    options = (symmetric, weight) if cast in (None, x.dtype) else (symmetric, weight, cast)
    # Torch looks at every argument of a function, and at every gradient: those that are no tensors come as one.
    return _SmallInfoNCE.apply(x, y, scale, (keep, backend, options))


class _SmallInfoNCE(torch.autograd.Function):
    """The loss of (x, y, scale); what its backward pass needs is the backend's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor, rest: tuple[bool, str, tuple[Any, ...]]) -> Tensor:
        keep, backend, (symmetric, weight, *cast) = rest
        ctx.rest = rest[1:]
        loss, *saved = load("small_info_nce", backend).forward(x, y, scale, symmetric, weight, keep, *cast)
        ctx.save_for_backward(x, y, scale, *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch._C._are_functorch_transforms_active():
            outside_transforms("info_nce", grad)
        call: Any = _backward
        if torch._C._functorch.is_legacy_batchedtensor(grad):
            call = _backward_again  # is_grads_batched=True: many gradients at once, which no kernel can read
        elif torch.is_grad_enabled():
            call = twice_differentiable(_backward, _backward_again)
        return (*call(*ctx.saved_tensors, grad, ctx.needs_input_grad[:3], *ctx.rest), None)


def _backward(x: Tensor, y: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    *saved, grad, needs, backend, options = rest
    return load("small_info_nce", backend).backward((x, y, scale), saved, grad, needs, *options)


def _backward_again(x: Tensor, y: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    """:func:`_backward` in plain torch."""
    *_, grad, needs, _, (symmetric, weight, *cast) = rest
    with torch.enable_grad(), without_autocast(x.device):
        inputs = [t if t.requires_grad else t.detach().requires_grad_() for t in (x, y, scale)]
        x, y = (t.to(*cast) if cast else t for t in inputs[:2])
        cols = COLS if symmetric else ()
        p = SimilarityProblem(x[None], y[None], inputs[2], None, None, None, None, None, True, ROWS, cols)
        (of_rows, own), of_cols = load("reduce_similarity", "reference").reduce(p)
        margins = torch.cat([lse - own for lse in (of_rows, *of_cols)])
        loss = weight * torch.nn.functional.softplus(margins, threshold=50).sum()
        grads = torch.autograd.grad(loss, inputs, grad, create_graph=True)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))
