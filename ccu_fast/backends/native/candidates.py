"""candidate_losses: torch's GEMMs, and csrc/cpu/candidates.cpp or csrc/cuda/candidates.cu for all between and behind.

The similarities of candidates and images are made a chunk at a time in one buffer that stays in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast import _C
from ccu_fast.backends.native.launch import on

_CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 16 << 20}


def solve(text_candidates: Tensor, image: Tensor, text: Tensor) -> Tensor:
    """``[B, K]`` fp32 from ``image``, already times the scale, and ``text``, both fp32."""
    batch, candidates, dim = text_candidates.shape
    image, text = image.detach(), text.detach()
    out = image.new_empty(batch, candidates)
    rest = image.new_empty(batch, batch)
    fixed = image.new_empty(batch, dtype=torch.float64)
    s = image @ text.T
    rows = min(batch, max(1, _CHUNK_BYTES[image.device.type] // (4 * candidates * batch)))
    buffer = image.new_empty(rows * candidates, batch)
    guard, where = on(image.device)
    with guard, torch.no_grad():
        _C.candidate_rest(s=s.data_ptr(), batch=batch, rest=rest.data_ptr(), fixed=fixed.data_ptr(), **where)
        for first in range(0, batch, rows):
            count = min(rows, batch - first)
            part = text_candidates[first : first + count].detach().reshape(count * candidates, dim).float()
            similarity = torch.mm(part, image.T, out=buffer[: count * candidates])
            _C.candidate_losses(
                similarity=similarity.data_ptr(),
                rest=rest.data_ptr(),
                fixed=fixed.data_ptr(),
                batch=batch,
                candidates=candidates,
                first=first,
                rows=count,
                out=out.data_ptr(),
                **where,
            )
    return out
