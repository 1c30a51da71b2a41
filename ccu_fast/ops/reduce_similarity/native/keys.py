"""Labels, ids and limits of a part of a problem in the form that C++ takes."""

from __future__ import annotations

import torch
from torch import Tensor


def strided(keys: Tensor | None, banks: slice, items: slice) -> tuple[int, int]:
    """Where a part's labels, ids or limits start, and the stride from bank to bank."""
    if keys is None:
        return 0, 0
    shared = keys.shape[0] == 1
    if shared and not items.start:  # a view costs more than a small problem's arithmetic
        return keys.data_ptr(), 0
    return (keys if shared else keys[banks])[:, items].data_ptr(), 0 if shared else keys.stride(0)


def narrow(row: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """Labels or ids in int32 that have the same equalities and signs."""
    both = torch.cat([row.flatten(), col.flatten()])
    if both.numel():
        low, high = torch.stack(both.aminmax()).tolist()
        if high > 2**31 - 1 or low < -(2**31):
            names = both.unique(return_inverse=True)[1]
            both = torch.where(both < 0, -1 - names, names)
    both = both.to(torch.int32)
    return both[: row.numel()].view(row.shape), both[row.numel() :].view(col.shape)
