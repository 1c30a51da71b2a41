"""pgd_step_ in plain torch, any device and dtype."""

from __future__ import annotations

import torch

from ccu_fast.ops.pgd_step.api import BadGradient, NoiseStep


def step(p: NoiseStep) -> None:
    """Write the step to ``p.delta``. Computes in fp64 for fp64 noise, in fp32 otherwise."""
    usable = torch.isfinite(p.grad) if p.l2 else ~torch.isnan(p.grad)
    if p.check and not bool(usable.all()):
        raise BadGradient
    compute = torch.float64 if p.delta.dtype == torch.float64 else torch.float32
    size, up, low, high = p.numbers if p.channel is None else p.channel.view(4, -1, *[1] * (p.delta.ndim - 2))
    delta, image = p.delta.to(compute), p.image.to(compute)
    grad = torch.where(usable, p.grad, 0).to(compute)
    if p.l2:
        rate = p.numbers[0] / _norms(grad)
        # Of a gradient so short that the rate is beyond the dtype the step is shorter, and not NaN.
        rate = torch.where(rate.isfinite(), rate, 0).clamp(max=torch.finfo(compute).max)
        delta = delta - rate.to(compute) * grad
        delta = delta * (p.numbers[1] / _norms(delta)).clamp(max=1).nan_to_num(1).to(compute)
    else:
        delta = (delta - size * grad.sign()).clamp(-up, up)
    noisy = (delta + image).clamp(low, high)
    p.delta.copy_(noisy - image)
    if p.out is not None:
        p.out.copy_(noisy)


def _norms(t: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of every sample, in fp64, shaped to broadcast."""
    samples = t.flatten(1) if t.ndim > 1 else t.unsqueeze(1)
    return torch.linalg.vector_norm(samples, dim=1, dtype=torch.float64).view(-1, *[1] * (t.ndim - 1))
