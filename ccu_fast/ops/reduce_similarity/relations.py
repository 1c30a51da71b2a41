"""How a row item and a column item stand to each other, and how many stand so.

Every pair (i, j) has exactly one relation:

    SELF    the same item: row_ids[i] == col_ids[j], or i == j when the two sides are paired
    SAME    the same label, not SELF
    OTHER   a different label (or no labels at all), not SELF

A negative label takes its row or column out of everything.
"""

from __future__ import annotations

from enum import IntFlag

import torch
from torch import Tensor
from torch.nn.functional import pad

from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem


class Relation(IntFlag):
    """A set of relations; combine with ``|``.

    Attributes:
        SELF: the same item.
        SAME: another item of the same label.
        OTHER: an item of another label, or another item where there are no labels.

    >>> ccu_fast.ALL == ccu_fast.SELF | ccu_fast.SAME | ccu_fast.OTHER
    True
    """

    SELF = 1
    SAME = 2
    OTHER = 4


SELF = Relation.SELF
"""The same item: equal ids or, where the two sides are paired, the same position."""
SAME = Relation.SAME
"""Another item of the same label; needs labels."""
OTHER = Relation.OTHER
"""Every other pair."""
ALL = SELF | SAME | OTHER
"""Every pair but those that a negative label or a limit takes out."""


def relation_matrix(p: SimilarityProblem) -> Tensor:
    """The relation of every pair as uint8 bits, ``[1 or B, N, M]``; 0 where a side is ignored.

    This is the definition the kernels are tested against; it costs O(N·M) memory.
    """
    rel = torch.full((1, p.n, p.m), int(OTHER), dtype=torch.uint8, device=p.x.device)
    if p.row_labels is not None and p.col_labels is not None:
        rel = torch.where(p.row_labels[:, :, None] == p.col_labels[:, None, :], int(SAME), rel)
    if p.row_ids is not None and p.col_ids is not None:
        rel = torch.where(p.row_ids[:, :, None] == p.col_ids[:, None, :], int(SELF), rel)
    elif p.diagonal:
        eye = torch.eye(p.n, p.m, dtype=torch.bool, device=p.x.device)
        rel = torch.where(eye, int(SELF), rel)
    if p.row_labels is not None and p.col_labels is not None:
        rel = rel.masked_fill((p.row_labels < 0)[:, :, None] | (p.col_labels < 0)[:, None, :], 0)
    return rel.to(torch.uint8)


def limited_relations(p: SimilarityProblem, dots: Tensor) -> tuple[Tensor, Tensor]:
    """The relations that rows see and those that columns see: 0 too where an OTHER pair is beyond the side's limit.

    Limits look at ``dots``, the products of x and y ``[B, N, M]``, or at those of the guide. SELF and SAME stay, and a
    comparison with NaN cuts nothing.
    """
    rel = relation_matrix(p)
    if not p.limited:
        return rel, rel
    similar = dots.detach()
    if p.guide_x is not None and p.guide_y is not None:
        similar = torch.matmul(p.guide_x.to(dots.dtype), p.guide_y.to(dots.dtype).mT)
    other, rows, cols = rel == int(OTHER), rel, rel
    if p.row_limits is not None:
        rows = rel.masked_fill(other & (similar > p.row_limits[:, :, None]), 0)
    if p.col_limits is not None:
        cols = rel.masked_fill(other & (similar > p.col_limits[:, None, :]), 0)
    return rows, cols


def _occurrences(keys: Tensor, queries: Tensor) -> Tensor:
    """How often each query occurs among the keys, along the last dimension."""
    ordered = keys.sort(dim=-1).values
    upper = torch.searchsorted(ordered, queries.contiguous(), right=True)
    return upper - torch.searchsorted(ordered, queries.contiguous())


def count_relations(p: SimilarityProblem, *, along_rows: bool) -> dict[Relation, Tensor]:
    """For every row the number of columns in each relation, int64 ``[1 or B, N]``, or for every column that of rows.

    O((N + M)·log(N + M)) time and O(N + M) memory, no host synchronisation: sorting and binary search instead of the
    N×M matrix.
    """
    row_labels, col_labels, row_ids, col_ids, n, m = p.row_labels, p.col_labels, p.row_ids, p.col_ids, p.n, p.m
    if not along_rows:
        row_labels, col_labels, row_ids, col_ids, n, m = col_labels, row_labels, col_ids, row_ids, m, n
    device = p.x.device
    if row_ids is None or col_ids is None:
        if row_labels is None or col_labels is None:
            own = (torch.arange(n, device=device) < (m if p.diagonal else 0)).long()[None]
            return {SELF: own, SAME: torch.zeros_like(own), OTHER: m - own}
        row_labels, col_labels = _same_banks(row_labels, col_labels)
        keep, valid = (row_labels >= 0).long(), (col_labels >= 0).sum(-1, keepdim=True)
        same = _occurrences(col_labels, row_labels) * keep
        if not p.diagonal:
            return {SELF: torch.zeros_like(same), SAME: same, OTHER: (valid - same) * keep}
        # The label of the pair (i, i), and −1 where there is none. Padded by n whatever m is: no branch on sizes.
        paired = pad(col_labels, (0, n), value=-1)[:, :n]
        own = (paired >= 0).long() * keep
        same = same - own * (row_labels == paired)
        return {SELF: own, SAME: same, OTHER: (valid - own - same) * keep}
    if row_labels is None or col_labels is None:
        col_ids, row_ids = _same_banks(col_ids, row_ids)
        own = _occurrences(col_ids, row_ids)
        return {SELF: own, SAME: torch.zeros_like(own), OTHER: m - own}

    row_ids, row_labels, col_ids, col_labels = _same_banks(row_ids, row_labels, col_ids, col_labels)
    ids = torch.cat([row_ids, col_ids], -1)
    labels = torch.cat([row_labels, col_labels], -1)
    # The position of a key's first occurrence in sorted order is a dense name for it below n + m,
    # so a pair of names fits in one int64.
    id_names = torch.searchsorted(ids.sort(dim=-1).values, ids)
    label_names = torch.searchsorted(labels.sort(dim=-1).values, labels)
    both = id_names * (n + m) + label_names

    ignored_cols = col_labels < 0
    # An ignored column gets a name no row has.
    col_id_names = id_names[:, n:].masked_fill(ignored_cols, -1)
    own = _occurrences(col_id_names, id_names[:, :n])
    alike = _occurrences(label_names[:, n:].masked_fill(ignored_cols, -1), label_names[:, :n])
    own_and_alike = _occurrences(both[:, n:].masked_fill(ignored_cols, -1), both[:, :n])
    valid = (~ignored_cols).sum(-1, keepdim=True)
    same = alike - own_and_alike
    keep = (row_labels >= 0).long()
    return {SELF: own * keep, SAME: same * keep, OTHER: (valid - own - same) * keep}


def _same_banks(*tensors: Tensor) -> tuple[Tensor, ...]:
    counts = [t.shape[0] for t in tensors]
    banks = 0 if 0 in counts else max(counts)
    return tuple(t.expand(banks, t.shape[1]).contiguous() for t in tensors)
