"""clip_loss: the symmetric InfoNCE loss of two banks of unit vectors, with dX, dY and dscale; and forward alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import ccu_fast
from benchmarks.gate import relative_errors, spread_rows
from benchmarks.ops.common import (
    build,
    build_autocast,
    build_compiled,
    build_medium,
    build_open_clip,
    leaf,
    open_clip_note,
    our_backend,
    scale_terms,
    unit,
)
from benchmarks.ops.peers import build_inf_cl, build_memeff, inf_cl_note, inf_cl_serves, memeff_note
from benchmarks.registry import Call, Expected, Op, Provider, Shape, Tensors, on_cuda

SCALE = 100.0  # where CLIP's learned temperature is clamped
COSINE = 0.15  # of a pair: positives are neither lost among the negatives nor already learned
TILE = 256  # pairs along either side of our largest tile
CHECKED_ROWS = 512  # gradient rows compared with fp64; loss and dscale cover everything


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Unit vectors x and y; pair i has a cosine of about COSINE, all others about 0."""
    rng = torch.Generator().manual_seed(0)
    x = unit(shape["B"], shape["D"], generator=rng)
    y = F.normalize(COSINE * x + (1 - COSINE**2) ** 0.5 * unit(shape["B"], shape["D"], generator=rng), dim=-1)
    return {
        "x": leaf(x, dtype, device),
        "y": leaf(y, dtype, device),
        "scale": leaf(torch.tensor(SCALE), torch.float32, device),
    }


def expect(inputs: Tensors, shape: Shape) -> Expected:
    """fp64, in row blocks: 2·B²D FLOPs and O(B) memory, so that it serves any B.

    With E = exp(S − shift), r = E·1, c = Eᵀ·1 and G = scale/2B · (E/r + E/c − 2I): dX = G Y, dY = Gᵀ X.
    A fixed shift is enough: in fp64 exp(−200) is far from underflow.
    """
    x, y = inputs["x"].detach().double(), inputs["y"].detach().double()
    scale, n = float(inputs["scale"].detach()), len(x)
    shift = scale * float(x.norm(dim=1).max() * y.norm(dim=1).max())
    row, row_dot = x.new_empty(n), x.new_empty(n)
    col, col_dot = x.new_zeros(n), x.new_zeros(n)
    for start in range(0, n, 1024):
        block = slice(start, start + 1024)
        cos = x[block] @ y.T
        e = torch.exp(scale * cos - shift)
        row[block], row_dot[block] = e.sum(1), (cos.mul_(e)).sum(1)
        col += e.sum(0)
        col_dot += cos.sum(0)
    diagonal = (x * y).sum(1)
    loss = (row.log().mean() + col.log().mean()) / 2 + shift - scale * diagonal.mean()
    dscale = ((row_dot / row).mean() + (col_dot / col).mean()) / 2 - diagonal.mean()

    rows = spread_rows(n, CHECKED_ROWS, x.device)
    pick = slice(None) if rows is None else rows

    def gradient(a: Tensor, b: Tensor, own: Tensor, other: Tensor) -> Tensor:
        e = torch.exp(scale * (a[pick] @ b.T) - shift)
        return scale / (2 * n) * ((e / own[pick, None] + e / other) @ b) - scale / n * b[pick]

    dx, dy = gradient(x, y, row, col), gradient(y, x, col, row)
    terms = {"dscale": scale_terms(x[pick], dx, inputs["scale"]) * n / len(dx)}
    said = "fp64" if rows is None else f"fp64; gradients on {CHECKED_ROWS} of {n} rows"
    return Expected({"loss": loss, "dx": dx, "dy": dy, "dscale": dscale}, terms, rows, said)


def expect_without_scale(inputs: Tensors, shape: Shape) -> Expected:
    """The same for a provider to which scale is a number."""
    right = expect(inputs, shape)
    return replace(right, values={k: v for k, v in right.values.items() if k != "dscale"})


def two_gemms(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """What open_clip's ClipLoss computes on one device: logits and their transpose, each by a GEMM of its own."""
    target = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(scale * x @ y.T, target) + F.cross_entropy(scale * y @ x.T, target)) / 2


def one_gemm(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The same loss from one logits matrix."""
    logits = scale * x @ y.T
    target = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def ours(x: Tensor, y: Tensor, scale: Tensor, *, backend: str, workspace: int | None) -> Tensor:
    """ccu_fast.info_nce."""
    return ccu_fast.info_nce(x, y, scale=scale, backend=backend, workspace=workspace)


def build_ours(
    inputs: Tensors, shape: Shape, *, backend: str = "auto", workspace: int | None = None, medium: bool = False
) -> Call:
    """The loss on the backend of this device, or on the one that is named."""
    loss = partial(ours, backend=our_backend("reduce_similarity", inputs["x"], backend), workspace=workspace)
    return (build_medium if medium else build)(inputs, shape, loss=loss)


def even(shape: Shape) -> int:
    """The largest number of pairs not above B whose matrix fits whole tiles."""
    return shape["B"] // TILE * TILE


def _evenly(inputs: Tensors, shape: Shape) -> tuple[Tensors, Shape]:
    whole = {k: inputs[k][: even(shape)].detach().requires_grad_() for k in ("x", "y")}
    return {**whole, "scale": inputs["scale"]}, {**shape, "B": even(shape)}


def build_even(inputs: Tensors, shape: Shape) -> Call:
    """Our loss of the pairs that fit whole tiles: what edges cost beside it."""
    return build_ours(*_evenly(inputs, shape))


def expect_even(inputs: Tensors, shape: Shape) -> Expected:
    """Its right answer."""
    return expect(*_evenly(inputs, shape))


def build_ceiling(inputs: Tensors, shape: Shape, *, dtype: torch.dtype | None = None) -> Call:
    """The three unavoidable GEMMs of 6·B²D FLOPs, into preallocated buffers."""
    x, y = (inputs[k].detach().to(dtype or inputs[k].dtype) for k in ("x", "y"))
    s, dx, dy = x.new_empty(len(x), len(y)), torch.empty_like(x), torch.empty_like(y)
    return partial(_three_gemms, x, y, s, dx, dy)


def _three_gemms(x: Tensor, y: Tensor, s: Tensor, dx: Tensor, dy: Tensor) -> Tensors:
    torch.mm(x, y.T, out=s)
    torch.mm(s, y, out=dx)
    torch.mm(s.T, x, out=dy)
    return {}


def work(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """6·B²D FLOPs; the bytes (x, y, dX, dY) do not matter beside them."""
    return 6.0 * shape["B"] ** 2 * shape["D"], 0.0


def _stored(shape: Shape, device: str) -> bool:
    # The largest shape serves the memory bar. On a CPU only ours in 64 MiB and open_clip run: the rest takes minutes.
    # On a GPU nothing runs that stores 137 GB of logits.
    return shape["B"] <= (65536 if device == "cuda" else 8192)


def _open_clip(shape: Shape, device: str) -> bool:
    return device == "cpu" or _stored(shape, device)


def _ours(shape: Shape, device: str) -> bool:
    return device == "cuda" or _stored(shape, device)


def _reference(shape: Shape, device: str) -> bool:
    return shape["B"] <= (8192 if device == "cuda" else 2048)


def _ragged_cuda(shape: Shape, device: str) -> bool:
    return device == "cuda" and even(shape) not in (0, shape["B"])


def _inf_cl(shape: Shape, device: str) -> bool:
    # Its kernels take so long that larger batches would have no time beside them.
    return inf_cl_serves(shape, device) and shape["B"] <= 32768


def _large_cuda(shape: Shape, device: str) -> bool:
    # Where the default workspace does not hold all of E.
    return device == "cuda" and shape["B"] >= 32768


def _stored_cpu(shape: Shape, device: str) -> bool:
    return device == "cpu" and shape["B"] <= 8192


def _cuda(shape: Shape, device: str) -> bool:
    return device == "cuda" and _stored(shape, device)


OPEN_CLIP = partial(build_open_clip, name="ClipLoss", otherwise=two_gemms)
PROVIDERS = (
    Provider("open_clip", OPEN_CLIP, note=open_clip_note, serves=_open_clip),
    Provider("one_gemm", partial(build, loss=one_gemm), serves=_stored),
    Provider("one_gemm_compiled", partial(build_compiled, loss=one_gemm), compiled=True, serves=_stored),
    Provider(
        "open_clip_compiled", partial(OPEN_CLIP, how=build_compiled), compiled=True, serves=_cuda, note=open_clip_note
    ),
    Provider("inf_cl", build_inf_cl, serves=_inf_cl, note=inf_cl_note),
    Provider("memeff", build_memeff, serves=on_cuda, note=memeff_note, expect=expect_without_scale),
    Provider("ccu_fast", build_ours, role="ours", serves=_ours),
    Provider("ccu_fast_1gib", partial(build_ours, workspace=1 << 30), role="ours", serves=_large_cuda),
    Provider(
        "ccu_fast_reference",
        partial(build_ours, backend="reference"),
        role="ours",
        serves=_reference,
        backend="reference",
    ),
    Provider("ccu_fast_64mib", partial(build_ours, workspace=64 << 20), role="ours"),
    Provider("even", build_even, role="yardstick", serves=_ragged_cuda, expect=expect_even),
    Provider("gemm_ceiling", build_ceiling, role="ceiling", serves=_stored),
    Provider(
        "open_clip_autocast",
        partial(OPEN_CLIP, how=build_autocast),
        arithmetic="bf16",
        serves=_stored_cpu,
        note=open_clip_note,
    ),
    Provider(
        "open_clip_medium",
        partial(OPEN_CLIP, how=build_medium),
        arithmetic="bf16",
        serves=_stored_cpu,
        note=open_clip_note,
    ),
    Provider("ccu_fast_bf16", partial(build_ours, medium=True), role="ours", arithmetic="bf16", serves=_stored_cpu),
    Provider(
        "gemm_ceiling_bf16",
        partial(build_ceiling, dtype=torch.bfloat16),
        role="ceiling",
        arithmetic="bf16",
        serves=_stored_cpu,
    ),
)

CLIP_LOSS = Op(
    name="clip_loss",
    kernel="reduce_similarity",
    title="symmetric InfoNCE of unit vectors at scale 100: loss, dX, dY, dscale",
    make=make,
    expect=expect,
    errors=relative_errors,
    providers=PROVIDERS,
    shapes={
        "cpu": [{"B": b, "D": 512} for b in (128, 1024, 2048, 8192, 16384)],
        "cuda": [{"B": b, "D": 512} for b in (128, 256, 1024, 4096, 8192, 10000, 16384, 32768, 65536, 262144)]
        + [{"B": 32768, "D": d} for d in (768, 1024)],
    },
    quick=[{"B": 96, "D": 64}, {"B": 640, "D": 48}],
    work=work,
    baseline="open_clip",
    bf16_baseline="open_clip_autocast",
)

# --- forward alone ---------------------------------------------------------------------------------------------------


def make_forward(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """The same inputs, none of which requires a gradient."""
    return {k: t.detach() for k, t in make(shape, dtype, device).items()}


def expect_forward(inputs: Tensors, shape: Shape) -> Expected:
    """The loss."""
    return Expected({"loss": expect(inputs, shape).values["loss"]})


def build_one_gemm(inputs: Tensors, shape: Shape) -> Call:
    """The one GEMM of 2·B²D FLOPs, into a preallocated buffer."""
    return partial(_gemm, inputs["x"], inputs["y"], inputs["x"].new_empty(shape["B"], shape["B"]))


def _gemm(x: Tensor, y: Tensor, s: Tensor) -> Tensors:
    torch.mm(x, y.T, out=s)
    return {}


def work_forward(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """2·B²D FLOPs."""
    return 2.0 * shape["B"] ** 2 * shape["D"], 0.0


CLIP_LOSS_FORWARD = Op(
    name="clip_loss_forward",
    kernel="reduce_similarity",
    title="the value of that loss alone, no gradients",
    make=make_forward,
    expect=expect_forward,
    errors=relative_errors,
    providers=(
        Provider("open_clip", OPEN_CLIP, note=open_clip_note),
        Provider("one_gemm", partial(build, loss=one_gemm)),
        Provider("one_gemm_compiled", partial(build_compiled, loss=one_gemm), compiled=True),
        Provider("ccu_fast", build_ours, role="ours"),
        Provider("gemm_ceiling", build_one_gemm, role="ceiling"),
    ),
    shapes={
        "cpu": [{"B": 4096, "D": 512}],
        "cuda": [{"B": 32768, "D": d} for d in (512, 768, 1024)],
    },
    quick=[{"B": 96, "D": 64}],
    work=work_forward,
    baseline="open_clip",
)
