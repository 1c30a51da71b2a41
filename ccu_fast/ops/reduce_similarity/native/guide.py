"""The products of a guide or a teacher beside those of x and y."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem


class Products(NamedTuple):
    """The guide's products of one chunk and, where they are a teacher's in bf16, those of the pairs (i, i) in fp32."""

    dot: Tensor
    own: Tensor | None


class Guide:
    """The guide's features in the dtype of its GEMM, and a buffer for the products of one chunk of at most ``most``."""

    def __init__(self, x: Tensor, y: Tensor, p: SimilarityProblem, dtype: torch.dtype, most: int) -> None:
        self.x, self.y = x.to(dtype), y.to(dtype)
        self.scratch = torch.empty(most, dtype=dtype, device="cpu")
        taught = p.teacher_scale is not None and dtype == torch.bfloat16 and p.diagonal
        self.own = own_dots(x, y).expand(p.banks, -1) if taught else None

    def beside(self, dot: Tensor, banks: slice, rows: slice) -> Products:
        """The products ``dot`` of some rows of some banks with what C++ needs besides."""
        return Products(dot, None if self.own is None else self.own[banks, rows].contiguous())


def own_dots(x: Tensor, y: Tensor) -> Tensor:
    """The products of the pairs (i, i) in fp32, ``[1 or B, N]``; 0 for rows that have none."""
    pairs = min(x.shape[1], y.shape[1])
    own = (x[:, :pairs].float() * y[:, :pairs].float()).sum(-1)
    return torch.nn.functional.pad(own, (0, x.shape[1] - pairs))
