"""The loss of a batch if one caption alone were another: candidate selection without running a model again."""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast import check

_CHUNK_ELEMENTS = 1 << 24


def candidate_losses(
    text_candidates: Tensor,
    image: Tensor,
    text: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor | None = None,
) -> Tensor:
    """The symmetric InfoNCE loss of the batch with one caption replaced, for every caption and candidate::

        for b, k:
            t = text.clone(); t[b] = text_candidates[b, k]
            s = scale * image @ t.T + bias
            out[b, k] = (cross_entropy(s, arange(B)) + cross_entropy(s.T, arange(B))) / 2

    at the cost of one similarity per candidate and image. A replaced caption changes one column of s: in that
    direction its log-sum-exp is new, in the other every image's loses one term and gains one. The term is not
    subtracted, which would cancel when it dominates: each log-sum-exp without it is joined from the part before
    it and the part behind it.

    Args:
        text_candidates: ``[B, K, D]`` features of K candidate captions for each of the B rows; fp32, fp16, bf16 or
            fp64.
        image: ``[B, D]`` image features.
        text: ``[B, D]`` features of the captions as they are.
        scale: number or one-element tensor: the inverse temperature.
        bias: number or one-element tensor added to every similarity. It cancels; accepted for one signature with
            :func:`ccu_fast.info_nce`.

    Returns:
        ``[B, K]`` fp32 (fp64 for fp64 inputs). Differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check.tensor("text_candidates", text_candidates, ndim=3)
    check.tensor("image", image, ndim=2)
    check.tensor("text", text, ndim=2)
    for name, t in (("image", image), ("text", text)):
        check.same(name, t, "text_candidates", text_candidates)
        check.shape(name, t, (text_candidates.shape[0], text_candidates.shape[2]))
    compute = torch.float64 if image.dtype == torch.float64 else torch.float32
    factor = _scalar("scale", scale, image, compute)
    if bias is not None:
        _scalar("bias", bias, image, compute)
    batch, candidates, _ = text_candidates.shape
    if batch == 0 or candidates == 0:
        return text_candidates.new_zeros((batch, candidates), dtype=compute)
    with torch.autocast(image.device.type, enabled=False):
        image, text = factor * image.to(compute), text.to(compute)
        s = image @ text.T
        own = s.diagonal()
        without = _leave_one_out(s)
        # What the rows and columns other than b contribute whatever stands at b.
        columns = (s.logsumexp(0) - own).double()
        fixed = columns.sum() - columns - (own.double().sum() - own.double())
        rows = max(1, _CHUNK_ELEMENTS // (candidates * batch))
        parts = []
        for start in range(0, batch, rows):
            part = slice(start, min(start + rows, batch))
            new = text_candidates[part].to(compute) @ image.T  # [b, K, B]: candidate against every image
            matched = new[torch.arange(new.shape[0]), :, torch.arange(start, start + new.shape[0])]
            per_image = torch.logaddexp(without[:, part].T[:, None, :], new)
            changed = per_image.double().sum(-1) + (new.logsumexp(-1) - 2 * matched).double()
            parts.append((changed + fixed[part, None]) / (2 * batch))
        return torch.cat(parts).to(compute)


def _leave_one_out(s: Tensor) -> Tensor:
    """out[i, b] = logsumexp of row i without its element b."""
    # In float64: sums along a row accumulate B roundings. B² elements are few beside B²·K.
    s64 = s.double()
    empty = s64.new_full((s.shape[0], 1), -torch.inf)
    before = torch.cat([empty, s64[:, :-1].logcumsumexp(1)], 1)
    behind = torch.cat([s64[:, 1:].flip(1).logcumsumexp(1).flip(1), empty], 1)
    return torch.logaddexp(before, behind).to(s.dtype)


def _scalar(name: str, value: float | Tensor, like: Tensor, dtype: torch.dtype) -> float | Tensor:
    if not isinstance(value, Tensor):
        return check.number(name, value)
    return check.one_element(name, value, "image", like).to(dtype)
