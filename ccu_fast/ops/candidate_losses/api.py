"""The loss of a batch with one caption replaced: choosing candidates without running a model again."""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.ops.backend import choose, has_tangent, load, transformed, without_autocast
from ccu_fast.ops.candidate_losses import reference
from ccu_fast.ops.operator import operator


def candidate_losses(
    text_candidates: Tensor,
    image: Tensor,
    text: Tensor,
    *,
    scale: float | Tensor,
    bias: float | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute a batch's symmetric InfoNCE with one caption replaced, for every caption and candidate::

        for b, k:
            t = text.clone(); t[b] = text_candidates[b, k]
            s = scale * image @ t.T + bias
            out[b, k] = (cross_entropy(s, arange(B)) + cross_entropy(s.T, arange(B))) / 2

    This costs one similarity per candidate and image. A replaced caption changes one column of s: the column's
    log-sum-exp is computed again, and that of every row loses one term and gains one. Where the lost term dominates,
    subtracting it would cancel; there the others are summed again.

    Args:
        text_candidates: ``[B, K, D]`` features of K candidate captions for each of the B rows; fp32, fp16, bf16 or
            fp64.
        image: ``[B, D]`` image features.
        text: ``[B, D]`` features of the captions as they are.
        scale: number or one-element tensor: the inverse temperature.
        bias: number or one-element tensor added to every similarity. It cancels; accepted for one signature with
            :func:`ccu_fast.info_nce`.
        backend: "auto", "native" or "reference"; a named one raises if it cannot serve. Where a gradient is asked for,
            and in fp64, the reference serves: the kernels only compare candidates.

    Returns:
        ``[B, K]`` fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: Radford et al. 2021 (arXiv 2103.00020), fig. 3, for the loss, by which Liu et al. 2024 (arXiv 2407.16307)
    choose among candidate words; computing it from one column is this project's.

    >>> image = text = torch.eye(2)
    >>> ccu_fast.candidate_losses(torch.eye(2)[None].expand(2, 2, 2), image, text, scale=2.0)
    tensor([[0.1269, 0.9100],
            [0.9100, 0.1269]])
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
    inputs = (text_candidates, image, text, factor if isinstance(factor, Tensor) else None)
    follows = transformed(*inputs) or has_tangent(*inputs)
    follows = follows or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs))
    if follows and backend == "native":
        raise ValueError("backend: 'native' has no gradient; call under torch.no_grad() or detach the inputs")
    name = choose("reference" if follows else backend, "candidate_losses", image.device, image.dtype)
    number, tensor = (1.0, factor) if isinstance(factor, Tensor) else (factor, None)
    with without_autocast(image.device):
        if follows:  # in a graph too: torch has to see what it is to differentiate
            return reference.solve(text_candidates, image, text, number, tensor)
        call = torch.ops.ccu_fast.candidate_losses if check.by_operator(image) else _solve
        losses: Tensor = call(text_candidates, image, text, number, tensor, name)
        return losses


@operator(
    "candidate_losses(Tensor text_candidates, Tensor image, Tensor text, float scale, Tensor? factor, str backend) "
    "-> Tensor",
    fake=lambda candidates, image, *_: image.new_empty(
        candidates.shape[:2], dtype=torch.promote_types(image.dtype, torch.float32)
    ),
)
def _solve(
    text_candidates: Tensor, image: Tensor, text: Tensor, scale: float, factor: Tensor | None, backend: str
) -> Tensor:
    solved: Tensor = load("candidate_losses", backend).solve(text_candidates, image, text, scale, factor)
    return solved


def _scalar(name: str, value: float | Tensor, like: Tensor, dtype: torch.dtype) -> float | Tensor:
    if not isinstance(value, Tensor):
        return check.number(name, value)
    return check.one_element(name, value, "image", like).to(dtype)
