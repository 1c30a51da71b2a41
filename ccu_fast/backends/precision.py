"""torch's setting for fp32 matrix products, whichever of its two interfaces it was made through."""

from __future__ import annotations

import torch


def fp32_precision(device_type: str) -> str:
    """The name that ``torch.set_float32_matmul_precision`` has for it: "highest", "high" (TF32) or "medium" (bf16)."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer, per-backend setting was used, which forbids the older question
        backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
        names = {"tf32": "high", "bf16": "medium"}
        return names.get(backend.matmul.fp32_precision, "highest")
