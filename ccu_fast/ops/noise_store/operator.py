"""The noise store's arithmetic as torch operators, so that a compiled graph never breaks on it.

    ccu_fast::noise_add_out    images with the noise of their rows, clamped, into a tensor that may be the images
    ccu_fast::noise_update_    noise, in place, plus what an index brings to its rows, clamped

Whether an index is in range depends on values: that is checked inside, for CPU tensors on the host, for CUDA tensors by
the kernel, which fails the launch as torch's own indexing does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ccu_fast.ops import machine
from ccu_fast.ops.backend import load
from ccu_fast.ops.noise_store.problem import NoiseAddition, NoiseUpdate
from ccu_fast.ops.operator import in_place, operator


@operator(
    "noise_add_out(Tensor images, Tensor noise, Tensor? index, float lower, float upper, Tensor? limits, "
    "Tensor(a!) out, str backend) -> ()",
    fake=in_place,
)
def add_out(*args: Any) -> None:
    """Write the noisy images to ``out``: the fields of :class:`NoiseAddition`, then the backend."""
    *fields, backend = args
    p = NoiseAddition(*fields)
    if p.index is not None:
        machine.check_range("index", "rows", p.index, p.noise.shape[0])
    if p.out.numel():
        load("noise_store", backend).add(p)


@operator("noise_update_(Tensor(a!) noise, Tensor index, Tensor delta, float eps, str backend) -> ()", fake=in_place)
def update(noise: Tensor, index: Tensor, delta: Tensor, eps: float, backend: str) -> None:
    """Add ``delta`` to the rows of ``noise`` that ``index`` names."""
    machine.check_range("index", "rows", index, noise.shape[0])
    if delta.numel():
        rows, order = index.sort(stable=True)
        load("noise_store", backend).update(NoiseUpdate(noise, rows, order, delta, eps))
