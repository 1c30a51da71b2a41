"""dX = G Y of one chunk, whole or in parts of its long sum: only a visit's tuning measures it."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gate import relative_errors
from benchmarks.registry import Call, Expected, Op, Provider, Shape, Tensors

PARTS = (2, 4, 8, 16)


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """g ``[N, M]`` as large as gradients of a loss are, y ``[M, D]`` of unit rows."""
    rng = torch.Generator(device).manual_seed(0)
    g = torch.randn(shape["N"], shape["M"], generator=rng, device=device) / shape["M"]
    y = torch.nn.functional.normalize(torch.randn(shape["M"], shape["D"], generator=rng, device=device), dim=-1)
    return {"g": g.to(dtype), "y": y.to(dtype)}


def expect(inputs: Tensors, shape: Shape) -> Expected:
    """fp64."""
    return Expected({"dx": inputs["g"].double() @ inputs["y"].double()})


def build(inputs: Tensors, shape: Shape, *, parts: int) -> Call:
    """Sums of ``parts`` slices of g's columns, a view each, then their sum; fp32 from the products on."""
    from ccu_fast.ops.reduce_similarity.triton.gemm import product

    g, y = inputs["g"], inputs["y"]
    slices = g.view(shape["N"], parts, -1).transpose(0, 1), y.view(parts, -1, shape["D"])
    out = torch.empty(parts, shape["N"], shape["D"], dtype=torch.float32, device=g.device)
    return partial(_sum, out, *slices, product)


def _sum(out: torch.Tensor, g: torch.Tensor, y: torch.Tensor, product: object) -> Tensors:
    assert callable(product)
    product(out, g, y, add=False)
    return {"dx": out[0] if len(out) == 1 else out.sum(0)}


def work(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """2·N·M·D FLOPs."""
    return 2.0 * shape["N"] * shape["M"] * shape["D"], 0.0


def build_torch(inputs: Tensors, shape: Shape) -> Call:
    """One GEMM whose result is rounded to the inputs' dtype."""
    return lambda: {"dx": inputs["g"] @ inputs["y"]}


SPLIT_GEMM = Op(
    name="split_gemm",
    kernel="reduce_similarity",
    title="dX = G Y of one chunk of rows",
    make=make,
    expect=expect,
    errors=relative_errors,
    providers=(
        Provider("rounded", build_torch),
        Provider("as it is", partial(build, parts=1), role="ours"),
        *(Provider(f"{parts} parts", partial(build, parts=parts), role="ours") for parts in PARTS),
    ),
    shapes={},
    quick=[{"N": 16, "M": 64, "D": 16}],
    work=work,
    baseline="rounded",
)
