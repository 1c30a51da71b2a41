"""pgd_step: one signed gradient step of bounded noise on an image batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gate import relative_errors
from benchmarks.ops.common import build_copy, our_backend
from benchmarks.registry import Call, Expected, Op, Provider, Shape, Tensors, on_cpu, on_cuda

STEP, EPS = 1 / 255, 8 / 255


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Pixels in [0, 1], noise within ±eps, a gradient with some exact zeros."""
    rng = torch.Generator().manual_seed(0)
    size = (shape["B"], 3, shape["H"], shape["H"])
    grad = torch.randn(size, generator=rng)
    grad[torch.rand(size, generator=rng) < 0.01] = 0
    delta = EPS * (2 * torch.rand(size, generator=rng) - 1)
    image = torch.rand(size, generator=rng)
    return {k: t.to(device, dtype) for k, t in (("delta", delta), ("grad", grad), ("image", image))}


def chain(delta: Tensor, grad: Tensor, image: Tensor) -> Tensor:
    """sign, mul, sub, clamp, add, clamp: the protected image, as a user writes it."""
    delta = (delta - STEP * grad.sign()).clamp(-EPS, EPS)
    return (image + delta).clamp(0, 1)


def expect(inputs: Tensors, shape: Shape) -> Expected:
    """The chain in fp64."""
    return Expected({"image": chain(*(t.double() for t in inputs.values()))})


def build_eager(inputs: Tensors, shape: Shape) -> Call:
    """The chain."""
    return partial(_call, chain, inputs)


def build_compiled(inputs: Tensors, shape: Shape) -> Call:
    """The chain under torch.compile."""
    return partial(_call, torch.compile(chain, dynamic=False), inputs)


def _call(function: Callable[..., Tensor], inputs: Tensors) -> Tensors:
    return {"image": function(*inputs.values())}


def build_ours(inputs: Tensors, shape: Shape) -> Call:
    """ccu_fast.pgd_step_ in place on its own copy of the noise, which changes from call to call."""
    from ccu_fast.ops.pgd_step.api import pgd_step_

    backend = our_backend("pgd_step_", inputs["delta"])
    delta, grad, image = inputs["delta"].clone(), inputs["grad"], inputs["image"]

    def once() -> Tensors:
        return {"delta": pgd_step_(delta, grad, image, step=STEP, eps=EPS, backend=backend)}

    return once


def errors(outputs: Tensors, expected: Expected, inputs: Tensors) -> dict[str, float]:
    """Ours returns the noise, the chain the image: compare images, and the noise with its bound."""
    if "delta" not in outputs:
        return relative_errors(outputs, expected, inputs)
    delta = outputs["delta"]
    outside = max(0.0, float(delta.abs().max()) - EPS)  # relative to an image's range, 1
    image = relative_errors({"image": inputs["image"].double() + delta.double()}, expected, inputs)
    return {**image, "eps": outside}


def build_ceiling(inputs: Tensors, shape: Shape) -> Call:
    """Three reads and a write of every element in one vectorised pass."""
    out = torch.empty_like(inputs["delta"])
    return partial(_stream, inputs["delta"], inputs["grad"], inputs["image"], out)


def _stream(delta: Tensor, grad: Tensor, image: Tensor, out: Tensor) -> Tensors:
    torch.addcmul(delta, grad, image, out=out)
    return {}


def work(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """Read noise, gradient and image, write noise."""
    return 0.0, 4.0 * dtype.itemsize * shape["B"] * 3 * shape["H"] ** 2


PGD_STEP = Op(
    name="pgd_step",
    kernel="pgd_step_",
    title="signed step of bounded noise on [B, 3, H, H] images, in place; the peers return the image instead",
    make=make,
    expect=expect,
    errors=errors,
    providers=(
        Provider("eager", build_eager),
        Provider("eager_compiled", build_compiled, compiled=True),
        Provider("ccu_fast", build_ours, role="ours"),
        Provider("stream_ceiling", build_ceiling, role="ceiling", serves=on_cpu),
        # What the aim of a GPU compares with.
        Provider("copy_ceiling", partial(build_copy, of="image", work=work), role="ceiling", serves=on_cuda),
    ),
    shapes={device: [{"B": 128, "H": 224}] for device in ("cpu", "cuda")},
    quick=[{"B": 3, "H": 17}],
    work=work,
    baseline="eager",
)
