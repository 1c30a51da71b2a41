"""Where image-caption pairs come from: the protocol that the generator reads, and its form in memory.

A row is one caption; several rows may share an image. Noise belongs to the image, triggers to the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ccu_fast import check

Asked = TypeVar("Asked")
Got = TypeVar("Got")


class PairSource(Protocol):
    """Image-caption pairs with random access.

    Attributes:
        captions: one string for each row.
        image_of: int64 ``[rows]``, which image each row has; every image has at least one row.
        n_images: distinct images.
        image_shape: ``(C, H, W)``, what the model takes and what is published.
    """

    @property
    def captions(self) -> Sequence[str]: ...

    @property
    def image_of(self) -> Tensor: ...

    @property
    def n_images(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    def images(self, index: Tensor) -> Tensor:
        """int64 ``[n]`` image numbers (not rows) → uint8 ``[n, C, H, W]`` on the CPU; the same bits at every call."""
        ...


class TensorSource:
    """Pairs in memory.

    Args:
        images: uint8 ``[N, C, H, W]``.
        captions: one string for each row.
        image_of: int64 ``[rows]`` in 0..N−1 with every image at least once; by default row i has image i.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(self, images: Tensor, captions: Sequence[str], image_of: Tensor | None = None) -> None:
        check.tensor("images", images, dtypes=(torch.uint8,), ndim=4)
        self.captions = list(captions)
        self._images = images
        self.n_images = len(images)
        self.image_shape: tuple[int, int, int] = (images.shape[1], images.shape[2], images.shape[3])
        if image_of is None:
            if len(self.captions) != len(images):
                raise ValueError(
                    f"captions: expected {len(images)} strings (one for each image), got {len(self.captions)}"
                )
            image_of = torch.arange(len(images))
        check.tensor("image_of", image_of, dtypes=(torch.int64,), ndim=1)
        check.shape("image_of", image_of, (len(self.captions),))
        low, high = (int(image_of.min()), int(image_of.max())) if len(image_of) else (0, 0)
        if low < 0 or high >= self.n_images:
            raise ValueError(f"image_of: expected numbers in [0, {self.n_images - 1}], got {low}..{high}")
        lonely = (torch.bincount(image_of, minlength=self.n_images) == 0).nonzero()
        if len(lonely):
            raise ValueError(f"image_of: expected every image at least once, got none for image {int(lonely[0])}")
        self.image_of = image_of

    def images(self, index: Tensor) -> Tensor:
        """See :class:`PairSource`."""
        return self._images[index]


class Part:
    """Some images of a source and all rows that show them, renumbered from 0 in the given order.

    Args:
        source: the whole.
        images: int64 ``[n]``, distinct image numbers of ``source``.

    Attributes:
        rows: int64, the part's rows as numbers of ``source``, ascending.
        whole_images: ``images`` as given.
        noise_shape: of one image's noise, that of the image.
    """

    def __init__(self, source: PairSource, images: Tensor) -> None:
        check.tensor("images", images, dtypes=(torch.int64,), ndim=1)
        place = torch.full((source.n_images,), -1, dtype=torch.int64)
        place[images] = torch.arange(len(images))
        if int((place >= 0).sum()) != len(images):
            raise ValueError("images: expected distinct image numbers, got repeated ones")
        self._source = source
        self.whole_images = images
        local = place[source.image_of]
        self.rows = (local >= 0).nonzero()[:, 0]
        self.image_of = local[self.rows]
        self.captions: Sequence[str] = [source.captions[row] for row in self.rows.tolist()]
        self.n_images = len(images)
        self.image_shape = self.noise_shape = source.image_shape

    def images(self, index: Tensor) -> Tensor:
        """See :class:`PairSource`."""
        return self._source.images(self.whole_images[index])


def read_ahead(
    source: PairSource, plan: Iterable[Tensor], image_of: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """``(part, source.images(image_of[part]))`` for each part of ``plan``, as :func:`ahead` reads.

    Without ``image_of`` the parts are image numbers.
    """
    return ahead(lambda part: source.images(part if image_of is None else image_of[part]), plan)


def ahead(read: Callable[[Asked], Got], plan: Iterable[Asked]) -> Iterator[tuple[Asked, Got]]:
    """``(part, read(part))`` for each part of ``plan``, the next one read while one is worked on.

    At most two parts are alive. Another thread reads: files and decoders release the interpreter.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
        waiting = None
        for part in plan:
            coming = (part, thread.submit(read, part))
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = coming
        if waiting is not None:
            yield waiting[0], waiting[1].result()
