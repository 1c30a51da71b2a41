"""topk_flips as a torch operator, so that a compiled graph never breaks on it.

    ccu_fast::topk_flips    gradients, table, options → ids, delta, score, count, valid; not differentiable

What depends on values (ids in range, a finite penalty, a table that is not stale) is checked inside the operator, where
there are values also when a graph runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.ops import machine
from ccu_fast.ops.backend import load, outside_transforms
from ccu_fast.ops.operator import operator
from ccu_fast.ops.topk_flips.problem import TokenProblem, TokenResult

STALE = (
    "table: expected an embedding unchanged since the table was built, got one changed in place; call table.refresh()"
)


def version_of(embedding: Tensor) -> int:
    """Counts in-place changes; −1 where torch does not (inference tensors)."""
    return -1 if embedding.is_inference() else embedding._version


def new_result(p: TokenProblem) -> TokenResult:
    """Memory for the result, not written yet."""
    rows = p.grad.shape[0]
    return TokenResult(
        ids=p.grad.new_empty((rows, p.k), dtype=torch.int64),
        delta=p.grad.new_empty((rows, p.k), dtype=torch.float32),
        score=p.grad.new_empty((rows, p.k), dtype=torch.float64),
        count=p.grad.new_empty(rows, dtype=torch.int64),
        valid=p.grad.new_empty(rows, dtype=torch.bool),
    )


@operator(
    "topk_flips(Tensor grad, Tensor embedding, Tensor? token_ids, Tensor? packed, Tensor? coarse, float max_norm, "
    "int k, bool maximize, Tensor? current, bool exclude_current, Tensor? allowed, Tensor? penalty, bool certify, "
    "int version, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda *args: new_result(TokenProblem(*args[:-2])),
)
def _topk(*args: Any) -> TokenResult:
    *fields, version, backend = args
    p = TokenProblem(*fields)
    if version >= 0 and version_of(p.embedding) != version:
        raise ValueError(STALE)
    # Reading values of a GPU would wait for it: there an id out of range fails the kernel, as in torch's indexing.
    if p.current is not None:
        machine.check_range("current_ids", "ids", p.current, p.embedding.shape[0])
    if p.penalty is not None and machine.host_sees(p.penalty.device):
        check.finite("penalty", p.penalty)
    result: TokenResult = load("topk_flips", backend).topk(p)
    return result


def topk(p: TokenProblem, version: int, backend: str) -> TokenResult:
    """Solve ``p``, of a table made when its embedding had been changed ``version`` times."""
    outside_transforms("topk_flips", p.grad, p.embedding, p.current, p.allowed, p.penalty)
    fields = (getattr(p, name) for name in TokenProblem.__dataclass_fields__)
    call = torch.ops.ccu_fast.topk_flips if check.by_operator(p.grad) else _topk
    return TokenResult(*call(*fields, version, backend))
