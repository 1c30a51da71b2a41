"""The processes that share one run: which images each has, and the surrogate that all of them train."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ccu_fast.data.captions.listing import Listing
from ccu_fast.distributed.parameters import average_


def share(listing: Listing, rank: int, world: int) -> list[int]:
    """The images of one process: a contiguous share; of shards whole ones, so that each is written by one process.

    Raises:
        ValueError: fewer than two images, or no shard, for some process.
    """
    n = listing.n_images
    if listing.spans is None:
        cuts = [n * r // world for r in range(world + 1)]
    else:
        ends = torch.bincount(listing.spans[:, 0], minlength=len(listing.shards)).cumsum(0)
        # A shard goes to the process in whose equal share its middle lies.
        sizes = torch.diff(ends, prepend=torch.zeros(1, dtype=ends.dtype))
        owner = ((ends - sizes / 2) * world / max(n, 1)).long().clamp(max=world - 1)
        cuts = [0, *(int(sizes[owner <= r].sum()) for r in range(world))]
    if min(b - a for a, b in itertools.pairwise(cuts)) < 2:
        unit = "images" if listing.spans is None else "images in whole shards"
        raise ValueError(
            f"processes: expected at least two {unit} for each of {world}, got shares that end at {cuts[1:]}"
        )
    return list(range(cuts[rank], cuts[rank + 1]))


class Average:
    """Averages gradients, and the running statistics of normalisation layers, over the processes; in place.

    All processes then take the same step from the same weights: they hold one surrogate, whose batch is all of theirs
    except that a caption is compared with the images of its own process alone.
    """

    def __init__(self) -> None:
        self.buffers: Callable[[], Iterable[Tensor]] = tuple

    def __call__(self, parameters: Iterable[nn.Parameter]) -> None:
        statistics = [b for b in self.buffers() if b.is_floating_point()]
        average_([*(p.grad for p in parameters if p.grad is not None), *statistics])
