"""candidate_losses: torch's GEMMs, and csrc/cpu/candidates.cpp or csrc/cuda/candidates.cu for everything else.

The similarities of candidates and images are computed one chunk at a time, in one buffer that stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ccu_fast import _C
from ccu_fast.ops.candidate_losses.reference import scaled
from ccu_fast.ops.native import address, multiply, on, on_gpu

_CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 16 << 20}


def solve(text_candidates: Tensor, image: Tensor, text: Tensor, scale: float, factor: Tensor | None) -> Tensor:
    """``[B, K]`` fp32; a similarity is ``scale`` and ``factor`` times a product of an image and a text."""
    batch, candidates, dim = text_candidates.shape
    with torch.no_grad():
        image, text = image.detach(), text.detach()
        rows = min(batch, max(1, _CHUNK_BYTES[image.device.type] // (4 * candidates * batch)))
        out = image.new_empty(batch, candidates, dtype=torch.float32)
        buffer = image.new_empty(rows * candidates, batch, dtype=torch.float32)
        operand, losses = (_on_gpu if on_gpu(image.device) else _on_cpu)(image, text, scale, factor, out)
        for first in range(0, batch, rows):
            count = min(rows, batch - first)
            part = text_candidates[first : first + count].detach().reshape(count * candidates, dim)
            losses(multiply(part, operand.T, buffer[: count * candidates]), first, count)
    return out


# What multiplies the candidates, and what then writes the losses of ``rows`` of them from ``first`` on.
_Shared = tuple[Tensor, Callable[[Tensor, int, int], None]]


def _on_cpu(image: Tensor, text: Tensor, scale: float, factor: Tensor | None, out: Tensor) -> _Shared:
    batch, candidates = out.shape
    image = scaled(image, scale, factor)
    rest = image.new_empty(batch, batch)
    fixed = image.new_empty(batch, dtype=torch.float64)
    s = image @ text.float().T
    _C.candidate_rest(
        s=s.data_ptr(),
        batch=batch,
        rest=rest.data_ptr(),
        fixed=fixed.data_ptr(),
        threads=torch.get_num_threads(),
    )

    def losses(similarity: Tensor, first: int, rows: int) -> None:
        _C.candidate_losses(
            similarity=similarity.data_ptr(),
            rest=rest.data_ptr(),
            fixed=fixed.data_ptr(),
            batch=batch,
            candidates=candidates,
            first=first,
            rows=rows,
            out=out.data_ptr(),
            threads=torch.get_num_threads(),
        )

    return image, losses


def _on_gpu(image: Tensor, text: Tensor, scale: float, factor: Tensor | None, out: Tensor) -> _Shared:
    """There the kernels multiply by the scale, and share nothing if the batch is small."""
    batch, candidates = out.shape
    factor = None if factor is None else factor.detach()
    s = multiply(image, text.T, image.new_empty(batch, batch, dtype=torch.float32))
    several = batch > _C.CUDA_ALONE
    rest = torch.empty_like(s) if several else None
    columns = s.new_empty(batch, dtype=torch.float64) if several else None

    def launch(kernel: Callable[[_C.CudaCandidates], None], similarity: Tensor | None, first: int, rows: int) -> None:
        guard, where = on(image.device)
        with guard:
            kernel(
                _C.CudaCandidates(
                    s=s.data_ptr(),
                    similarity=address(similarity),
                    scale=scale,
                    factor=address(factor),
                    batch=batch,
                    candidates=candidates,
                    first=first,
                    rows=rows,
                    rest=address(rest),
                    columns=address(columns),
                    out=out.data_ptr(),
                    stream=where["stream"],
                )
            )

    if several:
        launch(_C.cuda_candidate_rest, None, 0, 0)
    return image, partial(launch, _C.cuda_candidate_losses)
