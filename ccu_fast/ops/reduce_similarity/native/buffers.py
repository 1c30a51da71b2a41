"""One large buffer that stays between calls.

The C library maps blocks of more than 32 MiB anew each time, and the kernel then zeroes every page of them at its first
touch, which for the similarities of a batch of 8192 shows in the time of a step. So the largest buffer, of up to
320 MiB, stays with the process and is lent again once nothing but this module refers to its memory, saved graphs
included. :func:`release` gives it back to the system.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

WORTH_KEEPING = 32 << 20
_MOST = 320 << 20  # what the default workspace comes to, and some
_lock = threading.Lock()
_kept: Tensor | None = None
_references: Any = getattr(torch._C, "_storage_Use_Count", None)


def _is_free(buffer: Tensor) -> bool:
    storage = buffer.untyped_storage()
    # Two refer to it: the tensor in _kept, and the wrapper made in the line above.
    return bool(_references(storage._cdata) <= 2)


def borrow(size: int) -> Tensor:
    """``size`` uninitialised fp32 values on the CPU, flat and WORTH_KEEPING; given back by letting go of them."""
    global _kept
    if _references is None:
        return torch.empty(size, dtype=torch.float32, device="cpu")
    with _lock:
        if _kept is not None and _is_free(_kept):
            if size <= _kept.numel():
                return _kept[:size]
            if size * 4 <= _MOST:
                _kept = None
        buffer = torch.empty(size, dtype=torch.float32, device="cpu")
        if _kept is None and size * 4 <= _MOST:
            _kept = buffer
        return buffer[:]


def release() -> None:
    """Forget the kept buffer; its memory is freed when its last user lets go."""
    global _kept
    with _lock:
        _kept = None
