"""Large buffers that stay between calls: what the backward pass will read, and the part that is being worked on.

The C library gives large blocks back to the system and maps them anew at the next call, and the kernel then zeroes
every page of them at its first touch, which shows in the time of a step. So the largest buffer of each kind stays with
the process and is lent again once nothing but this module refers to its memory, saved graphs included. :func:`release`
gives both back to the system.

They ask the system for large pages, of which a product's operands touch few: with those of 4 KiB each row of a wide
matrix begins in another page.
"""

from __future__ import annotations

import mmap
import threading
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

WORTH_KEEPING = 8 << 20
_references: Any = getattr(torch._C, "_storage_Use_Count", None)
_has_large_pages = hasattr(mmap, "MADV_HUGEPAGE")


class Buffer:
    """The largest memory that was asked for, of up to ``most`` bytes."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: Tensor | None = None
        self._lock = threading.Lock()

    def borrow(self, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """``size`` uninitialised values on the CPU, flat; given back by letting go of them."""
        count = size * dtype.itemsize
        if count < WORTH_KEEPING or count > self.most or _references is None:
            return torch.empty(size, dtype=dtype, device="cpu")
        with self._lock:
            if self.kept is not None and self.is_free:
                if count <= self.kept.numel():
                    return self.kept[:count].view(dtype)
                self.kept = None
            buffer = _allocate(count)
            if self.kept is None:
                self.kept = buffer
            return buffer[:].view(dtype)

    @property
    def is_free(self) -> bool:
        """Whether nothing looks at the memory that is kept."""
        if self.kept is None:
            return True
        storage = self.kept.untyped_storage()
        # Two refer to it: the tensor that is kept, and the wrapper made in the line above.
        return bool(_references(storage._cdata) <= 2)

    def release(self) -> None:
        """Forget the memory; it is freed when its last user lets go."""
        with self._lock:
            self.kept = None


def _allocate(count: int) -> Tensor:
    """Uninitialised bytes in large pages where the system has them."""
    if not _has_large_pages:
        return torch.empty(count, dtype=torch.uint8, device="cpu")
    try:
        # Private: after a fork each process has its own.
        memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # no memory: torch's error says so in its own words
        return torch.empty(count, dtype=torch.uint8, device="cpu")
    with suppress(OSError):  # a kernel built without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


STASH = Buffer(320 << 20)  # what the default workspace comes to, and some
SCRATCH = Buffer(32 << 20)


def release() -> None:
    """Forget the kept buffers; their memory is freed when its last user lets go."""
    for buffer in (STASH, SCRATCH):
        buffer.release()
