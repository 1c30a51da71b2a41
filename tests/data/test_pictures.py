"""One picture: what its pixels are, what is noted, and what it cannot cost."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ccu_fast.data import pictures
from ccu_fast.data.load import load_pairs
from ccu_fast.data.pictures import DEEP, PROFILE, TRANSPARENT, TURNED, BadPicture, decode, encode_png, read_pixels
from tests.support import mem_datasets as made
from tests.support.paths import ROOT

SHAPE = (3, 16, 16)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
GREY = (1, 16, 16)


def saved(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_16_bits(values: np.ndarray) -> bytes:
    """[H, W] or [H, W, 3 or 4]; Pillow writes no colours of 16 bits."""
    colour = {2: 0, 3: 2, 4: 6}[values.ndim if values.ndim == 2 else values.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(("size", "expected"), [((48, 24), (32, 16)), ((10, 25), (16, 40)), ((16, 31), (16, 31))])
def test_pixels_are_those_of_clips_preprocessing(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Resize the shorter side to 16 (bicubic, the longer one rounded down), cut out the centre."""
    original = made.picture(1, size)
    resized = original.resize(expected, Image.Resampling.BICUBIC)
    left, top = round((expected[0] - 16) / 2), round((expected[1] - 16) / 2)
    want = resized.crop((left, top, left + 16, top + 16))
    assert decode(made.encoded(1, size=size), SHAPE).permute(1, 2, 0).numpy().tobytes() == want.tobytes()


def test_a_published_picture_is_read_as_it_was_written() -> None:
    for channels in (1, 3):
        pixels = torch.randint(0, 256, (channels, 16, 64), dtype=torch.uint8)
        assert torch.equal(decode(encode_png(pixels), (channels, 16, 64)), pixels)
        assert encode_png(pixels) == encode_png(pixels.clone())
    with pytest.raises(ValueError, match="1 or 3 channels"):
        encode_png(torch.zeros(2, 4, 4, dtype=torch.uint8))


def test_orientation_and_modes(tmp_path: Path) -> None:
    upright = made.picture(3, (16, 16))
    tags = Image.Exif()
    tags[0x0112] = 6  # shown turned by 90° clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=tags)
    assert torch.equal(decode((tmp_path / "turned.png").read_bytes(), SHAPE), decode(made.encoded(3), SHAPE))
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK"):
        kind = "tiff" if mode == "CMYK" else "png"
        made.picture(4).convert(mode).save(tmp_path / f"x.{kind}")
        assert decode((tmp_path / f"x.{kind}").read_bytes(), SHAPE).shape == SHAPE
    for mode in ("I", "F"):
        Image.new(mode, (16, 16)).save(tmp_path / "deep.tiff")
        for reader in (read_pixels, lambda data: decode(data, SHAPE)):
            with pytest.raises(BadPicture, match=f"expected 8 or 16 bits a channel, got mode {mode}"):
                reader((tmp_path / "deep.tiff").read_bytes())


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = made.encoded(0, size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadPicture, match="decompression bomb"):
        decode(data, SHAPE)
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BadPicture, match="at most 4095 pixels"):
        decode(data, SHAPE, max_pixels=4095)


# ---- 16 bits


DEEP_VALUES = np.concatenate([np.arange(128), np.arange(65408, 65536)]).reshape(16, 16).astype(np.uint16)
GREYS: dict[str, Callable[[np.ndarray], bytes]] = {
    "png": png_of_16_bits,
    "tiff": lambda values: saved(Image.fromarray(values), "TIFF"),
    "tiff, most significant byte first": lambda values: saved(
        Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes()), "TIFF"
    ),
}


@pytest.mark.parametrize("write", GREYS.values(), ids=GREYS)
def test_grey_of_16_bits_is_scaled(write: Callable[[np.ndarray], bytes]) -> None:
    data = write(DEEP_VALUES)
    rounded = torch.from_numpy(np.round(DEEP_VALUES / 257).astype(np.uint8))
    notes: list[str] = []
    assert torch.equal(decode(data, GREY, notes=notes)[0], rounded)
    assert torch.equal(decode(data, SHAPE), rounded.expand(3, 16, 16))
    assert notes == [DEEP]
    exact = torch.from_numpy((DEEP_VALUES / 65535).astype(np.float32))
    torch.testing.assert_close(read_pixels(data), exact[None], rtol=1e-6, atol=0)


def test_a_grey_png_of_16_bits_that_pillow_reads_into_32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As older versions do."""
    picture = Image.fromarray(DEEP_VALUES.astype(np.int32), "I")
    picture.format = "PNG"
    monkeypatch.setattr(pictures, "_load", lambda *_: (picture, []))
    assert torch.equal(decode(b"", GREY)[0], torch.from_numpy(np.round(DEEP_VALUES / 257).astype(np.uint8)))


@pytest.mark.parametrize("channels", [3, 4])
def test_of_colours_of_16_bits_the_upper_8_are_read(channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (16, 16, channels)).astype(np.uint16)
    notes: list[str] = []
    pixels = decode(png_of_16_bits(values), SHAPE, notes=notes)
    assert torch.equal(pixels, torch.from_numpy((values[..., :3] >> 8).astype(np.uint8)).permute(2, 0, 1))
    assert set(notes) == ({DEEP} if channels == 3 else {DEEP, TRANSPARENT})


# ---- what is noted


def turned(number: int = 3) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = 6  # shown turned by 90° clockwise
    return saved(made.picture(number).transpose(Image.Transpose.ROTATE_90), exif=tags)


NOTED: dict[str, tuple[Callable[[], bytes], list[str]]] = {
    "plain": (lambda: made.encoded(3), []),
    "alpha": (lambda: saved(made.picture(3).convert("RGBA")), [TRANSPARENT]),
    "grey and alpha": (lambda: saved(made.picture(3).convert("LA")), [TRANSPARENT]),
    "one colour of a palette": (lambda: saved(made.picture(3).quantize(8), transparency=1), [TRANSPARENT]),
    "a palette": (lambda: saved(made.picture(3).quantize(8), transparency=bytes(range(0, 160, 20))), [TRANSPARENT]),
    "one colour": (lambda: saved(made.picture(3), transparency=(1, 2, 3)), [TRANSPARENT]),
    "profile": (lambda: saved(made.picture(3), icc_profile=b"profile"), [PROFILE]),
    "turned": (turned, [TURNED]),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_the_pixels_do_not_show_is_noted(name: str) -> None:
    make, expected = NOTED[name]
    data, notes = make(), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode(data, SHAPE, notes=notes)
        exact = read_pixels(data)
    assert notes == expected
    if "palette" not in name and "grey" not in name:
        assert torch.equal(pixels, decode(made.encoded(3), SHAPE))
    assert torch.equal((exact * 255).round().to(torch.uint8), pixels)


def test_both_systems_turn_a_picture(tmp_path: Path) -> None:
    for part in ("visual", "other"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.png").write_bytes(turned())
    data, _ = load_pairs(tmp_path)
    assert torch.equal((data.visual[0] * 255).round().to(torch.uint8), decode(made.encoded(3), SHAPE))


# ---- what it costs


@pytest.mark.parametrize("size", [(1, 1_000_000), (1_000_000, 1), (3, 70_000)])
def test_a_long_and_thin_picture_costs_what_is_cut_out_of_it(size: tuple[int, int]) -> None:
    """Resized whole it would take 3 to 150 GB; here it may take 256 MB."""
    code = f"""
import io, resource
from PIL import Image
from ccu_fast.data.pictures import decode
buffer = io.BytesIO()
Image.new("RGB", {size}, (10, 200, 30)).save(buffer, "PNG")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28),) * 2)
pixels = decode(buffer.getvalue(), (3, 224, 224))
assert pixels.flatten(1).unique(dim=1).flatten().tolist() == [10, 200, 30]
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, timeout=100)


def test_what_is_cut_out_of_a_long_picture_is_what_clip_cuts_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to Pillow's rounding between its two passes, which are in another order."""
    for number, size in enumerate([(20, 300), (300, 20), (7, 100), (90, 11), (40, 200)]):
        smooth = made.picture(number, (4, 4)).resize(size, Image.Resampling.BICUBIC)
        monkeypatch.setattr(pictures, "_LARGER", 1e9)
        whole = decode(saved(smooth), SHAPE).int()
        monkeypatch.setattr(pictures, "_LARGER", 0)
        assert int((decode(saved(smooth), SHAPE).int() - whole).abs().max()) <= 2


def test_large_pictures_are_refused_by_both_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = made.encoded(0, size=(20, 20))
    for reader in (read_pixels, lambda data, **limit: decode(data, SHAPE, **limit)):
        with pytest.raises(BadPicture, match="expected at most 399 pixels, got 20 x 20"):
            reader(data, max_pixels=399)


@pytest.mark.parametrize("data", [b"", b"no picture", made.encoded(1, size=(90, 90))[:-300]])
def test_what_is_no_picture_is_named_by_the_reader_of_pairs(tmp_path: Path, data: bytes) -> None:
    for part in ("visual", "other"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=r"path: expected a usable picture, got .*visual/a\.png: \w+"):
        load_pairs(tmp_path)


def test_pillow_says_nothing_on_the_terminal(tmp_path: Path) -> None:
    """A picture between Pillow's warning and its error, and a palette with transparency."""
    from ccu_fast.cli import main as entry

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert entry.main(["info", "--help"]) == 0
        assert warnings.filters[0][3].match("PIL.TiffImagePlugin") and warnings.filters[0][0] == "ignore"
        monkey = Image.MAX_IMAGE_PIXELS
        try:
            Image.MAX_IMAGE_PIXELS = 200
            decode(made.encoded(1), SHAPE)
        finally:
            Image.MAX_IMAGE_PIXELS = monkey
    assert not said
