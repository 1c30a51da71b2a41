"""reduce_similarity in plain torch: stores S, differentiates by autograd, O(B·N·M) memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ccu_fast.ops.l2_normalize.api import EPS
from ccu_fast.ops.reduce_similarity.problem import Gradients, Incoming, SimilarityProblem, decode
from ccu_fast.ops.reduce_similarity.relations import limited_relations


def reduce(p: SimilarityProblem) -> tuple[list[Tensor], list[Tensor]]:
    """All reductions of one problem: rows ``[B, N]`` each, then columns ``[B, M]`` each.

    Computes in fp64 for fp64 inputs, in fp32 otherwise.
    """
    if p.prefixes:
        sides = zip(*(reduce(of_prefix(p, k)) for k in range(len(p.prefixes))), strict=True)
        rows, cols = ([torch.cat(results) for results in zip(*side, strict=True)] for side in sides)
        return rows, cols
    compute = torch.float64 if p.x.dtype == torch.float64 else torch.float32
    dots = torch.matmul(p.x.to(compute), p.y.to(compute).mT)
    s = p.scale.to(compute) * dots
    if p.bias is not None:
        s = s + p.bias.to(compute)
    of_rows, of_cols = limited_relations(p, dots)
    by_row, by_col = _probabilities(p, compute)
    return (
        [_reduce(s, of_rows, code, by_row, dim=-1) for code in p.rows],
        [_reduce(s, of_cols, code, by_col, dim=-2) for code in p.cols],
    )


def of_prefix(p: SimilarityProblem, k: int) -> SimilarityProblem:
    """The problem that one prefix is."""
    compute = torch.float64 if p.x.dtype == torch.float64 else torch.float32
    x, y = (t[..., : p.prefixes[k]] for t in (p.x, p.y))
    if p.unit:
        x, y = (torch.nn.functional.normalize(t.to(compute), dim=-1, eps=EPS) for t in (x, y))
    banks = slice(k * p.banks, (k + 1) * p.banks)
    row, col = (None if t is None else t if t.shape[0] == 1 else t[banks] for t in (p.row_limits, p.col_limits))
    return replace(p, x=x, y=y, row_limits=row, col_limits=col, prefixes=(), unit=False)


def own_pairs(p: SimilarityProblem) -> tuple[list[Tensor], list[Tensor]]:
    """The results where every reduction is the sum over the pairs (i, i), without S: ``[B, N]`` and ``[B, M]``."""
    compute = torch.float64 if p.x.dtype == torch.float64 else torch.float32
    own = p.scale.to(compute) * (p.x.to(compute) * p.y.to(compute)).sum(-1)
    if p.bias is not None:
        own = own + p.bias.to(compute)
    if p.row_labels is not None and p.col_labels is not None:
        own = torch.where((p.row_labels < 0) | (p.col_labels < 0), 0, own)
    return [own.clone() for _ in p.rows], [own.clone() for _ in p.cols]


def _probabilities(p: SimilarityProblem, compute: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """The teacher's softmax along rows and along columns, ``[1 or B, N, M]``; None for what is not asked for.

    Pairs that take no part have any value.
    """
    if p.teacher_scale is None or p.guide_x is None or p.guide_y is None:
        return None, None
    t = p.teacher_scale.to(compute) * torch.matmul(p.guide_x.to(compute), p.guide_y.to(compute).mT)
    return (
        None if p.row_limits is None else torch.exp(t - p.row_limits[:, :, None]),
        None if p.col_limits is None else torch.exp(t - p.col_limits[:, None, :]),
    )


def _reduce(s: Tensor, relation: Tensor, code: int, taught: Tensor | None, dim: int) -> Tensor:
    kind, relations = decode(code)
    chosen = (relation & relations) != 0
    if taught is not None and kind == "mass":
        return torch.where(chosen, taught, 0).expand_as(s).sum(dim)
    if taught is not None and kind == "expected":
        # Where nothing is chosen the probability may be inf, and its product with a gradient of 0 would be NaN.
        return (torch.where(chosen, taught, 0) * torch.where(chosen, s, 0)).sum(dim)
    if kind == "count":
        return chosen.expand_as(s).sum(dim).to(s.dtype)
    if kind == "sum":
        return torch.where(chosen, s, 0).sum(dim)
    if kind == "softplus":
        # Not torch's softplus: it is linear above 20 and loses 2e-9 there.
        return torch.where(chosen, -torch.nn.functional.logsigmoid(-s), 0).sum(dim)
    if kind == "logsigmoid":
        return torch.where(chosen, torch.nn.functional.logsigmoid(s), 0).sum(dim)
    if s.shape[dim] == 0:
        return s.sum(dim) - torch.inf
    masked = torch.where(chosen, s, -torch.inf)
    peak = masked.detach().amax(dim, keepdim=True)
    empty = peak == -torch.inf
    total = torch.exp(masked - torch.where(empty, 0, peak)).sum(dim, keepdim=True)
    # An empty set is −inf with zero gradient: its log must not see the zero.
    lse = torch.where(empty, -torch.inf, torch.log(torch.where(empty, 1, total)) + peak)
    return lse.squeeze(dim)


def forward(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What the fused backends' ``forward`` gives: results ``[R, B, N]`` and ``[C, B, M]``, no stash."""
    with torch.no_grad():
        rows, cols = reduce(p)
    return _stack(rows, p, p.n), _stack(cols, p, p.m), p.x.new_empty((0,))


def backward(
    p: SimilarityProblem, incoming: Incoming, stash: Tensor, needs: Sequence[bool], workspace: int
) -> Gradients:
    """What the fused backends' ``backward`` gives: E is relative to the results in ``incoming``."""
    grad_rows, grad_cols, row_out, col_out = incoming
    bias = torch.zeros_like(p.scale) if p.bias is None else p.bias
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (p.x, p.y, p.scale, bias)]
        x, y, scale, bias = leaves
        rows, cols = reduce(replace(p, x=x, y=y, scale=scale, bias=bias))
    pairs = [
        (own, _relative(code, own, shift, grad))
        for codes, results, shifts, wanted in ((p.rows, rows, row_out, grad_rows), (p.cols, cols, col_out, grad_cols))
        for code, own, shift, grad in zip(codes, results, shifts, wanted, strict=True)
        if own.requires_grad  # a count does not
    ]
    outputs, grads = zip(*pairs, strict=True)
    dx, dy, dscale, dbias = torch.autograd.grad(outputs, leaves, grads)
    empty = x.new_empty((0,))
    return dx if needs[0] else empty, dy if needs[1] else empty, dscale, dbias


def differentiable_backward(p: SimilarityProblem, grad_rows: Tensor, grad_cols: Tensor) -> tuple[Tensor, ...]:
    """dx, dy, dscale and dbias for gradients ``[R, B, N]`` and ``[C, B, M]``, all of which can be differentiated."""
    bias = torch.zeros_like(p.scale) if p.bias is None else p.bias
    with torch.enable_grad():
        inputs = [t if t.requires_grad else t.detach().requires_grad_() for t in (p.x, p.y, p.scale, bias)]
        x, y, scale, bias = inputs
        rows, cols = reduce(replace(p, x=x, y=y, scale=scale, bias=bias).without_ignored())
        pairs = zip([*rows, *cols], [*grad_rows, *grad_cols], strict=True)
        outputs, grads = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
        return torch.autograd.grad(outputs, inputs, grads, create_graph=True)


def _stack(results: list[Tensor], p: SimilarityProblem, items: int) -> Tensor:
    return torch.stack(results) if results else p.scale.new_empty((0, p.sets, items))


def _relative(code: int, own: Tensor, shift: Tensor, grad: Tensor) -> Tensor:
    """The gradient of ``own``, a log-sum-exp over a part of what ``shift`` is over."""
    if decode(code)[0] != "lse":
        return grad
    own = own.detach()
    return grad * torch.where(own == -torch.inf, 0, torch.exp(own - shift))
