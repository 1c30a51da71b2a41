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
        parameters: ``[4, 1 or C]`` in fp32 (fp64 for fp64 noise): step, eps, lower, upper.
        l2: project to the Euclidean ball of a sample instead of the box.
        check: raise, before anything is written, for NaN (l2: or inf) in grad; otherwise make no step there.
    """

    delta: Tensor
    grad: Tensor
    image: Tensor
    parameters: Tensor
    l2: bool
    check: bool


class BadGradient(ValueError):
    """NaN (l2: or inf) in the gradient; nothing was written."""
