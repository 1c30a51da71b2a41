"""topk_flips: the k vocabulary entries that a gradient row likes best, for N rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gate import spread_rows
from benchmarks.ops.common import our_backend
from benchmarks.registry import Call, Expected, Op, Provider, Shape, Tensors, Unavailable, on_cpu, on_cuda

CHECKED_ROWS = 256


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """A table with a common mean and uneven row norms, as trained embedding tables have, and gradient rows."""
    rng = torch.Generator().manual_seed(0)
    norms = torch.exp(0.3 * torch.randn(shape["V"], 1, generator=rng))
    table = 0.02 * norms * torch.randn(shape["V"], shape["D"], generator=rng)
    table += 0.01 * torch.randn(1, shape["D"], generator=rng)
    grad = 1e-3 * torch.randn(shape["N"], shape["D"], generator=rng)
    return {"grad": grad.to(device, dtype), "table": table.to(device, dtype)}


def expect(inputs: Tensors, shape: Shape) -> Expected:
    """The best k scores in fp64."""
    grad = inputs["grad"]
    rows = spread_rows(len(grad), CHECKED_ROWS, grad.device)
    picked = (grad if rows is None else grad[rows]).double()
    best = (picked @ inputs["table"].double().T).topk(shape["k"]).values
    said = "fp64" if rows is None else f"fp64; {CHECKED_ROWS} of {len(grad)} rows"
    return Expected({"ids": best}, rows=rows, said=said)


def errors(outputs: Tensors, expected: Expected, inputs: Tensors) -> dict[str, float]:
    """How much worse, in fp64, the chosen entries are than the best ones, place by place; a repeated id is wrong."""
    ids, grad = outputs["ids"], inputs["grad"]
    if expected.rows is not None:
        ids, grad = ids[expected.rows], grad[expected.rows]
    best = expected.values["ids"]
    if ids.shape != best.shape or bool((ids.sort(1).values.diff(dim=1) == 0).any()):
        return {"ids": math.inf}
    if bool(((ids < 0) | (ids >= len(inputs["table"]))).any()):
        return {"ids": math.inf}
    got = torch.einsum("nkd,nd->nk", inputs["table"][ids].double(), grad.double())
    return {"ids": float(((best - got).abs().max() / best.abs().max()).item())}


def naive(grad: Tensor, table: Tensor, k: int) -> Tensor:
    """The usual code."""
    return (grad @ table.T).topk(k).indices


def _call(function: Callable[..., Tensor], grad: Tensor, table: object, k: int) -> Tensors:
    return {"ids": function(grad, table, k)}


def build_naive(inputs: Tensors, shape: Shape) -> Call:
    """Eager."""
    return partial(_call, naive, inputs["grad"], inputs["table"], shape["k"])


def build_compiled(inputs: Tensors, shape: Shape) -> Call:
    """The same under torch.compile."""
    return partial(_call, torch.compile(naive, dynamic=False), inputs["grad"], inputs["table"], shape["k"])


def build_mem(inputs: Tensors, shape: Shape) -> Call:
    """The formulation of universal triggers and of MEM's authors: einsum, times -1, topk of what is largest."""
    return partial(_call, hotflip, -inputs["grad"], inputs["table"], shape["k"])


def hotflip(grad: Tensor, table: Tensor, k: int) -> Tensor:
    """As in AllenNLP's and Wallace's hotflip_attack, whose gradient is that of a loss to be lowered."""
    scores = torch.einsum("bij,kj->bik", (grad.unsqueeze(0), table))
    scores *= -1
    return scores[0].topk(k).indices


def build_gcg(inputs: Tensors, shape: Shape) -> Call:
    """What nanoGCG's sampling step ranks: the negated gradient by one-hot tokens; without its random choice."""
    return partial(_call, gcg, -inputs["grad"], inputs["table"], shape["k"])


def gcg(grad: Tensor, table: Tensor, k: int) -> Tensor:
    """The gradient of a loss by one-hot tokens is grad @ table.T."""
    return (-(grad @ table.T)).topk(k, dim=1).indices


def build_faiss(inputs: Tensors, shape: Shape) -> Call:
    """faiss.knn by inner product, exact."""
    try:
        import faiss  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as reason:
        raise Unavailable(f"{reason}") from None
    grad, table = inputs["grad"].numpy(), inputs["table"].numpy()

    def once() -> Tensors:
        return {"ids": torch.from_numpy(faiss.knn(grad, table, shape["k"], metric=faiss.METRIC_INNER_PRODUCT)[1])}

    return once


def build_flashinfer(inputs: Tensors, shape: Shape) -> Call:
    """A GEMM and FlashInfer's top_k."""
    try:
        from flashinfer import top_k  # type: ignore[import-not-found, unused-ignore]
    except ImportError as reason:
        raise Unavailable(f"{reason}") from None
    grad, table, k = inputs["grad"], inputs["table"], shape["k"]
    return lambda: {"ids": top_k((grad @ table.T).float(), k, sorted=True)[1].long()}


def build_ours(inputs: Tensors, shape: Shape) -> Call:
    """ccu_fast.topk_flips; the TokenTable is made once, as its users do."""
    from ccu_fast.ops.topk_flips.api import TokenTable, topk_flips

    backend = our_backend("topk_flips", inputs["grad"])

    def best(grad: Tensor, table: TokenTable, k: int) -> Tensor:
        return topk_flips(grad, table, k, maximize=True, backend=backend).ids

    return partial(_call, best, inputs["grad"], TokenTable(inputs["table"]), shape["k"])


def _prepared() -> str:
    return "its TokenTable, a copy of the table in the kernel's order, is made before the clock and not in its memory"


def build_ceiling(inputs: Tensors, shape: Shape) -> Call:
    """The scores alone: one GEMM into a preallocated buffer."""
    scores = inputs["grad"].new_empty(shape["N"], shape["V"])
    return partial(_scores, inputs["grad"], inputs["table"], scores)


def _scores(grad: Tensor, table: Tensor, out: Tensor) -> Tensors:
    torch.mm(grad, table.T, out=out)
    return {}


def build_stream(inputs: Tensors, shape: Shape) -> Call:
    """One read of the table: what is left when the arithmetic is free."""
    return partial(_read, inputs["table"])


def _read(table: Tensor) -> Tensors:
    return {"sum": table.sum()}


def _skinny(shape: Shape, device: str) -> bool:
    # A library GEMM of a few rows is slower than reading the table, so it is not a floor.
    return shape["N"] <= 16


def _wide(shape: Shape, device: str) -> bool:
    return not _skinny(shape, device)


def work(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """2·N·V·D FLOPs, and one read of the table and of the gradient."""
    flops = 2.0 * shape["N"] * shape["V"] * shape["D"]
    return flops, float(dtype.itemsize * shape["D"] * (shape["V"] + shape["N"]))


PROVIDERS = (
    Provider("naive", build_naive),
    Provider("naive_compiled", build_compiled, compiled=True),
    Provider("mem_reference", build_mem),
    Provider("nanogcg", build_gcg),
    Provider("faiss", build_faiss, serves=on_cpu),
    Provider("gemm_flashinfer", build_flashinfer, serves=on_cuda),
    Provider("ccu_fast", build_ours, role="ours", note=_prepared),
    Provider("stream_ceiling", build_stream, role="ceiling", serves=_skinny),
    Provider("gemm_ceiling", build_ceiling, role="ceiling", serves=_wide),
)

TOPK_FLIPS = Op(
    name="topk_flips",
    kernel="topk_flips",
    title="best k of V tokens for N gradient rows, exact",
    make=make,
    expect=expect,
    errors=errors,
    providers=PROVIDERS,
    shapes={
        "cpu": [{"N": n, "V": 49408, "D": 512, "k": 16} for n in (5, 64, 2560)],
        "cuda": [
            *({"N": n, "V": 49408, "D": 512, "k": 16} for n in (5, 64, 2560, 8192)),
            {"N": 20, "V": 128256, "D": 4096, "k": 256},
            {"N": 512, "V": 151936, "D": 2048, "k": 256},
        ],
    },
    quick=[{"N": 3, "V": 700, "D": 32, "k": 4}],
    work=work,
    baseline="naive",
)
