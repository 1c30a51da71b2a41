"""Matrix products of the library that the kernels continue from: fp32 sums and results for operands of any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast.ops.backend import fp32_sums


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out = a @ b`` in fp32; fp16 and bf16 operands are read as they are on a GPU."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if not a.is_cuda:
        return torch.mm(a.float(), b.float(), out=out)
    with fp32_sums():
        return torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
