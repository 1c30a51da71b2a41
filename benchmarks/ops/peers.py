"""Fused losses of other projects, called as their own documentation does on one GPU.

All are Triton kernels for CUDA tensors. Where they cannot run, the table shows the reason.
tests/benchmarks/ops/test_peers.py runs them in Triton's interpreter to check that they compute the same loss.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.ops.common import build
from benchmarks.registry import Call, Shape, Tensors, Unavailable

INF_CL, SIGLIP_KERNEL, MEMEFF = "inf_cl", "siglip-kernel", "memeff"
# What they are called among the providers: a kernel of theirs may end the process in which ours is measured.
NAMES = ("inf_cl", "memeff", "siglip_kernel")
_FEWEST, _MOST = 16, 256  # inf_cl's head_dim, a power of two that divides D


def inf_cl_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Inf-CL (arXiv 2410.17243) in both directions; one GPU runs cal_inf_loss's own non-distributed branch.

    cal_inf_loss itself cannot be used with a learned scale on one process: it all-reduces the scale's gradient.
    """
    loss = importlib.import_module("inf_cl").cal_flash_loss
    width = _head(x.shape[-1])
    return (loss(x, y, scale=scale, head_dim=width).mean() + loss(y, x, scale=scale, head_dim=width).mean()) / 2


def _head(d: int) -> int:
    return min(_MOST, d & -d)


def inf_cl_serves(shape: Shape, device: str) -> bool:
    """Where D has a power of two that its tiles can take."""
    return _head(shape["D"]) >= _FEWEST


def siglip_kernel_loss(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, *, variant: str = "auto", chunk: int = 0
) -> Tensor:
    """siglip-kernel, by default with the variant and the chunk of rows that it picks; its temperature is a logarithm.

    "auto" is "chunked_bf16" in half precision, the only variant whose rows of a chunk can be chosen.
    """
    package = importlib.import_module("siglip_kernel")
    if chunk:
        return package.fused_chunked_bf16_siglip_loss(x, y, scale.log(), bias, chunk_size=chunk)
    return package.fused_siglip_loss(x, y, scale.log(), bias, backend=variant)


def memeff_loss(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """memeff's CLIP loss with the gradient as it is defined; its temperature is a number and gets none."""
    module = importlib.import_module("memeff").MemoryEfficientCLIPLoss
    return module(temperature=1 / scale, normalized_inputs=True, stable=False)(x, y)


def memeff_prefixes_loss(x: Tensor, y: Tensor, scale: float, prefixes: tuple[int, ...]) -> Tensor:
    """memeff's fused Matryoshka CLIP loss, with the same settings; it normalises every prefix itself."""
    module = importlib.import_module("memeff").MemoryEfficientMatryoshkaCLIPLoss
    return module(prefixes, temperature=1 / scale, normalized_inputs=True, stable=False)(x, y)


def build_inf_cl(inputs: Tensors, shape: Shape) -> Call:
    """inf_cl's loss and gradients."""
    _require(INF_CL, inputs["x"].device)
    return build(inputs, shape, loss=inf_cl_loss)


def build_siglip_kernel(inputs: Tensors, shape: Shape, *, variant: str = "auto", chunk: int = 0) -> Call:
    """siglip-kernel's loss and gradients."""
    _require(SIGLIP_KERNEL, inputs["x"].device)
    return build(inputs, shape, loss=partial(siglip_kernel_loss, variant=variant, chunk=chunk))


def build_memeff(inputs: Tensors, shape: Shape) -> Call:
    """memeff's loss and the gradients of x and y."""
    _require(MEMEFF, inputs["x"].device)
    banks = {k: inputs[k] for k in ("x", "y")}
    return build(banks, shape, loss=partial(memeff_loss, scale=float(inputs["scale"].detach())))


def build_memeff_prefixes(inputs: Tensors, shape: Shape, *, prefixes: Callable[[Tensor], tuple[int, ...]]) -> Call:
    """memeff's Matryoshka loss and the gradients of x and y."""
    _require(MEMEFF, inputs["x"].device)
    banks = {k: inputs[k] for k in ("x", "y")}
    scale = float(inputs["scale"].detach())
    return build(banks, shape, loss=partial(memeff_prefixes_loss, scale=scale, prefixes=prefixes(banks["x"])))


def _require(package: str, device: torch.device) -> None:
    if version(package) is None:
        raise Unavailable(f"{package} is not installed (pip install --no-deps {package})")
    if device.type != "cuda":
        raise Unavailable(f"{package} has kernels for CUDA tensors only")


def version(package: str) -> str | None:
    """The installed version; None without one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _note(package: str) -> str:
    return f"{package} {version(package) or 'is not installed'}"


inf_cl_note = partial(_note, INF_CL)
memeff_note = partial(_note, MEMEFF)
siglip_kernel_note = partial(_note, SIGLIP_KERNEL)
