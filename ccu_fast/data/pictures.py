"""One picture: encoded bytes → the pixels a model takes, and pixels → PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = frozenset({"bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp"})
MAX_PIXELS = 178_956_970  # where Pillow, too, takes a picture for a decompression bomb
_LARGER = 4  # than what is cut out of it: a picture that may be resized whole
_ORIENTATION = 0x0112  # the EXIF tag

# What turns into 8-bit RGB or grey without a choice of ours; whole numbers of 32 bits and fractions are not among them.
_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})

# What a picture has that its pixels, as they are read, do not show.
TRANSPARENT = "transparency dropped"
PROFILE = "colour profile not applied"
DEEP = "16 bits a channel made 8"
TURNED = "turned by the EXIF orientation"

Box = tuple[float, float, float, float]


class BadPicture(ValueError):
    """A picture that cannot be used; the message says why, without its name."""


def is_picture(name: str) -> bool:
    """Whether a file's name ends as one of a picture."""
    return name.rpartition(".")[2].lower() in EXTENSIONS


def decode(
    data: bytes, shape: tuple[int, int, int], *, max_pixels: int = MAX_PIXELS, notes: list[str] | None = None
) -> Tensor:
    """The pixels a model takes, by CLIP's preprocessing: the picture is resized (bicubic, antialiased) until it just
    covers H×W, then its centre is cut out. Two things are ours: colours are converted first, because Pillow resizes
    palettes by nearest neighbour, and the EXIF orientation is applied, because a PNG does not carry it on.

    A picture of H×W pixels comes back unchanged, so what is published is read as it was written.

    Args:
        data: an encoded picture, its first frame is taken.
        shape: (C, H, W) with C = 1 (grey) or 3 (RGB; transparency is dropped as CLIP drops it).
        max_pixels: more than these (width · height) are refused before they are decoded.
        notes: gets what the pixels do not show of it: ``TRANSPARENT``, ``PROFILE``, ``DEEP``, ``TURNED``.

    Returns:
        uint8 ``[C, H, W]``. 16-bit grey is rounded to 8; of 16-bit colours Pillow reads the upper 8.

    Raises:
        BadPicture: no picture, truncated, too large, or of an unsupported kind.
    """
    channels, height, width = shape
    loaded, found = _load(data, max_pixels)
    loaded = _of_mode(_of_8_bits(loaded), "L" if channels == 1 else "RGB")
    if loaded.size != (width, height):
        loaded = _covering(loaded, width, height)
    if notes is not None:
        notes += found
    return _pixels(loaded, shape)


def decode_windows(
    data: bytes, shape: tuple[int, int, int], boxes: Sequence[Box], *, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """Windows of a picture as a model takes them, resized as by :func:`decode`; the picture is decoded once.

    Args:
        data: an encoded picture.
        shape: (C, H, W), as of :func:`decode`.
        boxes: (left, top, right, bottom) of each window in pixels of the upright picture, which need not be whole.
        max_pixels: as of :func:`decode`.

    Returns:
        uint8 ``[windows, C, H, W]``.

    Raises:
        BadPicture: as of :func:`decode`.
    """
    from PIL.Image import Resampling

    channels, height, width = shape
    loaded = _of_mode(_of_8_bits(_load(data, max_pixels)[0]), "L" if channels == 1 else "RGB")
    cut = [loaded.resize((width, height), Resampling.BICUBIC, box=box) for box in boxes]
    return torch.stack([_pixels(picture, shape) for picture in cut])


@dataclass(frozen=True)
class Whole:
    """A picture of its own size, as it is published.

    Attributes:
        pixels: uint8 ``[H, W, bands]``, not to be written to: grey, grey and alpha, RGB, or RGB and alpha.
        profile: the ICC profile that these pixels are in, or None.
    """

    pixels: np.ndarray
    profile: bytes | None = None

    @property
    def colours(self) -> int:
        """Bands without alpha: 1 or 3."""
        return 1 if self.pixels.shape[2] < 3 else 3


def decode_whole(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Whole:
    """A picture with all its pixels, upright, with its transparency and its colour profile.

    Grey stays grey; palettes, CMYK and YCbCr become RGB; transparency of any kind becomes an alpha channel.

    Raises:
        BadPicture: as of :func:`decode`.
    """
    loaded, _ = _load(data, max_pixels, keep=True)
    mode = _published_mode(loaded)
    profile = loaded.info.get("icc_profile") if _fits(loaded, mode) else None
    loaded = _of_mode(_of_8_bits(loaded), mode)
    array = np.asarray(loaded, dtype=np.uint8)  # not to be written to: a copy would be one more of a large picture
    return Whole(array[:, :, None] if array.ndim == 2 else array, profile)


def encode_whole(picture: Whole) -> bytes:
    """A PNG; the same pixels and profile give the same bytes."""
    from PIL import Image

    array = picture.pixels
    image: Any = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", icc_profile=picture.profile)
    return buffer.getvalue()


def measure(data: bytes, *, max_pixels: int = MAX_PIXELS, notes: list[str] | None = None) -> tuple[int, int, int]:
    """Height, width and colours (1 or 3) of what :func:`decode_whole` gives, after the picture was decoded once.

    Args:
        data: an encoded picture.
        max_pixels: as of :func:`decode`.
        notes: gets what :func:`decode_whole` does not keep of it: ``DEEP``, ``TURNED``, and ``PROFILE`` where the
            profile belongs to colours that become others.

    Raises:
        BadPicture: as of :func:`decode`.
    """
    loaded, found = _load(data, max_pixels, keep=True)
    mode = _published_mode(loaded)
    if notes is not None:
        kept = {TRANSPARENT: mode.endswith("A"), PROFILE: _fits(loaded, mode)}
        notes += [note for note in found if not kept.get(note)]
    return loaded.height, loaded.width, 1 if mode in ("L", "LA") else 3


def _published_mode(picture: Image) -> str:
    """L, LA, RGB or RGBA."""
    grey = picture.mode in ("1", "L", "LA", "La") or _is_deep(picture)
    clear = picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info
    one = picture.info.get("transparency")
    if _is_deep(picture) or (isinstance(one, tuple) and max(one) > 255):
        clear = False  # one colour of 16 bits a channel, which 8 would not tell apart from others
    return ("L" if grey else "RGB") + ("A" if clear else "")


def _fits(picture: Image, mode: str) -> bool:
    """Whether the picture has a colour profile, and one of grey or RGB as it is published."""
    profile = picture.info.get("icc_profile") or b""
    return bytes(profile[16:20]) == (b"GRAY" if mode in ("L", "LA") else b"RGB ")


def _of_8_bits(picture: Image) -> Image:
    if not _is_deep(picture):
        return picture
    from PIL import Image

    return Image.fromarray(((np.asarray(picture, dtype=np.uint32) + 128) // 257).astype(np.uint8))


def _of_mode(picture: Image, mode: str) -> Image:
    """Converted where it must be: Pillow would copy a large picture for nothing."""
    if picture.mode in ("La", "RGBa") and mode != picture.mode:
        picture = picture.convert(picture.mode.upper())  # not premultiplied by its alpha any more
    return picture if picture.mode == mode else picture.convert(mode)


def _pixels(picture: Image, shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = shape
    array = np.array(picture, dtype=np.uint8).reshape(height, width, channels)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def read_pixels(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """A picture as it is, upright: fp32 ``[1 or 3, H, W]`` in [0, 1]; grey has one channel, also with 16 bits.

    Raises:
        BadPicture: as of :func:`decode`.
    """
    loaded, _ = _load(data, max_pixels)
    if _is_deep(loaded):
        return torch.from_numpy(np.asarray(loaded, dtype=np.float32) / np.float32(65535))[None]
    array = np.asarray(loaded.convert("L" if loaded.mode in ("1", "L") else "RGB"), dtype=np.float32) / np.float32(255)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(array))


def _load(data: bytes, max_pixels: int, *, keep: bool = False) -> tuple[Image, list[str]]:
    """The picture, decoded and upright, and the notes on it; ``keep`` leaves what it says of its transparency."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > max_pixels:
                raise BadPicture(f"expected at most {max_pixels} pixels, got {picture.width} x {picture.height}")
            if picture.mode not in _MODES and not _is_deep(picture):
                raise BadPicture(f"expected 8 or 16 bits a channel, got mode {picture.mode}")
            deep = _is_deep(picture) or any(";16" in str(tile) for tile in getattr(picture, "tile", ()))
            loaded = ImageOps.exif_transpose(picture)
            clear = picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info
            found = {
                TRANSPARENT: clear,
                PROFILE: bool(picture.info.get("icc_profile")),
                DEEP: deep,
                TURNED: picture.getexif().get(_ORIENTATION, 1) in range(2, 9),
            }
            loaded.format = picture.format
    except BadPicture:
        raise
    # What decoders raise for broken files has no common base: OSError, SyntaxError, struct.error, ValueError, …
    except Exception as error:
        raise BadPicture(_reason(error)) from error
    if not keep:
        loaded.info.pop("transparency", None)  # of which Pillow makes colours, and warns
    return loaded, [note for note, holds in found.items() if holds]


def _is_deep(picture: Image) -> bool:
    """Grey with 16 bits; older Pillow reads a PNG of that into 32."""
    return picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG")


def _covering(picture: Image, width: int, height: int) -> Image:
    """Resized until it just covers width × height, and its centre.

    Of a picture that is long and thin only what the centre needs is resized: the whole would be larger without a limit.
    """
    from PIL.Image import Resampling

    covering, left, top = _cover(picture.width, picture.height, width, height)
    if covering[0] * covering[1] <= _LARGER * width * height:
        return picture.resize(covering, Resampling.BICUBIC).crop((left, top, left + width, top + height))
    # The same pixels but for rounding in between: Pillow takes rows or columns first, as it finds faster.
    box = centre_box((picture.width, picture.height), (width, height))
    return picture.resize((width, height), Resampling.BICUBIC, box=box)


def centre_box(size: tuple[int, int], cut: tuple[int, int]) -> Box:
    """What :func:`decode` cuts out of a picture: (left, top, right, bottom) in its pixels.

    Args:
        size: (width, height) of the picture.
        cut: (width, height) that the model takes.
    """
    covering, left, top = _cover(*size, *cut)
    x, y = size[0] / covering[0], size[1] / covering[1]
    return left * x, top * y, min((left + cut[0]) * x, size[0]), min((top + cut[1]) * y, size[1])


def _cover(own_width: int, own_height: int, width: int, height: int) -> tuple[tuple[int, int], int, int]:
    """The size that a picture is resized to, and where its centre begins there."""
    ratio = max(width / own_width, height / own_height)
    covering = (max(width, int(own_width * ratio)), max(height, int(own_height * ratio)))
    return covering, round((covering[0] - width) / 2), round((covering[1] - height) / 2)


def encode_png(pixels: Tensor) -> bytes:
    """uint8 ``[1 or 3, H, W]`` → a PNG; the same pixels give the same bytes.

    Raises:
        ValueError: another number of channels.
    """
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or pixels.dtype != torch.uint8:
        raise ValueError(f"pixels: expected uint8 of 1 or 3 channels, got {pixels.dtype} {list(pixels.shape)}")
    from PIL import Image

    array = pixels.permute(1, 2, 0).contiguous().numpy()
    picture: Any = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _reason(error: Exception) -> str:
    name = type(error).__name__
    if name == "UnidentifiedImageError":
        return "not a picture"
    if name == "DecompressionBombError":
        return "too many pixels (a decompression bomb?)"
    return str(error) or name
