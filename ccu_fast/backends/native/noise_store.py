"""The noise store by one call of the compiled module, see csrc/cpu/noise_add.cpp and csrc/cuda/noise_store.cu."""

from __future__ import annotations

from ccu_fast import _C
from ccu_fast.backends.native.launch import DTYPES, address, on
from ccu_fast.backends.store_problem import NoiseAddition, NoiseUpdate


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
