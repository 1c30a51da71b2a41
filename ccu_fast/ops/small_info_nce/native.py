"""InfoNCE of a small batch on a CPU: one product, one call into C++, two products; see api.py.

The forward pass turns the logits into their gradient in place, which takes N² · 4 bytes until the backward pass. The
backward pass only multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ccu_fast import _C
from ccu_fast.ops.reduce_similarity.native.chunks import FP32, SERIAL_PAIRS, UNLABELLED, reductions
from ccu_fast.ops.small_info_nce.api import COLS, ROWS, Inputs


def forward(x: Tensor, y: Tensor, scale: Tensor, symmetric: bool, weight: float, keep: bool) -> tuple[Tensor, ...]:
    """The loss and, if ``keep``, its gradients with respect to ``scale`` and to x yᵀ ``[N, N]``."""
    items = x.shape[0]
    dot = torch.mm(x, y.T)
    tile = _C.Tile(
        dot=(dot.data_ptr(), _C.F32),
        self_dot=0,
        shape=(1, items, items),
        row0=0,
        scale=float(scale),
        bias=0.0,
        relations=UNLABELLED[True],
        reductions=reductions(ROWS, COLS if symmetric else ()),
        threads=torch.get_num_threads() if items * items > SERIAL_PAIRS else 1,
    )
    loss = torch.empty((), **FP32)
    if not keep:
        _C.small_info_nce(tile=tile, weight=weight, loss=loss.data_ptr(), scale_grad=0)
        return (loss,)
    by_scale = torch.empty((), **FP32)
    _C.small_info_nce(tile=tile, weight=weight, loss=loss.data_ptr(), scale_grad=by_scale.data_ptr())
    return loss, by_scale, dot


def backward(
    inputs: Inputs, saved: Sequence[Tensor], grad: Tensor, needs: Sequence[bool], symmetric: bool, weight: float
) -> tuple[Tensor | None, ...]:
    """The gradients of x, y and scale; None where none is needed."""
    x, y, _ = inputs
    by_scale, by_dot = saved
    factor = float(grad)

    def product(left: Tensor, right: Tensor) -> Tensor:
        out = torch.mm(left, right)
        return out if factor == 1.0 else out.mul_(factor)

    return (
        product(by_dot, y) if needs[0] else None,
        product(by_dot.T, x) if needs[1] else None,
        by_scale * factor if needs[2] else None,
    )
