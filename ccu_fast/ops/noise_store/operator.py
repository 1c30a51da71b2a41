"""The noise store's arithmetic as torch operators, so that a compiled graph never breaks on it.

    ccu_fast::noise_add           images, noise, index → images with the noise of their rows, clamped
    ccu_fast::noise_add_out       the same into a tensor that is there, which may be the images
    ccu_fast::noise_update_       noise, in place, plus what an index brings to its rows, clamped

Whether an index is in range depends on values: that is checked inside, for CPU tensors on the host, for CUDA tensors by
the kernel, which fails the launch as torch's own indexing does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ccu_fast.ops import machine
from ccu_fast.ops.backend import load
from ccu_fast.ops.noise_store.problem import NoiseAddition, NoiseUpdate
from ccu_fast.ops.operator import in_place, operator

_ADD = "Tensor images, Tensor noise, Tensor? index, float lower, float upper, Tensor? limits, str backend"


def check_range(name: str, index: Tensor, rows: int) -> None:
    """Raise unless every id of a CPU index is in [0, rows). In a graph the operators do this."""
    if not machine.host_sees(index.device) or torch.compiler.is_compiling() or not index.numel():
        return
    low, high = (int(v) for v in index.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(f"{name}: expected rows in [0, {rows - 1}], got {low if low < 0 else high}")


def _add(
    images: Tensor,
    noise: Tensor,
    index: Tensor | None,
    lower: float,
    upper: float,
    limits: Tensor | None,
    backend: str,
    out: Tensor,
) -> None:
    if index is not None:
        check_range("index", index, noise.shape[0])
    if out.numel():
        load("noise_store", backend).add(NoiseAddition(images, noise, index, lower, upper, limits, out))


@operator(f"noise_add({_ADD}) -> Tensor", fake=lambda images, *_: torch.empty_like(images))
def _added(images: Tensor, *rest: Any) -> Tensor:
    out = torch.empty_like(images)
    arguments = (images, *rest, out)
    _add(*arguments)
    return out


@operator(f"noise_add_out({_ADD}, Tensor(a!) out) -> ()", fake=in_place)
def _add_out(*arguments: Any) -> None:
    _add(*arguments)


@operator("noise_update_(Tensor(a!) noise, Tensor index, Tensor delta, float eps, str backend) -> ()", fake=in_place)
def _update(noise: Tensor, index: Tensor, delta: Tensor, eps: float, backend: str) -> None:
    check_range("index", index, noise.shape[0])
    if delta.numel():
        rows, order = index.sort(stable=True)
        load("noise_store", backend).update(NoiseUpdate(noise, rows, order, delta, eps))


def added(*arguments: Any) -> Tensor:
    """A new tensor for the noisy images; arguments as the fields of :class:`NoiseAddition`, then the backend."""
    out: Tensor = (torch.ops.ccu_fast.noise_add if torch.compiler.is_compiling() else _added)(*arguments)
    return out


def add_out(*arguments: Any) -> None:
    """The same into ``out``, the last argument."""
    (torch.ops.ccu_fast.noise_add_out if torch.compiler.is_compiling() else _add_out)(*arguments)


def update(*arguments: Any) -> None:
    """``noise`` in place: noise, index, delta, eps, backend."""
    (torch.ops.ccu_fast.noise_update_ if torch.compiler.is_compiling() else _update)(*arguments)


def first_wrong(values: Tensor, slack: float | None, backend: str) -> int | None:
    """Where, counted through, the first value is that a store cannot hold; see the reference's. Not in a graph."""
    first: int | None = load("noise_store", backend).first_wrong(values, slack)
    return first
