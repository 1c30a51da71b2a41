"""pgd_step_ by one call of the compiled module, see csrc/cpu/pgd_step.cpp and csrc/cuda/pgd_step.cu."""

from __future__ import annotations

import torch

from ccu_fast import _C
from ccu_fast.backends.native.launch import DTYPES, address, on, on_gpu
from ccu_fast.backends.noise_problem import BadGradient, NoiseStep


def step(p: NoiseStep) -> None:
    """Write the step to ``p.delta``."""
    device = p.delta.device
    if on_gpu(device) and p.check and bool((~torch.isfinite(p.grad) if p.l2 else torch.isnan(p.grad)).any()):
        raise BadGradient
    # Without channels the samples are told apart by the l2 norm alone.
    samples, channels = p.delta.shape[0], 1 if p.channel is None else p.channel.shape[1]
    inner = p.delta.numel() // max(samples * channels, 1)
    if p.channel is None and not p.l2:
        samples, inner = 1, p.delta.numel()
    parts = None
    if on_gpu(device) and p.l2:
        parts = torch.empty(2, samples, _C.PGD_SLICES, dtype=torch.float64, device=device)
    size, eps, lower, upper = p.numbers
    guard, where = on(device)
    with guard:
        found = _C.pgd_step(
            delta=p.delta.data_ptr(),
            grad=p.grad.data_ptr(),
            image=p.image.data_ptr(),
            out=address(p.out),
            dtype=DTYPES[p.delta.dtype],
            grad_dtype=DTYPES[p.grad.dtype],
            samples=samples,
            channels=channels,
            inner=inner,
            step=size,
            eps=eps,
            lower=lower,
            upper=upper,
            channel=address(p.channel),
            l2=p.l2,
            check=p.check,
            parts=address(parts),
            **where,
        )
    if found:
        raise BadGradient
