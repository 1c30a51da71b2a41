"""What the logits of the positives and of the negatives of a row come to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccu_fast.losses.formulas import logsumexp
from ccu_fast.ops.backend import fp32_precision, fp32_sums, transformed, without_autocast
from ccu_fast.ops.operator import constant

# The most bytes of hard negatives that are in fp32 at a time; a GPU's cache holds about as many.
WIDENED = 32 << 20


class Positives(NamedTuple):
    """The positives of every row or column.

    Attributes:
        total: sum of their logits.
        inside: the log-sum-exp.
        number: how many they are; None: one each.
    """

    total: Tensor
    inside: Tensor
    number: Tensor | None

    def mean(self) -> Tensor:  # no property: torch 2.8 does not trace one of a NamedTuple
        return self.total if self.number is None else self.total / self.number.clamp(min=1)


class Negatives(NamedTuple):
    """A set of negatives of every row or column.

    Attributes:
        lse: log-sum-exp of their logits.
        total: sum of these.
        number: how many they are. Both 0 where the variant does not ask.
    """

    lse: Tensor
    total: Tensor | float = 0.0
    number: Tensor | int = 0

    @staticmethod
    def union(sets: list[Negatives]) -> Negatives:
        if len(sets) == 1:
            return sets[0]
        lse = torch.broadcast_tensors(*(s.lse for s in sets))
        return Negatives(logsumexp(torch.stack(lse)), sum(s.total for s in sets), sum(s.number for s in sets))


def products_of_own(x: Tensor, others: Tensor) -> Tensor:
    """x ``[..., N, D]`` times its own ``[..., N, K, D]`` in at least fp32: ``[..., N, K]``."""
    with without_autocast(x.device):
        if x.shape[:-1] != others.shape[:-2] or transformed(x, others):
            return _products(x, others)
        products: Tensor = _Own.apply(x, others)
        return products


class _Own(torch.autograd.Function):
    """Torch's own gradients of this product take twice as long: it adds up the outer ones one by one.

    ``others`` in half precision, the largest tensor here, are widened some rows at a time, so that neither they nor
    their gradient are ever whole in fp32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, others: Tensor) -> Tensor:
        ctx.save_for_backward(x, others)
        if _multiplied_in_half(x, others):
            with fp32_sums():
                own = torch.bmm(others.flatten(0, -3), x.reshape(-1, x.shape[-1], 1), out_dtype=torch.float32)
            return own.view(others.shape[:-1])
        parts = [_products(x[..., rows, :], others[..., rows, :, :]) for rows in _parts(others)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, others = ctx.saved_tensors
        of_x, of_others = ctx.needs_input_grad
        parts = _parts(others)
        if len(parts) == 1 or torch.is_grad_enabled() or _batched(grad):
            return (
                _sums(grad, others).to(x.dtype) if of_x else None,
                _outer(grad, x).to(others.dtype) if of_others else None,
            )
        dx = torch.empty_like(x) if of_x else None
        dothers = torch.empty_like(others) if of_others else None
        for rows in parts:
            part = grad[..., rows, :]
            if dx is not None:
                dx[..., rows, :] = _sums(part, others[..., rows, :, :])
            if dothers is not None:
                dothers[..., rows, :, :] = _outer(part, x[..., rows, :])
        return dx, dothers


def _batched(grad: Tensor) -> bool:
    """Whether these are many cotangents at once, which cannot be written into parts of one tensor."""
    return transformed(grad) or torch._C._functorch.is_legacy_batchedtensor(grad)


def _products(x: Tensor, others: Tensor) -> Tensor:
    return torch.matmul(others.to(wide(others)), x.to(wide(x))[..., None])[..., 0]


def _sums(grad: Tensor, others: Tensor) -> Tensor:
    return torch.matmul(grad[..., None, :], others.to(wide(others)))[..., 0, :]


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    return grad[..., None] * x.to(wide(x))[..., None, :]


def _parts(others: Tensor) -> list[slice]:
    """The rows of ``others`` to widen at a time; all of them where there is nothing to widen, or in a graph."""
    n = others.shape[-3]
    # A graph serves any number of rows, and so has no loop over them.
    if torch.compiler.is_compiling() or others.dtype == wide(others) or 4 * others.numel() <= WIDENED:
        return [slice(0, n)]
    step = max(1, WIDENED * n // (4 * others.numel()))
    return [slice(start, start + step) for start in range(0, n, step)]


def _multiplied_in_half(x: Tensor, others: Tensor) -> bool:
    """Whether a GEMM takes both as they are and sums in fp32: of CUDA alone."""
    half = x.dtype == others.dtype and x.dtype in (torch.float16, torch.bfloat16)
    return half and x.is_cuda and torch.version.hip is None and others.numel() > 0 and not torch.compiler.is_compiling()


# The precision is a constant of a graph, as it is for torch's own GEMMs.
@constant
def rounding(dtype: torch.dtype, device_type: str) -> float:
    """By how much the similarities of two equal items may differ, relative to one.

    A product of a pair alone is exact where that of a tile has its operands rounded, or the result: to bf16, or fp32 to
    what its precision allows, which is bf16 on a CPU and TF32 on a GPU.
    """
    if dtype == torch.float64:
        return 1e-14
    precision = fp32_precision(device_type) if dtype == torch.float32 else "highest"
    if device_type == "cuda" and precision != "highest":
        return 2**-8
    return 2**-7 if dtype == torch.bfloat16 or precision == "medium" else 1e-6


def wide(t: Tensor) -> torch.dtype:
    """The dtype of sums: fp64 of fp64, else fp32."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def difference(a: Tensor, b: Tensor) -> Tensor:
    """a − b, and −inf of two empty sets."""
    empty = b == -torch.inf
    return torch.where(empty, -torch.inf, torch.where(empty, 0, a) - torch.where(empty, 0, b))


def log_of_number(count: Tensor | int, like: Tensor) -> Tensor:
    """The logarithm of a number of negatives; of none it is 0, for what is added to −inf."""
    return torch.as_tensor(count, device=like.device).clamp(min=1).to(like.dtype).log()
