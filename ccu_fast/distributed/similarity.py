"""reduce_similarity over a process group: each rank holds some rows of x and some of y."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ccu_fast import check
from ccu_fast.distributed import agreement
from ccu_fast.distributed.agreement import MODES, Sizes, agree
from ccu_fast.distributed.blocks import Blocks, Plan
from ccu_fast.distributed.ranks import Ranks, offsets
from ccu_fast.losses.formulas import logsumexp
from ccu_fast.ops.backend import choose
from ccu_fast.ops.operator import never
from ccu_fast.ops.reduce_similarity.api import Reduction, assemble, build_problem, check_paired, workspace_bytes
from ccu_fast.ops.reduce_similarity.normalize import normalize_pair
from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem, decode
from ccu_fast.ops.reduce_similarity.relations import count_relations
from ccu_fast.ops.reduce_similarity.teacher import of_teacher


class _Prepared(NamedTuple):
    """The arguments of this rank, checked."""

    problem: SimilarityProblem
    rows: list[Reduction]
    cols: list[Reduction]
    engine: str
    workspace: int


@never
def reduce_similarity(
    x: Tensor,
    y: Tensor,
    *,
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
    teacher: tuple[Tensor, Tensor] | None = None,
    teacher_scale: float | Tensor = 1.0,
    normalize: bool = False,
    rows: Sequence[Reduction] = (),
    cols: Sequence[Reduction] = (),
    backend: str = "auto",
    workspace: int | None = None,
    nan_policy: str = "propagate",
    group: dist.ProcessGroup | None = None,
    mode: str = "auto",
    equal: bool = False,
    positives: str | None = None,
    alike: bool = False,
    ending: tuple[int, int] = (0, 0),
) -> tuple[list[Tensor], list[Tensor]]:
    """Compute :func:`ccu_fast.reduce_similarity` of x and y whose rows lie on several ranks::

        X, Y = (torch.cat([v of rank 0, v of rank 1, ...]) for v in (x, y))     # nowhere built (Y is, by "gather")
        row_results, col_results = ccu_fast.reduce_similarity(X, Y, ...)
        return this rank's part of row_results, this rank's part of col_results

    Only y travels, and what belongs to it. A rank reduces S between its own x and all of Y; of every column that is a
    part, which goes to the rank that owns the column and is merged there. Gradients are those of plain autograd on X
    and Y: ``x.grad`` is the gradient of the sum of all ranks' losses, wherever it came from. For ``scale`` and ``bias``
    a rank has the part that its own rows of x make; the sum over ranks is the gradient.

    Every rank of the group has to call this with the same options, and to run backward through its results.

    Args:
        x: ``[n, D]``, this rank's rows; n may differ from rank to rank and be 0.
        y: ``[m, D]``, this rank's columns.
        scale, bias: numbers or one-element tensors, the same on every rank. A replicated DTensor counts as this rank's
            own copy, of which the gradient is this rank's part.
        row_labels, row_ids: int64 ``[n]``, those of this rank's rows; equal keys mean the same on every rank.
        col_labels, col_ids: int64 ``[m]``.
        paired: as there, for X and Y: item i of X is item i of Y.
        row_limits: ``[n]``, those of this rank's rows, as there. On every rank or on none, like all that follows.
        col_limits: ``[m]``, those of this rank's columns, which all ranks see.
        guide: ``([n, Dg], [m, Dg])`` of this rank's rows and columns; the second travels with y.
        teacher: the same of a teacher; once more before, for its log-sum-exps over all ranks.
        teacher_scale: as there, the same on every rank.
        normalize: as there; before anything travels.
        rows, cols, backend, workspace, nan_policy: as there; ``workspace`` is for each rank.
        group: None for the default group. Ranks outside it must not call.
        mode: "gather" holds Y and its gradient at once; "ring" only passes blocks of it from rank to rank, the next
            one while it computes with this one, and computes S again in backward. "auto" gathers while Y and its
            gradient in fp32 take at most 2 GiB on a CPU and 8 GiB on a GPU (``agreement.GATHER_BYTES``).
        equal: promise that every rank has the same n, the same m and the same options. Saves one exchange of a few
            numbers (and on a GPU a synchronisation) and with it the check; a broken promise may end in a timeout.
        positives: for a loss in which every item needs a positive: the keys that mark positives when items are not
            paired, such as "row_ids and col_ids". Items that are neither paired nor have these keys are refused.
        alike: refuse a rank that has not as many rows of y as of x: for a loss whose pairs lie on one rank each.
        ending: for a loss: which reduction and which gradients it was asked for.

    Returns:
        Two lists in the order asked: row results ``[n]`` and column results ``[m]`` of this rank.

    Raises:
        TypeError, ValueError: as there, on every rank if ``equal`` is False; sizes that do not fit.
        RuntimeError: one of several processes has not initialised torch.distributed, or a rank failed or did not answer
            within the timeout that the process group was made with.

    Runs between two graphs under torch.compile, hence not with ``fullgraph=True``. No second derivatives.

    Source: this project's definition, as :func:`ccu_fast.reduce_similarity`.

    Example, of one process alone:

    >>> (lse,), _ = ccu_fast.distributed.reduce_similarity(torch.eye(3), torch.eye(3), rows=[("lse", ccu_fast.ALL)])
    >>> lse
    tensor([1.5514, 1.5514, 1.5514])
    """
    ranks = Ranks(group)
    keyed = row_ids is not None or ("labels" in (positives or "") and row_labels is not None)

    def prepare() -> tuple[_Prepared, list[int]]:
        check.one_of("mode", mode, MODES)
        check_paired(paired)
        if positives and not keyed and paired is False:
            raise ValueError(f"paired: expected True or {positives}, got False")
        for name, value in (("x", x), ("y", y)):
            check.tensor(name, value, ndim=2)
        if alike and len(x) != len(y):
            raise ValueError(f"y: expected {len(x)} rows (those of x on this rank), got {len(y)}")
        labels = (row_labels, col_labels)
        pair = normalize_pair(x, y, backend, *labels) if check.boolean("normalize", normalize) else (x, y)
        here = None if paired else paired  # whether pairs meet on this rank is seen when all sizes are known
        p, _, row_spec, col_spec = build_problem(
            *pair, scale, bias, row_labels, col_labels, row_ids, col_ids, here, rows, cols, nan_policy,
            row_limits, col_limits, guide, teacher, teacher_scale,
        )  # fmt: skip
        engine = choose(backend, "reduce_similarity", p.x.device, p.x.dtype)
        prepared = _Prepared(p, row_spec, col_spec, engine, workspace_bytes(workspace, p.x.device))
        beside = [0, 0] if p.guide_y is None else [p.guide_y.shape[-1], agreement.DTYPES.index(p.guide_y.dtype)]
        must_match = [
            0,
            p.x.shape[-1],
            agreement.DTYPES.index(p.x.dtype),
            MODES.index(mode),
            p.row_labels is not None,
            p.row_ids is not None,
            p.row_limits is not None,
            p.col_limits is not None,
            *(beside if teacher is None else [0, 0]),
            *(beside if teacher is not None else [0, 0]),
            p.x.requires_grad,
            p.y.requires_grad,
            p.scale.requires_grad or (p.bias is not None and p.bias.requires_grad),
            zlib.crc32(repr((row_spec, col_spec, p.bias is None, paired, normalize)).encode()),
            *ending,
        ]
        return prepared, [p.n, p.m, *must_match]

    (p, row_spec, col_spec, engine, room), sizes = agree(ranks, prepare, x, equal=equal)
    if positives and not keyed and sum(sizes.x) != sum(sizes.y):
        raise ValueError(
            f"y: expected {sum(sizes.x)} rows over all ranks (those of x) or {positives}, got {sum(sizes.y)}"
        )
    plan = _plan(ranks, p, sizes, paired, agreement.ring(mode, sizes.y, p.y), engine, room)
    if teacher is not None:
        plan = _normalised(plan, backend)
    if p.rows or p.cols:
        guide_y = None if p.guide_y is None else p.guide_y[0]
        row_out, col_parts = Blocks.apply(p.x[0], p.y[0], p.scale, p.bias, guide_y, plan)
    else:
        row_out, col_parts = p.scale.new_empty((0, p.n)), p.scale.new_empty((0, sum(sizes.y)))
    merged = _merge(plan, p, col_parts)
    row_counts, col_counts = partial(count_relations, _counted(plan), along_rows=True), partial(_column_counts, plan)
    return (
        assemble(row_spec, iter(row_out.unbind(0)), row_counts, (p.n,), limited=row_limits is not None),
        assemble(col_spec, iter(merged), col_counts, (p.m,), limited=col_limits is not None),
    )


def _plan(
    ranks: Ranks, p: SimilarityProblem, sizes: Sizes, paired: bool | None, ring: bool, engine: str, workspace: int
) -> Plan:
    total_x, total_y = sum(sizes.x), sum(sizes.y)
    if paired and total_x != total_y:
        raise ValueError(f"paired: expected as many rows in x as in y over all ranks, got {total_x} and {total_y}")
    by_place = p.row_ids is None and (total_x == total_y if paired is None else paired)
    row_ids, col_ids = p.row_ids, p.col_ids
    if by_place and not sizes.alike:
        # The pairs do not lie on the same ranks: they get ids, their places in X and Y.
        row_ids, col_ids = (
            torch.arange(offsets(of)[ranks.rank], offsets(of)[ranks.rank + 1], device=p.x.device)[None] for of in sizes
        )
        by_place = False
    local = replace(p, row_ids=row_ids, col_ids=col_ids, diagonal=by_place)
    plan = Plan(ranks, sizes.y, ring, engine, workspace, local, None, None, None)
    labels, ids, limits = (
        None if keys is None else plan.in_order(ranks.gather(keys[0], sizes.y))
        for keys in (p.col_labels, col_ids, p.col_limits)
    )
    return replace(plan, col_labels=labels, col_ids=ids, col_limits=limits)


@torch.no_grad()
def _normalised(plan: Plan, backend: str) -> Plan:
    """The plan with the log-sum-exps of the teacher over all ranks: this rank's rows, and all columns."""
    t = of_teacher(plan.local)
    engine = choose(backend, "reduce_similarity", t.x.device, t.x.dtype)
    rows, parts = Blocks.apply(t.x[0], t.y[0], t.scale, None, None, replace(plan, local=t, backend=engine))
    every = None
    if t.cols:
        (cols,) = _merge(plan, t, parts)
        every = plan.in_order(plan.ranks.gather(cols, plan.sizes))
    return replace(plan, local=replace(plan.local, row_limits=rows if t.rows else None), col_limits=every)


def _merge(plan: Plan, p: SimilarityProblem, col_parts: Tensor) -> list[Tensor]:
    """The columns of this rank from the parts that all ranks made of them, merged in rank order."""
    if not p.cols:
        return []
    from_all = _Swap.apply(col_parts.T, plan)  # [ranks, m, C]
    return [
        logsumexp(from_all[..., c]) if decode(code)[0] == "lse" else from_all[..., c].sum(0)
        for c, code in enumerate(p.cols)
    ]


class _Swap(torch.autograd.Function):
    """:meth:`Plan.from_all` with its gradient."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return plan.from_all(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        plan = ctx.plan
        return plan.in_order(plan.ranks.swap(list(grad.unbind(0)), plan.sizes)), None


def _counted(plan: Plan) -> SimilarityProblem:
    """Own rows against all columns, for counting."""
    everything = plan.local.y.new_empty((sum(plan.sizes), 0))
    return plan.problem(plan.local.x[0, :, :0], everything, plan.local.scale, plan.local.bias, None, 0)


def _column_counts(plan: Plan) -> dict[Any, Tensor]:
    by_relation = count_relations(_counted(plan), along_rows=False)
    parts = torch.stack([v[0] for v in by_relation.values()], 1)
    totals = plan.from_all(parts).sum(0)
    return {relation: totals[None, :, i] for i, relation in enumerate(by_relation)}
