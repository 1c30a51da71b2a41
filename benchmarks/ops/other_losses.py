"""The other contrastive losses: batched banks, SigLIP's sigmoid loss, supervised contrastive."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ccu_fast
from benchmarks.gate import relative_errors, spread_rows
from benchmarks.ops import clip_loss
from benchmarks.ops.common import (
    build,
    build_compiled,
    build_open_clip,
    build_ours,
    fp64_step,
    leaf,
    open_clip_note,
    scale_terms,
    unit,
)
from benchmarks.ops.peers import build_siglip_kernel, siglip_kernel_note
from benchmarks.registry import Call, Expected, Op, Provider, Shape, Tensors, on_cuda

# --- K text banks against one image bank -----------------------------------------------------------------------------


def make_banks(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """x ``[K, B, D]``, y ``[B, D]``: each bank holds other partners of the same items."""
    rng = torch.Generator().manual_seed(0)
    y = unit(shape["B"], shape["D"], generator=rng)
    x = unit(shape["K"], shape["B"], shape["D"], generator=rng)
    x = F.normalize(clip_loss.COSINE * y + (1 - clip_loss.COSINE**2) ** 0.5 * x, dim=-1)
    scale = leaf(torch.tensor(clip_loss.SCALE), torch.float32, device)
    return {"x": leaf(x, dtype, device), "y": leaf(y, dtype, device), "scale": scale}


def banks_loop(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The sum of the losses of all banks, one after the other."""
    return torch.stack([clip_loss.two_gemms(bank, y, scale) for bank in x]).sum()


def banks_batched(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The same from one batched logits tensor."""
    logits = scale * x @ y.mT
    target = torch.arange(y.shape[0], device=x.device).expand(x.shape[0], -1)
    rows, cols = F.cross_entropy(logits.mT, target), F.cross_entropy(logits, target)
    return (rows + cols) / 2 * x.shape[0]


def ours_banks(x: Tensor, y: Tensor, scale: Tensor, *, backend: str) -> Tensor:
    """The same by ccu_fast."""
    return ccu_fast.info_nce(x, y, scale=scale, backend=backend).sum()


# --- SigLIP ----------------------------------------------------------------------------------------------------------


SIGLIP_KERNEL_SETTINGS: dict[str, dict[str, Any]] = {
    "16384": {"chunk": 16384},
    "pipelined": {"variant": "chunked_bf16_pipelined"},
    "epilogue": {"variant": "chunked_epilogue"},
}


def make_sigmoid(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Unit vectors with SigLIP's initial temperature and bias."""
    inputs = clip_loss.make(shape, dtype, device)
    scale = leaf(torch.tensor(10.0), torch.float32, device)
    return {**inputs, "scale": scale, "bias": leaf(torch.tensor(-10.0), torch.float32, device)}


def eager_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """arXiv 2303.15343, algorithm 1, as open_clip computes it."""
    logits = scale * x @ y.T + bias
    sign = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
    return -F.logsigmoid(sign * logits).sum() / len(x)


def expect_sigmoid(inputs: Tensors, shape: Shape) -> Expected:
    """fp64, in row blocks: of a large batch gradients of some rows, as in clip_loss.

    With G = (sigmoid(S) − I) / B: dX = scale · G Y, dY = scale · Gᵀ X, dscale = Σ G∘XYᵀ, dbias = Σ G.
    """
    x, y = inputs["x"].detach().double(), inputs["y"].detach().double()
    scale, bias = (float(inputs[name].detach()) for name in ("scale", "bias"))
    n = len(x)
    loss, dscale, dbias = x.new_zeros(()), x.new_zeros(()), x.new_zeros(())
    for start in range(0, n, 1024):
        cos = x[start : start + 1024] @ y.T
        logits = scale * cos + bias
        own = logits.diagonal(start).clone()
        loss += F.softplus(logits).sum() - own.sum()
        g = logits.sigmoid_()
        g.diagonal(start).sub_(1)
        dscale += (g * cos).sum() / n
        dbias += g.sum() / n

    rows = spread_rows(n, clip_loss.CHECKED_ROWS, x.device)
    pick = torch.arange(n, device=x.device) if rows is None else rows

    def gradient(a: Tensor, b: Tensor) -> Tensor:
        g = (scale * (a[pick] @ b.T) + bias).sigmoid_()
        g[torch.arange(len(pick), device=g.device), pick] -= 1
        return scale / n * (g @ b)

    dx, dy = gradient(x, y), gradient(y, x)
    terms = {"dscale": scale_terms(x[pick], dx, inputs["scale"]) * n / len(dx)}
    said = "fp64" if rows is None else f"fp64; gradients on {len(rows)} of {n} rows"
    values = {"loss": loss / n, "dx": dx, "dy": dy, "dscale": dscale, "dbias": dbias}
    return Expected(values, terms, rows, said)


def ours_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *, backend: str) -> Tensor:
    """The same by ccu_fast."""
    return ccu_fast.sigmoid_loss(x, y, scale=scale, bias=bias, backend=backend)


# --- supervised contrastive ------------------------------------------------------------------------------------------


def make_sup_con(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """One bank z of unit vectors around their class centres, 64 items a class."""
    rng = torch.Generator().manual_seed(0)
    classes = max(2, shape["B"] // 64)
    labels = torch.randint(classes, (shape["B"],), generator=rng)
    centres = unit(classes, shape["D"], generator=rng)
    z = F.normalize(0.3 * centres[labels] + unit(shape["B"], shape["D"], generator=rng), dim=-1)
    return {
        "z": leaf(z, dtype, device),
        "scale": leaf(torch.tensor(10.0), torch.float32, device),
        "labels": labels.to(device),
    }


def eager_sup_con(z: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    """arXiv 2004.11362, eq. 2; rows without a positive do not count."""
    logits = scale * z @ z.T
    own = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == labels[None, :]) & ~own
    count = positive.sum(1)
    lse = logits.masked_fill(own, -torch.inf).logsumexp(1)
    mean_positive = logits.masked_fill(~positive, 0).sum(1) / count.clamp(min=1)
    per_row = torch.where(count > 0, lse - mean_positive, 0)
    return per_row.sum() / (count > 0).sum().clamp(min=1)


def ours_sup_con(z: Tensor, scale: Tensor, labels: Tensor, *, backend: str) -> Tensor:
    """The same by ccu_fast."""
    return ccu_fast.sup_con(z, z, scale=scale, row_labels=labels, backend=backend)


# --- registered ------------------------------------------------------------------------------------------------------


def _banks_work(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    flops, moved = clip_loss.work(shape, dtype)
    return shape["K"] * flops, moved


def _ceiling_banks(inputs: Tensors, shape: Shape) -> Call:
    x, y = inputs["x"].detach(), inputs["y"].detach()
    s = x.new_empty(*x.shape[:2], len(y))
    return partial(_three_batched_gemms, x, y.expand(len(x), -1, -1), s, torch.empty_like(x), torch.empty_like(y))


def _three_batched_gemms(x: Tensor, y: Tensor, s: Tensor, dx: Tensor, dy: Tensor) -> Tensors:
    torch.bmm(x, y.mT, out=s)
    torch.bmm(s, y, out=dx)
    torch.mm(s.flatten(0, 1).T, x.flatten(0, 1), out=dy)
    return {}


def _ceiling_one_bank(inputs: Tensors, shape: Shape) -> Call:
    return clip_loss.build_ceiling({"x": inputs["z"], "y": inputs["z"]}, shape)


CLIP_LOSS_BANKS = Op(
    name="clip_loss_banks",
    kernel="reduce_similarity",
    title="K banks [K, B, D] against one bank [B, D], summed symmetric InfoNCE: loss, dX, dY, dscale",
    make=make_banks,
    expect=partial(fp64_step, loss=banks_batched),
    errors=relative_errors,
    providers=(
        Provider("eager_loop", partial(build, loss=banks_loop)),
        Provider("eager_batched", partial(build, loss=banks_batched)),
        Provider("batched_compiled", partial(build_compiled, loss=banks_batched), compiled=True),
        Provider("ccu_fast", partial(build_ours, loss=ours_banks), role="ours"),
        Provider("gemm_ceiling", _ceiling_banks, role="ceiling"),
    ),
    shapes={
        "cpu": [{"K": 17, "B": 128, "D": 512}],
        "cuda": [{"K": 17, "B": 128, "D": d} for d in (512, 1024)],
    },
    quick=[{"K": 3, "B": 40, "D": 32}],
    work=_banks_work,
    baseline="eager_loop",
)

SIGMOID_LOSS = Op(
    name="sigmoid_loss",
    kernel="reduce_similarity",
    title="SigLIP's sigmoid loss: loss, dX, dY, dscale, dbias",
    make=make_sigmoid,
    expect=expect_sigmoid,
    errors=relative_errors,
    providers=(
        Provider(
            "open_clip", partial(build_open_clip, name="SigLipLoss", otherwise=eager_sigmoid), note=open_clip_note
        ),
        Provider("eager_compiled", partial(build_compiled, loss=eager_sigmoid), compiled=True),
        Provider("siglip_kernel", build_siglip_kernel, note=siglip_kernel_note),
        # Its other settings for bf16: a chunk of more rows, which its own notes call the fastest and the largest, two
        # streams, and one Triton kernel for product and loss. Its remaining variants are for fp32.
        *(
            Provider(
                f"siglip_kernel_{name}",
                partial(build_siglip_kernel, **setting),
                serves=on_cuda,
                note=siglip_kernel_note,
            )
            for name, setting in SIGLIP_KERNEL_SETTINGS.items()
        ),
        Provider(
            "siglip_kernel_fp8",
            partial(build_siglip_kernel, variant="chunked_bf16_fp8"),
            serves=on_cuda,
            note=siglip_kernel_note,
        ),
        Provider("ccu_fast", partial(build_ours, loss=ours_sigmoid), role="ours"),
        Provider("gemm_ceiling", clip_loss.build_ceiling, role="ceiling"),
    ),
    shapes={
        "cpu": [{"B": 4096, "D": 512}],
        "cuda": [{"B": 65536, "D": 512}, *({"B": b, "D": 768} for b in (4096, 16384))],
    },
    quick=[{"B": 96, "D": 64}],
    work=clip_loss.work,
    baseline="open_clip",
)

SUP_CON = Op(
    name="sup_con",
    kernel="reduce_similarity",
    title="supervised contrastive loss of one bank, 64 items a class: loss, dZ, dscale",
    make=make_sup_con,
    expect=partial(fp64_step, loss=eager_sup_con),
    errors=relative_errors,
    providers=(
        Provider("eager", partial(build, loss=eager_sup_con)),
        Provider("eager_compiled", partial(build_compiled, loss=eager_sup_con), compiled=True),
        Provider("ccu_fast", partial(build_ours, loss=ours_sup_con), role="ours"),
        Provider("gemm_ceiling", _ceiling_one_bank, role="ceiling"),
    ),
    shapes={"cpu": [{"B": 4096, "D": 512}], "cuda": [{"B": b, "D": 512} for b in (4096, 16384)]},
    quick=[{"B": 192, "D": 32}],
    work=clip_loss.work,
    baseline="eager",
)
