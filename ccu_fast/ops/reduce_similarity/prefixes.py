"""reduce_similarity of several prefixes of the same features, as Matryoshka representations are trained with.

One operator serves all prefixes (see :mod:`native.prefixes <.native.prefixes>` and
:mod:`triton.prefix_kernels <.triton.prefix_kernels>`); where it does not, they are a loop.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.ops.backend import choose, load, reverse_mode_alone, without_autocast
from ccu_fast.ops.operator import constant
from ccu_fast.ops.reduce_similarity import reference
from ccu_fast.ops.reduce_similarity.api import (
    OWN_PAIRS,
    Reduction,
    assemble,
    build_problem,
    reduce_similarity,
    workspace_bytes,
)
from ccu_fast.ops.reduce_similarity.operator import SimilarityReduction, flat
from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem
from ccu_fast.ops.reduce_similarity.relations import Relation, count_relations

Results = tuple[list[Tensor], list[Tensor]]


def reduce_prefixes(
    x: Tensor,
    y: Tensor,
    *,
    prefixes: Sequence[int],
    scale: float | Tensor = 1.0,
    bias: float | Tensor | None = None,
    row_labels: Tensor | None = None,
    col_labels: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    paired: bool | None = None,
    row_limits: Tensor | None = None,
    col_limits: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    rows: Sequence[Reduction] = (),
    cols: Sequence[Reduction] = (),
    normalize: bool = False,
    backend: str = "auto",
    workspace: int | None = None,
    nan_policy: str = "propagate",
) -> Results:
    """Reduce the similarities that each of several prefixes of the features makes::

        for d in prefixes:                                           # u(t) = F.normalize(t) if normalize else t
            reduce_similarity(u(x[..., :d]), u(y[..., :d]), ...)     # all results stacked

    The products of a prefix are those of the shorter one and some more, and the gradients of x and y telescope, so that
    all prefixes together cost the products of the longest one. They are a loop over ranks, where a CPU multiplies bf16,
    and on a GPU in fp16 and fp64, with a bias, limits or banks, of more than eight prefixes, and where one is no
    multiple of 16.

    Args:
        x: ``[..., N, D]``, as of :func:`ccu_fast.reduce_similarity`.
        y: ``[..., M, D]``, likewise.
        prefixes: ascending numbers of dimensions, each in [1, D].
        scale, bias: numbers or one-element tensors (gradient flows).
        row_labels, col_labels, row_ids, col_ids, paired: as there; the same for every prefix.
        row_limits: ``[N]``, ``[..., N]``, or ``[P, ..., N]`` with those of each prefix, of which there are P.
        col_limits: ``[M]``, ``[..., M]`` or ``[P, ..., M]``.
        guide: as there; taken whole, and the same for every prefix.
        rows, cols: the reductions, as there.
        normalize: make every prefix a unit vector; computed in fp32 and, where prefixes are no loop, never rounded to a
            half type.
        backend, workspace, nan_policy: as there.

    Returns:
        Two lists, in the order asked: row results ``[P, ..., N]`` and column results ``[P, ..., M]``.

    Raises:
        TypeError, ValueError, RuntimeError: prefixes that do not ascend or do not fit; else as there.

    Source: the sums of Kusupati et al. 2022 (arXiv 2205.13147), eq. 1, need these.

    >>> rows, _ = ccu_fast.reduce_prefixes(torch.eye(3), torch.eye(3), prefixes=(1, 3), rows=[("sum", ccu_fast.ALL)])
    >>> rows
    [tensor([[1., 0., 0.],
            [1., 1., 1.]])]
    """
    check.tensor("x", x)
    prefixes = checked_prefixes(prefixes)
    fit(prefixes, x)
    keys = {"row_labels": row_labels, "col_labels": col_labels, "row_ids": row_ids, "col_ids": col_ids}
    limits = {"row_limits": row_limits, "col_limits": col_limits, "guide": guide}
    options: dict[str, Any] = {**keys, **limits, "paired": paired, "rows": rows, "cols": cols, "nan_policy": nan_policy}
    name = choose(backend, "reduce_similarity", x.device, x.dtype)
    check.boolean("normalize", normalize)
    p, lead, row_spec, col_spec = build_problem(x, y, scale, bias, prefixes=prefixes, **options)
    p = replace(p, unit=normalize)
    few = not (p.rows or p.cols) or (p.diagonal and set(p.rows + p.cols) == {OWN_PAIRS})
    if few or not (name == "reference" or (_in_registers(p) if name == "triton" else _at_once(p.x.dtype))):
        how: dict[str, Any] = {"normalize": normalize, "backend": backend, "workspace": workspace}
        return of_each_prefix(reduce_similarity, x, y, prefixes=prefixes, scale=scale, bias=bias, **options, **how)
    rows_shape, cols_shape = ((len(prefixes), *lead, items) for items in (p.n, p.m))
    if name == "reference" or not (p.x.numel() and p.y.numel()):
        with without_autocast(p.x.device):
            of_rows, of_cols = reference.reduce(p.without_ignored())
    else:
        inputs = (p.x, p.y, p.scale, p.bias)
        reverse_mode_alone("reduce_prefixes", *inputs)
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        room = workspace_bytes(workspace, x.device)
        row_out, col_out = SimilarityReduction.apply(*flat(p), f"{name}.prefixes", room, keep)
        row_out, col_out = row_out.view(-1, *rows_shape), col_out.view(-1, *cols_shape)
        of_rows, of_cols = list(row_out.unbind(0)), list(col_out.unbind(0))
    row_counts, col_counts = (functools.partial(_counts, p, along_rows=side) for side in (True, False))
    return (
        assemble(row_spec, iter(of_rows), row_counts, rows_shape, limited=p.row_limits is not None),
        assemble(col_spec, iter(of_cols), col_counts, cols_shape, limited=p.col_limits is not None),
    )


def checked_prefixes(prefixes: Any) -> tuple[int, ...]:
    """Ascending numbers of dimensions."""
    if not isinstance(prefixes, (tuple, list)) or not prefixes:
        raise TypeError(f"prefixes: expected ascending numbers of dimensions such as (64, 128, 256), got {prefixes!r}")
    checked = tuple(check.integer("prefixes", d, low=1) for d in prefixes)
    if any(a >= b for a, b in itertools.pairwise(checked)):
        raise ValueError(f"prefixes: expected ascending numbers, got {checked}")
    return checked


def fit(prefixes: tuple[int, ...], x: Tensor) -> None:
    """Refuse prefixes that are longer than the features."""
    if x.ndim and prefixes[-1] > x.shape[-1]:
        raise ValueError(f"prefixes: expected at most {x.shape[-1]} dimensions (those of x), got {prefixes[-1]}")


def of_each_prefix(
    reduce: Callable[..., Results],
    x: Tensor,
    y: Tensor,
    *,
    prefixes: Sequence[int],
    row_limits: Tensor | None = None,
    col_limits: Tensor | None = None,
    **options: Any,
) -> Results:
    """:func:`reduce_prefixes` as a loop over any function that reduces."""
    lead = len(check.leading("y", y.shape[:-2], x.shape[:-2]))

    def limit(limits: Tensor | None, k: int) -> Tensor | None:
        return limits if limits is None or limits.ndim < lead + 2 else limits[k if len(limits) > 1 else 0]

    sides = [
        reduce(x[..., :d], y[..., :d], row_limits=limit(row_limits, k), col_limits=limit(col_limits, k), **options)
        for k, d in enumerate(prefixes)
    ]
    rows, cols = ([torch.stack(results) for results in zip(*side, strict=True)] for side in zip(*sides, strict=True))
    return rows, cols


def _in_registers(p: SimilarityProblem) -> bool:
    """Whether a GPU has a kernel that makes the products of one prefix from those of the one before."""
    # Not asked of the module, whose import torch.compile would have to follow.
    plain = p.bias is None and p.guide_x is None and not p.limited and p.banks == 1
    whole = 1 < len(p.prefixes) <= 8 and math.gcd(*p.prefixes) % 16 == 0
    return plain and whole and p.x.dtype in (torch.bfloat16, torch.float32)


@constant
def _at_once(dtype: torch.dtype) -> bool:
    serves: bool = load("reduce_similarity", "native.prefixes").serves(dtype)
    return serves


def _counts(p: SimilarityProblem, *, along_rows: bool) -> dict[Relation, Tensor]:
    """Those of one prefix, for each of them."""
    by_relation = count_relations(p, along_rows=along_rows)
    return {relation: t.expand(p.banks, -1).repeat(len(p.prefixes), 1) for relation, t in by_relation.items()}
