"""What every backend of the noise store receives: validated rows of noise and the operation on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 255  # of an int8 store, in one unit of a float one: the levels of an 8-bit pixel


@dataclass(frozen=True)
class NoiseAddition:
    """out[b] = clamp(images[b] + noise[index[b]], lower, upper).

    Integer noise counts steps of 1/255. uint8 images are pixels: float noise is rounded to whole steps first.

    Attributes:
        images: ``[B, C, E]``, uint8, fp32, fp16 or bf16 (fp64 for the reference); contiguous.
        noise: ``[N, C, E]``, int8, fp16 or fp32; contiguous.
        index: int64 ``[B]``, or None for the rows in their order.
        lower: least value, in the units of ``images`` (steps for uint8).
        upper: largest.
        limits: fp32 ``[2, C]``: lower and upper per channel in their place, or None. Not for uint8.
        out: like ``images``; may be it.
    """

    images: Tensor
    noise: Tensor
    index: Tensor | None
    lower: float
    upper: float
    limits: Tensor | None
    out: Tensor


@dataclass(frozen=True)
class NoiseUpdate:
    """noise[i] = clamp(noise[i] + Σ delta[b], −eps, eps) over all b with index[b] = i, added in the order of b.

    Sums are fp32, for int8 noise int32 (floating-point deltas are rounded to whole steps first).

    Attributes:
        noise: ``[N, E]``, int8, fp16 or fp32; contiguous.
        rows: int64 ``[B]``: the index, sorted.
        order: int64 ``[B]``: where in ``delta`` each of ``rows`` stands; equal rows in ascending order.
        delta: ``[B, E]``, int8 (steps) or floating point; contiguous.
        eps: in the units of ``noise``; steps for int8.
    """

    noise: Tensor
    rows: Tensor
    order: Tensor
    delta: Tensor
    eps: float


def steps_of(values: Tensor) -> Tensor:
    """Floating-point noise in whole steps: round(255 · values), to even; computed in fp32, fp64 for fp64."""
    wide = values if values.dtype == torch.float64 else values.float()
    return (wide * STEPS).round()
