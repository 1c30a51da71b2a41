"""A similarity problem in the form that the GEMMs and C++ take."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from ccu_fast import _C
from ccu_fast.ops.backend import fp32_precision
from ccu_fast.ops.native import DTYPES, address
from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem

# With fewer pairs than this, another thread costs more than it saves.
_SERIAL_PAIRS = 1 << 14
# For every buffer whose address C++ gets: the defaults of the process may be others.
FP32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
# Relations without labels and ids, by whether the pairs (i, i) are SELF.
UNLABELLED = {diagonal: _C.Relations((0, 0), (0, 0), (0, 0), (0, 0), diagonal) for diagonal in (False, True)}


def gemm_dtype(p: SimilarityProblem) -> torch.dtype:
    """What the GEMMs multiply: bf16 if the CPU has it and the inputs' dtype or the matmul precision asks for it."""
    wanted = p.x.dtype == torch.bfloat16 or (p.x.dtype == torch.float32 and fp32_precision("cpu") == "medium")
    return torch.bfloat16 if wanted and has_bf16() else torch.float32


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def threads_for(pairs: int) -> int:
    """How many threads may share this many pairs."""
    return torch.get_num_threads() if pairs > _SERIAL_PAIRS else 1


@lru_cache(maxsize=64)
def reductions(rows: tuple[int, ...], cols: tuple[int, ...]) -> _C.Reductions:
    """Codes of reductions in the form that C++ takes."""
    return _C.Reductions(rows, cols)


class Operands:
    """x and y in the dtype of the GEMMs, labels and ids in int32, scale and bias as numbers of the host.

    Args:
        codes: reductions of rows. Default: all that the problem asks for, of rows and of columns.
    """

    def __init__(self, p: SimilarityProblem, dtype: torch.dtype, codes: tuple[int, ...] | None = None) -> None:
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
        self.reductions = reductions(p.rows, p.cols) if codes is None else reductions(codes, ())
        self.threads = threads_for(p.banks * p.n * p.m)

    @cached_property
    def x(self) -> Tensor:
        return self.p.x.to(self.dtype)

    @cached_property
    def y(self) -> Tensor:
        return self.p.y.to(self.dtype)

    def tile(self, dot: Tensor, banks: slice, rows: slice, cols: slice = slice(0, None)) -> _C.Tile:
        """What C++ has to know about a part of S whose products are ``dot``, ``[banks, rows, cols]``."""
        # self holds it until the next tile, because C++ reads it through an address.
        self.own = None if self.self_dot is None else self.self_dot[banks, rows].contiguous()
        return _C.Tile(
            dot=(dot.data_ptr(), DTYPES[dot.dtype]),
            self_dot=address(self.own),
            shape=dot.shape,
            row0=rows.start - cols.start,  # row i and column j of the part are the same item if row0 + i == j
            scale=self.scale,
            bias=self.bias,
            relations=self._relations(banks, rows, cols),
            reductions=self.reductions,
            threads=self.threads,
        )

    def _relations(self, banks: slice, rows: slice, cols: slice) -> _C.Relations:
        if self.row_labels is None and self.row_ids is None:
            return UNLABELLED[self.p.diagonal]
        return _C.Relations(
            row_labels=_strided(self.row_labels, banks, rows),
            col_labels=_strided(self.col_labels, banks, cols),
            row_ids=_strided(self.row_ids, banks, rows),
            col_ids=_strided(self.col_ids, banks, cols),
            diagonal=self.p.diagonal,
        )


def of_banks(t: Tensor, banks: slice) -> Tensor:
    """The part that belongs to some banks; the whole if all banks share one."""
    return t if t.shape[0] == 1 else t[banks]


def _strided(keys: Tensor | None, banks: slice, items: slice) -> tuple[int, int]:
    """Where a part's labels or ids start, and the stride from bank to bank."""
    if keys is None:
        return 0, 0
    return of_banks(keys, banks)[:, items].data_ptr(), 0 if keys.shape[0] == 1 else keys.stride(0)


def _narrow(row: Tensor | None, col: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Labels or ids in int32 that have the same equalities and signs."""
    if row is None or col is None:
        return None, None
    both = torch.cat([row.flatten(), col.flatten()])
    if both.numel() and (both.max() > 2**31 - 1 or both.min() < -(2**31)):
        names = both.unique(return_inverse=True)[1]
        both = torch.where(both < 0, -1 - names, names)
    both = both.to(torch.int32)
    return both[: row.numel()].view(row.shape), both[row.numel() :].view(col.shape)
