"""l2_normalize in plain torch, any device and dtype; differentiable twice."""

from __future__ import annotations

import torch
from torch import Tensor


def normalize(x: Tensor, dtype: torch.dtype, eps: float) -> Tensor:
    """Unit rows of ``dtype``. Computes in fp64 for fp64 rows, in fp32 otherwise."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.nn.functional.normalize(x.to(compute), dim=-1, eps=eps).to(dtype)
