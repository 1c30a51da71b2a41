"""The noise store's arithmetic as torch operators, so that a compiled graph never breaks on it.

    ccu_fast::noise_add           images, noise, index → images with the noise of their rows, clamped
    ccu_fast::noise_add_out       the same into a tensor that is there, which may be the images
    ccu_fast::noise_update_       noise, in place, plus what an index brings to its rows, clamped

Whether an index is in range depends on values: that is checked inside, for CPU tensors on the host, for CUDA tensors by
the kernel, which fails the launch as torch's own indexing does.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ccu_fast.backends import machine
from ccu_fast.backends.store_problem import NoiseAddition, NoiseUpdate

_LIBRARY = torch.library.Library("ccu_fast", "FRAGMENT")
_ADD = "Tensor images, Tensor noise, Tensor? index, float lower, float upper, Tensor? limits, str backend"
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(f"noise_add({_ADD}) -> Tensor", tags=_TAGS)
_LIBRARY.define(f"noise_add_out({_ADD}, Tensor(a!) out) -> ()", tags=_TAGS)
_LIBRARY.define("noise_update_(Tensor(a!) noise, Tensor index, Tensor delta, float eps, str backend) -> ()", tags=_TAGS)


def check_range(name: str, index: Tensor, rows: int) -> None:
    """Raise unless every id of a CPU index is in [0, rows). In a graph the operators do this."""
    if not machine.host_sees(index.device) or torch.compiler.is_compiling() or not index.numel():
        return
    low, high = (int(v) for v in index.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(f"{name}: expected rows in [0, {rows - 1}], got {low if low < 0 else high}")


def _backend(name: str) -> Any:
    return importlib.import_module(f"ccu_fast.backends.{name}.noise_store")


def _add_out(
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
        _backend(backend).add(NoiseAddition(images, noise, index, lower, upper, limits, out))


def _add(
    images: Tensor,
    noise: Tensor,
    index: Tensor | None,
    lower: float,
    upper: float,
    limits: Tensor | None,
    backend: str,
) -> Tensor:
    out = torch.empty_like(images)
    _add_out(images, noise, index, lower, upper, limits, backend, out)
    return out


def _update(noise: Tensor, index: Tensor, delta: Tensor, eps: float, backend: str) -> None:
    check_range("index", index, noise.shape[0])
    if delta.numel():
        rows, order = index.sort(stable=True)
        _backend(backend).update(NoiseUpdate(noise, rows, order, delta, eps))


def first_wrong(values: Tensor, slack: float | None, backend: str) -> int | None:
    """Where, counted through, the first value is that a store cannot hold; see the reference's. Not in a graph."""
    first: int | None = _backend(backend).first_wrong(values, slack)
    return first


_LIBRARY.impl("noise_add", _add, "CompositeExplicitAutograd")
_LIBRARY.impl("noise_add_out", _add_out, "CompositeExplicitAutograd")
_LIBRARY.impl("noise_update_", _update, "CompositeExplicitAutograd")
torch.library.register_fake("ccu_fast::noise_add", lambda images, *_: torch.empty_like(images), lib=_LIBRARY)
torch.library.register_fake("ccu_fast::noise_add_out", lambda *_: None, lib=_LIBRARY)
torch.library.register_fake("ccu_fast::noise_update_", lambda *_: None, lib=_LIBRARY)


def add(p: NoiseAddition, backend: str) -> None:
    """``p.out`` from the rest; through the operator only where a graph is being made."""
    arguments = (p.images, p.noise, p.index, p.lower, p.upper, p.limits, backend, p.out)
    if torch.compiler.is_compiling():
        torch.ops.ccu_fast.noise_add_out(*arguments)
    else:
        _add_out(*arguments)


def added(
    images: Tensor,
    noise: Tensor,
    index: Tensor | None,
    lower: float,
    upper: float,
    limits: Tensor | None,
    backend: str,
) -> Tensor:
    """A new tensor for the noisy images."""
    arguments = (images, noise, index, lower, upper, limits, backend)
    return torch.ops.ccu_fast.noise_add(*arguments) if torch.compiler.is_compiling() else _add(*arguments)


def update(noise: Tensor, index: Tensor, delta: Tensor, eps: float, backend: str) -> None:
    """``noise`` in place."""
    arguments = (noise, index, delta, eps, backend)
    if torch.compiler.is_compiling():
        torch.ops.ccu_fast.noise_update_(*arguments)
    else:
        _update(*arguments)
