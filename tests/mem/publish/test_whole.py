"""Pictures that keep their size, as they are published: every kind of them, exact, with what belongs to them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from ccu_fast.data.pictures import DEEP, PROFILE, TRANSPARENT, TURNED, decode_whole, measure
from ccu_fast.mem import fidelity
from ccu_fast.mem.fidelity import Fidelity, ssim, ssim_of_whole
from ccu_fast.mem.publish import whole as module
from ccu_fast.mem.publish.whole import published_picture
from ccu_fast.mem.views import stretch
from tests.data.test_pictures import png_of_16_bits, saved
from tests.support import mem_datasets as made

SIZE = (40, 23)
RGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY_PROFILE = RGB_PROFILE[:16] + b"GRAY" + RGB_PROFILE[20:]


def picture() -> Image.Image:
    return made.picture(3, SIZE)


def alpha() -> Image.Image:
    return made.picture(4, SIZE).convert("L")


def turned() -> bytes:
    tags = Image.Exif()
    tags[0x0112] = 6
    return saved(picture().transpose(Image.Transpose.ROTATE_90), exif=tags)


def with_alpha(mode: str) -> bytes:
    image = picture().convert(mode)
    image.putalpha(alpha())
    return saved(image)


# What is read, its mode when published, its pixels then, its profile, and what is noted.
KINDS: dict[str, tuple[Callable[[], bytes], str, Callable[[], Image.Image], bytes | None, list[str]]] = {
    "colour": (lambda: saved(picture()), "RGB", picture, None, []),
    "grey": (lambda: saved(picture().convert("L")), "L", lambda: picture().convert("L"), None, []),
    "black and white": (
        lambda: saved(picture().convert("1")),
        "L",
        lambda: picture().convert("1").convert("L"),
        None,
        [],
    ),
    "alpha": (lambda: with_alpha("RGB"), "RGBA", lambda: Image.open(io.BytesIO(with_alpha("RGB"))), None, []),
    "grey and alpha": (lambda: with_alpha("L"), "LA", lambda: Image.open(io.BytesIO(with_alpha("L"))), None, []),
    "palette": (
        lambda: saved(picture().quantize(8)),
        "RGB",
        lambda: picture().quantize(8).convert("RGB"),
        None,
        [],
    ),
    "clear palette": (
        lambda: saved(picture().quantize(8), transparency=bytes(range(0, 160, 20))),
        "RGBA",
        lambda: Image.open(io.BytesIO(saved(picture().quantize(8), transparency=bytes(range(0, 160, 20))))).convert(
            "RGBA"
        ),
        None,
        [],
    ),
    "one clear colour": (
        lambda: saved(picture(), transparency=picture().getpixel((0, 0))),
        "RGBA",
        lambda: Image.open(io.BytesIO(saved(picture(), transparency=picture().getpixel((0, 0))))).convert("RGBA"),
        None,
        [],
    ),
    "turned": (turned, "RGB", picture, None, [TURNED]),
    "profile": (lambda: saved(picture(), icc_profile=RGB_PROFILE), "RGB", picture, RGB_PROFILE, []),
    "grey profile": (
        lambda: saved(picture().convert("L"), icc_profile=GREY_PROFILE),
        "L",
        lambda: picture().convert("L"),
        GREY_PROFILE,
        [],
    ),
    "profile of other colours": (
        lambda: saved(picture(), icc_profile=GREY_PROFILE),
        "RGB",
        picture,
        None,
        [PROFILE],
    ),
    "16 bits": (
        lambda: png_of_16_bits(np.asarray(picture().convert("L")).astype(np.uint16) * 257 + 100),
        "L",
        lambda: picture().convert("L"),
        None,
        [DEEP],
    ),
    "16 bits, colours and alpha": (
        lambda: png_of_16_bits(np.asarray(Image.open(io.BytesIO(with_alpha("RGB")))).astype(np.uint16) * 256 + 9),
        "RGBA",
        lambda: Image.open(io.BytesIO(with_alpha("RGB"))),
        None,
        [DEEP],
    ),
}


def expected_noise(noise: torch.Tensor, height: int, width: int, colours: int) -> np.ndarray:
    """round(U n Uᵀ), ``[H, W, 1 or C]``, by dense matrices."""
    grid = noise.double().mean(0, keepdim=True) if colours == 1 else noise.double()
    axes = []
    for size, values in ((height, grid.shape[1]), (width, grid.shape[2])):
        index, weight = stretch(values, size, np.arange(size))
        matrix = torch.zeros(size, values, dtype=torch.float64)
        axes.append(matrix.scatter_add_(1, torch.from_numpy(index), torch.from_numpy(weight)))
    return np.asarray((axes[0] @ grid @ axes[1].T).permute(1, 2, 0))


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_pictures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 7)
    monkeypatch.setattr(module, "_COLUMNS", 11)
    make, mode, upright, profile, noted = KINDS[name]
    data, notes = make(), []
    colours = 1 if mode in ("L", "LA") else 3
    assert measure(data, notes=notes) == (SIZE[1], SIZE[0], colours) and notes == noted
    noise = torch.randint(-9, 10, (3, 8, 12), generator=torch.Generator().manual_seed(5), dtype=torch.int8)
    noise[:, :3] = 9  # the limit, everywhere around some pixels
    found = published_picture(decode_whole(data), noise)
    written = Image.open(io.BytesIO(found.png))
    assert (written.mode, written.size, found.size) == (mode, SIZE, SIZE)
    assert written.info.get("icc_profile") == profile
    original, pixels = (np.asarray(p).reshape(SIZE[1], SIZE[0], -1) for p in (upright(), written))
    change = pixels.astype(int) - original
    assert not change[:, :, colours:].any(), "alpha stays"
    noisy = expected_noise(noise, SIZE[1], SIZE[0], colours)
    want = np.clip(original[:, :, :colours] + np.rint(noisy), 0, 255)
    # A half may be rounded either way.
    differs = pixels[:, :, :colours] != want
    assert np.abs(noisy[differs] % 1 - 0.5).max(initial=0) < 1e-4
    assert np.abs(change).max() == 9 == found.sums.largest
    assert found.sums.squares == (change**2).sum() and found.sums.values == change[:, :, :colours].size


@pytest.mark.parametrize("size", [(16, 12), (60, 35), (35, 60), (5, 3), (1, 1), (300, 2), (3, 500)])
@pytest.mark.parametrize("channels", [1, 3])
def test_no_pixel_changes_by_more_than_the_largest_noise(size: tuple[int, int], channels: int) -> None:
    noise = torch.where(torch.rand(channels, 12, 16, generator=torch.Generator().manual_seed(1)) < 0.5, -127, 127)
    original = decode_whole(made.encoded(1, size=size))
    found = published_picture(original, noise.to(torch.int8))
    pixels = np.asarray(Image.open(io.BytesIO(found.png)))
    assert np.abs(pixels.astype(int) - original.pixels).max() == found.sums.largest <= 127
    if size == (16, 12):
        want = np.clip(original.pixels + np.asarray(noise.permute(1, 2, 0)), 0, 255)
        assert np.array_equal(pixels, want)  # of the grid's size: the noise itself


def test_one_clear_colour_of_16_bits() -> None:
    """Which 8 bits would not tell apart from others: it is dropped, and that is noted."""
    data = bytearray(png_of_16_bits(np.full((4, 4, 3), 1000, np.uint16)))
    where = data.index(b"IDAT") - 4
    body = b"tRNS" + struct.pack(">HHH", 1000, 1000, 1000)
    data[where:where] = struct.pack(">I", 6) + body + struct.pack(">I", zlib.crc32(body))
    notes: list[str] = []
    assert measure(bytes(data), notes=notes) == (4, 4, 3) and set(notes) == {TRANSPARENT, DEEP}
    assert decode_whole(bytes(data)).pixels.shape == (4, 4, 3)


@pytest.mark.parametrize("size", [(11, 11), (40, 70), (26, 57)])
def test_fidelity_in_parts_is_that_of_the_whole(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "_ROWS", 16)
    monkeypatch.setattr(fidelity, "_COLUMNS", 13)
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    b = np.clip(a.astype(int) + rng.integers(-8, 9, a.shape), 0, 255).astype(np.uint8)
    x, y = (torch.from_numpy(t).permute(2, 0, 1)[None].contiguous() for t in (a, b))
    assert ssim_of_whole(a, b) == pytest.approx(float(ssim(x, y)), abs=1e-12)
    whole, parts = Fidelity(), Fidelity()
    whole.add(x, y)
    parts.add_whole(a, b)
    assert parts.report() == pytest.approx(whole.report(), abs=1e-12)
    parts.add_whole(a[:10], b[:10])  # too small for the window
    assert (parts.pictures, parts.compared) == (2, 1)


def test_a_cut_picture_is_bad(tmp_path: Path) -> None:
    for call in (measure, decode_whole):
        reader: Any = call
        with pytest.raises(ValueError, match="truncated"):
            reader(made.encoded(1, size=(90, 90))[:-300])
        with pytest.raises(ValueError, match="at most 99 pixels"):
            reader(made.encoded(1, size=(10, 10)), max_pixels=99)
