"""InfoNCE of a small batch on a CPU: one call into C++ each way, between the library's products where those are faster.

The forward pass turns the products x yᵀ into their gradient in place, which takes N² · 4 bytes until the backward pass.
The backward pass only multiplies. Everything is fp32, from inputs in the dtype that they have; a gradient in half
precision is rounded once. Only where the CPU multiplies bf16 and the batch is large enough to feel it are the products
in bf16, as torch's; the pairs (i, i) are in fp32 even then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ccu_fast import _C
from ccu_fast.ops.backend import has_bf16, without_autocast
from ccu_fast.ops.native import DTYPES
from ccu_fast.ops.small_info_nce.api import Inputs

# N² from which the library's products are faster than ours, which need no call of their own: with AVX2 and D = 512 they
# take as long at 256 items, and less at 512.
LIBRARY_PAIRS = 1 << 16


def forward(
    x: Tensor, y: Tensor, scale: Tensor, symmetric: bool, weight: float, keep: bool, cast: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """The loss and, if ``keep``, its gradients with respect to x yᵀ and to ``scale``, flat in one tensor."""
    items, dim = x.shape
    pairs = items * items
    loss = torch.empty_like(scale)
    kept = scale.new_empty((pairs + 1,))
    dot = kept.data_ptr()
    if pairs < LIBRARY_PAIRS:
        x, y = x.contiguous(), y.contiguous()
        of_x, of_y = x.data_ptr(), y.data_ptr()
    else:
        _products(x, y, cast, kept[:-1].view(items, items))
        of_x = of_y = 0
    _C.small_info_nce(
        of_x,
        of_y,
        items,
        dim,
        DTYPES[x.dtype],
        DTYPES[cast or torch.float32],
        scale.item(),
        weight,
        symmetric,
        dot,
        loss.data_ptr(),
        dot + 4 * pairs if keep else 0,
        torch.get_num_threads(),
    )
    return (loss, kept) if keep else (loss,)


def backward(
    inputs: Inputs,
    saved: Sequence[Tensor],
    grad: Tensor,
    needs: Sequence[bool],
    symmetric: bool,
    weight: float,
    cast: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, y and scale; None where none is needed."""
    x, y, scale = inputs
    kept = saved[0]
    items, dim = x.shape
    pairs = items * items
    dscale = torch.empty_like(scale) if needs[2] else None
    dx = dy = None
    if pairs < LIBRARY_PAIRS:
        x, y = x.contiguous(), y.contiguous()
        dx = torch.empty_like(x) if needs[0] else None
        dy = torch.empty_like(y) if needs[1] else None
    at = kept.data_ptr()
    factor = grad.item()
    _C.small_info_nce_backward(
        at,
        x.data_ptr(),
        y.data_ptr(),
        items,
        dim,
        DTYPES[x.dtype],
        DTYPES[cast or torch.float32],
        factor,
        0 if dx is None else dx.data_ptr(),
        0 if dy is None else dy.data_ptr(),
        at + 4 * pairs,
        0 if dscale is None else dscale.data_ptr(),
        torch.get_num_threads(),
    )
    if pairs >= LIBRARY_PAIRS:
        by_dot = kept[:-1].view(items, items)
        dx = _gradient(by_dot, y, cast, factor) if needs[0] else None
        dy = _gradient(by_dot.T, x, cast, factor) if needs[1] else None
    return dx, dy, dscale


def _in_bf16(x: Tensor, cast: torch.dtype | None) -> bool:
    """Whether the library's products are in bf16."""
    return torch.bfloat16 in (x.dtype, cast) and has_bf16()


def _products(x: Tensor, y: Tensor, cast: torch.dtype | None, out: Tensor) -> None:
    """``out = x yᵀ``."""
    bf16 = _in_bf16(x, cast)
    x, y = (t if cast is None else t.to(cast) for t in (x, y))
    with torch.no_grad(), without_autocast(x.device):
        if bf16:
            out.copy_(torch.mm(x, y.T))
        x, y = x.float(), y.float()
        if bf16:
            torch.sum(x * y, 1, out=out.diagonal())
        else:
            torch.mm(x, y.T, out=out)


def _gradient(left: Tensor, right: Tensor, cast: torch.dtype | None, factor: float) -> Tensor:
    """``left @ right * factor`` in the dtype of right."""
    rounded = right if cast is None else right.to(cast)
    with torch.no_grad(), without_autocast(right.device):
        if _in_bf16(right, cast):
            left = left if factor == 1.0 else left * factor
            return torch.mm(left.to(torch.bfloat16), rounded).to(right.dtype)
        out = torch.mm(left, rounded.float())
        return (out if factor == 1.0 else out.mul_(factor)).to(right.dtype)
