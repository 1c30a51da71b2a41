"""What several processes share: images, the surrogate's gradients, and the numbers of what they publish."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ccu_fast.data.captions import DiskSource, Listing
from ccu_fast.distributed.parameters import average_
from ccu_fast.mem.protection import Protection
from ccu_fast.mem.publish.whole import Made, published_picture
from ccu_fast.mem.source import Part


class WholeNumbers:
    """What a process publishes, by the numbers of the whole dataset."""

    def __init__(self, protection: Protection, part: Part) -> None:
        self._protection, self._part = protection, part

    def published_images(self, index: Tensor) -> Tensor:
        return self._protection.published_images(torch.searchsorted(self._part.whole_images, index))

    def published_picture(self, source: DiskSource, image: int) -> Made:
        """The file of a picture that keeps its size."""
        here = int(torch.searchsorted(self._part.whole_images, image))
        return published_picture(source.whole(image), self._protection.noise_of(here))

    def published_captions(self, rows: Tensor) -> list[str]:
        return self._protection.published_captions(torch.searchsorted(self._part.rows, rows))


def check_complete(folder: Path, expected: set[str]) -> None:
    """Exactly the files of the manifest are there."""
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    if there != expected:
        odd = ", ".join(f"{name} {'more' if name in there else 'less'}" for name in sorted(there ^ expected)[:3])
        raise ValueError(f"out: expected the files that were written to {folder} and no others, got {odd}")


def share(listing: Listing, rank: int, world: int) -> list[int]:
    """The images of one process: a contiguous share; of shards whole ones, so that each is written by one process.

    Raises:
        ValueError: fewer than two images, or no shard, for some process.
    """
    n = listing.n_images
    if listing.spans is None:
        cuts = [n * r // world for r in range(world + 1)]
    else:
        # A shard goes to the process in whose equal share its middle lies.
        sizes = torch.bincount(listing.spans[:, 0], minlength=len(listing.shards))
        owner = ((sizes.cumsum(0) - sizes / 2) * world / max(n, 1)).long().clamp(max=world - 1)
        cuts = [0, *(int(sizes[owner <= r].sum()) for r in range(world))]
    if min(b - a for a, b in itertools.pairwise(cuts)) < 2:
        if world == 1:
            raise ValueError(f"{listing.argument}: expected at least two images, got {n or 'none'} in {listing.root}")
        unit = "images" if listing.spans is None else "images in whole shards"
        raise ValueError(
            f"processes: expected at least two {unit} for each of {world}, got shares that end at {cuts[1:]}"
        )
    return list(range(cuts[rank], cuts[rank + 1]))


def average_surrogate(parameters: Iterable[nn.Parameter], buffers: Iterable[Tensor]) -> None:
    """Replace gradients, and running statistics of normalisation layers, by their means over the processes.

    All processes then take the same step from the same weights: they hold one surrogate, whose batch is all of theirs
    except that a caption is compared with the images of its own process alone.
    """
    statistics = [b for b in buffers if b.is_floating_point()]
    average_([*(p.grad for p in parameters if p.grad is not None), *statistics])
