"""What every similarity backend receives: one validated, flattened problem."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.ops.backend import transformed

KINDS = ("lse", "sum", "softplus", "logsigmoid")
# On either side. CCU_MAX_REDUCTIONS of csrc/ccu_fast.h.
MAX_REDUCTIONS = 8


# What a teacher's probabilities make: their sum, which has no gradient, and that of the logits weighted by them.
TAUGHT = ("mass", "expected")

# A reduction as one integer, by its kind: add the relations. So it crosses an operator schema and the C ABI. A count is
# among them where limits decide what counts; otherwise sorting finds it (relations.count_relations).
_TILED = (*KINDS, "count", *TAUGHT)
CODES = {kind: 8 * place for place, kind in enumerate(_TILED)}


def encode(kind: str, relations: int) -> int:
    """A reduction as one integer."""
    return CODES[kind] + int(relations)


def decode(code: int) -> tuple[str, int]:
    """The inverse of :func:`encode`."""
    return _TILED[code // 8], code % 8


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
        row_limits, col_limits: ``[1 or B, N]`` and ``[1 or B, M]`` like ``scale``, or None: an OTHER pair that is more
            similar than its row's limit has no part in the row's reductions, and likewise for columns. None where no
            reduction of that side has OTHER.
        guide_x, guide_y: ``[1 or B, N, Dg]`` and ``[1 or B, M, Dg]`` whose products are the similarities that limits
            look at, in a dtype of their own; None for x and y themselves.
        teacher_scale: like ``scale``, of the logits of a teacher whose features ``guide_x`` and ``guide_y`` are; None
            without one. There are no limits beside it: ``row_limits`` and ``col_limits`` are the log-sum-exps of its
            rows and columns, None where no reduction of that side needs them.
        prefixes: ascending numbers of dimensions; each makes an S of its own, of that many of the first dimensions.
            The results, and limits that are not shared, are then ``[P · B, …]``, all banks of one prefix after those of
            the one before.
        unit: every prefix of x and y is made a unit vector; the guide remains as it is.
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
    row_limits: Tensor | None = None
    col_limits: Tensor | None = None
    guide_x: Tensor | None = None
    guide_y: Tensor | None = None
    teacher_scale: Tensor | None = None
    prefixes: tuple[int, ...] = ()
    unit: bool = False

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
    def sets(self) -> int:
        """How many S there are."""
        return self.banks * max(len(self.prefixes), 1)

    @property
    def limited(self) -> bool:
        """A pair may take part in the reductions of its row and not in those of its column, or the other way round."""
        return self.teacher_scale is None and (self.row_limits is not None or self.col_limits is not None)

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
    if look and (not ignored.any() or torch.isfinite(items.detach()[ignored.expand(lead)]).all()):
        return items
    return items.masked_fill(ignored[..., None], 0)


def checked_keys(name: str, value: Tensor, lead: tuple[int, ...], items: int, x: Tensor) -> Tensor:
    """Labels or ids as int64 ``[1 or B, items]``."""
    check.tensor(name, value, dtypes=check.INTEGERS)
    check.same(name, value, "x", x, dtype=False)
    return check.per_row(name, value.long(), lead, items).contiguous()


def checked_guide(
    guide: Any, lead: tuple[int, ...], n: int, m: int, x: Tensor, called: str = "guide"
) -> tuple[Tensor, Tensor]:
    """Both sides of a guide, or of what else ``called`` names, as given, of shapes that fit."""
    if not isinstance(guide, (tuple, list)) or len(guide) != 2:
        came = f"{len(guide)} of them" if isinstance(guide, (tuple, list)) else type(guide).__name__
        raise TypeError(f"{called}: expected a pair of tensors, for the rows of x and of y, got {came}")
    for place, (t, items) in enumerate(zip(guide, (n, m), strict=True)):
        name = f"{called}[{place}]"
        check.tensor(name, t)
        check.same(name, t, "x", x, dtype=False)
        if t.ndim < 2 or t.shape[-2] != items or not t.shape[-1]:
            raise ValueError(f"{name}: expected shape [..., {items}, Dg] with Dg at least 1, got {list(t.shape)}")
        try:
            if t.shape[:-2].numel() != 1:
                t.expand(*lead, *t.shape[-2:])
        except RuntimeError:
            raise ValueError(f"{name}: expected shape {[*lead, items, t.shape[-1]]}, got {list(t.shape)}") from None
    u, v = guide
    if u.shape[-1] != v.shape[-1]:
        expected = f"last dimension {u.shape[-1]} (that of {called}[0])"
        raise ValueError(f"{called}[1]: expected {expected}, got {v.shape[-1]}")
    return u, v
