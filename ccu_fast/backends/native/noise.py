"""pgd_step_ by one call of the compiled module, see csrc/cpu/pgd_step.cpp and csrc/cuda/pgd_step.cu."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ccu_fast import _C
from ccu_fast.backends.noise_problem import BadGradient, NoiseStep

_DTYPES = {torch.float32: _C.F32, torch.float16: _C.F16, torch.bfloat16: _C.BF16}


def step(p: NoiseStep) -> None:
    """Write the step to ``p.delta``."""
    device = p.delta.device
    cuda = device.type == "cuda"
    if cuda and p.check and bool(torch.isnan(p.grad).any()):
        raise BadGradient
    # One channel whose parameters hold for all: the samples are told apart by the l2 norm alone.
    samples, channels = p.delta.shape[0], p.parameters.shape[1]
    inner = p.delta.numel() // max(samples * channels, 1)
    if channels == 1 and not p.l2:
        samples, inner = 1, p.delta.numel()
    guard: AbstractContextManager[Any] = torch.cuda.device(device) if cuda else nullcontext()
    with guard:
        found = _C.pgd_step(
            delta=p.delta.data_ptr(),
            grad=p.grad.data_ptr(),
            image=p.image.data_ptr(),
            dtype=_DTYPES[p.delta.dtype],
            grad_dtype=_DTYPES[p.grad.dtype],
            samples=samples,
            channels=channels,
            inner=inner,
            **{name: p.parameters[i].data_ptr() for i, name in enumerate(("step", "eps", "lower", "upper"))},
            l2=p.l2,
            check=p.check,
            threads=torch.get_num_threads(),
            cuda=cuda,
            stream=torch.cuda.current_stream(device).cuda_stream if cuda else 0,
        )
    if found:
        raise BadGradient
