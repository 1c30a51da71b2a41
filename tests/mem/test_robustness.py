"""Treatments of published pairs, each against what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from ccu_fast import extras
from ccu_fast.mem import denoisers, robustness
from ccu_fast.mem.denoisers import learned, nlmeans
from ccu_fast.mem.robustness import TREATMENTS, blur, crop, grey, jpeg, median, require, resize, treat
from ccu_fast.mem.surrogate import generator

IMAGES = torch.randint(0, 256, (3, 1, 16, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
COLOURS = torch.randint(0, 256, (3, 3, 13, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def as_pillow(image: torch.Tensor) -> Image.Image:
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def as_tensor(picture: Image.Image) -> torch.Tensor:
    array = np.array(picture)
    return torch.from_numpy(array[..., None] if array.ndim == 2 else array).permute(2, 0, 1)


def smooth(n: int, channels: int, size: int = 32) -> torch.Tensor:
    """Pictures without detail: 4×4 random values, enlarged."""
    low = 255 * torch.rand(n, channels, 4, 4, generator=torch.Generator().manual_seed(2))
    return F.interpolate(low, size=(size, size), mode="bicubic").clamp(0, 255).round().to(torch.uint8)


def noisy(images: torch.Tensor, width: int = 8) -> torch.Tensor:
    noise = torch.randint(-width, width + 1, images.shape, generator=torch.Generator().manual_seed(3))
    return (images.int() + noise).clamp(0, 255).to(torch.uint8)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).square().mean())


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


@pytest.mark.parametrize("images", [IMAGES, COLOURS], ids=["grey", "colours"])
def test_resize_and_median_are_pillow_s(images: torch.Tensor) -> None:
    for image, small, sorted_ in zip(images, resize(images), median(images), strict=True):
        picture = as_pillow(image)
        # Python rounds 6.5 to 6.
        half = (round(picture.width / 2), round(picture.height / 2))
        there_and_back = picture.resize(half, Image.Resampling.BICUBIC).resize(picture.size, Image.Resampling.BICUBIC)
        assert torch.equal(small, as_tensor(there_and_back))
        assert torch.equal(sorted_, as_tensor(picture.filter(ImageFilter.MedianFilter(3))))
    assert torch.equal(resize(images, 1.0), images)


def test_a_median_drops_single_pixels() -> None:
    point = torch.full((1, 1, 9, 9), 7, dtype=torch.uint8)
    expected = point.clone()
    point[0, 0, 4, 4] = 255
    assert torch.equal(median(point), expected)


def test_grey_is_pillow_s_luma() -> None:
    every = torch.stack(torch.meshgrid(*(torch.arange(0, 256, 15, dtype=torch.uint8),) * 3, indexing="ij"))
    images = every.reshape(1, 3, 18, -1)
    found = grey(images)
    assert torch.equal(found[0, :1], as_tensor(as_pillow(images[0]).convert("L")))
    assert torch.equal(found[:, :1].expand_as(found), found)
    assert torch.equal(grey(IMAGES), IMAGES)


@pytest.mark.parametrize("channels", [1, 3])
def test_nlmeans_removes_noise_and_keeps_the_order_of_colours(channels: int) -> None:
    pytest.importorskip("cv2")
    flat = torch.tensor([200, 100, 20][:channels], dtype=torch.uint8).view(1, -1, 1, 1).expand(2, channels, 24, 20)
    dirty = noisy(flat)
    assert error(nlmeans(dirty), flat) < 0.2 * error(dirty, flat)


@pytest.mark.parametrize("channels", [1, 3])
def test_learned_needs_no_clean_pictures(channels: int) -> None:
    clean = smooth(64, channels)
    dirty = noisy(clean)
    found = learned(dirty, generator(0, "l"))
    assert found.dtype == torch.uint8 and found.shape == dirty.shape
    assert error(found, clean) < 0.4 * error(dirty, clean)


def test_learned_depends_on_its_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoisers, "STEPS", 5)
    found = learned(COLOURS, generator(0, "l"))
    assert torch.equal(found, learned(COLOURS, generator(0, "l")))
    assert not torch.equal(found, learned(COLOURS, generator(1, "l")))
    before = torch.random.get_rng_state()
    with torch.no_grad():  # in which training works, too
        learned(COLOURS, generator(0, "l"))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", TREATMENTS)
def test_treat(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoisers, "STEPS", 5)
    if name == "nlmeans":
        pytest.importorskip("cv2")
    for images in (noisy(smooth(2, 3, 40) // 8), IMAGES[:2], COLOURS[..., :1, :1], IMAGES[:1, :, :1, :5]):
        before = images.clone()
        left = treat(name, images, generator(0, "t"))
        assert left.dtype == torch.uint8 and left.shape == images.shape and torch.equal(images, before)
        assert torch.equal(left, treat(name, images, generator(0, "t")))
        # By its defaults non-local means leaves random pixels alone.
        if images.shape[2] > 1 and (name not in ("grey", "nlmeans") or images.shape == (2, 3, 40, 40)):
            assert not torch.equal(left, images)
    with pytest.raises(ValueError, match="images: expected 1 or 3 channels, got 2"):
        treat(name, IMAGES.repeat(1, 2, 1, 1), generator(0, "t"))


def test_what_cannot_be_done_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="treatment: expected one of"):
        treat("sharpen", IMAGES, generator(0, "t"))
    with pytest.raises(TypeError, match="images: expected dtype"):
        treat("blur", IMAGES.float(), generator(0, "t"))
    monkeypatch.setitem(robustness.NEEDS, "nlmeans", ("cv2_absent",))
    monkeypatch.setitem(extras.EXTRAS["denoise"], "cv2_absent", "opencv-python-headless")
    with pytest.raises(ImportError, match=r"opencv-python-headless is needed .*pip install opencv-python-headless"):
        require("nlmeans")
