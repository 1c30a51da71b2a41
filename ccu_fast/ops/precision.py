"""torch's settings for matrix products: what they say, and what must not follow them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def fp32_precision(device_type: str) -> str:
    """The name that ``torch.set_float32_matmul_precision`` has for it: "highest", "high" (TF32) or "medium" (bf16)."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer, per-backend setting was used, which forbids the older question
        backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
        names = {"tf32": "high", "bf16": "medium"}
        return names.get(backend.matmul.fp32_precision, "highest")


@contextmanager
def fp32_sums() -> Iterator[None]:
    """GEMMs of fp16 in here add in fp32, although the user allowed cuBLAS to add in fp16.

    Ours have operands scaled to the top of fp16's range, whose sums would overflow, or a bound that counts on fp32.
    """
    matmul = torch.backends.cuda.matmul
    if not matmul.allow_fp16_accumulation:
        yield
        return
    matmul.allow_fp16_accumulation = False
    try:
        yield
    finally:
        matmul.allow_fp16_accumulation = True
