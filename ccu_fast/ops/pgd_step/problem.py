"""What every backend of pgd_step_ receives: one validated step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class NoiseStep:
    """delta, in place, one projected step against grad.

    Attributes:
        delta: ``[B, C, ...]``, fp32, fp16, bf16 or fp64; contiguous.
        grad: its shape, floating point; contiguous.
        image: its shape and dtype; contiguous.
        numbers: step, eps, lower, upper.
        channel: the four per channel in their place, ``[4, C]`` in fp32 (fp64 for fp64 noise), or None. Step and eps
            of l2 are numbers all the same.
        out: like delta, for the noisy images; contiguous; or None.
        l2: project to the Euclidean ball of a sample instead of the box.
        check: raise, before anything is written, for NaN (l2: or inf) in grad; otherwise make no step there.
    """

    delta: Tensor
    grad: Tensor
    image: Tensor
    numbers: tuple[float, float, float, float]
    channel: Tensor | None
    out: Tensor | None
    l2: bool
    check: bool


class BadGradient(ValueError):
    """NaN (l2: or inf) in the gradient; nothing was written."""
