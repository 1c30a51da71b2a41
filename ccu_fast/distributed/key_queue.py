"""KeyQueue: the keys of past batches, as negatives or as positives of the next one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ccu_fast import check
from ccu_fast.distributed.agreement import agree
from ccu_fast.distributed.ranks import Ranks
from ccu_fast.ops.operator import never

# What ranks compare of the keys that they put into one queue.
_ALIKE = (
    ("keys", "last dimension"),
    ("dtype", "value (its place in fp16, bf16, fp32, fp64)"),
    ("labels", "answer whether they are given"),
)


class KeyQueue(nn.Module):
    """The keys of the latest batches, first in, first out: a momentum queue, a cross-batch memory or a bank of keys::

        bank[(place + torch.arange(n)) % capacity] = keys;  place = (place + n) % capacity

    The keys and labels are buffers, so a checkpoint has them. They get no gradient. Inside a module that
    DistributedDataParallel wraps, which gives all ranks the buffers of rank 0, it has to be one with ``gather``.

    Args:
        capacity: how many keys it holds at most.
        dim: length of a key, D.
        labelled: every key has an int64 label.
        gather: over several ranks put in the keys of all of them, in rank order, so that every rank holds the same
            queue; every rank has to call :meth:`enqueue`. Without it a rank's queue holds what it is given.
        group: with ``gather``, None for the default group.
        dtype, device: of the keys.

    Raises:
        TypeError, ValueError: an argument outside its range.

    Source: He et al. 2020 (arXiv 1911.05722), sec. 3.2; with labels Wang et al. 2020 (arXiv 1912.06798), algorithm 1.

    >>> queue = ccu_fast.KeyQueue(4, 2)
    >>> queue.enqueue(torch.eye(2)), queue.enqueue(-torch.eye(2)), queue.enqueue(torch.ones(1, 2))
    (2, 4, 4)
    >>> queue.keys.int().tolist()
    [[1, 1], [0, 1], [-1, 0], [0, -1]]
    >>> x = torch.eye(2)
    >>> ccu_fast.info_nce(x, x, scale=2.0, negatives=queue.keys, in_batch=False)  # MoCo
    tensor(0.9883)
    """

    bank: Tensor
    bank_labels: Tensor | None

    def __init__(
        self,
        capacity: int,
        dim: int,
        *,
        labelled: bool = False,
        gather: bool = False,
        group: dist.ProcessGroup | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.capacity = check.integer("capacity", capacity, low=1)
        self.dim = check.integer("dim", dim, low=1)
        self.labelled = check.boolean("labelled", labelled)
        self.gather = check.boolean("gather", gather)
        self.group = group
        if dtype not in check.FLOATS:
            raise TypeError(f"dtype: expected {check.names(check.FLOATS)}, got {dtype}")
        self.register_buffer("bank", torch.zeros(capacity, dim, dtype=dtype, device=device))
        labels = torch.full((capacity,), -1, device=device) if labelled else None
        self.register_buffer("bank_labels", labels)
        # Where the next key goes, and how many there are. As numbers, so that nobody has to wait for a GPU.
        self._place = self._filled = 0

    @property
    def keys(self) -> Tensor:
        """The keys it holds, ``[filled, D]``: a view, which the next :meth:`enqueue` changes."""
        return self.bank[: self._filled]

    @property
    def labels(self) -> Tensor:
        """Their labels, int64 ``[filled]``."""
        if self.bank_labels is None:
            raise ValueError("labelled: expected True for a queue whose labels are asked for, got False")
        return self.bank_labels[: self._filled]

    def __len__(self) -> int:
        return self._filled

    @never
    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor | None = None) -> int:
        """Put keys in, over the oldest where it is full.

        After the backward pass of a loss that has the queue's keys, which it needs unchanged.

        Args:
            keys: ``[n, D]``; of more than ``capacity`` the last ones stay.
            labels: int64 ``[n]``, of a labelled queue. A negative one keeps its key out of every loss.

        Returns:
            How many keys it holds now.

        Raises:
            TypeError, ValueError: a shape or dtype that does not fit, labels where there are none or the reverse.
        """
        if self.gather:
            keys, labels = self._of_all(keys, labels)
        else:
            self._check(keys, labels)
        keys = keys[-self.capacity :]
        labels = None if labels is None else labels[-self.capacity :]
        first = min(len(keys), self.capacity - self._place)
        for bank, new in ((self.bank, keys), (self.bank_labels, labels)):
            if bank is not None and new is not None:
                bank[self._place : self._place + first] = new[:first].to(bank.dtype)
                bank[: len(new) - first] = new[first:].to(bank.dtype)
        self._filled = min(self.capacity, self._filled + len(keys))
        self._place = (self._place + len(keys)) % self.capacity
        return self._filled

    def _check(self, keys: Tensor, labels: Tensor | None) -> None:
        check.tensor("keys", keys, ndim=2)
        check.shape("keys", keys, (len(keys), self.dim))
        check.same("keys", keys, "the queue", self.bank, dtype=False)
        if (labels is not None) != self.labelled:
            want, got = ("a tensor", "None") if self.labelled else ("None for a queue without labels", "a tensor")
            raise ValueError(f"labels: expected {want}, got {got}")
        if labels is not None:
            check.tensor("labels", labels, dtypes=check.INTEGERS, ndim=1)
            check.shape("labels", labels, (len(keys),))
            check.same("labels", labels, "the queue", self.bank, dtype=False)

    def _of_all(self, keys: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        ranks = Ranks(self.group)

        def prepare() -> tuple[Tensor, list[int]]:
            self._check(keys, labels)
            dtype = check.FLOATS.index(self.bank.dtype)
            return keys.to(self.bank.dtype), [len(keys), len(keys), keys.shape[-1], dtype, labels is not None]

        own, sizes = agree(ranks, prepare, keys, equal=False, agreed=_ALIKE)
        every = torch.cat(ranks.gather(own.detach(), sizes.x))
        return every, None if labels is None else torch.cat(ranks.gather(labels.long(), sizes.x))

    def get_extra_state(self) -> Tensor:
        """Where the next key goes, how many there are, and the capacity."""
        return torch.tensor([self._place, self._filled, self.capacity])

    def set_extra_state(self, state: Any) -> None:
        """Go on where a checkpoint was."""
        place, filled, capacity = state.tolist()
        if capacity != self.capacity:
            raise ValueError(f"capacity: expected {self.capacity} in the checkpoint, got {capacity}")
        self._place, self._filled = place, filled

    def extra_repr(self) -> str:
        return f"{self.capacity}, {self.dim}, labelled={self.labelled}, gather={self.gather}, filled={self._filled}"
