"""candidate_losses: torch's GEMMs, and csrc/cpu/candidates.cpp or csrc/cuda/candidates.cu for everything else.

The similarities of candidates and images are computed one chunk at a time, in one buffer that stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable

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
        shared = (_Gpu if on_gpu(image.device) else _Cpu)(image, text, scale, factor)
        for first in range(0, batch, rows):
            count = min(rows, batch - first)
            part = text_candidates[first : first + count].detach().reshape(count * candidates, dim)
            similarity = multiply(part, shared.image.T, buffer[: count * candidates])
            shared.losses(similarity, candidates, first, count, out)
    return out


class _Cpu:
    """What all candidates of a batch share, on a CPU."""

    def __init__(self, image: Tensor, text: Tensor, scale: float, factor: Tensor | None) -> None:
        batch = len(image)
        self.image = scaled(image, scale, factor)
        self.rest = self.image.new_empty(batch, batch)
        self.fixed = self.image.new_empty(batch, dtype=torch.float64)
        s = self.image @ text.float().T
        _C.candidate_rest(
            s=s.data_ptr(),
            batch=batch,
            rest=self.rest.data_ptr(),
            fixed=self.fixed.data_ptr(),
            threads=torch.get_num_threads(),
        )

    def losses(self, similarity: Tensor, candidates: int, first: int, rows: int, out: Tensor) -> None:
        _C.candidate_losses(
            similarity=similarity.data_ptr(),
            rest=self.rest.data_ptr(),
            fixed=self.fixed.data_ptr(),
            batch=len(self.image),
            candidates=candidates,
            first=first,
            rows=rows,
            out=out.data_ptr(),
            threads=torch.get_num_threads(),
        )


class _Gpu:
    """The same on a GPU, where the kernels multiply by the scale and share nothing if the batch is small."""

    def __init__(self, image: Tensor, text: Tensor, scale: float, factor: Tensor | None) -> None:
        batch = len(image)
        self.image, self.scale = image, scale
        self.factor = None if factor is None else factor.detach()
        self.s = multiply(image, text.T, image.new_empty(batch, batch, dtype=torch.float32))
        self.rest = self.columns = None
        if batch > _C.CUDA_ALONE:
            self.rest = torch.empty_like(self.s)
            self.columns = self.s.new_empty(batch, dtype=torch.float64)
            self._launch(_C.cuda_candidate_rest)

    def losses(self, similarity: Tensor, candidates: int, first: int, rows: int, out: Tensor) -> None:
        self._launch(_C.cuda_candidate_losses, similarity, candidates, first, rows, out)

    def _launch(
        self,
        kernel: Callable[[_C.CudaCandidates], None],
        similarity: Tensor | None = None,
        candidates: int = 0,
        first: int = 0,
        rows: int = 0,
        out: Tensor | None = None,
    ) -> None:
        guard, where = on(self.image.device)
        with guard:
            kernel(
                _C.CudaCandidates(
                    s=self.s.data_ptr(),
                    similarity=address(similarity),
                    scale=self.scale,
                    factor=address(self.factor),
                    batch=len(self.image),
                    candidates=candidates,
                    first=first,
                    rows=rows,
                    rest=address(self.rest),
                    columns=address(self.columns),
                    out=address(out),
                    stream=where["stream"],
                )
            )
