"""Counting the multiplications of matrix products."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Multiplications(TorchDispatchMode):
    """How many of them the products of matrices took, in whatever form they are written."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_"):
            a, b = args[-2:]
            self.total += a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))
