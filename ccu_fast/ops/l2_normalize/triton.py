"""l2_normalize on a GPU: one kernel forward, one backward.

Forward ``out = x · inverse``, ``inverse = 1 / max(|x|, eps)``; backward ``dx = (g − (u·g) u) · inverse`` with
``u = x · inverse``, and ``g / eps`` where ``|x| < eps``. Everything in fp32, rounded once.

Bytes bound: one read and one write of ``[R, D]``, backward two reads and one write; the second walk over a row finds it
in the L1 cache. A program owns ROWS whole rows, so that there is nothing to merge and rows of any length fit.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton functions are a language of their own: typed when they are compiled.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ccu_fast.ops.reduce_similarity.triton.configs import on_device
from ccu_fast.ops.triton.launch import OPTIONS

ROWS = 4
WIDEST = 1024  # columns a program holds at a time: 32 values for each of its 128 threads
WARPS = 4


@triton.jit
def _tile(start, at, inside, D, BLOCK: tl.constexpr):
    """Offsets and mask of the columns [start, start + BLOCK) of a program's rows."""
    k = start + tl.arange(0, BLOCK)
    return at[:, None] + k[None, :], inside[:, None] & (k < D)[None, :]


@triton.jit
def normalize_kernel(x, out, inverse_out, rows, D, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``out`` [rows, D] in its own dtype, ``inverse_out`` fp32 [rows]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, BLOCK):
        offsets, mask = _tile(start, row * D, inside, D, BLOCK)
        v = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        squares += tl.sum(v * v, 1)
    norm = tl.sqrt_rn(squares)
    inverse = tl.div_rn(1.0, tl.where(norm < eps, eps, norm))  # NaN stays NaN
    tl.store(inverse_out + row, inverse, mask=inside)
    for start in range(0, D, BLOCK):
        offsets, mask = _tile(start, row * D, inside, D, BLOCK)
        v = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + offsets, (v * inverse[:, None]).to(out.dtype.element_ty), mask=mask)


@triton.jit
def normalize_backward_kernel(grad, x, inverse_in, dx, rows, D, most, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """``dx`` [rows, D] in the dtype of x; ``most`` is 1 / eps, the inverse of a row that was too short."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    inverse = tl.load(inverse_in + row, mask=inside, other=0.0)
    along = tl.zeros((ROWS,), tl.float32)
    for start in range(0, D, BLOCK):
        offsets, mask = _tile(start, row * D, inside, D, BLOCK)
        v = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        along += tl.sum(v * g, 1)
    toward = tl.where(inverse < most, along * inverse * inverse, 0.0)
    for start in range(0, D, BLOCK):
        offsets, mask = _tile(start, row * D, inside, D, BLOCK)
        v = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + offsets, ((g - toward[:, None] * v) * inverse[:, None]).to(dx.dtype.element_ty), mask=mask)


def forward(x: Tensor, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    """Unit rows ``[R, D]`` of ``dtype``, and the inverse norms fp32 ``[R]``."""
    out = torch.empty_like(x, dtype=dtype)
    inverse = x.new_empty(x.shape[0], dtype=torch.float32)
    if not x.numel():
        return out, inverse.fill_(1 / eps)
    _launch(normalize_kernel, x, x, out, inverse, *x.shape, eps)
    return out, inverse


def backward(grad: Tensor, x: Tensor, inverse: Tensor, eps: float) -> Tensor:
    """The gradient of ``x``, in its dtype."""
    dx = torch.empty_like(x)
    if x.numel():
        _launch(normalize_backward_kernel, x, grad, x, inverse, dx, *x.shape, 1 / eps)
    return dx


def _launch(kernel: Any, x: Tensor, *arguments: Any) -> None:
    block = min(triton.next_power_of_2(x.shape[1]), WIDEST)
    with on_device(x):
        kernel[(triton.cdiv(x.shape[0], ROWS),)](*arguments, ROWS=ROWS, BLOCK=block, num_warps=WARPS, **OPTIONS)
