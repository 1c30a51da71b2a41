"""A look at everything that a run will read and write, before the work begins."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccu_fast import extras
from ccu_fast.data.captions import BadData, DiskSource, Listing, scan
from ccu_fast.data.captions.dataset import Scan, bad_pictures
from ccu_fast.mem.job.job import Job
from ccu_fast.mem.publish.rehearse import Space, space, unreadable_captions, unwritable_files, unwritable_samples
from ccu_fast.mem.source import Part
from ccu_fast.mem.views import Pictures
from ccu_fast.models.named import Model
from ccu_fast.runs.checkpoint import read_state, write_state
from ccu_fast.runs.progress import Progress

SKIP = "skip_bad leaves them out"


def check_places(job: Job) -> None:
    """The output lies outside the folder that is the input.

    Raises:
        ValueError: it does not.
    """
    folder = os.path.realpath(job.input)
    if os.path.isdir(folder) and Path(os.path.realpath(job.out)).is_relative_to(folder):
        raise ValueError(f"out: expected a folder outside the input {job.input}, which stays as it is, got {job.out}")


def check_listing(job: Job, listing: Listing) -> None:
    """There is something in the input that can be published.

    Raises:
        BadData: all of it is bad.
        ImportError: of shards, without the package that writes them.
    """
    if listing.spans is not None:
        extras.require("webdataset")
    if not job.skip_bad and not listing.n_images:
        listing.whole(SKIP)  # else the pictures are looked at first, so that all that is bad is told at once


def source_of(job: Job, listing: Listing, model: Model, digests: Tensor | None = None) -> DiskSource:
    """The pictures as the model takes them."""
    return DiskSource(listing, model.image_shape, digests=digests, threads=job.threads, max_pixels=job.max_pixels)


def inspect(
    job: Job,
    listing: Listing,
    model: Model,
    images: Sequence[int],
    folder: Path,
    progress: Progress,
    *,
    files: bool,
    kept: Path | None = None,
) -> dict[str, Any]:
    """Read each of these pictures once, and rehearse how it and its captions are published.

    Args:
        job: what is to be done.
        listing: all pictures.
        model: with the tokenizer.
        images: numbers of those to look at.
        folder: on the file system of the output.
        progress: called with counts of pictures.
        files: whether to try the names of all files, too.
        kept: a file for what was found so far, from which a look that is interrupted goes on.

    Returns:
        ``digests`` and, of pictures that keep their size, ``sizes`` of these images (else None), ``bad``, image number
        to why it cannot be used, and ``notes``, see :class:`ccu_fast.data.captions.Scan`.
    """
    with closing(source_of(job, listing, model)) as source:

        def told(done: int, n: int) -> None:
            progress("checking pictures", done, n, "")

        seen = _scan(source, images, told, kept, whole=not job.thumbnails)
        triggers = job.method.triggers if job.settings.place == "front" and not job.settings.compat else 0
        bad = unreadable_captions(listing, images, model.tokenizer, triggers)
        bad |= unwritable_samples(source, images)
        bad |= unwritable_files(listing, folder) if files else {}
        sizes = None if seen.sizes is None else seen.sizes[list(images)]
        return {"digests": seen.digests[list(images)], "bad": bad | seen.bad, "notes": seen.notes, "sizes": sizes}


def _scan(
    source: DiskSource, images: Sequence[int], told: Callable[[int, int], None], kept: Path | None, *, whole: bool
) -> Scan:
    """:func:`ccu_fast.data.captions.scan`, which goes on from a file, if there is to be one."""
    if kept is None:
        return scan(source, images, told, whole=whole)
    before = Scan(**read_state(kept, "out")) if kept.exists() else None

    def keep(found: Scan) -> None:
        write_state(kept, {field.name: getattr(found, field.name) for field in fields(found)})

    return scan(source, images, told, whole=whole, seen=before, keep=keep)


def usable(listing: Listing, bad: dict[int, str]) -> tuple[Listing, list[int]]:
    """What is left of a listing without bad pictures, and the numbers that its images had."""
    keep = [number for number in range(listing.n_images) if number not in bad]
    return listing.without(list(bad), bad_pictures(listing, bad, published=True)), keep


def all_bad(listing: Listing, bad: dict[int, str]) -> BadData:
    """The error that tells of them."""
    return BadData([*listing.bad, *bad_pictures(listing, bad)], SKIP)


def check_compat(job: Job, listing: Listing) -> None:
    """With ``compat`` each picture has one caption.

    Raises:
        ValueError: some have more.
    """
    if job.settings.compat and len(listing.captions) != listing.n_images:
        raise ValueError(
            "compat: expected one caption for each image, because the authors' noise belongs to captions and "
            f"a picture can hold one; got {len(listing.captions)} captions of {listing.n_images} images"
        )


def part_of(job: Job, source: DiskSource, images: Sequence[int], sizes: Tensor | None, model: Model) -> Part:
    """Some images as the generator reads them; ``sizes`` of all, where they keep theirs."""
    if sizes is None:
        return Part(source, torch.tensor(images))
    _, height, width = model.image_shape
    grid = (height * job.settings.grid, width * job.settings.grid)
    return Pictures(source, torch.tensor(images), sizes, grid)


def room(job: Job, source: DiskSource, images: Sequence[int], part: Part, sizes: Tensor | None, folder: Path) -> Space:
    """What the run needs on the disk, and what there is; see :func:`ccu_fast.mem.publish.rehearse.space`."""
    return space(
        source,
        images,
        folder,
        eps=0 if job.method.noise == "none" else job.settings.eps,
        noise_shape=part.noise_shape,
        noise_files=2 * (job.method.generates and job.method.noise != "universal") + job.noise_on_disk,
        reference_files=job.reference_files,
        sizes=sizes,
    )
