"""Treatments of published pairs, each against what it says."""

from __future__ import annotations

import pytest
import torch

from ccu_fast.mem.robustness import TREATMENTS, blur, crop, jpeg, treat
from ccu_fast.mem.surrogate import generator

IMAGES = torch.randint(0, 256, (3, 1, 16, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_changes_noise_little_and_flat_images_not(channels: int) -> None:
    images = IMAGES.repeat(1, channels, 1, 1)
    read = jpeg(images)
    assert read.shape == images.shape
    error = (read.float() - images.float()).abs().mean()
    assert 1 < error < 25
    assert error < (jpeg(images, 30).float() - images.float()).abs().mean()
    flat = torch.full_like(images, 90)
    assert (jpeg(flat).int() - 90).abs().max() <= 1


def test_blur_by_hand() -> None:
    point = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    point[0, 0, 4, 4] = 255
    weight = torch.exp(-0.5 * torch.arange(-3, 4).double() ** 2)
    weight = weight / weight.sum()
    expected = (255 * weight[:, None] * weight).round().to(torch.uint8)
    out = blur(point)[0, 0]
    assert torch.equal(out[1:8, 1:8], expected)
    flat = torch.full_like(IMAGES, 200)
    assert torch.equal(blur(flat), flat)


def test_crop_is_a_window_that_depends_on_the_generator() -> None:
    ramp = torch.arange(64).expand(5, 1, 16, 64).to(torch.uint8)
    a, b = crop(ramp, generator(0, "c")), crop(ramp, generator(0, "c"))
    assert torch.equal(a, b)
    assert a.shape == ramp.shape
    spans = a[:, 0, 0, -1].int() - a[:, 0, 0, 0].int()
    assert ((spans - 57).abs() <= 1).all()  # 58 of 64 columns
    assert len(a[:, 0, 0, 0].unique()) > 1
    assert torch.equal(crop(ramp, generator(0, "c"), kept=1.0), ramp)


def test_treat() -> None:
    for name in TREATMENTS:
        assert not torch.equal(treat(name, IMAGES, generator(0, "t")), IMAGES)
    with pytest.raises(ValueError, match="treatment: expected one of"):
        treat("sharpen", IMAGES, generator(0, "t"))
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        jpeg(IMAGES.repeat(1, 2, 1, 1))
