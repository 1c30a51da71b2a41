"""reduce_similarity of small batches on a GPU: one launch forward, one backward and one for the gradient of scale.

The arithmetic is in :mod:`.small_batch_kernels`. Nothing is kept for the backward pass but the results.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ccu_fast.backends.problem import SimilarityProblem
from ccu_fast.backends.triton import configs, plan
from ccu_fast.backends.triton.similarity import HALF_EXPONENT
from ccu_fast.backends.triton.small_batch_kernels import small_forward_kernel, small_gradient_kernel

BLOCK_M = 16


def stash_shape(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[int, ...]:
    """Nothing is kept."""
    return (0,)


def forward(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Row results fp32 ``[R, B, N]``, column results fp32 ``[C, B, M]`` and an empty stash."""
    new = p.x.new_empty
    row_out = new((len(p.rows), p.banks, p.n), dtype=torch.float32)
    col_out = new((len(p.cols), p.banks, p.m), dtype=torch.float32)
    reduce_into(p, row_out, col_out)
    return row_out, col_out, new((0,), dtype=torch.float32)


def reduce_into(p: SimilarityProblem, row_out: Tensor, col_out: Tensor) -> None:
    """The results of rows and columns into contiguous tensors."""
    blocks = p.banks * (triton.cdiv(p.n, BLOCK_M) * bool(p.rows) + triton.cdiv(p.m, BLOCK_M) * bool(p.cols))
    with configs.on_device(p.x):
        small_forward_kernel[(blocks,)](
            *_operands(p), row_out, col_out, p.n, p.m, p.x.shape[2], p.banks, *_strides(p), **_constants(p)
        )


def backward(
    p: SimilarityProblem,
    grad_rows: Tensor,
    grad_cols: Tensor,
    row_out: Tensor,
    col_out: Tensor,
    stash: Tensor,
    needs: Sequence[bool],
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx and dy like x and y (empty where not needed), dscale and dbias 0-dim fp32."""
    want_x, want_y, want_scale, want_bias = needs
    with configs.on_device(p.x):
        dx = p.x.new_empty(p.x.shape if want_x else (0,))
        dy = p.y.new_empty(p.y.shape if want_y else (0,))
        totals = want_scale or want_bias
        row_programs = p.x.shape[0] * triton.cdiv(p.n, BLOCK_M) if want_x or totals else 0
        parts = p.x.new_empty((2, row_programs if totals else 0), dtype=torch.float32)
        programs = row_programs + (p.y.shape[0] * triton.cdiv(p.m, BLOCK_M) if want_y else 0)
        if programs:
            small_gradient_kernel[(programs,)](
                *_operands(p), grad_rows, grad_cols, row_out, col_out, dx, dy, parts,
                p.n, p.m, p.x.shape[2], p.banks, row_programs, *_strides(p), **_constants(p),
                X_SHARED=p.x.shape[0] < p.banks, Y_SHARED=p.y.shape[0] < p.banks,
                HALF=p.x.dtype == torch.float16, STORE=want_x, TOTALS=totals, EXPONENT=HALF_EXPONENT,
            )  # fmt: skip
        # Results must not share memory; a sum that nobody asked for is not made.
        dscale = parts[0].sum() if want_scale else parts.new_empty(())
        dbias = parts[1].sum() if want_bias else parts.new_empty(())
        return dx, dy, dscale, dbias


def _operands(p: SimilarityProblem) -> tuple[Tensor | None, ...]:
    return p.x, p.y, p.scale, p.bias, p.row_labels, p.col_labels, p.row_ids, p.col_ids


def _strides(p: SimilarityProblem) -> tuple[int, ...]:
    keys = (p.row_labels, p.col_labels, p.row_ids, p.col_ids)
    return (
        0 if p.x.shape[0] == 1 else p.n, 0 if p.y.shape[0] == 1 else p.m,
        *(0 if k is None or k.shape[0] == 1 else k.shape[1] for k in keys),
    )  # fmt: skip


def _constants(p: SimilarityProblem) -> dict[str, Any]:
    return constants(
        plan.spec(p, p.rows), plan.spec(p, p.cols), p.n, p.m, p.x.shape[2],
        p.bias is not None, p.row_labels is not None, p.row_ids is not None, p.diagonal,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def constants(
    rows: plan.Spec, cols: plan.Spec, n: int, m: int, d: int, bias: bool, labels: bool, ids: bool, diagonal: bool
) -> dict[str, Any]:
    """What is compiled into the kernels; not to be changed by the caller."""
    # A step of the other side is 32 KB: two fit beside each other in the shared memory of any of the GPUs.
    block_d = max(triton.next_power_of_2(d), 16)
    block_n, warps = (32, 4) if block_d <= 512 else (16, 16)
    return {
        "ROWS": rows, "COLS": cols, "HAS_BIAS": bias, "HAS_LABELS": labels, "HAS_IDS": ids, "DIAGONAL": diagonal,
        "MASK_N": n % block_n != 0, "MASK_M": m % block_n != 0, "MASK_D": d != block_d,
        "BLOCK_M": BLOCK_M, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": warps, "num_stages": 2,
        **configs.OPTIONS,
    }  # fmt: skip
