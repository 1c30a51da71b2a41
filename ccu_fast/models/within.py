"""Limits that do not stop what stands on them."""

from __future__ import annotations

import torch
from torch import Tensor


def within(values: Tensor, low: float, high: float) -> Tensor:
    """``values.clamp(low, high)``, whose derivative is 1 on the limits too.

    torch's own is 1 there up to 2.13 and 0 since 2.14, with which a black pixel would get no noise, and a scale that
    starts at its limit would stay there.

    Args:
        values: floating, any shape.
        low, high: the limits; ``low`` ≤ ``high``, either may be infinite.

    Returns:
        Like ``values``. Outside of the limits, and of NaN, the derivative is 0.

    Example:
        >>> pixels = torch.tensor([-1.0, 0.0, 255.0], requires_grad=True)
        >>> torch.autograd.grad(within(pixels, 0, 255).sum(), pixels)
        (tensor([0., 1., 1.]),)
    """
    inside = (values >= low) & (values <= high)
    return torch.where(inside, values, values.detach().clamp(low, high))
