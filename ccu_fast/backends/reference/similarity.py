"""reduce_similarity in plain torch: stores S, differentiates by autograd, O(B·N·M) memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast.backends.problem import SimilarityProblem, decode
from ccu_fast.relations import relation_matrix


def reduce(p: SimilarityProblem) -> tuple[list[Tensor], list[Tensor]]:
    """All reductions of one problem: rows ``[B, N]`` each, then columns ``[B, M]`` each.

    Computes in fp64 for fp64 inputs, in fp32 otherwise.
    """
    compute = torch.float64 if p.x.dtype == torch.float64 else torch.float32
    s = p.scale.to(compute) * torch.matmul(p.x.to(compute), p.y.to(compute).mT)
    if p.bias is not None:
        s = s + p.bias.to(compute)
    relation = relation_matrix(
        p.row_labels, p.col_labels, p.row_ids, p.col_ids, diagonal=p.diagonal, n=p.n, m=p.m, device=p.x.device
    )
    return (
        [_reduce(s, relation, code, dim=-1) for code in p.rows],
        [_reduce(s, relation, code, dim=-2) for code in p.cols],
    )


def _reduce(s: Tensor, relation: Tensor, code: int, dim: int) -> Tensor:
    kind, relations = decode(code)
    chosen = (relation & relations) != 0
    if kind == "sum":
        return torch.where(chosen, s, 0).sum(dim)
    if kind == "softplus":
        # Not torch's softplus: it is linear above 20 and loses 2e-9 there.
        return torch.where(chosen, -torch.nn.functional.logsigmoid(-s), 0).sum(dim)
    if s.shape[dim] == 0:
        return s.sum(dim) - torch.inf
    masked = torch.where(chosen, s, -torch.inf)
    peak = masked.detach().amax(dim, keepdim=True)
    empty = peak == -torch.inf
    total = torch.exp(masked - torch.where(empty, 0, peak)).sum(dim, keepdim=True)
    # An empty set is −inf with zero gradient: its log must not see the zero.
    lse = torch.where(empty, -torch.inf, torch.log(torch.where(empty, 1, total)) + peak)
    return lse.squeeze(dim)
