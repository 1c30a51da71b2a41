"""What the ranks must know of each other before features travel, and the errors if they do not match."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ccu_fast.distributed.ranks import Ranks

MODES = ("auto", "gather", "ring")
# "auto" goes around the ring where y of all ranks and its gradient, in fp32, would need more bytes than this.
GATHER_BYTES = {"cpu": 2 << 30, "cuda": 8 << 30}

T = TypeVar("T")


class Sizes(NamedTuple):
    """Rows of x and of y on each rank, in rank order."""

    x: tuple[int, ...]
    y: tuple[int, ...]

    @property
    def alike(self) -> bool:
        """Every rank has as many rows of x as of y."""
        return self.x == self.y


# Argument, and what of it.
AGREED = (
    ("options", "options of the loss (as one number, 0 for none)"),
    ("x", "last dimension (that of y)"),
    ("x", "dtype (its place in fp32, fp16, bf16, fp64)"),
    ("mode", "value"),
    ("row_labels", "answer whether they are given"),
    ("row_ids", "answer whether they are given"),
    ("row_limits", "answer whether they are given"),
    ("col_limits", "answer whether they are given"),
    ("guide", "last dimension (0 where there is none)"),
    ("guide", "dtype (its place in fp32, fp16, bf16, fp64; 0 where there is none)"),
    ("teacher", "last dimension (0 where there is none)"),
    ("teacher", "dtype (its place in fp32, fp16, bf16, fp64; 0 where there is none)"),
    ("x", "requires_grad"),
    ("y", "requires_grad"),
    ("scale", "requires_grad (its own or that of bias)"),
    ("rows", "reductions, and cols, paired, normalize and bias or none (as one number)"),
    ("reduction", "value (its place in mean, sum, none)"),
    ("gradients", "value (its place in mean, sum)"),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def agree(
    ranks: Ranks,
    prepare: Callable[[], tuple[T, list[int]]],
    x: Any,
    *,
    equal: bool,
    agreed: Sequence[tuple[str, str]] = AGREED,
) -> tuple[T, Sizes]:
    """``prepare()`` on every rank, and every rank's numbers of rows.

    Args:
        ranks: who has to agree.
        prepare: checks this rank's arguments, or raises what is wrong with them; returns what it made of them and the
            numbers to exchange: the rows of x, the rows of y, and one for each of ``agreed``.
        x: the argument whose device carries the exchange, if it is a tensor.
        equal: trust that all ranks fit together and have the same sizes; nothing is exchanged.
        agreed: what has to be the same everywhere: arguments, and what of them.

    Raises:
        TypeError, ValueError: this rank's own error, or that of the first rank that has one, on every rank.
    """
    if equal or ranks.size == 1:
        prepared, (n, m, *_) = prepare()
        return prepared, Sizes((n,) * ranks.size, (m,) * ranks.size)
    device = x.device if isinstance(x, Tensor) else torch.device("cpu")
    try:
        prepared, numbers = prepare()
    except (TypeError, ValueError):
        ranks.table([0] * (3 + len(agreed)), device)  # the others would wait for it
        raise
    table = ranks.table([1, *numbers], device)
    refused = [rank for rank, row in enumerate(table) if not row[0]]
    if refused:
        raise ValueError(
            f"group: expected valid arguments on every rank, got an error on rank {refused[0]} (see there)"
        )
    for (name, what), column in zip(agreed, zip(*(row[3:] for row in table), strict=True), strict=True):
        if len(set(column)) > 1:
            raise ValueError(
                f"{name}: expected the same {what} on every rank of the group, got {list(column)} in rank order"
            )
    return prepared, Sizes(tuple(row[1] for row in table), tuple(row[2] for row in table))


def like(features: Tensor, options: str = "") -> list[int]:
    """What ``AGREED`` says of features and of the options of a loss, where nothing else could differ."""
    outline = zlib.crc32(options.encode()) if options else 0
    return [outline, features.shape[-1], DTYPES.index(features.dtype), *[0] * (len(AGREED) - 3)]


def ring(mode: str, sizes: Sequence[int], y: Tensor) -> bool:
    """Whether to go around the ring; the same answer on every rank, because it depends on nothing else."""
    if mode != "auto":
        return mode == "ring"
    bytes_per_row = y.shape[-1] * (y.element_size() + max(4, y.element_size()))
    return sum(sizes) * bytes_per_row > GATHER_BYTES.get(y.device.type, GATHER_BYTES["cpu"])
