"""candidate_losses in plain torch, any device and dtype, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 24


def solve(text_candidates: Tensor, image: Tensor, text: Tensor, scale: float, factor: Tensor | None) -> Tensor:
    """``[B, K]``; a similarity is ``scale`` and ``factor`` times a product of an image and a text."""
    batch, candidates, _ = text_candidates.shape
    image = scaled(image, scale, factor)
    s = image @ text.to(image.dtype).T
    own = s.diagonal()
    without = _leave_one_out(s)
    # What the rows and columns other than b contribute whatever stands at b.
    columns = (s.logsumexp(0) - own).double()
    fixed = columns.sum() - columns - (own.double().sum() - own.double())
    rows = max(1, _CHUNK_ELEMENTS // (candidates * batch))
    parts = []
    for start in range(0, batch, rows):
        part = slice(start, min(start + rows, batch))
        new = text_candidates[part].to(image.dtype) @ image.T  # [b, K, B]: candidate against every image
        matched = new[torch.arange(new.shape[0]), :, torch.arange(start, start + new.shape[0])]
        per_image = torch.logaddexp(without[:, part].T[:, None, :], new)
        changed = per_image.double().sum(-1) + (new.logsumexp(-1) - 2 * matched).double()
        parts.append((changed + fixed[part, None]) / (2 * batch))
    return torch.cat(parts).to(image.dtype)


def scaled(image: Tensor, scale: float, factor: Tensor | None) -> Tensor:
    """``image`` times the scale, in the dtype to compute in; contiguous."""
    wide = image if image.dtype == torch.float64 else image.float()
    return ((scale if factor is None else scale * factor) * wide).contiguous()


def _leave_one_out(s: Tensor) -> Tensor:
    """out[i, b] = logsumexp of row i without its element b: what is before it joined with what is after it."""
    # In float64: sums along a row accumulate B roundings. B² elements are few beside B²·K.
    s64 = s.double()
    empty = s64.new_full((s.shape[0], 1), -torch.inf)
    before = torch.cat([empty, s64[:, :-1].logcumsumexp(1)], 1)
    behind = torch.cat([s64[:, 1:].flip(1).logcumsumexp(1).flip(1), empty], 1)
    return torch.logaddexp(before, behind).to(s.dtype)
