"""topk_flips in plain torch and float64: the definition of the order.

A GEMM adds in an order that depends on where a column lies, so two equal rows of the embedding could get scores that
differ in the last bit. The GEMM therefore only nominates: whatever lies within its error bound of the k-th place is
scored again by one sum in one order, and a stable sort of those scores is the answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast.ops.topk_flips.problem import TokenProblem, TokenResult

_CHUNK_BYTES = 256 << 20
_UNIT = 2.0**-53


def topk(p: TokenProblem) -> TokenResult:
    """The k best tokens of every row; O(chunk · T) memory."""
    size = (p.rows, p.k)
    result = TokenResult(
        ids=p.grad.new_full(size, -1, dtype=torch.int64),
        delta=p.grad.new_full(size, torch.nan, dtype=torch.float32),
        score=p.grad.new_full(size, torch.inf, dtype=torch.float64),
        count=p.grad.new_zeros(p.rows, dtype=torch.int64),
        valid=torch.isfinite(p.grad).all(1),
    )
    table = p.embedding if p.token_ids is None else p.embedding[p.token_ids]
    table = table.double()
    rows = max(1, _CHUNK_BYTES // (8 * max(p.tokens, 1)))
    for start in range(0, p.rows, rows):
        _chunk(p, table, slice(start, min(start + rows, p.rows)), result)
    return result


def _chunk(p: TokenProblem, table: Tensor, part: slice, result: TokenResult) -> None:
    valid = result.valid[part]
    grad = torch.where(valid[:, None], p.grad[part], 0).double()
    sign = -1.0 if p.maximize else 1.0
    penalty = _rows(p.penalty, part)
    current = None if p.current is None else p.current[part]

    nominated = sign * (grad @ table.T)
    if penalty is not None:
        # On a GPU it was not checked: a value that is not finite forbids its token, as in the kernels.
        usable = torch.isfinite(penalty)
        penalty = torch.where(usable, penalty, 0)
        nominated = torch.where(usable, nominated + penalty, torch.inf)
    nominated[~valid] = torch.inf
    allowed = _rows(p.allowed, part)
    if allowed is not None:
        nominated.masked_fill_(~allowed, torch.inf)
    if current is not None and p.exclude_current:
        ids = p.token_ids if p.token_ids is not None else torch.arange(p.tokens, device=grad.device)
        nominated.masked_fill_(ids == current[:, None], torch.inf)

    kth = nominated.topk(p.k, largest=False).values[:, -1]
    largest = 0.0 if penalty is None else penalty.abs().amax(1).double()
    error = 2 * _UNIT * ((p.grad.shape[1] + 2) * grad.norm(dim=1) * p.max_norm + largest)
    near = (nominated <= (kth + 2 * error)[:, None]) & (nominated < torch.inf)
    row, token = near.nonzero(as_tuple=True)
    dot = _dots(table, token, grad, row)
    score = sign * dot
    if penalty is not None:
        score += penalty.expand(grad.shape[0], -1)[row, token]

    order = score.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    row, token, dot, score = row[order], token[order], dot[order], score[order]
    found = torch.bincount(row, minlength=grad.shape[0])
    rank = torch.arange(row.shape[0], device=row.device) - (found.cumsum(0) - found)[row]
    first = rank < p.k
    row, token, dot, score, rank = row[first], token[first], dot[first], score[first], rank[first]

    everyone = torch.arange(grad.shape[0], device=grad.device)
    own = torch.zeros_like(kth) if current is None else _dots(p.embedding, current, grad, everyone)
    result.ids[part][row, rank] = token if p.token_ids is None else p.token_ids[token]
    result.delta[part][row, rank] = (dot - own[row]).float()
    result.score[part][row, rank] = score - sign * own[row]
    result.count[part] = found.clamp(max=p.k)


def _rows(t: Tensor | None, part: slice) -> Tensor | None:
    return t if t is None or t.shape[0] == 1 else t[part]


def _dots(table: Tensor, token: Tensor, grad: Tensor, row: Tensor) -> Tensor:
    """table[token] · grad[row], every pair by the same sum."""
    step = max(1, _CHUNK_BYTES // (16 * table.shape[1]))
    parts = [
        (table[token[i : i + step]].double() * grad[row[i : i + step]]).sum(-1) for i in range(0, len(token), step)
    ]
    return torch.cat(parts) if parts else grad.new_zeros(0)
