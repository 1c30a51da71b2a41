"""Gradient token scoring (HotFlip): which tokens would change the loss most, to first order.

The table of token embeddings is prepared once; scoring then reads it once and never makes a rows × tokens matrix.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.ops.backend import choose, load, outside_transforms
from ccu_fast.ops.candidate_losses.api import candidate_losses
from ccu_fast.ops.topk_flips.operator import STALE, topk, version_of
from ccu_fast.ops.topk_flips.problem import TokenProblem, TokenResult

__all__ = ["Flips", "TokenTable", "candidate_losses", "topk_flips"]

_GRAM_ROWS, _NORM_ROWS = 1 << 16, 1 << 12


class Flips(NamedTuple):
    """The best replacements, as :func:`topk_flips` returns them.

    Attributes:
        ids: int64 ``[..., k]``, best first; −1 where fewer than k tokens could be chosen from.
        delta: fp32 ``[..., k]``, the first-order change of the loss, without the penalty; NaN where ids is −1.
        count: int64 ``[...]``, how many of the k are real.
        valid: bool ``[...]`` (scope "global": ``[..., n]``), False for a row whose gradient has NaN or inf.
        rows: scope "global" only: int64 ``[..., k]``, the row of the group that the flip belongs to; −1 as in ids.

    >>> table = ccu_fast.TokenTable(torch.eye(3), allowed=torch.tensor([0, 2]))
    >>> ccu_fast.topk_flips(torch.ones(3), table, k=2, current_ids=torch.tensor(2), exclude_current=True).ids
    tensor([ 0, -1])
    """

    ids: Tensor
    delta: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    valid: Tensor
    rows: Tensor | None = None


class TokenTable:
    """An embedding matrix prepared for :func:`topk_flips`.

    With the compiled kernels this holds a copy of the allowed rows in the order the kernel reads them: on a CPU 16-bit
    integers and a step (2·D + 4 bytes a row), on a GPU centred and scaled fp16 (2·D bytes). The embedding itself is
    referenced, not copied.

    Args:
        embedding: ``[V, D]`` fp32, fp16 or bf16 (fp64 on the reference backend), finite, any strides.
        allowed: tokens that may ever be chosen, bool ``[V]`` or integer ids; default all. Scoring gets faster by
            the fraction left out.
        backend: "auto" or the name of one; tables built for "reference" serve that backend alone and copy nothing.

    Raises:
        TypeError, ValueError: naming the argument; also for NaN or inf in an allowed row of the embedding.

    An in-place change of the embedding (an optimiser step, say) makes the table stale: :func:`topk_flips` then raises
    until :meth:`refresh` is called. Torch does not count changes through ``.data`` or of tensors made under inference
    mode; those go unnoticed.

    Attributes:
        embedding: the matrix, detached.
        ids: int64 ``[T]`` the allowed tokens in ascending order, or None for all.
        vocabulary: V.
        dim: D.

    >>> table = ccu_fast.TokenTable(torch.eye(4), allowed=torch.tensor([0, 2]))
    >>> len(table), table.vocabulary, table.dim
    (2, 4, 4)
    """

    def __init__(self, embedding: Tensor, allowed: Tensor | None = None, *, backend: str = "auto") -> None:
        check.tensor("embedding", embedding, ndim=2)
        _with_values("embedding", embedding)
        self.vocabulary, self.dim = embedding.shape
        if self.vocabulary < 1 or self.dim < 1 or self.vocabulary > 2**31 - 64:
            raise ValueError(f"embedding: expected at least one token and dimension, got {list(embedding.shape)}")
        self.backend = choose(backend, "topk_flips", embedding.device, embedding.dtype)
        self.embedding = embedding.detach()
        self.ids = None if allowed is None else _allowed_ids(allowed, self.vocabulary, embedding.device)
        self.refresh()

    def refresh(self) -> None:
        """Prepare the table from the embedding as it is now."""
        self.version = version_of(self.embedding)
        self.max_norm = _largest_norm(self.embedding, self.ids)
        self.packed: Tensor | None = None
        self.coarse: Tensor | None = None
        self._gram: Tensor | None = None
        if self.backend != "reference":
            self.packed, self.coarse = load("topk_flips", self.backend).pack(self.embedding, self.ids)

    def check_fresh(self) -> None:
        """Raise a ValueError if the embedding changed in place since the table was prepared."""
        if self.version >= 0 and version_of(self.embedding) != self.version:
            raise ValueError(STALE)

    @property
    def gram(self) -> Tensor:
        """``[D, D]`` E.T @ E of the allowed rows, in fp32 (fp64 for fp64); made at the first use and kept."""
        self.check_fresh()
        if self._gram is None:
            dtype = torch.float64 if self.embedding.dtype == torch.float64 else torch.float32
            self._gram = torch.zeros(self.dim, self.dim, dtype=torch.float64, device=self.embedding.device)
            for start in range(0, len(self), _GRAM_ROWS):
                part = slice(start, start + _GRAM_ROWS)
                rows = (self.embedding[part] if self.ids is None else self.embedding[self.ids[part]]).to(dtype)
                self._gram += rows.T @ rows
            self._gram = self._gram.to(dtype)
        return self._gram

    def score_norms(self, grad: Tensor) -> Tensor:
        """``(embedding[allowed] @ grad).norm()`` for every row of ``grad`` ``[..., D]``, without the scores.

        GCG divides by it to weigh the gradients of several prompts alike: √(gᵀ(EᵀE)g) costs D² a row instead of V·D.
        """
        check.tensor("grad", grad)
        if grad.ndim < 1 or grad.shape[-1] != self.dim:
            raise ValueError(f"grad: expected shape [..., {self.dim}] for this table, got {list(grad.shape)}")
        check.same("grad", grad, "table", self.embedding, dtype=False)
        wide = grad.to(self.gram.dtype)
        return (wide @ self.gram * wide).sum(-1).clamp(min=0).sqrt()

    def __len__(self) -> int:
        return self.vocabulary if self.ids is None else self.ids.shape[0]

    def __repr__(self) -> str:
        return (
            f"TokenTable({len(self)} of {self.vocabulary} tokens, D={self.dim}, {self.embedding.dtype}, "
            f"{self.embedding.device}, backend={self.backend!r})"
        )


def topk_flips(
    grad: Tensor,
    table: TokenTable,
    k: int,
    *,
    maximize: bool = False,
    current_ids: Tensor | None = None,
    exclude_current: bool = False,
    allowed: Tensor | None = None,
    penalty: Tensor | None = None,
    scope: str = "row",
    precision: str = "certified",
    backend: str = "auto",
) -> Flips:
    """Find the k tokens whose substitution lowers (or raises) the loss most, to first order::

        delta[..., v] = (embedding[v] - embedding[current]) @ grad       # without current_ids: embedding[v] @ grad
        score = delta + penalty                                          # maximize: -delta + penalty
        ids = score.double().sort(stable=True).indices[..., :k]          # ties: the lowest id; -0 equals +0

    The result is exact whatever the backend and the number of threads, and no rows × tokens matrix is made.

    Args:
        grad: ``[..., D]`` gradient of the loss by the embedding at a position; fp32, fp16 or bf16 (fp64 on the
            reference backend). A row with NaN or inf gives ids −1 and valid False.
        table: a :class:`TokenTable` of the embedding matrix.
        k: replacements per row; at most the tokens that the table allows (scope "global": times n).
        maximize: look for the highest change instead of the lowest.
        current_ids: integers ``[...]``, the token that stands there now. It moves every delta of a row by the same
            amount, so it matters for the reported delta, for ``exclude_current`` and for scope "global".
        exclude_current: the current token is not a candidate.
        allowed: bool ``[V]`` or ``[..., V]``, True where a token may be chosen, on top of the table's own choice.
            A choice that holds for many calls belongs in the table, which then gets smaller.
        penalty: floating point ``[V]`` or ``[..., V]``, finite, taken in fp32. It always counts against a token, for
            ``maximize`` too; delta does not contain it.
        scope: "row": k for every row. "global": k for each group of rows ``[n, D]``, the best (row, token) flips
            together; ties: the lowest row, then the lowest id.
        precision: "certified": the float64 order. "fp32": fp32 dot products may decide; on every backend of today
            it is the same as "certified". "fast": on a GPU fp16 decides which k tokens survive, float64 their order
            and delta; on a CPU it is the same as "certified".
        backend: "auto", or "native" or "reference"; a named one raises if it cannot serve.

    Returns:
        :class:`Flips`. Nothing in it carries a gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. On a GPU, where reading the
            values would wait for it, an id in ``current_ids`` out of range fails the kernel, and a penalty that is
            not finite forbids its token.

    Source: HotFlip (arXiv 1712.06751), eq. 10, and universal triggers (arXiv 1908.07125), eq. 3.

    >>> table = ccu_fast.TokenTable(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]))
    >>> flips = ccu_fast.topk_flips(torch.tensor([1.0, -1.0]), table, k=2)
    >>> flips.ids, flips.delta
    (tensor([2, 0]), tensor([-2.,  0.]))
    """
    if not isinstance(table, TokenTable):
        raise TypeError(f"table: expected a TokenTable, got {type(table).__name__}")
    check.one_of("scope", scope, ("row", "global"))
    check.one_of("precision", precision, ("certified", "fp32", "fast"))
    check.tensor("grad", grad)
    if grad.ndim < (2 if scope == "global" else 1) or grad.shape[-1] != table.dim:
        expected = f"[..., n, {table.dim}]" if scope == "global" else f"[..., {table.dim}]"
        raise ValueError(f"grad: expected shape {expected} for this table, got {list(grad.shape)}")
    check.same("grad", grad, "table", table.embedding, dtype=False)
    lead = tuple(grad.shape[:-1])
    group = lead[-1] if scope == "global" else 1
    check.integer("k", k, low=1)
    if k > len(table) * group:
        what = f"{len(table)} tokens allowed by the table" + (f" in {group} rows" if scope == "global" else "")
        raise ValueError(f"k: expected at most {len(table) * group} ({what}), got {k}")
    if exclude_current and current_ids is None:
        raise ValueError("current_ids: expected a tensor because exclude_current is set, got None")
    wide = torch.float64 in (grad.dtype, table.embedding.dtype)
    name = choose(backend, "topk_flips", grad.device, torch.float64 if wide else grad.dtype)
    if backend == "auto" and table.packed is None:
        name = "reference"
    compute = torch.float64 if wide else torch.float32
    if current_ids is not None:
        check.tensor("current_ids", current_ids, dtypes=check.INTEGERS)
        check.same("current_ids", current_ids, "grad", grad, dtype=False)
        check.shape("current_ids", current_ids, lead)
        current_ids = current_ids.long().reshape(-1).contiguous()
    p = TokenProblem(
        grad=grad.detach().to(compute).reshape(math.prod(lead), table.dim).contiguous(),
        embedding=table.embedding,
        token_ids=table.ids,
        packed=table.packed,
        coarse=table.coarse,
        max_norm=table.max_norm,
        k=min(k, len(table)),
        maximize=bool(maximize),
        current=current_ids,
        exclude_current=bool(exclude_current),
        allowed=_per_token("allowed", allowed, lead, table, (torch.bool,)),
        penalty=_per_token("penalty", penalty, lead, table, check.FLOATS),
        certify=precision != "fast",
    )
    found = topk(p, table.version, name)
    if scope == "global":
        return _merge(found, lead, k)
    rows = (*lead, k)
    return Flips(found.ids.view(rows), found.delta.view(rows), found.count.view(lead), found.valid.view(lead))


def _merge(found: TokenResult, lead: tuple[int, ...], k: int) -> Flips:
    """The k best of each group of rows from the best of its rows."""
    *outer, n = lead
    groups, width = math.prod(outer), found.ids.shape[1]
    # Row-major before a stable sort: among equals the lowest row comes first, then the lowest id.
    order = found.score.view(groups, n * width).argsort(dim=1, stable=True)[:, :k]
    ids = found.ids.view(groups, n * width).gather(1, order)
    rows = torch.where(ids < 0, -1, order.div(width, rounding_mode="floor"))
    return Flips(
        ids=ids.view(*outer, k),
        delta=found.delta.view(groups, n * width).gather(1, order).view(*outer, k),
        count=found.count.view(groups, n).sum(1).clamp(max=k).view(outer),
        valid=found.valid.view(lead),
        rows=rows.view(*outer, k),
    )


def _per_token(name: str, value: Any, lead: tuple[int, ...], table: TokenTable, dtypes: Any) -> Tensor | None:
    """``[1 or N, T]``: one row for all, or one for each; only the table's tokens."""
    if value is None:
        return None
    check.tensor(name, value, dtypes=dtypes)
    check.same(name, value, "table", table.embedding, dtype=False)
    value = check.per_row(name, value.detach(), lead, table.vocabulary)
    if table.ids is not None:
        value = value.index_select(1, table.ids)
    return (value if name == "allowed" else value.float()).contiguous()


def _with_values(name: str, value: Tensor) -> None:
    outside_transforms("TokenTable", value)
    if value.is_meta:
        raise ValueError(f"{name}: expected values, got a tensor on the device meta")


def _allowed_ids(allowed: Tensor, vocabulary: int, device: torch.device) -> Tensor:
    check.tensor("allowed", allowed, dtypes=(torch.bool, *check.INTEGERS), ndim=1)
    _with_values("allowed", allowed)
    if allowed.dtype == torch.bool:
        check.shape("allowed", allowed, (vocabulary,))
        ids = allowed.nonzero()[:, 0]
    else:
        ids = allowed.long().unique()
        if ids.numel() and (ids[0] < 0 or ids[-1] >= vocabulary):
            bad = int(ids[0] if ids[0] < 0 else ids[-1])
            raise ValueError(f"allowed: expected ids in [0, {vocabulary - 1}], got {bad}")
    if ids.numel() == 0:
        raise ValueError("allowed: expected at least one token, got none")
    return ids.to(device)


def _largest_norm(embedding: Tensor, ids: Tensor | None) -> float:
    """max ‖row‖ over the allowed rows, which must be finite."""
    norms = embedding.new_empty(embedding.shape[0], dtype=torch.float64)
    # Some rows at a time: on a CPU torch copies what it sums in another dtype.
    for part, out in zip(embedding.split(_NORM_ROWS), norms.split(_NORM_ROWS), strict=True):
        torch.linalg.vector_norm(part, dim=1, dtype=torch.float64, out=out)
    if ids is not None:
        norms = norms[ids]
    largest = float(norms.max())
    if not math.isfinite(largest):
        bad = int((~torch.isfinite(norms)).nonzero()[0])
        token = bad if ids is None else int(ids[bad])
        raise ValueError(f"embedding: expected finite values, got NaN or inf in the row of token {token}")
    return largest
