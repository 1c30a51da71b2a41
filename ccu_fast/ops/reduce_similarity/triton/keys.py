"""Labels and ids as the kernels read them: int32, half the registers of int64 and one comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem


def keys(p: SimilarityProblem) -> tuple[Tensor | None, ...]:
    """Row labels, column labels, row ids, column ids."""
    return (*_names(p.row_labels, p.col_labels, signed=True), *_names(p.row_ids, p.col_ids, signed=False))


def _names(row: Tensor | None, col: Tensor | None, *, signed: bool) -> tuple[Tensor | None, Tensor | None]:
    """Equal keys get equal names, the place of their first occurrence in sorted order; negative labels get −1."""
    if row is None or col is None:
        return None, None
    banks = max(row.shape[0], col.shape[0])
    keys = torch.cat([row.expand(banks, -1), col.expand(banks, -1)], 1)
    names = torch.searchsorted(keys.sort(dim=1).values, keys, out_int32=True)
    if signed:
        names = names.masked_fill(keys < 0, -1)
    return names[:, : row.shape[1]].contiguous(), names[:, row.shape[1] :].contiguous()
