"""l2_normalize: rows of unit length in one pass, as two torch operators with an autograd rule.

ccu_fast::l2_normalize           x [R, D] → unit rows [R, D], inverse norms fp32 [R]
ccu_fast::l2_normalize_backward  gradient of the rows → dx
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.ops.backend import autocast_dtype, choose, load, reverse_mode_alone, without_autocast
from ccu_fast.ops.operator import operator, twice_differentiable

EPS = 1e-12  # torch.nn.functional.normalize's


def l2_normalize(x: Tensor, *, dtype: torch.dtype | None = None, backend: str = "auto") -> Tensor:
    """Scale the rows of a tensor to unit length::

        F.normalize(x.float(), dim=-1).to(dtype)          # x / max(‖x‖, 1e-12)

    Computed in fp32 whatever the dtype and rounded once, where ``F.normalize`` of a half type rounds the norm and the
    quotient. The gradient is ``(g − (u·g) u) / ‖x‖`` with the unrounded u. A row of zeros stays zero; its gradient is
    that of ``x / 1e-12``, as with ``F.normalize`` in fp32.

    Args:
        x: ``[..., D]`` fp32, fp16 or bf16 (fp64 on the reference backend). Any strides.
        dtype: of the result. Default: that of ``x``; under autocast the one that torch.matmul would multiply it in.
        backend: "auto", or one of "native", "triton", "reference"; a named one raises if it cannot serve.

    Returns:
        ``[..., D]``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: ``torch.nn.functional.normalize``, its eps of 1e-12 included; no paper.

    >>> ccu_fast.l2_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    check.tensor("x", x)
    if x.ndim < 1:
        raise ValueError(f"x: expected shape [..., D], got {list(x.shape)}")
    if dtype is None:
        dtype = (None if x.dtype == torch.float64 else autocast_dtype(x.device.type)) or x.dtype
    elif dtype not in check.FLOATS or (torch.float64 in (dtype, x.dtype) and dtype != x.dtype):
        wanted = "torch.float64 (that of x)" if x.dtype == torch.float64 else check.names(check.FLOATS[:3])
        raise TypeError(f"dtype: expected {wanted}, got {dtype}")
    name = choose(backend, "l2_normalize", x.device, x.dtype)
    if name == "reference":
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        with without_autocast(x.device):
            return torch.nn.functional.normalize(x.to(compute), dim=-1, eps=EPS).to(dtype)
    reverse_mode_alone("l2_normalize", x)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()
    unit: Tensor = _Normalize.apply(rows, dtype, name)
    return unit.view(x.shape)


@operator(
    "l2_normalize(Tensor x, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    fake=lambda x, dtype, backend: (torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)),
)
def _forward(x: Tensor, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    out: tuple[Tensor, Tensor] = load("l2_normalize", backend).forward(x, dtype, EPS)
    return out


@operator(
    "l2_normalize_backward(Tensor grad, Tensor x, Tensor inverse, str backend) -> Tensor",
    fake=lambda grad, x, inverse, backend: torch.empty_like(x),
)
def _backward(grad: Tensor, x: Tensor, inverse: Tensor, backend: str) -> Tensor:
    dx: Tensor = load("l2_normalize", backend).backward(grad, x, inverse, EPS)
    return dx


class _Normalize(torch.autograd.Function):
    """Keeps the rows, which are there anyway, and one number for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
        call = torch.ops.ccu_fast.l2_normalize if check.by_operator(x) else _forward
        out, inverse = call(x, dtype, backend)
        ctx.save_for_backward(x, inverse)
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, inverse = ctx.saved_tensors
        call: Any = _backward
        if check.by_operator(grad):
            call = torch.ops.ccu_fast.l2_normalize_backward
        elif torch._C._functorch.is_legacy_batchedtensor(grad):
            # is_grads_batched=True: many gradients at once, which no kernel can read
            return _backward_again(grad, x, inverse, ctx.backend)[0], None, None
        elif torch.is_grad_enabled():
            call = twice_differentiable(_backward, _backward_again)
        return call(grad.contiguous(), x, inverse, ctx.backend), None, None


def _backward_again(grad: Tensor, x: Tensor, inverse: Tensor, backend: str) -> tuple[Tensor, ...]:
    """:func:`_backward` in plain torch."""
    with without_autocast(x.device), torch.enable_grad():
        given = x if x.requires_grad else x.detach().requires_grad_()
        unit = torch.nn.functional.normalize(given.float(), dim=-1, eps=EPS).to(grad.dtype)
        return torch.autograd.grad(unit, given, grad, create_graph=True)
