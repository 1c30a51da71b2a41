"""Published pictures and captions against the originals that they were made of."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ccu_fast.data.captions import Listing, Options, list_pairs
from ccu_fast.data.pictures import BadPicture, decode, decode_whole
from ccu_fast.mem.fidelity import WINDOW, ssim_of_whole
from ccu_fast.mem.placing import stands_among
from ccu_fast.mem.verification.check import Check, as_text, checked, counted, skipped


@dataclass(frozen=True)
class Distance:
    """How far a published picture is from its original: the largest change in 1/255, and SSIM (None below 11 px)."""

    largest: int
    ssim: float | None


class Pairs:
    """Which original belongs to each published picture: the one that is published under its name.

    Args:
        published: what is published.
        original: what it was made of.
        manifest: says what was left out.
    """

    def __init__(self, published: Listing, original: Listing, manifest: dict[str, Any]) -> None:
        self.published, self.original = published, original
        number = {name: i for i, name in enumerate(original.names)}
        self.partner = [number.get(name) for name in published_names(published)]
        self.before, self.after = captions_of(original), captions_of(published)
        self._left_out = {item.get("where") for item in manifest["skipped"]["items"]}

    def check(self) -> Check:
        """Whether each has the other, and as many captions."""
        return checked(
            f"{counted(sum(i is not None for i in self.partner), 'picture')} of {self.original.n_images:,}",
            self._problems(),
        )

    def _problems(self) -> Iterator[str]:
        paired = set(self.partner)
        for image, name in enumerate(self.original.names):
            file = self.original.files[image]
            places = (name, file, os.path.relpath(file, self.original.root))
            if image not in paired and not self._left_out & set(map(as_text, places)):
                yield f"{file}: not published, nor left out by the manifest"
        for image, (name, partner) in enumerate(zip(published_names(self.published), self.partner, strict=True)):
            if partner is None:
                yield f"{name}: no picture of the original is published under this name"
            elif len(self.after[image]) != len(self.before[partner]):
                yield (
                    f"{name}: expected {counted(len(self.before[partner]), 'caption')}, as the original has, got "
                    f"{len(self.after[image])}"
                )

    def check_triggers(self, triggers: int | None, *, among: bool) -> Check:
        """Whether published captions are trigger words and the original caption.

        Args:
            triggers: how many words; None: any number of them.
            among: they stand between the caption's words instead of in front of it.
        """
        rows = sum(len(after) for _, _, after in self._comparable())
        if not rows:
            return skipped("no published picture has its original there, with as many captions")
        words = "some words" if triggers is None else counted(triggers, "word")
        where = "among the words of" if among else "in front of"
        return checked(f"{words} {where} {counted(rows, 'original caption')}", self._changed(triggers, among))

    def _changed(self, triggers: int | None, among: bool) -> Iterator[str]:
        for name, before, after in self._comparable():
            for clean, published in zip(before, after, strict=True):
                kept = (
                    stands_among(published, clean, triggers or 0)
                    if among
                    else _is_behind_words(published, clean, triggers)
                )
                if not kept:
                    words = "" if triggers == 0 else f"{triggers or 'some'} trigger words and "
                    yield f"{name}: expected {words}{clean!r}, got {published!r}"

    def _comparable(self) -> Iterator[tuple[str, list[str], list[str]]]:
        """Names of pictures, original captions and published ones; another number of captions is told by `check`."""
        for name, after, partner in zip(published_names(self.published), self.after, self.partner, strict=True):
            if partner is not None and len(self.before[partner]) == len(after):
                yield name, self.before[partner], after


def _is_behind_words(published: str, clean: str, triggers: int | None) -> bool:
    if triggers == 0:
        return published == clean
    words = published.removesuffix(clean)
    if words == published or not words.endswith(" "):
        return False
    return bool(words.strip()) if triggers is None else words.count(" ") == triggers == len(words.split())


def originals(path: Path, manifest: dict[str, Any]) -> Listing:
    """The original, read by the format and the columns of the manifest.

    Raises:
        FileNotFoundError, ValueError: it cannot be; names the argument.
    """
    image, caption = manifest.get("columns") or (None, None)
    tables = manifest["format"] in ("csv", "imagefolder")
    options = Options(
        manifest["format"], image if tables else None, caption if manifest["format"] != "folder" else None
    )
    return list_pairs(path, options, "original")


def published_names(listing: Listing) -> list[str]:
    """Where each picture lies in the dataset."""
    if listing.spans is not None:
        return listing.names
    return [os.path.relpath(file, listing.root) for file in listing.files]


def captions_of(listing: Listing) -> list[list[str]]:
    """The captions of each picture, in the order of the rows."""
    found: list[list[str]] = [[] for _ in range(listing.n_images)]
    for caption, image in zip(listing.captions, listing.image_of.tolist(), strict=True):
        found[image].append(caption)
    return found


def published_pixels(data: bytes, max_pixels: int) -> Tensor:
    """A picture as it was published: uint8 ``[1 or 3, H, W]``, without its transparency.

    Raises:
        BadPicture: it cannot be read.
    """
    return decode(data, _shape(data), max_pixels=max_pixels)


def original_pixels(data: bytes, published: Tensor, max_pixels: int) -> Tensor:
    """The original of a published picture, in its size: pixel by pixel, or resized and cropped as for a thumbnail.

    Raises:
        BadPicture: it cannot be read.
    """
    channels, height, width = published.shape
    return decode(data, (channels, height, width), max_pixels=max_pixels)


def change_of_form(original: bytes, published: bytes, max_pixels: int) -> str | None:
    """What a picture that keeps its size has not kept: its size, its channels, its transparency or its profile.

    Raises:
        BadPicture: one of them cannot be read.
    """
    before, after = (decode_whole(data, max_pixels=max_pixels) for data in (original, published))
    if before.pixels.shape[:2] != after.pixels.shape[:2]:
        return f"expected {size_text(before.pixels.shape)} as of its original, got {size_text(after.pixels.shape)}"
    if before.pixels.shape != after.pixels.shape:
        return f"expected {before.pixels.shape[2]} channels as of its original, got {after.pixels.shape[2]}"
    if not np.array_equal(before.pixels[:, :, before.colours :], after.pixels[:, :, after.colours :]):
        return "expected the transparency of its original, got another"
    return None if before.profile == after.profile else "expected the colour profile of its original, got another"


def size_text(shape: Sequence[int]) -> str:
    """Width x height of (height, width, …)."""
    return f"{shape[1]}x{shape[0]}"


def _shape(data: bytes) -> tuple[int, int, int]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            return 1 if picture.mode in ("1", "L", "LA", "I", "I;16") else 3, picture.height, picture.width
    # What decoders raise for broken files has no common base.
    except Exception as error:
        name = type(error).__name__
        raise BadPicture("not a picture" if name == "UnidentifiedImageError" else str(error) or name) from error


def distance(original: Tensor, published: Tensor, *, similar: bool) -> Distance:
    """Of two pictures uint8 ``[C, H, W]``; SSIM only where it is asked for."""
    largest = int((published.short() - original.short()).abs().max())
    return Distance(largest, similarity(original, published) if similar and min(original.shape[1:]) >= WINDOW else None)


def similarity(a: Tensor, b: Tensor) -> float:
    """SSIM of two pictures uint8 ``[C, H, W]``."""
    return ssim_of_whole(*(picture.permute(1, 2, 0).numpy() for picture in (a, b)))


def largest_change(manifest: dict[str, Any]) -> int:
    """What noise may change at most, in 1/255."""
    if manifest["method"].get("noise") == "none":
        return 0
    return int(manifest["settings"]["eps"])


def check_noise(names: list[str], distances: dict[int, Distance], allowed: int, unread: list[str]) -> Check:
    """Whether no pixel was changed by more than is allowed; ``unread`` says which originals cannot be read."""
    if not distances and not unread:
        return skipped("no published picture that can be read has its original there")
    worst = sorted(distances, key=lambda image: (-distances[image].largest, image))
    told = "no picture compared"
    if worst:
        told = f"largest change {distances[worst[0]].largest}/255 ({names[worst[0]]}), allowed {allowed}/255"

    def problems() -> Iterator[str]:
        for image in worst:
            if distances[image].largest > allowed:
                yield f"{names[image]}: a pixel is changed by {distances[image].largest}/255, allowed are {allowed}/255"
        yield from unread

    return checked(as_text(told), problems())


def order_of_similarity(distances: dict[int, Distance]) -> list[int]:
    """Picture numbers, the least similar first; those too small for SSIM last, the most changed first."""
    return sorted(distances, key=lambda n: (_or_last(distances[n].ssim), -distances[n].largest, n))


def _or_last(value: float | None) -> float:
    return float("inf") if value is None else value
