"""A rank's rows of S against the columns of all ranks: gathered at once, or block by block around a ring.

Both give the rows of this rank whole, and of every column the part that this rank's rows make. Columns come in the
order that the ring brings them: this rank's own first, then those of the rank before it, and so on. So the pairs of a
paired problem stand on the diagonal of the first block on every rank.

With W ranks of n rows each, M columns in all, per rank and in elements of the features' dtype:

    gather   sends 2 · (W − 1)/W · M·D (y; its gradient), stores y and its gradient for all M columns
    ring     sends 3 · (W − 1)/W · M·D (y; y again; its gradient, in fp32), stores three blocks

(a guide's columns travel as y does, and have no gradient)

and n·M·D · (8 − 2f) FLOPs, f the share of E that the workspace kept; a ring keeps none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ccu_fast.distributed.ranks import Pending, Ranks, offsets
from ccu_fast.ops.reduce_similarity.operator import run_backward, run_forward
from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem, decode

# Tags of the streams of a ring.
_BLOCK, _GRADIENT, _GUIDE = 0, 1, 2


@dataclass(frozen=True)
class Plan:
    """What all ranks agreed on before the first column travels.

    Attributes:
        ranks: who takes part.
        sizes: rows of y on each rank.
        ring: block by block instead of gathered.
        backend, workspace: as for one process.
        local: the problem of this rank's x and y; its column keys are those of the own block.
        col_labels, col_ids: int64 ``[M]`` keys of all columns in the order of the ring, or None.
        col_limits: their limits, or None.
    """

    ranks: Ranks
    sizes: tuple[int, ...]
    ring: bool
    backend: str
    workspace: int
    local: SimilarityProblem
    col_labels: Tensor | None
    col_ids: Tensor | None
    col_limits: Tensor | None

    @property
    def owners(self) -> list[int]:
        """Whose columns come first, second, …."""
        return [(self.ranks.rank - step) % self.ranks.size for step in range(self.ranks.size)]

    @property
    def starts(self) -> list[int]:
        """Where their columns start, and where the last ones end."""
        return offsets([self.sizes[owner] for owner in self.owners])

    def by_owner(self, t: Tensor) -> list[Tensor]:
        """Columns in the order of the ring as one piece for each rank, in rank order."""
        pieces = dict(zip(self.owners, t.split([self.sizes[owner] for owner in self.owners]), strict=True))
        return [pieces[rank] for rank in range(self.ranks.size)]

    def in_order(self, pieces: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`by_owner`."""
        return torch.cat([pieces[owner] for owner in self.owners])

    def from_all(self, parts: Tensor) -> Tensor:
        """Parts ``[M, C]`` of all columns, from own rows → parts ``[ranks, m, C]`` of own columns, from all rows."""
        own = self.sizes[self.ranks.rank]
        return torch.stack(self.ranks.swap(self.by_owner(parts), [own] * self.ranks.size))

    def problem(
        self, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, guide_y: Tensor | None, first: int
    ) -> SimilarityProblem:
        """x against the columns ``[first, first + len(y))``, whose guide is ``guide_y``."""

        def cut(keys: Tensor | None) -> Tensor | None:
            return None if keys is None else keys[None, first : first + y.shape[0]].contiguous()

        return replace(
            self.local,
            x=x[None],
            y=y[None],
            scale=scale,
            bias=bias,
            col_labels=cut(self.col_labels),
            col_ids=cut(self.col_ids),
            col_limits=cut(self.col_limits),
            guide_y=None if guide_y is None else guide_y[None],
            diagonal=self.local.diagonal and first == 0,
        )

    def engine(self, p: SimilarityProblem) -> str:
        """Only the reference handles problems without items."""
        return "reference" if 0 in (p.n, p.m, p.x.shape[-1]) else self.backend


class Blocks(torch.autograd.Function):
    """x ``[n, D]``, y ``[m, D]``, scale, bias, guide ``[m, Dg]``, plan → rows and columns.

    Rows ``[R, n]`` are whole, columns ``[C, M]`` this rank's part.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, guide: Tensor | None, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        ctx.plan = plan
        if plan.ring:
            rows, cols = _ring_forward(x, y, scale, bias, guide, plan)
            ctx.save_for_backward(x, y, scale, bias, guide, rows, cols)
        else:
            everything = plan.in_order(plan.ranks.gather(y, plan.sizes))
            if guide is not None:
                guide = plan.in_order(plan.ranks.gather(guide, plan.sizes))
            p = plan.problem(x, everything, scale, bias, guide, 0)
            rows, cols, stash = run_forward(p, plan.engine(p), plan.workspace, any(ctx.needs_input_grad))
            ctx.save_for_backward(x, everything, scale, bias, guide, rows, cols, stash)
        return rows[:, 0], cols[:, 0]

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_cols: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ccu_fast.distributed: second derivatives (create_graph=True) are not supported over ranks; "
                "gather the features and call the loss of the same name in ccu_fast"
            )
        plan, needs = ctx.plan, list(ctx.needs_input_grad[:4])
        x, y, scale, bias, guide, rows, cols, *stash = ctx.saved_tensors
        grads = grad_rows.contiguous()[:, None], grad_cols.contiguous()[:, None]
        if plan.ring:
            dx, dy, dscale, dbias = _ring_backward(x, y, scale, bias, guide, rows, cols, *grads, needs, plan)
        else:
            p = plan.problem(x, y, scale, bias, guide, 0)
            dx, dy, dscale, dbias = run_backward(p, plan.engine(p), *grads, rows, cols, stash[0], needs, plan.workspace)
            if needs[0]:
                dx = dx[0]
            if needs[1]:
                dy = plan.ranks.sum_to_owners(plan.by_owner(dy[0]))
        return (*(g if need else None for g, need in zip((dx, dy, dscale, dbias), needs, strict=True)), None, None)


def _ring_forward(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None, guide: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor]:
    starts = plan.starts
    p = plan.local
    rows = scale.new_empty((len(p.rows), 1, p.n))
    for row, code in zip(rows, p.rows, strict=True):
        row.fill_(-torch.inf if decode(code)[0] == "lse" else 0)
    cols = scale.new_empty((len(p.cols), 1, starts[-1]))
    for step, (block, block_guide, arriving) in enumerate(_blocks(y, guide, plan)):
        first, last = starts[step], starts[step + 1]
        block_problem = plan.problem(x, block, scale, bias, block_guide, first)
        block_rows, block_cols, _ = run_forward(block_problem, plan.engine(block_problem), plan.workspace, False)
        cols[:, :, first:last] = block_cols
        for row, new, code in zip(rows, block_rows, p.rows, strict=True):
            row.copy_(torch.logaddexp(row, new) if decode(code)[0] == "lse" else row + new)
        for transfer in arriving:
            transfer.wait()
    return rows, cols


def _ring_backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    guide: Tensor | None,
    rows: Tensor,
    cols: Tensor,
    grad_rows: Tensor,
    grad_cols: Tensor,
    needs: list[bool],
    plan: Plan,
) -> tuple[Tensor, ...]:
    """The blocks come by once more. The gradient of one starts where it meets a stranger's rows first and follows it.

    It is home after the last step; the own rows' share waits there.
    """
    starts, ranks = plan.starts, plan.ranks
    compute = scale.dtype
    dx = torch.zeros(x.shape if needs[0] else (0,), dtype=compute, device=x.device)
    home = dx.new_zeros(y.shape if needs[1] else (0,))
    dscale, dbias = torch.zeros_like(scale), torch.zeros_like(scale)
    follower: Tensor | None = None  # the gradient that belongs to this step's block, from the rank before
    sent = None
    for step, (block, block_guide, arriving) in enumerate(_blocks(y, guide, plan)):
        first, last = starts[step], starts[step + 1]
        p = plan.problem(x, block, scale, bias, block_guide, first)
        block_dx, block_dy, block_dscale, block_dbias = run_backward(
            p,
            plan.engine(p),
            grad_rows,
            grad_cols[:, :, first:last].contiguous(),
            rows,
            cols[:, :, first:last].contiguous(),
            x.new_empty((0,)),
            needs,
            plan.workspace,
        )
        dscale += block_dscale
        dbias += block_dbias
        if needs[0]:
            dx += block_dx[0]
        if needs[1] and step == 0:
            home += block_dy[0]
        elif needs[1]:
            mine = block_dy[0].to(compute)
            if sent is not None and follower is not None:
                sent.wait()
                mine = mine + follower
            following = plan.owners[(step + 1) % ranks.size]
            follower = mine.new_empty((plan.sizes[following], mine.shape[1]))
            # After the next block was asked for: on every rank in this order.
            sent = ranks.pass_on(mine, follower, _GRADIENT)
        for transfer in arriving:
            transfer.wait()
    if sent is not None and follower is not None:
        sent.wait()
        home = home + follower
    return dx.to(x.dtype), home.to(y.dtype), dscale, dbias


def _blocks(y: Tensor, guide: Tensor | None, plan: Plan) -> Iterator[tuple[Tensor, Tensor | None, list[Pending]]]:
    """Each block of y and of the guide, with the transfer of the next ones, which runs while these are used."""
    block, beside = y.contiguous(), None if guide is None else guide.contiguous()
    for owner in plan.owners[1:]:
        following = block.new_empty((plan.sizes[owner], block.shape[1]))
        transfers = [plan.ranks.pass_on(block, following, _BLOCK)]
        beside_following = None
        if beside is not None:
            beside_following = beside.new_empty((plan.sizes[owner], beside.shape[1]))
            transfers.append(plan.ranks.pass_on(beside, beside_following, _GUIDE))
        yield block, beside, transfers
        block, beside = following, beside_following
    yield block, beside, []
