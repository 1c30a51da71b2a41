"""What every similarity backend receives: one validated, flattened problem."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.ops.backend import transformed

KINDS = ("lse", "sum", "softplus", "logsigmoid")
# On either side. CCU_MAX_REDUCTIONS of csrc/ccu_fast.h.
MAX_REDUCTIONS = 8


# A reduction as one integer, by its kind: add the relations. So it crosses an operator schema and the C ABI.
CODES = {kind: 8 * place for place, kind in enumerate(KINDS)}


def encode(kind: str, relations: int) -> int:
    """A reduction as one integer."""
    return CODES[kind] + int(relations)


def decode(code: int) -> tuple[str, int]:
    """The inverse of :func:`encode`."""
    return KINDS[code // 8], code % 8


# What a backward pass gets (the gradients of row and column results, and those results), and what it gives: the
# gradients of x, y, scale and bias.
Incoming = tuple[Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class SimilarityProblem:
    """S = scale · x yᵀ + bias, and which reductions of it are wanted.

    Attributes:
        x: ``[B, N, D]`` or ``[1, N, D]`` (shared by all banks); fp16, bf16, fp32 or fp64.
        y: ``[B, M, D]`` or ``[1, M, D]``; dtype and device of ``x``.
        scale: 0-dim fp32 (fp64 for fp64 inputs) tensor on the device of ``x``.
        bias: the same, or None.
        row_labels, col_labels: int64 ``[1 or B, N]`` and ``[1 or B, M]``, both or neither; negative = ignored.
        row_ids, col_ids: the same for identities; when None, ``diagonal`` says whether i == j is SELF.
        diagonal: pairs (i, i) are SELF. Only without ids.
        rows, cols: encoded reductions (:func:`encode`) along rows (over j) and columns (over i).
    """

    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor | None
    row_labels: Tensor | None
    col_labels: Tensor | None
    row_ids: Tensor | None
    col_ids: Tensor | None
    diagonal: bool
    rows: tuple[int, ...]
    cols: tuple[int, ...]

    def without_ignored(self) -> SimilarityProblem:
        """The same problem with the items that no pair counts set to zero.

        Their share of a gradient is 0 · x, and that must be 0 although x is NaN or inf.
        """
        if self.row_labels is None or self.col_labels is None:
            return self
        return replace(self, x=without_ignored(self.x, self.row_labels), y=without_ignored(self.y, self.col_labels))

    @property
    def banks(self) -> int:
        # Not the larger of the two: no bank at all on one side is no bank.
        return self.y.shape[0] if self.x.shape[0] == 1 else self.x.shape[0]

    @property
    def n(self) -> int:
        return self.x.shape[1]

    @property
    def m(self) -> int:
        return self.y.shape[1]


def without_ignored(items: Tensor, labels: Tensor | None) -> Tensor:
    """``[..., N, D]`` with zeros where the label is negative; where banks share an item, where it is in all of them.

    Labels that do not fit are another function's to refuse.
    """
    if not check.readable(labels) or labels.dtype not in check.INTEGERS or labels.device != items.device:
        return items
    lead = items.shape[:-1]
    ignored = labels < 0
    while ignored.ndim > len(lead):
        ignored = ignored.all(0)
    for place in range(-ignored.ndim, -1):
        if lead[place] == 1:
            ignored = ignored.all(place, keepdim=True)
    if any(ignored.shape[place] not in (1, lead[place]) for place in range(-ignored.ndim, 0)):
        return items
    # To look costs less than a copy; but a GPU would keep the host waiting, and a compiled graph cannot branch on it.
    look = items.device.type == "cpu" and not check.by_operator(items) and not transformed(items, ignored)
    if look and torch.isfinite(items.detach()[ignored.expand(lead)]).all():
        return items
    return items.masked_fill(ignored[..., None], 0)
