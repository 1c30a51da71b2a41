"""What publishing could fail on after hours is found before: all but the pixels is written once, by the same code."""

from __future__ import annotations

import errno
import io
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ccu_fast.data.captions import DiskSource, Listing
from ccu_fast.data.captions.listing import MANIFEST, is_text
from ccu_fast.data.captions.shards import Sample, read_index
from ccu_fast.data.captions.tables import columns_of_bytes
from ccu_fast.data.pictures import Whole, encode_png, encode_whole
from ccu_fast.files import FULL
from ccu_fast.mem.publish.card import CARD
from ccu_fast.mem.publish.elsewhere import Elsewhere
from ccu_fast.mem.publish.tar import published, writer
from ccu_fast.mem.publish.whole import with_noise
from ccu_fast.mem.publish.writer import CHUNK, caption_field, key_of, published_files, write_metadata
from ccu_fast.mem.triggers import survivors
from ccu_fast.models.tokenizer import Tokenizer

_SAMPLED = 16  # pictures whose size tells that of all
_PIECE = 512  # px of a large one
_BLOCK = 4096  # of a file system: what the smallest file takes


def unwritable_files(listing: Listing, folder: Path) -> dict[int, str]:
    """Make every file of the output, empty, and its table; what they are made in is gone afterwards.

    Args:
        listing: what is to be protected.
        folder: on the file system of the output.

    Returns:
        Image number → why it cannot be published: its name is no text, is too long for the file system, or is taken.

    Raises:
        OSError: the disk is full.
        ValueError: a table cannot be written, or has bytes in it that would be published as they are.
    """
    for table in listing.tables:
        if columns := columns_of_bytes(table):
            raise ValueError(
                f"{listing.argument}: expected no columns of bytes, in which clean pictures could stay, got "
                f"{', '.join(columns)} in {table}"
            )
    bad: dict[int, str] = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix="trial-") as trial:
        for own in (MANIFEST, CARD):
            (Path(trial) / own).touch()
        if listing.tables:
            try:
                # With as many distinct texts as there will be, which a column's type may not hold.
                write_metadata(listing, lambda row: f"{row} {listing.captions[row]}", Path(trial), Elsewhere())
            except (OSError, ImportError, MemoryError):
                raise
            except Exception as error:  # whatever Arrow raises
                why = str(error).removeprefix(f"{listing.argument}: ")
                tables = ", ".join(map(str, listing.tables[:3]))
                raise ValueError(
                    f"{listing.argument}: expected tables that can be written, got {tables} ({why})"
                ) from error
        for image, name in ((i, name) for i in range(listing.n_images) for name in published_files(listing, i)):
            if not is_text(name):
                bad[image] = "its name is not UTF-8"
                continue
            target = Path(trial) / name
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch(exist_ok=False)
            except OSError as error:
                if error.errno in FULL:
                    raise
                taken = isinstance(error, FileExistsError)
                bad[image] = f"cannot be published as {name}: {'the name is taken' if taken else error.strerror}"
    return bad


def unwritable_samples(source: DiskSource, images: Sequence[int]) -> dict[int, str]:
    """Write every sample of these images to a shard in memory and read its key back; of other formats none.

    Returns:
        Image number → why it cannot be published.
    """
    listing = source.listing
    bad: dict[int, str] = {}
    if listing.spans is None:
        return {}
    by_shard: dict[int, dict[str, int]] = {}
    for image, shard in zip(images, listing.spans[list(images), 0].tolist(), strict=True):
        by_shard.setdefault(shard, {})[key_of(listing, image)] = image
    captions_of: dict[int, list[str]] = {}
    for image, caption in zip(listing.image_of.tolist(), listing.captions, strict=True):
        captions_of.setdefault(image, []).append(caption)
    column = caption_field(listing)
    for shard, image_of in by_shard.items():
        for sample in read_index(listing.shards[shard]):
            if sample.key in image_of:
                number = image_of[sample.key]
                try:
                    if not is_text(f"{listing.shard_names[shard]}/{sample.key}"):
                        raise ValueError("its name is not UTF-8")
                    _write_sample(listing.shards[shard], sample, captions_of[number], column)
                except Exception as error:  # whatever a parser or the archive raises
                    bad[number] = f"cannot be published: {str(error) or type(error).__name__}"
    return bad


def unreadable_captions(listing: Listing, images: Sequence[int], tokenizer: Tokenizer, triggers: int) -> dict[int, str]:
    """Encode every caption of these images, alone and behind as many words as will be published in front of it.

    Args:
        listing: all captions.
        images: those of this process.
        tokenizer: of the surrogate.
        triggers: how many words.

    Returns:
        Image number → why it cannot be used: no token is in a caption, or others are read back than were meant.
    """
    mine = set(images)
    rows = [(row, image) for row, image in enumerate(listing.image_of.tolist()) if image in mine]
    words = tokenizer.allowed().nonzero()[:triggers, 0]

    def are_read(captions: list[str]) -> bool:
        tokens = tokenizer.encode(captions)
        return bool(survivors(captions, tokens, words.expand(len(captions), -1), tokenizer).all())

    bad: dict[int, str] = {}
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        with suppress(Exception):  # of which caption, is asked below
            if are_read([listing.captions[row] for row, _ in part]):
                continue
        for row, image in part:
            caption = listing.captions[row]
            try:
                if not are_read([caption]):
                    bad[image] = f"caption {caption[:40]!r}: read in another way behind trigger words"
            except Exception as error:  # whatever a tokenizer raises
                bad[image] = f"caption {caption[:40]!r}: {error}"
    return bad


def _write_sample(shard: Path, sample: Sample, captions: list[str], column: str) -> None:
    if sample.key.startswith("/") or ".." in sample.key.split("/"):
        raise ValueError("its key leads out of the folder that a shard is unpacked in")
    members = published(shard, sample, b"", {text: f"a {text}" for text in captions}, (1, 1), Elsewhere(), column)
    memory = io.BytesIO()
    with writer(memory) as archive:
        archive.write(members)
    memory.seek(0)
    with tarfile.open(fileobj=memory) as archive:
        found = {member.name for member in archive}
    if found != {f"{sample.key}.{name}" for name in members if name != "__key__"}:
        raise ValueError("its key is read back as another")


@dataclass(frozen=True)
class Space:
    """Room on a disk.

    Attributes:
        needed: bytes, about.
        free: bytes, with those that the run has taken already.
        folder: where.
        told: what it is for.
    """

    needed: int
    free: int
    folder: Path
    told: str

    def check(self) -> None:
        """There is enough.

        Raises:
            OSError: there is not; tells how much is needed and how much there is.
        """
        if self.needed > self.free:
            raise OSError(
                errno.ENOSPC,
                f"out: expected about {size_text(self.needed)} of free space in {self.folder} for {self.told}, "
                f"got {size_text(self.free)}",
            )


def space(
    source: DiskSource,
    images: Sequence[int],
    folder: Path,
    *,
    eps: int,
    noise_shape: Sequence[int],
    noise_files: int,
    reference_files: bool,
    sizes: Tensor | None = None,
) -> Space:
    """Room for the noise of the checkpoints and then for the pictures, as far as can be told.

    Args:
        source: all pictures.
        images: those of this process, of which a few are encoded with noise.
        folder: where the run works; what it holds already is counted as room.
        eps: largest noise, in 1/255.
        noise_shape: of one image's noise, a byte for each value.
        noise_files: how many times the noise is on the disk while a checkpoint is written.
        reference_files: whether they are written: fp32 noise for each row, twice.
        sizes: int64 ``[source.n_images, 3]`` (height, width, colours) of pictures that keep their size.
    """
    some = torch.tensor(images)[torch.linspace(0, len(images) - 1, min(_SAMPLED, len(images))).long()]
    n, (_, height, width) = source.n_images, source.image_shape
    if sizes is None:
        original = source.images(some).short()
        noise = torch.randint(-eps, eps + 1, original.shape, generator=torch.Generator().manual_seed(0))
        lengths = [len(encode_png(pixels)) for pixels in (original + noise).clamp(0, 255).to(torch.uint8)]
        pixels = original[0].numel()
        published = n * (sum(lengths) / len(lengths) + _BLOCK)
        reference = 8 * pixels * len(source.captions) if reference_files else 0
        told = f"{n} pictures of {height}x{width}"
    else:
        noise = torch.randint(-eps, eps + 1, noise_shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
        parts = [(0, 0)] * len(some)

        def look(place: int) -> None:
            parts[place] = _piece(source.whole(int(some[place])), noise)

        source.each(look, len(some))
        values, reference = int(sizes.prod(1).sum()), 0
        published = values * sum(part[0] for part in parts) / sum(part[1] for part in parts) + n * _BLOCK
        told = f"{n} pictures of {int(sizes[:, :2].prod(1).sum()) / 1e6:.1f} million pixels together"
    stored = n * prod(noise_shape)
    needed = max(noise_files * stored, max(noise_files - 1, 0) * stored + published + reference)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Space(int(needed), shutil.disk_usage(folder).free + there, folder, told)


def _piece(whole: Whole, noise: Tensor) -> tuple[int, int]:
    """Bytes of the PNG of a picture's middle with noise, and how many values of colours it has."""
    height, width = whole.pixels.shape[:2]
    top, left = max(0, height - _PIECE) // 2, max(0, width - _PIECE) // 2
    pixels = whole.pixels[top : top + _PIECE, left : left + _PIECE]
    made = encode_whole(with_noise(Whole(pixels), noise))
    return len(made), pixels.shape[0] * pixels.shape[1] * whole.colours


def size_text(count: float) -> str:
    """A number of bytes, to be read."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
