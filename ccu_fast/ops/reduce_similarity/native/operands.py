"""A similarity problem as the GEMMs and the C++ side want it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ccu_fast import _C
from ccu_fast.ops.backend import fp32_precision
from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem

# Below this many pairs another thread costs more than it does.
_SERIAL_PAIRS = 1 << 14
# Said of every buffer whose address C++ gets: the process may have other defaults.
FP32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def gemm_dtype(p: SimilarityProblem) -> torch.dtype:
    """What the GEMMs multiply: bf16 when the inputs' dtype or the matmul precision says so and the CPU has it."""
    wanted = p.x.dtype == torch.bfloat16 or (p.x.dtype == torch.float32 and fp32_precision("cpu") == "medium")
    return torch.bfloat16 if wanted and has_bf16() else torch.float32


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def threads_for(pairs: int) -> int:
    """How many threads may share that many pairs."""
    return torch.get_num_threads() if pairs > _SERIAL_PAIRS else 1


class Operands:
    """x and y in the dtype of the GEMMs, int32 keys, host numbers."""

    def __init__(self, p: SimilarityProblem, dtype: torch.dtype) -> None:
        self.p, self.dtype = p, dtype
        self.self_dot: Tensor | None = None
        if dtype == torch.bfloat16 and p.diagonal:
            pairs = min(p.n, p.m)
            own = (p.x[:, :pairs].float() * p.y[:, :pairs].float()).sum(-1)
            self.self_dot = torch.nn.functional.pad(own, (0, p.n - pairs)).expand(p.banks, -1)
        self.scale = float(p.scale)
        self.bias = 0.0 if p.bias is None else float(p.bias)
        self.row_labels, self.col_labels = _narrow(p.row_labels, p.col_labels)
        self.row_ids, self.col_ids = _narrow(p.row_ids, p.col_ids)

    @cached_property
    def x(self) -> Tensor:
        return self.p.x.to(self.dtype)

    @cached_property
    def y(self) -> Tensor:
        return self.p.y.to(self.dtype)

    def tile(
        self,
        dot: Tensor,
        banks: slice,
        rows: slice,
        cols: slice = slice(0, None),
        codes: tuple[int, ...] | None = None,
    ) -> Any:
        """What C++ has to know about a part of S whose products are ``dot``, ``[banks, rows, cols]``.

        Args:
            codes: reductions of rows. Default: all that the problem asks for, of rows and of columns.
        """
        # Held by self until the next tile: C++ reads it through an address.
        self.own = None if self.self_dot is None else self.self_dot[banks, rows].contiguous()
        return _C.Tile(
            dot.data_ptr(), _C.BF16 if dot.dtype == torch.bfloat16 else _C.F32,
            0 if self.own is None else self.own.data_ptr(),
            # Row i and column j of the part are the same item if row0 + i == j.
            *dot.shape, rows.start - cols.start, self.scale, self.bias,
            _address(self.row_labels, banks, rows), _address(self.col_labels, banks, cols),
            _address(self.row_ids, banks, rows), _address(self.col_ids, banks, cols),
            self.p.diagonal,
            list(self.p.rows if codes is None else codes), list(self.p.cols if codes is None else ()),
            threads_for(self.p.banks * self.p.n * self.p.m),
        )  # fmt: skip


def of_banks(t: Tensor, banks: slice) -> Tensor:
    """The part of some banks; the whole where one serves all."""
    return t if t.shape[0] == 1 else t[banks]


def _address(keys: Tensor | None, banks: slice, items: slice) -> tuple[int, int]:
    """Where a part's labels or ids start, and the stride from bank to bank."""
    if keys is None:
        return 0, 0
    return of_banks(keys, banks)[:, items].data_ptr(), 0 if keys.shape[0] == 1 else keys.stride(0)


def _narrow(row: Tensor | None, col: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The same equalities and signs in int32."""
    if row is None or col is None:
        return None, None
    both = torch.cat([row.flatten(), col.flatten()])
    if both.numel() and (both.max() > 2**31 - 1 or both.min() < -(2**31)):
        names = both.unique(return_inverse=True)[1]
        both = torch.where(both < 0, -1 - names, names)
    both = both.to(torch.int32)
    return both[: row.numel()].view(row.shape), both[row.numel() :].view(col.shape)
