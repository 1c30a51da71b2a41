"""InfoNCE of a paired batch as reductions: which ones, and how each of their results counts in the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast.ops.reduce_similarity.problem import encode
from ccu_fast.ops.reduce_similarity.relations import ALL, SELF

ROWS = (encode("lse", int(ALL)), encode("sum", int(SELF)))
COLS = ROWS[:1]


def weights(items: int, symmetric: bool, weight: float, device: torch.device) -> Tensor:
    """``∂loss/∂result``, fp32 ``[3N or 2N]``: of the rows' lse and positives and, if symmetric, of the columns' lse.

    Made at every call and kept for no other: a CUDA graph or another stream must not read what it has not written.
    """
    each = torch.full(((3 if symmetric else 2) * items,), weight, dtype=torch.float32, device=device)
    each[items : 2 * items].fill_(-2 * weight if symmetric else -weight)
    return each
