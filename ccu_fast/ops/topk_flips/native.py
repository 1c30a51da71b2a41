"""topk_flips by the compiled module: one call on a CPU (csrc/cpu/topk_flips.cpp), cuda.py on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast import _C
from ccu_fast.ops.backend import load
from ccu_fast.ops.native import DTYPES, on_gpu
from ccu_fast.ops.topk_flips import reference
from ccu_fast.ops.topk_flips.operator import new_result
from ccu_fast.ops.topk_flips.problem import TokenProblem, TokenResult

_PANEL = _C.TOKEN_PANEL
_BITS = _C.TOKEN_BITS
_PACK_ROWS = 512 * _PANEL


def pack(embedding: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """The table that the scan reads, and what the scan must know about its rounding.

    On a CPU: panels of 16 tokens, int16 ``[ceil(T / 16), ceil(D / 2), 16, 2]``, and each token's step, fp32
    ``[.., 16]``. A vector register then holds two dimensions of 16 tokens. A token's step is the power of two that
    brings its largest element to 13 bits (or fp32's smallest normal number): an element is off by at most half of it,
    and the product of a step and a sum is exact.
    """
    if on_gpu(embedding.device):
        on_device: tuple[Tensor, Tensor] = load("topk_flips", "cuda").pack(embedding, token_ids)
        return on_device
    tokens = embedding.shape[0] if token_ids is None else token_ids.shape[0]
    panels, dim = (tokens + _PANEL - 1) // _PANEL, embedding.shape[1]
    packed = torch.zeros(panels, (dim + 1) // 2, _PANEL, 2, dtype=torch.int16, device="cpu")
    steps = torch.zeros(panels, _PANEL, dtype=torch.float32, device="cpu")
    for start in range(0, tokens, _PACK_ROWS):
        part = slice(start, min(start + _PACK_ROWS, tokens))
        rows = (embedding[part] if token_ids is None else embedding[token_ids[part]]).float()
        # A little more than the largest, so that it does not round up to 2^13.
        largest = rows.abs().amax(1).double() * (1 + 2.0**-_BITS)
        exponent = torch.where(largest > 0, torch.frexp(largest).exponent - _BITS, -126).clamp(min=-126)
        step = ((exponent + 127).int() << 23).view(torch.float32)
        whole = torch.zeros(-(-len(rows) // _PANEL) * _PANEL, packed.shape[1] * 2, dtype=torch.int16, device="cpu")
        whole[: len(rows), :dim] = (rows * step.reciprocal()[:, None]).round_()
        whole = whole.unflatten(1, (-1, 2)).unflatten(0, (-1, _PANEL))
        packed[start // _PANEL :][: len(whole)].copy_(whole.transpose(1, 2))
        steps.view(-1)[part] = step
    return packed, steps


def topk(p: TokenProblem) -> TokenResult:
    """The k best tokens of every row; memory O(N · (k + D)) beyond the packed table."""
    if p.packed is None or p.coarse is None:
        raise ValueError("table: expected one built for the native backend, got one built for the reference")
    if p.packed.dtype == torch.float16:  # as pack makes it for the kernels of a GPU
        # For more flips than a block can hold, say a whole vocabulary sorted, the reference's sort is as good.
        found: TokenResult = (load("topk_flips", "cuda") if p.k <= _C.CUDA_MOST_FLIPS else reference).topk(p)
        return found
    result = new_result(p)
    _C.topk_flips(
        grad=p.grad.data_ptr(),
        rows=p.grad.shape[0],
        dim=p.grad.shape[1],
        packed=p.packed.data_ptr(),
        steps=p.coarse.data_ptr(),
        tokens=len(p.embedding if p.token_ids is None else p.token_ids),
        token_ids=0 if p.token_ids is None else p.token_ids.data_ptr(),
        max_norm=p.max_norm,
        embedding=p.embedding.data_ptr(),
        embedding_strides=p.embedding.stride(),
        embedding_dtype=DTYPES[p.embedding.dtype],
        maximize=p.maximize,
        current=0 if p.current is None else p.current.data_ptr(),
        exclude_current=p.exclude_current,
        allowed=per_row(p.allowed),
        penalty=per_row(p.penalty),
        k=p.k,
        threads=torch.get_num_threads(),
        ids=result.ids.data_ptr(),
        delta=result.delta.data_ptr(),
        score=result.score.data_ptr(),
        count=result.count.data_ptr(),
        valid=result.valid.data_ptr(),
    )
    return result


def per_row(t: Tensor | None) -> tuple[int, int]:
    """Address of a ``[1 or N, T]`` tensor, and the stride from row to row."""
    return (0, 0) if t is None else (t.data_ptr(), 0 if t.shape[0] == 1 else t.shape[1])
