"""l2_normalize by one call of the compiled module, see csrc/cpu/l2_normalize.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast import _C
from ccu_fast.ops.native import DTYPES, address

# With fewer elements than this, another thread costs more than it saves.
_SERIAL = 1 << 16


def forward(x: Tensor, dtype: torch.dtype, eps: float) -> tuple[Tensor, Tensor]:
    """Unit rows ``[R, D]`` of ``dtype``, and the inverse norms fp32 ``[R]``."""
    out = torch.empty(x.shape, dtype=dtype, device="cpu")
    inverse = torch.empty(x.shape[0], dtype=torch.float32, device="cpu")
    if not x.numel():
        return out, inverse.fill_(1 / eps)
    _call(x, None, out, dtype, inverse, eps)
    return out, inverse


def backward(grad: Tensor, x: Tensor, inverse: Tensor, eps: float) -> Tensor:
    """The gradient of ``x``, in its dtype."""
    out = torch.empty_like(x)
    if x.numel():
        _call(x, grad, out, grad.dtype, inverse, eps)
    return out


def _call(x: Tensor, grad: Tensor | None, out: Tensor, dtype: torch.dtype, inverse: Tensor, eps: float) -> None:
    _C.l2_normalize(
        x=x.data_ptr(),
        dtype=DTYPES[x.dtype],
        rows=x.shape[0],
        dim=x.shape[1],
        eps=eps,
        grad=address(grad),
        out=out.data_ptr(),
        other_dtype=DTYPES[dtype],
        inverse=inverse.data_ptr(),
        threads=torch.get_num_threads() if x.numel() > _SERIAL else 1,
    )
