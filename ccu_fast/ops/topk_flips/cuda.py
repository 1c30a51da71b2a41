"""topk_flips on a GPU: csrc/cuda/topk_describe.cu, coarse fp16 scores, csrc/cuda/topk_select.cu. The host never waits.

Up to six rows are scored by a kernel of this package, in one read of the table. It also writes the lowest score of each
group of tokens, so that the selection need not read all scores. More rows go to the library's fp16 GEMM with fp32
results: at N = 2560, V = 49408, D = 512 writing and reading the scores of a chunk at memory speed takes about as long
as that GEMM, so that fusing both would save less than a hand-written GEMM loses to the library's.

The table is centred, which moves the scores of a row by a constant, and scaled to the range of fp16. The error of the
coarse scores is bounded row by row. The bound rests on the rounding errors of the table, measured when it is packed,
and of the gradient, measured in each call, and on (D + 2) fp32 roundings of the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast import _C
from ccu_fast.ops.native import DTYPES, address, multiply, on
from ccu_fast.ops.topk_flips.native import per_row
from ccu_fast.ops.topk_flips.operator import new_result
from ccu_fast.ops.topk_flips.problem import TokenProblem, TokenResult

_CHUNK_BYTES = 256 << 20
_PACK_ROWS = 8192


def pack(embedding: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """The table in fp16, ``[T, D rounded up to 8]``, and fp64 ``[3]``: 1 / scale, a row's largest error and norm."""
    tokens = embedding.shape[0] if token_ids is None else token_ids.shape[0]
    dim = embedding.shape[1]
    parts = range(0, tokens, _PACK_ROWS)

    def rows(start: int) -> Tensor:
        part = slice(start, start + _PACK_ROWS)
        return (embedding[part] if token_ids is None else embedding[token_ids[part]]).double()

    mean = sum((rows(start).sum(0) for start in parts), torch.zeros(dim, dtype=torch.float64, device=embedding.device))
    mean = mean / tokens
    largest = torch.stack([(rows(start) - mean).abs().amax() for start in parts]).amax()
    scale = torch.ldexp(torch.ones_like(largest), 14 - torch.frexp(largest).exponent)
    packed = torch.zeros(tokens, (dim + 7) // 8 * 8, dtype=torch.float16, device=embedding.device)
    error = norm = torch.zeros_like(largest)
    for start in parts:
        exact = rows(start) - mean
        low = (exact * scale).half()
        packed[start : start + _PACK_ROWS, :dim] = low
        seen = low.double() / scale
        error = torch.maximum(error, (exact - seen).norm(dim=1).amax())
        norm = torch.maximum(norm, seen.norm(dim=1).amax())
    return packed, torch.stack([1 / scale, error, norm])


def describe(p: TokenProblem, few: bool) -> tuple[Tensor, Tensor]:
    """The operand of the scan, and fp32 ``[N, 4]`` that says how to read its scores: see ccu_cuda_topk_args."""
    assert p.coarse is not None and p.packed is not None
    padded = p.packed.shape[1]
    operand = p.grad.new_empty(p.rows, padded, dtype=torch.float32 if few else torch.float16)
    about = p.grad.new_empty(p.rows, 4)
    guard, where = on(p.grad.device)
    with guard:
        _C.topk_describe(
            grad=p.grad.data_ptr(),
            rows=p.rows,
            dim=p.grad.shape[1],
            padded=padded,
            coarse=p.coarse.data_ptr(),
            maximize=p.maximize,
            certify=p.certify,
            half=not few,
            operand=operand.data_ptr(),
            about=about.data_ptr(),
            cuda=where["cuda"],
            stream=where["stream"],
        )
    return operand, about


def topk(p: TokenProblem) -> TokenResult:
    """The k best tokens of every row, for k up to 1024."""
    assert p.packed is not None
    device, result = p.grad.device, new_result(p)
    if p.rows == 0:
        return result
    # The kernels mark the rows with too many candidates to settle at once.
    redone = torch.empty(p.rows, dtype=torch.bool, device=device)
    few = p.rows <= _C.CUDA_FEW_ROWS
    operand, about = describe(p, few)
    chunk = min(p.rows, max(1, _CHUNK_BYTES // (4 * p.tokens)))
    buffer = torch.empty(chunk, p.tokens, dtype=torch.float32, device=device)
    # The scan of few rows writes the lowest score of every group of neighbouring tokens.
    group = _C.CUDA_GROUP_STEP * -(-p.tokens // (_C.CUDA_GROUP_STEP * _C.CUDA_TOPK_GROUPS))
    # The kernels store unsigned 32-bit keys in it.
    lowest = torch.empty(chunk, -(-p.tokens // group), dtype=torch.int32, device=device) if few else None
    guard, where = on(device)
    stream = where["stream"]
    with guard:
        for first in range(0, p.rows, chunk):
            rows = min(chunk, p.rows - first)
            scores = buffer[:rows]
            if not few:
                multiply(operand[first : first + rows], p.packed.T, scores)
            _C.cuda_topk(
                table=p.packed.data_ptr() if few else 0,
                operand=operand[first:].data_ptr(),
                padded=operand.shape[1],
                lowest=address(lowest),
                group=group,
                scores=scores.data_ptr(),
                first=first,
                rows=rows,
                tokens=p.tokens,
                about=about.data_ptr(),
                grad=p.grad.data_ptr(),
                dim=p.grad.shape[1],
                token_ids=address(p.token_ids),
                embedding=p.embedding.data_ptr(),
                embedding_strides=p.embedding.stride(),
                vocabulary=p.embedding.shape[0],
                embedding_dtype=DTYPES[p.embedding.dtype],
                maximize=p.maximize,
                current=address(p.current),
                exclude_current=p.exclude_current,
                allowed=per_row(p.allowed),
                penalty=per_row(p.penalty),
                k=p.k,
                ids=result.ids.data_ptr(),
                delta=result.delta.data_ptr(),
                score=result.score.data_ptr(),
                count=result.count.data_ptr(),
                valid=result.valid.data_ptr(),
                redo=redone.data_ptr(),
                stream=stream,
            )
    return result
