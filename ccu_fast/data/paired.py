"""Items that exist in two modalities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.data.disk_rows import DiskRows


@dataclass(frozen=True)
class PairedData:
    """N items, each with a visual and another view, an identity and, where there are classes, a label.

    Attributes:
        visual: ``[N, ...]`` what the visual tower takes: a tensor, or a :class:`~ccu_fast.data.disk_rows.DiskRows`,
            which is read by the batch.
        other: ``[N, ...]`` what the other tower takes, likewise.
        labels: int64 ``[N]``, class indices ≥ 0; None for pairs without classes, which is stored as −1 everywhere
            (see :attr:`labelled`).
        ids: int64 ``[N]``, unique: who the item is. Default 0 … N−1; give your own where two sets are compared.

    Raises:
        TypeError, ValueError: the first dimensions differ, a label is negative, an id occurs twice.

    >>> data = ccu_fast.unlearn.PairedData(torch.zeros(4, 8), torch.zeros(4, 6), torch.tensor([0, 0, 1, 1]))
    >>> data[data.labels == 1].ids
    tensor([2, 3])
    """

    visual: Tensor
    other: Tensor
    labels: Tensor = field(default=None)  # type: ignore[assignment]
    ids: Tensor = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for name in ("visual", "other"):
            if not isinstance(getattr(self, name), DiskRows):
                check.tensor(name, getattr(self, name), dtypes=None)
        unlabelled = self.labels is None
        if unlabelled:
            labels = torch.full((len(self.other),), -1, device=self.other.device)
            object.__setattr__(self, "labels", labels)
        check.tensor("labels", self.labels, dtypes=check.INTEGERS, ndim=1)
        if self.ids is None:
            object.__setattr__(self, "ids", torch.arange(len(self.labels), device=self.labels.device))
        check.tensor("ids", self.ids, dtypes=check.INTEGERS, ndim=1)
        for name in ("visual", "labels", "ids"):
            items = len(getattr(self, name))
            check.same(name, getattr(self, name), "other", self.other, dtype=False)
            if items != len(self.other):
                raise ValueError(f"{name}: expected {len(self.other)} items (as in other), got {items}")
        object.__setattr__(self, "labels", self.labels.long())
        object.__setattr__(self, "ids", self.ids.long())
        if len(self) and not unlabelled and int(self.labels.min()) < 0:
            raise ValueError(f"labels: expected class indices of at least 0, got {int(self.labels.min())}")
        if len(self.ids.unique()) != len(self):
            raise ValueError("ids: expected every id once, got repeated ones")

    def __len__(self) -> int:
        return len(self.other)

    @property
    def labelled(self) -> bool:
        """Whether the items have classes; an empty set has none."""
        return len(self) > 0 and int(self.labels[0]) >= 0

    def __getitem__(self, index: Tensor) -> PairedData:
        """The items of a boolean mask ``[N]`` or of int64 positions, each at most once; nothing is read from a disk."""
        labels = self.labels[index] if self.labelled else None
        visual, other = _chosen(self.visual, index), _chosen(self.other, index)
        return PairedData(visual, other, labels, self.ids[index])  # type: ignore[arg-type]

    def select(self, index: Tensor) -> PairedData:
        """Like indexing, without the checks."""
        return self._each(lambda inputs: _chosen(inputs, index))

    def batch(self, index: Tensor) -> PairedData:
        """Like :meth:`select`, in memory: for inner loops."""
        return self._each(lambda inputs: _rows(inputs, index))

    @property
    def on_disk(self) -> bool:
        """Whether some of the inputs are read by the batch."""
        return isinstance(self.visual, DiskRows) or isinstance(self.other, DiskRows)

    def in_memory(self) -> PairedData:
        """All items, in memory."""
        return self.batch(torch.arange(len(self), device=self.labels.device)) if self.on_disk else self

    def to(self, device: torch.device | str) -> PairedData:
        """The same items on another device; of inputs on a disk, what is read of them."""
        return self._each(lambda tensor: tensor.to(device))

    def swapped(self) -> PairedData:
        """The same items, the two modalities exchanged: data of a :class:`ccu_fast.models.swapped.Swapped` model."""
        changed = self._each(lambda tensor: tensor)
        object.__setattr__(changed, "visual", self.other)
        object.__setattr__(changed, "other", self.visual)
        return changed

    def _each(self, change: Callable[[Tensor], Tensor]) -> PairedData:
        changed = object.__new__(PairedData)
        for name in ("visual", "other", "labels", "ids"):
            object.__setattr__(changed, name, change(getattr(self, name)))
        return changed


def _chosen(inputs: Tensor, index: Tensor) -> Tensor:
    return inputs.select(index) if isinstance(inputs, DiskRows) else inputs[index]


def _rows(inputs: Tensor, index: Tensor) -> Tensor:
    """In memory; of positions index_select is the faster way."""
    if isinstance(inputs, DiskRows) or index.dtype == torch.bool:
        return inputs[index]
    return inputs.index_select(0, index)
