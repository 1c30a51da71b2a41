"""One picture: encoded bytes → the pixels a model takes, and pixels → PNG."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

EXTENSIONS = frozenset({"bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp"})
MAX_PIXELS = 178_956_970  # where Pillow, too, takes a picture for a decompression bomb

# What turns into 8-bit RGB or grey without a choice of ours; 16-bit and floating-point pictures are not among them.
_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})


class BadPicture(ValueError):
    """A picture that cannot be used; the message says why, without its name."""


def is_picture(name: str) -> bool:
    """Whether a file's name ends as one of a picture."""
    return name.rpartition(".")[2].lower() in EXTENSIONS


def decode(data: bytes, shape: tuple[int, int, int], *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """The pixels a model takes, by CLIP's preprocessing: the picture is resized (bicubic, antialiased) until it just
    covers H×W, then its centre is cut out. Two things are ours: colours are converted first, because Pillow resizes
    palettes by nearest neighbour, and the EXIF orientation is applied, because a PNG does not carry it on.

    A picture of H×W pixels comes back unchanged, so what is published is read as it was written.

    Args:
        data: an encoded picture, its first frame is taken.
        shape: (C, H, W) with C = 1 (grey) or 3 (RGB; transparency is dropped as CLIP drops it).
        max_pixels: more than these (width · height) are refused before they are decoded.

    Returns:
        uint8 ``[C, H, W]``.

    Raises:
        BadPicture: no picture, truncated, too large, or of an unsupported kind.
    """
    from PIL import Image, ImageOps

    channels, height, width = shape
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > max_pixels:
                raise BadPicture(f"expected at most {max_pixels} pixels, got {picture.width} x {picture.height}")
            if picture.mode not in _MODES:
                raise BadPicture(f"expected 8 bits a channel, got mode {picture.mode}")
            loaded = ImageOps.exif_transpose(picture).convert("L" if channels == 1 else "RGB")
    except BadPicture:
        raise
    # What decoders raise for broken files has no common base: OSError, SyntaxError, struct.error, ValueError, …
    except Exception as error:
        raise BadPicture(_reason(error)) from error
    if loaded.size != (width, height):
        ratio = max(width / loaded.width, height / loaded.height)
        covering = (max(width, int(loaded.width * ratio)), max(height, int(loaded.height * ratio)))
        loaded = loaded.resize(covering, Image.Resampling.BICUBIC)
        left, top = round((covering[0] - width) / 2), round((covering[1] - height) / 2)
        loaded = loaded.crop((left, top, left + width, top + height))
    array = np.array(loaded, dtype=np.uint8).reshape(height, width, channels)
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


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
