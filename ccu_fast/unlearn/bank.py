"""More keys than a batch has: frozen embeddings, drawn once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ccu_fast import check


@dataclass(frozen=True)
class KeyBank:
    """Frozen embeddings, with the labels and ids that decide their role.

    A queue that replaces its oldest keys serves encoders that move; these keys come from the frozen model and never go
    stale, so they are drawn once and stay.

    Attributes:
        keys: ``[K, D]`` unit vectors, without gradients.
        labels: int64 ``[K]``; negative = none.
        ids: int64 ``[K]``.

    Raises:
        TypeError, ValueError: labels or ids of another length.

    >>> ids = torch.arange(4)
    >>> len(ccu_fast.unlearn.KeyBank(keys=torch.eye(4), labels=ids % 2, ids=ids).draw(2, seed=0))
    2
    """

    keys: Tensor
    labels: Tensor
    ids: Tensor

    def __post_init__(self) -> None:
        check.tensor("keys", self.keys, ndim=2)
        for name in ("labels", "ids"):
            check.tensor(name, getattr(self, name), dtypes=check.INTEGERS)
            check.shape(name, getattr(self, name), [len(self.keys)])
        object.__setattr__(self, "keys", self.keys.detach())

    def __len__(self) -> int:
        return len(self.keys)

    def draw(self, size: int, seed: int) -> KeyBank:
        """``size`` of the keys at random, each at most once; all of them where there are fewer."""
        check.integer("size", size, low=0)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:size]
        rows = order.sort().values.to(self.keys.device)
        return KeyBank(self.keys[rows], self.labels[rows], self.ids[rows])
