"""In which dtype the GEMMs of a CPU multiply."""

from __future__ import annotations

import torch

from ccu_fast.ops.backend import fp32_precision
from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 natively."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def gemm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of inputs of a dtype: bf16 if the CPU has it and that dtype or the matmul precision asks for it."""
    return torch.bfloat16 if _wants_bf16(dtype) and has_bf16() else torch.float32


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """What room is made for: no setting changes it, as it may change before a compiled graph runs."""
    return torch.bfloat16 if dtype == torch.bfloat16 and has_bf16() else torch.float32


def guide_dtype(p: SimilarityProblem) -> torch.dtype | None:
    """Of the guide's features: no setting changes it unless it is a teacher. None without a guide."""
    if p.guide_x is None:
        return None
    return (kept_dtype if p.teacher_scale is None else gemm_dtype)(p.guide_x.dtype)


def _wants_bf16(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 or (dtype == torch.float32 and fp32_precision("cpu") == "medium")
