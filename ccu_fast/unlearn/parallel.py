"""One run on several processes: each embeds its share of every batch, and all take the same step.

Every process holds the model, both sets and the frozen embeddings, and draws the same batches. The towers of a
:class:`SharedTowers` embed the process's own rows and gather the rest, so that a method sees the whole batch and its
loss, keys and heads included, is that of one process. The backward pass goes through the own rows alone; the mean over
the processes of what it leaves is the gradient of one process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ccu_fast.distributed.parameters import average_, average_gradients
from ccu_fast.distributed.ranks import Ranks, Value, offsets
from ccu_fast.unlearn.model import TwoModalityModel


class Alone:
    """A run on this process only."""

    is_first = True

    def towers(self, model: TwoModalityModel) -> TwoModalityModel:
        """What the method sees of the model."""
        return model

    def of_first(self, make: Callable[[], Value]) -> Value:
        """What ``make`` returns on the first process."""
        return make()

    def average_gradients(self, model: TwoModalityModel) -> None:
        """Make the gradients those of the whole batch."""

    def agree(self, model: TwoModalityModel) -> None:
        """Start from the same weights everywhere."""


class Shared(Alone):
    """A run that the processes of a group share.

    Args:
        group: this process is a member.
        key: of the run; must be the same on all.
        rows: of each set in a batch; at least one for each process.
        device: of the data.

    Raises:
        ValueError: another run on some process, more processes than rows.
    """

    def __init__(self, group: dist.ProcessGroup, key: str, rows: int, device: torch.device) -> None:
        self.ranks = Ranks(group)
        self.is_first = self.ranks.rank == 0
        if rows < self.ranks.size:
            raise ValueError(
                f"group: expected at most as many processes as a batch has items of each set ({rows}), got "
                f"{self.ranks.size}"
            )
        keys = {row[0] for row in self.ranks.table([int(key[:15], 16)], device)}
        if len(keys) > 1:
            raise ValueError(
                f"group: expected the same model, data and settings on all {self.ranks.size} processes, got "
                f"{len(keys)} different ones"
            )

    def towers(self, model: TwoModalityModel) -> TwoModalityModel:
        return cast("TwoModalityModel", SharedTowers(model, self.ranks))

    def of_first(self, make: Callable[[], Value]) -> Value:
        return self.ranks.of_first(make)

    def average_gradients(self, model: TwoModalityModel) -> None:
        average_gradients(model.parameters(), self.ranks.group)
        # The statistics of a normalisation layer are those of its process's rows.
        average_([statistics for statistics in model.buffers() if statistics.is_floating_point()], self.ranks.group)

    @torch.no_grad()
    def agree(self, model: TwoModalityModel) -> None:
        for value in (*model.parameters(), *model.buffers()):
            mine = value if self.is_first else torch.zeros_like(value)
            value.copy_(self.ranks.total(mine))


class SharedTowers:
    """A model whose towers embed this process's rows and gather those of the others; else the model itself.

    Process k of K embeds rows k, k + K, k + 2 K, …; the result is ``[N, D]`` in the order of the input, on every
    process. Batch statistics and dropout are those of the process's own rows.
    """

    def __init__(self, model: TwoModalityModel, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def embed_visual(self, visual: Tensor) -> Tensor:
        """Inputs → unit vectors ``[N, D]``."""
        return self._gathered(self._model.embed_visual, visual)

    def embed_other(self, other: Tensor) -> Tensor:
        """Inputs → unit vectors ``[N, D]``."""
        return self._gathered(self._model.embed_other, other)

    def _gathered(self, embed: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        size, rank = self._ranks.size, self._ranks.rank
        order = torch.cat([torch.arange(k, len(rows), size) for k in range(size)]).to(rows.device)
        sizes = [len(range(k, len(rows), size)) for k in range(size)]
        by_rank: Tensor = _Gather.apply(embed(rows[rank::size]), self._ranks, sizes)
        return by_rank[order.argsort()]


class _Gather(torch.autograd.Function):
    """All rows on every process. The gradient of the own ones is multiplied by the number of processes.

    Every process has the gradient of the whole loss by every row, so there is nothing to add up; the factor undoes
    the mean over the processes for what lies under the towers and not for what all compute alike, such as the heads.
    """

    @staticmethod
    def forward(ctx: Any, mine: Tensor, ranks: Ranks, sizes: list[int]) -> Tensor:
        ctx.size, ctx.start, ctx.stop = ranks.size, *offsets(sizes)[ranks.rank : ranks.rank + 2]
        return torch.cat(ranks.gather(mine, sizes))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.start : ctx.stop] * ctx.size, None, None
