"""reduce_similarity as torch operators with an autograd rule.

    ccu_fast::reduce_similarity           x, y, … → row results [R, B, N], column results [C, B, M], stash
    ccu_fast::reduce_similarity_backward  their gradients → dx, dy, dscale, dbias

The backend is chosen before and named by a string, inside the operator, so a compiled graph never breaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.ops.backend import load, outside_transforms, without_autocast
from ccu_fast.ops.operator import operator, twice_differentiable
from ccu_fast.ops.reduce_similarity.problem import Gradients, SimilarityProblem, decode

_FIELDS = (
    "Tensor x, Tensor y, Tensor scale, Tensor? bias, Tensor? row_labels, Tensor? col_labels, "
    "Tensor? row_ids, Tensor? col_ids, Tensor? row_limits, Tensor? col_limits, Tensor? guide_x, Tensor? guide_y, "
    "Tensor? teacher_scale, bool diagonal, int[] rows, int[] cols, int[] prefixes, bool unit"
)
_N_KEYED, _N_TENSORS, _N_FIELDS = 8, 13, 18
# With fewer frozen keys what has to be kept is small, and many rows or banks at a time make better GEMMs.
MANY_KEYS = 4096
# What one small kernel each way does sooner than the launches of the large ones: pairs in all, and of one item.
SMALL_PAIRS, SMALL_SIDE, SMALL_DIM = 1 << 20, 2048, 1024
# Fewer than these cost a CPU so little that a loss of each prefix is sooner done than one of all prefixes at once.
FEW_PAIRS = 1 << 16
HALF = (torch.float16, torch.bfloat16)


def specialised(p: SimilarityProblem, backend: str, keep: bool) -> str:
    """The backend, or the module of it that is made for problems like this one.

    That is on a CPU a large bank of frozen keys, on a GPU a small batch in half precision.
    """
    # Not asked of the module, whose import torch.compile would have to follow.
    if backend == "triton":
        few = p.banks * p.n * p.m <= SMALL_PAIRS and max(p.n, p.m) <= SMALL_SIDE and p.x.shape[2] <= SMALL_DIM
        return "triton.small" if few and p.x.dtype in HALF and p.guide_x is None else backend
    frozen = backend == "native" and keep and not p.y.requires_grad
    only_lse = not p.cols and all(decode(code)[0] == "lse" for code in p.rows)
    # There the gradient of scale is a sum over mean keys, whose weights are rounded to bf16 when the GEMMs are.
    exact = p.x.dtype != torch.bfloat16 or not p.scale.requires_grad
    if frozen and only_lse and exact and not p.limited and p.banks == 1 and p.m >= MANY_KEYS:
        return "native.frozen_keys"
    return backend


def flat(p: SimilarityProblem) -> tuple[Any, ...]:
    """The fields in order, in the types an operator schema knows."""
    keyed = (p.x, p.y, p.scale, p.bias, p.row_labels, p.col_labels, p.row_ids, p.col_ids)
    limits = (p.row_limits, p.col_limits, p.guide_x, p.guide_y, p.teacher_scale)
    return (*keyed, *limits, p.diagonal, list(p.rows), list(p.cols), list(p.prefixes), p.unit)


def _problem(args: Sequence[Any]) -> SimilarityProblem:
    """The inverse of :func:`flat`, of an operator's first arguments."""
    diagonal, rows, cols, prefixes, unit = args[_N_TENSORS:_N_FIELDS]
    keyed, limits = args[:_N_KEYED], args[_N_KEYED:_N_TENSORS]
    return SimilarityProblem(*(*keyed, diagonal, tuple(rows), tuple(cols), *limits, tuple(prefixes), unit))


def run_forward(p: SimilarityProblem, backend: str, workspace: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Row results ``[R, B, N]``, column results ``[C, B, M]`` and, if ``keep``, what the backend wants to have back."""
    if keep and p.x.device.type == "cpu" and p.row_labels is not None:
        p = p.without_ignored()  # what is kept there, S itself or mean keys, is multiplied in the backward pass
    with without_autocast(p.x.device):
        return load("reduce_similarity", backend).forward(p, workspace, keep)


def run_backward(
    p: SimilarityProblem,
    backend: str,
    grad_rows: Tensor,
    grad_cols: Tensor,
    row_out: Tensor,
    col_out: Tensor,
    stash: Tensor,
    needs: Sequence[bool],
    workspace: int,
) -> Gradients:
    """dx, dy, dscale and dbias, those not in ``needs`` empty or zero.

    With an empty stash S is computed again, and ``row_out`` and ``col_out`` may be results of a larger problem of which
    this one is a block.
    """
    if p.row_labels is not None:
        p = p.without_ignored()
    with without_autocast(p.x.device):
        backward = load("reduce_similarity", backend).backward
        return backward(p, (grad_rows, grad_cols, row_out, col_out), stash, needs, workspace)


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    p = _problem(args)
    backend, workspace, keep = args[_N_FIELDS:]
    row_out = p.x.new_empty((len(p.rows), p.sets, p.n), dtype=torch.float32)
    col_out = p.x.new_empty((len(p.cols), p.sets, p.m), dtype=torch.float32)
    stash = p.x.new_empty(load("reduce_similarity", backend).stash_shape(p, workspace, keep), dtype=torch.float32)
    return row_out, col_out, stash


@operator(
    f"reduce_similarity({_FIELDS}, str backend, int workspace, bool keep) -> (Tensor, Tensor, Tensor)",
    fake=_fake_forward,
)
def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return run_forward(_problem(args), *args[_N_FIELDS:])


def _fake_backward(grad_rows: Tensor, grad_cols: Tensor, *args: Any) -> Gradients:
    p = _problem(args)
    needs = args[_N_FIELDS + 3]
    return (
        p.x.new_empty(p.x.shape if needs[0] else (0,)),
        p.y.new_empty(p.y.shape if needs[1] else (0,)),
        p.scale.new_empty(()),
        p.scale.new_empty(()),
    )


@operator(
    f"reduce_similarity_backward(Tensor grad_rows, Tensor grad_cols, {_FIELDS}, Tensor row_out, Tensor col_out, "
    "Tensor stash, bool[] needs, str backend, int workspace) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
def _backward(grad_rows: Tensor, grad_cols: Tensor, *args: Any) -> Gradients:
    p = _problem(args)
    row_out, col_out, stash, needs, backend, workspace = args[_N_FIELDS:]
    return run_backward(p, backend, grad_rows, grad_cols, row_out, col_out, stash, needs, workspace)


def _backward_again(grad_rows: Tensor, grad_cols: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
    """:func:`_backward` in plain torch, with None for an empty gradient."""
    p = _problem(args)
    with without_autocast(p.x.device):
        dx, dy, *rest = load("reduce_similarity", "reference").differentiable_backward(p, grad_rows, grad_cols)
    needs = args[_N_FIELDS + 3]
    return dx if needs[0] else None, dy if needs[1] else None, *rest


class SimilarityReduction(torch.autograd.Function):
    """Row and column results of one problem; the stash is whatever the backend keeps for its backward pass."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        call = torch.ops.ccu_fast.reduce_similarity if check.by_operator(args[0]) else _forward
        row_out, col_out, stash = call(*args)
        # The stash is not marked as an input or output: it lives exactly as long as the graph.
        ctx.save_for_backward(*args[:_N_TENSORS], row_out, col_out, stash)
        ctx.rest = args[_N_TENSORS:]
        return row_out, col_out

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_cols: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, row_out, col_out, stash = ctx.saved_tensors
        *spec, backend, workspace, _ = ctx.rest
        needs = list(ctx.needs_input_grad[:4])
        problem = (*tensors, *spec)
        kept = (row_out, col_out, stash, needs, backend, workspace)
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            outside_transforms("reduce_similarity", grad_rows, grad_cols)
        incoming = (grad_rows.contiguous(), grad_cols.contiguous())
        call: Any = _backward
        if check.by_operator(grad_rows):
            call = torch.ops.ccu_fast.reduce_similarity_backward
        elif any(map(torch._C._functorch.is_legacy_batchedtensor, incoming)):
            call = _backward_again  # is_grads_batched=True: many gradients at once, which no kernel can read
        elif torch.is_grad_enabled():
            call = twice_differentiable(_backward, _backward_again)
        grads = call(*incoming, *problem, *kept)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 17)
