"""What the kernels of both passes are launched with: operands, sizes and constants."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem
from ccu_fast.ops.reduce_similarity.triton import configs, plan
from ccu_fast.ops.triton.launch import Descriptor, specialised_on

# fp16 gradients are stored times a power of two that brings the largest possible one below 2^14: a factor 2 under
# fp16's largest for each of rows and columns, and 2^28 above its smallest normal number.
HALF_EXPONENT = 14

# Row labels, column labels, row ids, column ids; then row limits, column limits, the guide's two sides, the scale of a
# teacher.
Keys = tuple[Tensor | None, ...]
N_KEYS = 4


class Operands:
    """x, y and the keys as the kernels want them, limits and the guide among the latter."""

    __slots__ = ("keys", "x", "y")

    def __init__(self, p: SimilarityProblem, device: configs.Device) -> None:
        # Descriptors need rows of whole 16 bytes, pointers whole steps along D: aligned loads without a mask.
        multiple = 16 // p.x.element_size() if device.tma else device.largest_step
        self.x, self.y = _padded(p.x, multiple), _padded(p.y, multiple)
        # int32 takes half the registers of int64 and one comparison.
        names = (*_names(p.row_labels, p.col_labels, signed=True), *_names(p.row_ids, p.col_ids, signed=False))
        # The guide is read through pointers.
        guide = (None if t is None else _padded(t, device.largest_step) for t in (p.guide_x, p.guide_y))
        self.keys = (*names, p.row_limits, p.col_limits, *guide, p.teacher_scale)

    def signature(self, p: SimilarityProblem, *others: Tensor) -> tuple[Hashable, ...]:
        """What the launches depend on: equal for problems that differ only in values."""
        specialised = specialised_on(self.x, self.y, p.scale, p.bias, *self.keys, *others)
        return *shapes(p, self.keys), arithmetic(p), specialised


def shapes(p: SimilarityProblem, keys: Keys) -> tuple[Hashable, ...]:
    """The sizes and the reductions of a problem with these keys."""
    return p.x.shape, p.y.shape, p.rows, p.cols, p.diagonal, *[None if key is None else key.shape for key in keys]


def arithmetic(p: SimilarityProblem) -> str:
    """Which tiles serve the problem: those of x and y, or of the guide where that is slower."""
    used = configs.arithmetic(p.x.dtype)
    if p.guide_x is None:
        return used
    return max(used, configs.arithmetic(p.guide_x.dtype), key=("half", "tf32", "ieee").index)


def strides(p: SimilarityProblem, keys: Keys) -> tuple[int, ...]:
    """Rows from one bank of x and of y to the next, and elements from one bank of each of the keys; 0 if shared."""
    of_keys = (0 if key is None or key.shape[0] == 1 else key.shape[1] for key in keys[:N_KEYS])
    return 0 if p.x.shape[0] == 1 else p.n, 0 if p.y.shape[0] == 1 else p.m, *of_keys


def limit_strides(keys: Keys) -> tuple[int | None, ...]:
    """The same of both sides' limits and, in rows, of the guide's sides; then the guide's dimension.

    None, which a kernel is compiled without, for what there is not.
    """
    of = keys[N_KEYS : N_KEYS + 4]
    of_all = (None if key is None else 0 if key.shape[0] == 1 else key.shape[1] for key in of)
    return *of_all, None if of[-1] is None else of[-1].shape[2]


class Pass:
    """What the launches of a problem have in common, made from sizes and types alone. No tensor is kept."""

    def __init__(self, p: SimilarityProblem, operands: Operands, device: configs.Device, tile: configs.Tile) -> None:
        self.arithmetic, self.tile = arithmetic(p), tile
        self.precision = "tf32" if self.arithmetic == "tf32" else "ieee"
        self.d = operands.x.shape[2]
        blocks = (self.tile.block_m, self.tile.block_k), (self.tile.block_n, self.tile.block_k)
        self.descriptors = tuple(map(Descriptor, blocks)) if device.tma else None
        self.strides = (*strides(p, operands.keys), *limit_strides(operands.keys))

    def readers(self, operands: Operands) -> tuple[Any, Any]:
        """x and y as a tile reads them: through pointers, or through descriptors."""
        if self.descriptors is None:
            return operands.x, operands.y
        return self.descriptors[0](operands.x), self.descriptors[1](operands.y)

    def constants(self, p: SimilarityProblem, items: int, rows: plan.Spec, cols: plan.Spec) -> dict[str, Any]:
        """Constants of a kernel that tells tiles near the diagonal from others; its rows are ``items`` of each bank."""
        tile, tma = self.tile, self.descriptors is not None
        found = {"ROWS": rows, "COLS": cols, "DIAGONAL": p.diagonal, "PRECISION": self.precision, "TMA": tma}
        for name, spec in (("ROWS", rows), ("COLS", cols)):
            limited = p.limited and (p.row_limits if name == "ROWS" else p.col_limits) is not None
            parts = plan.by_distance(p, spec, limited=limited)
            found |= {f"{name}_{where}": part for where, part in zip(("ALWAYS", "NEAR", "FAR"), parts, strict=True)}
        # What is beyond an edge needs no mask where there are labels: its label is negative, so it is ignored.
        edges = p.row_labels is None
        found["MASK_N"] = edges and items % tile.block_m != 0
        found["MASK_M"] = edges and p.m % tile.block_n != 0
        return {**found, "WHOLE": configs.row_stride(p.m) % tile.block_n == 0, **tile.options()}


def _padded(t: Tensor, multiple: int) -> Tensor:
    missing = -t.shape[2] % multiple
    if missing:
        return torch.nn.functional.pad(t, (0, missing))
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _names(row: Tensor | None, col: Tensor | None, *, signed: bool) -> tuple[Tensor | None, Tensor | None]:
    """Equal keys get equal names, the place of their first occurrence in sorted order; negative labels get −1."""
    if row is None or col is None:
        return None, None
    banks = max(row.shape[0], col.shape[0])
    keys = torch.cat([row.expand(banks, -1), col.expand(banks, -1)], 1)
    names = torch.searchsorted(keys.sort(dim=1).values, keys, out_int32=True)
    if signed:
        names = names.masked_fill(keys < 0, -1)
    return names[:, : row.shape[1]].contiguous(), names[:, row.shape[1] :].contiguous()
