"""The noise store by one call of the compiled module, see csrc/cpu/noise_add.cpp and csrc/cuda/noise_store.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast import _C
from ccu_fast.ops.native import DTYPES, address, on, on_gpu
from ccu_fast.ops.noise_store import reference
from ccu_fast.ops.noise_store.problem import NoiseAddition, NoiseUpdate


def add(p: NoiseAddition) -> None:
    """Write the noisy images to ``p.out``."""
    items, channels, inner = p.images.shape
    guard, where = on(p.images.device)
    with guard:
        _C.noise_add(
            images=p.images.data_ptr(),
            image_dtype=DTYPES[p.images.dtype],
            noise=p.noise.data_ptr(),
            noise_dtype=DTYPES[p.noise.dtype],
            index=address(p.index),
            items=items,
            channels=channels,
            inner=inner,
            rows=p.noise.shape[0],
            lower=p.lower,
            upper=p.upper,
            limits=address(p.limits),
            out=p.out.data_ptr(),
            **where,
        )


def update(p: NoiseUpdate) -> None:
    """Add to the rows of ``p.noise`` in place."""
    guard, where = on(p.noise.device)
    with guard:
        _C.noise_update(
            noise=p.noise.data_ptr(),
            noise_dtype=DTYPES[p.noise.dtype],
            rows=p.rows.data_ptr(),
            order=p.order.data_ptr(),
            count=p.rows.shape[0],
            total=p.noise.shape[0],
            size=p.noise.shape[1],
            delta=p.delta.data_ptr(),
            delta_dtype=DTYPES[p.delta.dtype],
            eps=p.eps,
            **where,
        )


def first_wrong(values: Tensor, slack: float | None) -> int | None:
    """As the reference's; a GPU looks in one kernel, and the host waits for the one number."""
    if not on_gpu(values.device):
        return reference.first_wrong(values, slack)
    found = torch.zeros(1, dtype=torch.int64, device=values.device)
    guard, where = on(values.device)
    with guard:
        _C.cuda_noise_check(
            values=values.data_ptr(),
            dtype=DTYPES[values.dtype],
            whole=slack is not None,
            slack=slack or 0.0,
            count=values.numel(),
            found=found.data_ptr(),
            stream=where["stream"],
        )
    behind = int(found)
    return values.numel() - behind if behind else None
