"""reduce_similarity on a CPU for a bank of frozen keys: y gets no gradient, and only log-sum-exps of rows are wanted.

The derivative of such a log-sum-exp is small, and known before the incoming gradient is:

    ∂lse_i / ∂x_i = scale · Σ_j softmax_ij y_j            the mean key of row i, [N, D]

So the forward pass computes it too, from the block of S that is in the cache anyway: for each block of rows it walks
the keys once, one block at a time, with a running softmax. The backward pass then needs [N, D] numbers instead of the
N x M of S. Each pair takes part in 2 GEMMs and one exponential, whatever the workspace.

Several log-sum-exps of a row, say over ALL and over OTHER, share their parts: relations that belong to the same
reductions form a group, with its own softmax and mean key, and each result is joined from those of its groups. The
group that has OTHER holds most pairs and goes through the GEMM; the keys of the other groups are added one by one
(csrc/cpu/similarity_softmax.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ccu_fast import _C
from ccu_fast.ops.backend import gemm_dtype
from ccu_fast.ops.native import address
from ccu_fast.ops.reduce_similarity.native.chunks import FP32, Operands
from ccu_fast.ops.reduce_similarity.problem import Gradients, Incoming, SimilarityProblem, decode, encode
from ccu_fast.ops.reduce_similarity.relations import OTHER, SAME, SELF

# A block: its similarities take 1 MiB, its keys 2 MiB at D = 512.
_ROWS, _KEYS = 256, 1024


def _groups(p: SimilarityProblem) -> list[int]:
    """Sets of relations that belong to the same reductions. The first has OTHER, or is 0 if none wants OTHER."""
    by_user: dict[tuple[int, ...], int] = {}
    for relation in (OTHER, SAME, SELF):
        users = tuple(r for r, code in enumerate(p.rows) if decode(code)[1] & relation)
        if users:
            by_user[users] = by_user.get(users, 0) | int(relation)
    groups = list(by_user.values())
    return groups if groups[0] & OTHER else [0, *groups]


def stash_shape(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[int, ...]:
    """The shape of the stash that :func:`_parts` splits."""
    return (len(_groups(p)) * p.n * (2 + p.x.shape[2]),)


def _parts(p: SimilarityProblem, stash: Tensor) -> tuple[Tensor, Tensor]:
    """Per group the log-sum-exps, fp64 ``[G, N]``, and the mean keys, fp32 ``[G, N, D]``."""
    groups = len(_groups(p))
    lse, mean = stash[: 2 * groups * p.n], stash[2 * groups * p.n :]
    return lse.view(torch.float64).view(groups, p.n), mean.view(groups, p.n, -1)


def forward(p: SimilarityProblem, workspace: int, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Row results ``[R, 1, N]``, column results ``[0, 1, M]`` and the parts of all groups."""
    groups, dtype = _groups(p), gemm_dtype(p.x.dtype)
    native = Operands(p, dtype, tuple(encode("lse", group) for group in groups))
    stash = torch.zeros(stash_shape(p, workspace, keep), **FP32)
    total, mean = _parts(p, stash)
    shift = torch.full(total.shape, -torch.inf, **FP32)
    block = torch.empty(min(_ROWS, p.n) * min(_KEYS, p.m), dtype=dtype, device="cpu")
    exponentials = block if dtype == torch.float32 else torch.empty(block.shape, **FP32)
    for i in range(0, p.n, _ROWS):
        rows = slice(i, min(i + _ROWS, p.n))
        x, count = native.x[0, rows], rows.stop - i
        for j in range(0, p.m, _KEYS):
            cols = slice(j, min(j + _KEYS, p.m))
            keys = p.y[0, cols].to(dtype)
            wide = keys.float() if len(groups) > 1 else None
            dot = block[: count * keys.shape[0]].view(1, count, -1)
            e = exponentials[: dot.numel()].view(dot.shape[1:])
            torch.mm(x, keys.T, out=dot[0])
            _C.similarity_softmax(
                tile=native.tile(dot, slice(0, 1), rows, cols),
                e=e.data_ptr(),
                keys=address(wide),
                dim=p.x.shape[2],
                shift=shift[:, i:].data_ptr(),
                sum=total[:, i:].data_ptr(),
                mean=mean[:, i:].data_ptr(),
                group_stride=p.n,
            )
            if groups[0]:
                if dtype == torch.float32:
                    mean[0, rows].addmm_(e, keys)
                else:
                    mean[0, rows] += torch.mm(e.to(dtype), keys)
    # An empty group has the mean key 0.
    mean /= torch.where(total == 0, 1, total).float()[..., None]
    total.log_().add_(shift)
    row_out = torch.stack([total[_members(groups, code)].logsumexp(0, keepdim=True) for code in p.rows])
    return row_out.float(), torch.empty(0, 1, p.m, **FP32), stash


def backward(
    p: SimilarityProblem, incoming: Incoming, stash: Tensor, needs: Sequence[bool], workspace: int
) -> Gradients:
    """Gradients of x, scale and bias, without another look at the keys; that of y is empty."""
    groups = _groups(p)
    lse, mean = _parts(p, stash)
    # In fp64: for lse(ALL) - lse(OTHER) the factors of a group nearly cancel.
    factors = torch.zeros_like(lse)
    for code, grad in zip(p.rows, incoming[0][:, 0], strict=True):
        members = _members(groups, code)
        out = lse[members].logsumexp(0)
        # A row without pairs passes no gradient.
        factors[members] += torch.where(out == -torch.inf, 0, grad * (lse[members] - out).exp())
    # d loss / d (scale * x_i)
    grad = torch.einsum("gn,gnd->nd", factors.float(), mean)
    dx = (p.scale * grad)[None].to(p.x.dtype) if needs[0] else torch.empty(0, **FP32)
    dscale = (p.x[0].float() * grad).sum(dtype=torch.float64) if needs[2] else torch.zeros(())
    return dx, torch.empty(0, **FP32), dscale.float(), factors.sum().float()


def _members(groups: list[int], code: int) -> list[int]:
    """The groups whose relations a reduction wants."""
    return [g for g, group in enumerate(groups) if group & decode(code)[1]]
