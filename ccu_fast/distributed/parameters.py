"""Parameter gradients of all ranks, where neither DistributedDataParallel nor FSDP averages them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from ccu_fast import check
from ccu_fast.distributed.ranks import Ranks


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace every gradient by its mean over the ranks, in place::

        for p in parameters:
            p.grad = sum(p.grad of each rank) / ranks

    This does for parameters outside DistributedDataParallel what it does for its own: for the scale of a loss, or a
    small model that is not wrapped. It takes one all-reduce for each dtype and device.

    Args:
        parameters: the same ones in the same order on every rank. A parameter that needs no gradient is passed over;
            one that got none on this rank counts as 0.
        group: None for the default group.

    Raises:
        TypeError: a parameter or its gradient is a DTensor (fully_shard averages those itself), sparse, or no tensor.
        RuntimeError: one of several processes has not initialised torch.distributed; a rank failed or did not answer in
            time.

    Example, of one process alone:

    >>> scale = torch.nn.Parameter(torch.tensor(2.0))
    >>> scale.square().backward()
    >>> ccu_fast.distributed.average_gradients([scale])
    >>> scale.grad
    tensor(4.)
    """
    parameters = [p for p in parameters if not isinstance(p, Tensor) or p.requires_grad]
    for p in parameters:
        check.tensor("parameters", p)
        if p.grad is not None:
            check.tensor("parameters", p.grad)
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    average_([p.grad for p in parameters if p.grad is not None], group)


@torch.no_grad()
def average_(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Replace each tensor by its mean over the ranks, in place; on every rank the same shapes in the same order."""
    ranks = Ranks(group)
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for t in tensors:
        kinds.setdefault((t.dtype, t.device), []).append(t)
    for same in kinds.values():
        mean = ranks.total(torch.cat([t.flatten() for t in same])) / ranks.size
        for t, part in zip(same, mean.split([t.numel() for t in same]), strict=True):
            t.copy_(part.view_as(t))
