"""reduce_similarity of small batches on a GPU: one launch forward, one backward and one for the gradient of scale.

The arithmetic is in :mod:`.small_kernels`. Nothing is kept for the backward pass but the results. Problems with a guide
are not served here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ccu_fast.ops.reduce_similarity.problem import Gradients, Incoming, SimilarityProblem
from ccu_fast.ops.reduce_similarity.triton import configs, plan
from ccu_fast.ops.reduce_similarity.triton.arguments import HALF_EXPONENT, Keys, limit_strides, shapes, strides
from ccu_fast.ops.reduce_similarity.triton.small_kernels import small_forward_kernel, small_gradient_kernel
from ccu_fast.ops.triton.launch import Launch, specialised_on

BLOCK_M = 16


def stash_shape(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[int, ...]:
    """Nothing is kept."""
    return (0,)


def forward(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Row results fp32 ``[R, B, N]``, column results fp32 ``[C, B, M]`` and an empty stash."""
    new = p.x.new_empty
    row_out = new((len(p.rows), p.banks, p.n), dtype=torch.float32)
    col_out = new((len(p.cols), p.banks, p.m), dtype=torch.float32)
    with configs.on_device(p.x):
        device = configs.device()
        operands = _operands(p)
        signature = ("small forward", *shapes(p, _keys(p)), specialised_on(*operands, row_out, col_out, *_limits(p)))
        launch = device.plans.get(signature) or device.keep(signature, forward_launch(p, device))
        launch(*operands, row_out, col_out, *_limits(p))
    return row_out, col_out, new((0,), dtype=torch.float32)


def forward_launch(p: SimilarityProblem, device: configs.Device) -> Launch:
    """The launch for problems like p: of x, y, scale, bias, the keys, the row and column results, and any limits."""
    blocks = p.banks * (triton.cdiv(p.n, BLOCK_M) * bool(p.rows) + triton.cdiv(p.m, BLOCK_M) * bool(p.cols))
    numbers = (p.n, p.m, p.x.shape[2], p.banks, *_strides(p))
    return Launch(small_forward_kernel, blocks, (*_no_limits(p), *numbers), index=device.index, **_constants(p))


def backward(
    p: SimilarityProblem, incoming: Incoming, stash: Tensor, needs: Sequence[bool], workspace: int
) -> Gradients:
    """dx and dy like x and y (empty where not needed), dscale and dbias 0-dim fp32."""
    with configs.on_device(p.x):
        device = configs.device()
        operands = (*_operands(p), *incoming)
        signature = ("small backward", tuple(needs), *shapes(p, _keys(p)), specialised_on(*operands, *_limits(p)))
        made = device.plans.get(signature) or device.keep(signature, Backward(p, needs, device))
        dx, dy, dscale, dbias = made(p.x, p.y, operands, _limits(p))
        # Results must not share memory.
        return (
            p.x.new_empty((0,)) if dx is None else dx,
            p.y.new_empty((0,)) if dy is None else dy,
            p.scale.new_empty(()) if dscale is None else dscale,
            p.scale.new_empty(()) if dbias is None else dbias,
        )


class Backward:
    """The launch of a backward pass and the results it needs."""

    def __init__(self, p: SimilarityProblem, needs: Sequence[bool], device: configs.Device) -> None:
        want_x, want_y, self.want_scale, self.want_bias = needs
        self.want_x, self.want_y = want_x, want_y
        totals = self.want_scale or self.want_bias
        row_programs = p.x.shape[0] * triton.cdiv(p.n, BLOCK_M) if want_x or totals else 0
        self.parts = (2, row_programs if totals else 0)
        programs = row_programs + (p.y.shape[0] * triton.cdiv(p.m, BLOCK_M) if want_y else 0)
        self.launch = None
        if programs:
            numbers = (*_no_limits(p), p.n, p.m, p.x.shape[2], p.banks, row_programs, *_strides(p))
            constants = _constants(p) | {"X_SHARED": p.x.shape[0] < p.banks, "Y_SHARED": p.y.shape[0] < p.banks}
            constants |= {"STORE": want_x, "TOTALS": totals}
            constants["EXPONENT"] = HALF_EXPONENT if p.x.dtype == torch.float16 else None
            self.launch = Launch(small_gradient_kernel, programs, numbers, index=device.index, **constants)

    def __call__(self, x: Tensor, y: Tensor, operands: Keys, limits: Keys = ()) -> tuple[Tensor | None, ...]:
        """dx like x, dy like y, dscale and dbias; None where not wanted.

        ``operands`` are the kernel's tensors before the results, ``limits`` those after them.
        """
        dx = torch.empty_like(x) if self.want_x else None
        dy = torch.empty_like(y) if self.want_y else None
        parts = x.new_empty(self.parts, dtype=torch.float32)
        if self.launch is not None:
            # Nothing is written where nothing is wanted.
            self.launch(*operands, x if dx is None else dx, y if dy is None else dy, parts, *limits)
        return dx, dy, parts[0].sum() if self.want_scale else None, parts[1].sum() if self.want_bias else None


def _keys(p: SimilarityProblem) -> Keys:
    return p.row_labels, p.col_labels, p.row_ids, p.col_ids


def _limits(p: SimilarityProblem) -> Keys:
    """Both sides' limits; nothing where neither has any."""
    return (p.row_limits, p.col_limits) if p.limited else ()


def _no_limits(p: SimilarityProblem) -> tuple[None, ...]:
    """What the kernels are compiled with in their place."""
    return () if p.limited else (None, None)


def _strides(p: SimilarityProblem) -> tuple[int | None, ...]:
    return *strides(p, _keys(p)), *limit_strides((*_keys(p), p.row_limits, p.col_limits, None))[:2]


def _operands(p: SimilarityProblem) -> tuple[Tensor | None, ...]:
    return p.x, p.y, p.scale, p.bias, *_keys(p)


def _constants(p: SimilarityProblem) -> dict[str, Any]:
    """What is compiled into both kernels."""
    d = p.x.shape[2]
    # A step of the other side is 32 KB: two fit beside each other in the shared memory of any of the GPUs.
    block_d = max(triton.next_power_of_2(d), 16)
    block_n, warps = (32, 4) if block_d <= 512 else (16, 16)
    constants = {"ROWS": plan.spec(p, p.rows), "COLS": plan.spec(p, p.cols), "DIAGONAL": p.diagonal}
    constants |= {"MASK_N": p.n % block_n != 0, "MASK_M": p.m % block_n != 0, "MASK_D": d != block_d}
    constants |= {"BLOCK_M": BLOCK_M, "BLOCK_N": block_n, "BLOCK_D": block_d}
    return constants | {"num_warps": warps, "num_stages": 2}
