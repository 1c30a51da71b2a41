"""Counts what one rank sends and multiplies, for any code that runs on it.

Bytes are the least that any algorithm sends: an all-gather sends the rank's shard to every other rank, a reduce-scatter
every part but its own, an all-reduce does both in turn. FLOPs are two for every product of a matrix multiplication that
torch runs, in forward and backward; elementwise work (a few operations per pair) is not counted, neither that of the
C++ and Triton kernels nor torch's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(Counter[str]):
    """Bytes sent by this rank, by collective."""

    @property
    def total(self) -> int:  # type: ignore[override]
        """All of them."""
        return sum(self.values())


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _others(group: Any) -> int:
    return dist.get_world_size(group) - 1


# collective → bytes sent, from its arguments. A collective that is not listed raises, so that none goes uncounted.
def _gather(out: Any, mine: Tensor, group: Any = None, **_: Any) -> int:
    return _bytes(mine) * _others(group)


def _reduce(mine: Tensor, op: Any = None, group: Any = None, **_: Any) -> int:
    return 2 * _bytes(mine) * _others(group) // dist.get_world_size(group)


def _scatter(out: Tensor, parts: Any, op: Any = None, group: Any = None, **_: Any) -> int:
    return _bytes(out) * _others(group)


def _swap_lists(out: list[Tensor], mine: list[Tensor], group: Any = None, **_: Any) -> int:
    return sum(_bytes(t) for r, t in enumerate(mine) if r != dist.get_rank(group))


def _swap(out: Tensor, mine: Tensor, out_sizes: Any = None, in_sizes: Any = None, group: Any = None, **_: Any) -> int:
    kept = in_sizes[dist.get_rank(group)] if in_sizes else len(mine) // dist.get_world_size(group)
    return _bytes(mine) - _bytes(mine[:1]) * kept if len(mine) else 0


def _from_root(t: Tensor, scatter_list: Any = None, src: int | None = None, group: Any = None, **_: Any) -> int:
    return sum(_bytes(part) for r, part in enumerate(scatter_list or ()) if r != dist.get_rank(group))


def _point_to_point(operations: list[dist.P2POp]) -> int:
    return sum(_bytes(operation.tensor) for operation in operations if operation.op is dist.isend)


_RULES: dict[str, Callable[..., int]] = {
    "all_gather": _gather,
    "all_gather_into_tensor": _gather,
    "all_reduce": _reduce,
    "reduce_scatter": _scatter,
    "all_to_all": _swap_lists,
    "all_to_all_single": _swap,
    "scatter": _from_root,
    "batch_isend_irecv": _point_to_point,
}
_UNKNOWN = ("broadcast", "reduce_scatter_tensor", "send", "gather", "reduce", "all_gather_object", "_all_gather_base")


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts what this rank sends through torch.distributed while the context lasts."""
    traffic = Traffic()

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            traffic[name] += _RULES[name](*args, **kwargs)
            return call(*args, **kwargs)

        return wrapper

    with ExitStack() as stack:
        for name in _RULES:
            stack.enter_context(mock.patch.object(dist, name, counted(name, getattr(dist, name))))
        for name in _UNKNOWN:
            error = AssertionError(f"{name} was called, which is not counted")
            stack.enter_context(mock.patch.object(dist, name, side_effect=error))
        yield traffic


class CountFlops(TorchDispatchMode):
    """Counts the FLOPs of the matrix multiplications that torch runs while the context lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "bmm"):
            self._add(*args[:2])
        elif name in ("addmm", "baddbmm"):
            self._add(*args[1:3])
        elif any(word in name for word in ("matmul", "linear", "einsum", "addbmm", "_mm", "attention")):
            raise AssertionError(f"{func} is not counted")
        return func(*args, **(kwargs or {}))

    def _add(self, a: Tensor, b: Tensor) -> None:
        self.total += 2 * a.numel() * b.shape[-1]
