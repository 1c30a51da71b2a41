"""The ranks of a process group and what they send each other; no other file of this folder calls a collective.

Everything is in the order of the group's ranks, and sums are taken in that order, so the same inputs give the same
bits. A rank that died or does not answer is noticed by the process group: its error, or its timeout, comes out here.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


class Ranks:
    """A process group as this package uses it.

    Args:
        group: None for the default group, or one that this rank is a member of. Where none is initialised, a process
            that was started alone is the only rank.

    Raises:
        RuntimeError: one of several processes (by ``WORLD_SIZE``) has not initialised torch.distributed.
        ValueError: this rank is not a member of the group.
    """

    group: dist.ProcessGroup | None

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            started = int(os.environ.get("WORLD_SIZE", "1"))
            if started > 1:
                raise RuntimeError(
                    f"group: expected an initialised torch.distributed process group for {started} processes "
                    "(WORLD_SIZE), got none"
                )
            self.group, self.rank, self.size, self._sums_on_the_way = None, 0, 1, False
            return
        world = dist.group.WORLD
        assert world is not None
        self.group = world if group is None else group
        self.rank = dist.get_rank(self.group)
        if self.rank < 0:
            raise ValueError(f"group: expected a group that rank {dist.get_rank()} is a member of, got another one")
        self.size = dist.get_world_size(self.group)
        # NCCL sums on its way; gloo emulates a reduce-scatter with an all-reduce, twice the bytes.
        self._sums_on_the_way = dist.get_backend(self.group) == "nccl"

    def table(self, values: Sequence[int], device: torch.device) -> list[list[int]]:
        """Every rank's ``values``, as host numbers: one small all-gather.

        On a GPU the host waits for it, but on a stream of its own, hence not for what the towers still compute.
        """
        with torch.cuda.stream(torch.cuda.Stream(device) if device.type == "cuda" else None):
            mine = torch.tensor(values, dtype=torch.int64, device=device)
            return torch.stack(self.gather(mine, [len(values)] * self.size)).tolist()

    def gather(self, mine: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Every rank's tensor, in rank order; rank r's has ``sizes[r]`` rows.

        Bytes sent by each rank: (ranks − 1) · its own, padded to the longest.
        """
        if self.group is None:
            return [mine]
        longest = max(sizes)
        padded = _pad(mine, longest)
        received = [torch.empty_like(padded) for _ in sizes]
        if padded.numel():
            dist.all_gather(received, padded, group=self.group)
        return [t[:size] for t, size in zip(received, sizes, strict=True)]

    def total(self, mine: Tensor) -> Tensor:
        """The sum over ranks, on every rank; small tensors."""
        result = mine.contiguous().clone()
        if self.group is not None:
            dist.all_reduce(result, group=self.group)
        return result

    def of_first(self, make: Callable[[], Value]) -> Value:
        """Call ``make`` on the group's first rank; every rank returns its value, or raises its error.

        Tensors come back on the device they were on. The value is pickled: for what is small or sent once.
        """
        if self.group is None:
            return make()
        sent: list[Any] = [None, None]
        if self.rank == 0:
            try:
                sent[0] = make()
            except Exception as error:
                sent[1] = error
        dist.broadcast_object_list(sent, src=dist.get_global_rank(self.group, 0), group=self.group)
        if sent[1] is not None:
            raise sent[1]
        value: Value = sent[0]
        return value

    def swap(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Rank r gets ``outgoing[r]``; what comes from rank r has ``sizes[r]`` rows.

        Bytes sent by each rank: everything but what is for itself.
        """
        if self.group is None:
            return list(outgoing)
        flat = torch.cat(list(outgoing))
        received = flat.new_empty((sum(sizes), *flat.shape[1:]))
        dist.all_to_all_single(received, flat, list(sizes), [len(t) for t in outgoing], group=self.group)
        return list(received.split(list(sizes)))

    def sum_to_owners(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum over ranks of ``parts[own rank]``, in the dtype of the parts.

        Bytes sent by each rank: everything but its own part, by a reduce-scatter or its equal.
        """
        mine = parts[self.rank]
        if self.size == 1 or not max(len(part) for part in parts):
            return mine
        if self._sums_on_the_way:
            longest = max(len(part) for part in parts)
            result = mine.new_empty((longest, *mine.shape[1:]))
            dist.reduce_scatter(result, [_pad(part, longest) for part in parts], group=self.group)
            return result[: len(mine)]
        received = self.swap(parts, [len(mine)] * self.size)
        total = torch.zeros_like(mine, dtype=torch.promote_types(mine.dtype, torch.float32))
        for part in received:
            total += part
        return total.to(mine.dtype)

    def pass_on(self, outgoing: Tensor, incoming: Tensor, tag: int) -> Pending:
        """Start to send a tensor to the next rank and to receive one from the rank before.

        Empty tensors are not sent. Neither may be touched before ``wait``. All ranks start their transfers in the same
        order; ``tag`` keeps two streams of them apart where the backend knows tags.
        """
        assert self.group is not None, "a process alone passes nothing on"
        outgoing = outgoing.contiguous()
        after = dist.get_global_rank(self.group, (self.rank + 1) % self.size)
        before = dist.get_global_rank(self.group, (self.rank - 1) % self.size)
        operations = [
            dist.P2POp(call, tensor, peer, self.group, tag)
            for call, tensor, peer in ((dist.isend, outgoing, after), (dist.irecv, incoming, before))
            if tensor.numel()
        ]
        return Pending(dist.batch_isend_irecv(operations) if operations else [], (outgoing, incoming))


@contextmanager
def processes(device: torch.device, *, timeout: timedelta | None = None) -> Iterator[tuple[int, int]]:
    """(rank, number of processes) as ``torchrun`` started them; (0, 1) without it. gloo on CPUs, NCCL on GPUs.

    Of several processes each makes its GPU the current one, which NCCL sends objects from. ``timeout``: how long one
    may wait for the others; by default torch's.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        yield (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    # torch imports this at an optimizer's first step. Its functions then take the group of that time for their default:
    # it would never end, and Python would end under its threads, now and then with an abort.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def own_device(name: str) -> str:
    """Of "cuda" the GPU of this process, as ``torchrun`` numbers them."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if name == "cuda" and local is not None else name


def gather_objects(value: Any) -> list[Any]:
    """The value of every process, in the order of ranks; pickled. One process alone gets its own."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for all processes."""
    gather_objects(None)


class Pending:
    """A transfer under way; holds its tensors until it is done."""

    def __init__(self, works: Sequence[dist.Work | None] = (), tensors: Sequence[Tensor] = ()) -> None:
        self._works, self._tensors = works, tensors

    def wait(self) -> None:
        """Return when the tensors may be used, or raise what went wrong."""
        for work in self._works:
            if work is not None:
                work.wait()
        self._works, self._tensors = (), ()


def offsets(sizes: Sequence[int]) -> list[int]:
    """Where each part starts, and where the last one ends."""
    return [0, *accumulate(sizes)]


def _pad(t: Tensor, rows: int) -> Tensor:
    if len(t) == rows:
        return t.contiguous()
    padded = t.new_zeros((rows, *t.shape[1:]))
    padded[: len(t)] = t
    return padded
