"""Limits whose derivative does not depend on torch's version, and every place where something stands on one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ccu_fast.mem.noise import pgd
from ccu_fast.mem.views import Views
from ccu_fast.models.dual_encoder import SmallDualEncoder
from ccu_fast.models.within import within


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_are_those_of_clamp_and_the_derivative_is_1_on_the_limits(dtype: torch.dtype) -> None:
    values = torch.tensor([-3.0, -0.0, 0.0, 0.5, 1.0, 1.5, math.inf, math.nan], dtype=dtype, requires_grad=True)
    got = within(values, 0, 1)
    torch.testing.assert_close(got, values.clamp(0, 1), rtol=0, atol=0, equal_nan=True)
    (grad,) = torch.autograd.grad(got.nan_to_num().sum(), values)
    assert grad.tolist() == [0, 1, 1, 1, 1, 0, 0, 0]


def test_a_limit_may_be_infinite() -> None:
    values = torch.tensor([-1e30, 2.0, 3.0], requires_grad=True)
    got = within(values, -math.inf, 2.0)
    assert got.tolist() == values.clamp(max=2.0).tolist()
    assert torch.autograd.grad(got.sum(), values)[0].tolist() == [1, 1, 0]


def model() -> SmallDualEncoder:
    return SmallDualEncoder(20, 2, width=32, dim=16)


@pytest.mark.parametrize("shade", [0, 255])
def test_black_and_white_pixels_get_noise(shade: int) -> None:
    images, text = torch.full((2, 1, 16, 64), shade, dtype=torch.uint8), torch.eye(2, 16)
    views = Views(
        images[None], torch.eye(16).expand(1, 2, -1, -1), torch.eye(64).expand(1, 2, -1, -1), torch.zeros(2) > 0
    )
    for shown in (images, views):
        noise, _ = pgd(model(), shown, torch.zeros((1, 1, 16, 64), dtype=torch.int8), text, eps=2, step=1, steps=1)
        assert (noise != 0).float().mean() > 0.9


def test_a_scale_on_its_limit_can_fall() -> None:
    encoder = model()
    with torch.no_grad():
        encoder.log_scale.fill_(math.log(100.0))
    grads: tuple[Tensor, ...] = torch.autograd.grad(encoder.scale, encoder.log_scale)
    torch.testing.assert_close(grads[0], torch.tensor(100.0))
