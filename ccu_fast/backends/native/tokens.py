"""topk_flips on a CPU: one C++ call; the table is packed once. See csrc/cpu/topk_flips.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast import _C
from ccu_fast.backends.token_problem import TokenProblem, TokenResult

_PANEL = _C.TOKEN_PANEL
_DTYPES = {torch.float32: _C.F32, torch.float16: _C.F16, torch.bfloat16: _C.BF16}
_PACK_ROWS = 4096 * _PANEL


def pack(embedding: Tensor, token_ids: Tensor | None) -> Tensor:
    """Panels of 16 tokens, ``[ceil(T / 16), D, 16]`` fp32: a vector register holds one dimension of 16 tokens."""
    tokens = embedding.shape[0] if token_ids is None else token_ids.shape[0]
    dim = embedding.shape[1]
    packed = torch.empty((tokens + _PANEL - 1) // _PANEL, dim, _PANEL, dtype=torch.float32, device="cpu")
    for start in range(0, tokens, _PACK_ROWS):
        part = slice(start, min(start + _PACK_ROWS, tokens))
        rows = embedding[part] if token_ids is None else embedding[token_ids[part]]
        whole = rows.shape[0] // _PANEL
        panels = packed[start // _PANEL :]
        panels[:whole].copy_(rows[: whole * _PANEL].unflatten(0, (whole, _PANEL)).mT)
        if rest := rows.shape[0] - whole * _PANEL:
            panels[whole].zero_()
            panels[whole, :, :rest].copy_(rows[whole * _PANEL :].T)
    return packed


def topk(p: TokenProblem) -> TokenResult:
    """The k best tokens of every row; memory O(N · (k + D)) beyond the packed table."""
    if p.packed is None:
        raise ValueError("table: expected one built for the native backend, got one built for the reference")
    size = (p.rows, p.k)
    result = TokenResult(
        ids=torch.empty(size, dtype=torch.int64, device="cpu"),
        delta=torch.empty(size, dtype=torch.float32, device="cpu"),
        score=torch.empty(size, dtype=torch.float64, device="cpu"),
        count=torch.empty(p.rows, dtype=torch.int64, device="cpu"),
        valid=torch.empty(p.rows, dtype=torch.bool, device="cpu"),
    )
    _C.topk_flips(
        grad=p.grad.data_ptr(),
        rows=p.rows,
        dim=p.grad.shape[1],
        packed=p.packed.data_ptr(),
        tokens=p.tokens,
        token_ids=_address(p.token_ids),
        max_norm=p.max_norm,
        embedding=p.embedding.data_ptr(),
        embedding_strides=p.embedding.stride(),
        embedding_dtype=_DTYPES[p.embedding.dtype],
        maximize=p.maximize,
        current=_address(p.current),
        exclude_current=p.exclude_current,
        certify=p.certify,
        allowed=_per_row(p.allowed),
        penalty=_per_row(p.penalty),
        k=p.k,
        threads=torch.get_num_threads(),
        ids=result.ids.data_ptr(),
        delta=result.delta.data_ptr(),
        score=result.score.data_ptr(),
        count=result.count.data_ptr(),
        valid=result.valid.data_ptr(),
    )
    return result


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _per_row(t: Tensor | None) -> tuple[int, int]:
    """Address of a ``[1 or N, T]`` tensor, and the stride from row to row."""
    return (0, 0) if t is None else (t.data_ptr(), 0 if t.shape[0] == 1 else t.shape[1])
