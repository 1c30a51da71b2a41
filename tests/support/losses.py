"""A loss and its gradients against the same in plain torch, and what most losses are tried on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.support.oracle import unit
from tests.support.tolerance import assert_three_way

Loss = Callable[..., Tensor]


def differentiate(loss: Loss, data: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The loss and its gradients; features in ``dtype``, scalars in at least fp32."""
    leaves = {
        name: t.to(dtype if t.ndim else torch.promote_types(dtype, torch.float32)).clone().requires_grad_()
        for name, t in data.items()
    }
    value = loss(**leaves)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    grads = torch.autograd.grad((value * weights).sum(), list(leaves.values()))
    return {"loss": value} | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def compare(ours: Loss, torchs: Loss, data: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Three-way, from inputs that are exact in ``dtype``."""
    data = {name: t.to(dtype).double() if t.ndim else t.double() for name, t in data.items()}
    exact = differentiate(torchs, data, torch.float64)
    same, got = differentiate(torchs, data, dtype), differentiate(ours, data, dtype)
    for name, truth in exact.items():
        # The gradient of a scalar is a sum over pairs that cancel, and at most that of its features' size.
        magnitude = max(1.0, float(truth.detach().abs().max())) if truth.ndim == 0 else None
        # A relative error of eps in S is one of |S| eps in exp(S), and |S| is at most the scale.
        ulps = (64 if dtype == torch.float64 else 16) + 2 * float(data["scale"])
        assert_three_way(name, got[name], same[name], truth, ulps=ulps, magnitude=magnitude)


def features(*shape: int, m: int | None = None, scale: float = 14.0, bias: float | None = None) -> dict[str, Tensor]:
    *lead, n, d = shape
    y = (*lead, n if m is None else m, d)
    data = {"x": unit(*shape), "y": unit(*y), "scale": torch.tensor(scale)}
    return data if bias is None else data | {"bias": torch.tensor(bias)}


def logits(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    s = (x @ y.mT).to(scale.dtype) * scale
    return s if bias is None else s + bias
