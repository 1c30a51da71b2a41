"""Losses of N rows against M labelled keys: bounded inverse, Contrastive Unlearning, supervised contrastive."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import ccu_fast
from benchmarks.gate import relative_errors
from benchmarks.ops import clip_loss
from benchmarks.ops.common import Loss, build, build_compiled, build_ours, fp64_step, leaf, unit
from benchmarks.registry import Op, Provider, Shape, Tensors

PER_CLASS = 64  # keys


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Unit vectors around the centres of their classes; rows and keys are different items of the same classes."""
    rng = torch.Generator().manual_seed(0)
    classes = max(2, shape["M"] // PER_CLASS)
    centres = unit(classes, shape["D"], generator=rng)

    def bank(items: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(items).remainder(classes)[torch.randperm(items, generator=rng)]
        return F.normalize(0.3 * centres[labels] + unit(items, shape["D"], generator=rng), dim=-1), labels

    (x, row_labels), (y, col_labels) = bank(shape["N"]), bank(shape["M"])
    return {
        "x": leaf(x, dtype, device),
        "y": leaf(y, dtype, device),
        "scale": leaf(torch.tensor(10.0), torch.float32, device),
        "row_labels": row_labels.to(device),
        "col_labels": col_labels.to(device),
    }


# Every class has keys and is not the only one, so every row has a positive and a negative. The peers below rely on it,
# as anyone who writes them in eager torch would; ours cannot know it, and counts.


def eager_bounded(x: Tensor, y: Tensor, scale: Tensor, row_labels: Tensor, col_labels: Tensor) -> Tensor:
    """ccu_fast.inverse_info_nce's definition of kind="bounded": −log(1 − p of the positives)."""
    logits = scale * x @ y.T
    same = row_labels[:, None] == col_labels
    return (logits.logsumexp(1) - logits.masked_fill(same, -torch.inf).logsumexp(1)).mean()


def eager_unlearning(x: Tensor, y: Tensor, scale: Tensor, row_labels: Tensor, col_labels: Tensor) -> Tensor:
    """Contrastive Unlearning, arXiv 2401.10458, eq. 1."""
    logits = scale * x @ y.T
    same = row_labels[:, None] == col_labels
    mean_other = logits.masked_fill(same, 0).sum(1) / (~same).sum(1)
    return (logits.masked_fill(~same, -torch.inf).logsumexp(1) - mean_other).mean()


def eager_sup_con(x: Tensor, y: Tensor, scale: Tensor, row_labels: Tensor, col_labels: Tensor) -> Tensor:
    """arXiv 2004.11362, eq. 2, against a bank of keys that are other items."""
    logits = scale * x @ y.T
    same = row_labels[:, None] == col_labels
    return (logits.logsumexp(1) - logits.masked_fill(~same, 0).sum(1) / same.sum(1)).mean()


def eager_info_nce(x: Tensor, y: Tensor, scale: Tensor, row_labels: Tensor, col_labels: Tensor) -> Tensor:
    """Key i is the one positive of row i; labels do not matter."""
    return F.cross_entropy(scale * x @ y.T, torch.arange(len(x), device=x.device))


def ours_bounded(x: Tensor, y: Tensor, scale: Tensor, row: Tensor, col: Tensor, *, backend: str) -> Tensor:
    """The same by ccu_fast."""
    return ccu_fast.inverse_info_nce(x, y, scale=scale, row_labels=row, col_labels=col, backend=backend)


def ours_unlearning(x: Tensor, y: Tensor, scale: Tensor, row: Tensor, col: Tensor, *, backend: str) -> Tensor:
    """The same by ccu_fast."""
    return ccu_fast.inverse_info_nce(
        x, y, scale=scale, kind="contrastive", row_labels=row, col_labels=col, backend=backend
    )


def ours_sup_con(x: Tensor, y: Tensor, scale: Tensor, row: Tensor, col: Tensor, *, backend: str) -> Tensor:
    """The same by ccu_fast."""
    return ccu_fast.sup_con(x, y, scale=scale, row_labels=row, col_labels=col, backend=backend)


def ours_info_nce(x: Tensor, y: Tensor, scale: Tensor, row: Tensor, col: Tensor, *, backend: str) -> Tensor:
    """InfoNCE of the same rows and keys: what the GEMMs and one log-sum-exp cost without labels."""
    (lse,), _ = ccu_fast.reduce_similarity(x, y, scale=scale, rows=[("lse", ccu_fast.ALL)], backend=backend)
    return (lse - scale * (x.float() * y[: len(x)].float()).sum(-1)).mean()


def work(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """6·N·M·D FLOPs."""
    return 6.0 * shape["N"] * shape["M"] * shape["D"], 0.0


def _op(name: str, title: str, eager: Loss, ours: Loss) -> Op:
    info_nce = partial(fp64_step, loss=eager_info_nce)
    return Op(
        name=name,
        kernel="reduce_similarity",
        title=f"{title} of N rows against M labelled keys, {PER_CLASS} keys a class: loss, dX, dY, dscale",
        make=make,
        expect=partial(fp64_step, loss=eager),
        errors=relative_errors,
        providers=(
            Provider("eager", partial(build, loss=eager)),
            Provider("eager_compiled", partial(build_compiled, loss=eager), compiled=True),
            Provider("ccu_fast", partial(build_ours, loss=ours), role="ours"),
            Provider("info_nce", partial(build_ours, loss=ours_info_nce), role="yardstick", expect=info_nce),
            Provider("gemm_ceiling", clip_loss.build_ceiling, role="ceiling"),
        ),
        shapes={
            "cpu": [{"N": 1024, "M": 8192, "D": 512}],
            "cuda": [{"N": 4096, "M": 32768, "D": 512}],
        },
        quick=[{"N": 48, "M": 192, "D": 32}],
        work=work,
        baseline="eager",
    )


BOUNDED_INVERSE = _op("bounded_inverse", "bounded inverse InfoNCE", eager_bounded, ours_bounded)
CONTRASTIVE_UNLEARNING = _op(
    "contrastive_unlearning", "Contrastive Unlearning's loss", eager_unlearning, ours_unlearning
)
SUP_CON_KEYS = _op("sup_con_keys", "supervised contrastive loss", eager_sup_con, ours_sup_con)
