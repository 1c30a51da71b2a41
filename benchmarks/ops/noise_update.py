"""noise_update: steps added to the stored noise of some rows, cut to its bound, in place."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.gate import relative_errors
from benchmarks.ops.common import build_copy, our_backend
from benchmarks.registry import Call, Expected, Op, Provider, Shape, Tensors
from ccu_fast import NoiseStore

STEPS, EPS = 255, 8  # levels of a pixel, and the bound in them


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """R rows of noise, a shuffled index of B of them, and a delta that adds nothing or goes beyond the bound; in fp32.

    So a second update changes nothing, and the answer is the same after any number of calls.
    """
    rng = torch.Generator().manual_seed(0)
    item = (3, shape["H"], shape["H"])
    noise = torch.randint(-EPS, EPS + 1, (shape["R"], *item), generator=rng, dtype=torch.int8)
    index = torch.randperm(shape["R"], generator=rng)[: shape["B"]]
    turns = torch.randint(-1, 2, (shape["B"], *item), generator=rng, dtype=torch.int8)
    delta = 2 * EPS * turns.float() / STEPS
    return {"noise": (noise.float() / STEPS).to(device), "index": index.to(device), "delta": delta.to(device)}


def update(noise: Tensor, index: Tensor, delta: Tensor) -> Tensor:
    """Gather, add, clamp, scatter."""
    noise[index] = (noise[index] + delta).clamp(-EPS / STEPS, EPS / STEPS)
    return noise


def expect(inputs: Tensors, shape: Shape) -> Expected:
    """In fp64."""
    noise, delta = inputs["noise"].double(), inputs["delta"].double()
    return Expected({"noise": update(noise, inputs["index"], delta)})


def errors(outputs: Tensors, expected: Expected, inputs: Tensors) -> dict[str, float]:
    """All rows are compared, also those that must not change; an int8 store holds steps."""
    noise = outputs["noise"]
    noise = noise.float() / STEPS if noise.dtype == torch.int8 else noise
    return relative_errors({"noise": noise}, expected, inputs)


def build_eager(inputs: Tensors, shape: Shape) -> Call:
    """Four passes."""
    noise = inputs["noise"].clone()
    return lambda: {"noise": update(noise, inputs["index"], inputs["delta"])}


def build_compiled(inputs: Tensors, shape: Shape) -> Call:
    """The four under torch.compile."""
    noise, compiled = inputs["noise"].clone(), torch.compile(update, dynamic=False)
    return lambda: {"noise": compiled(noise, inputs["index"], inputs["delta"])}


def build_ours(inputs: Tensors, shape: Shape, *, dtype: torch.dtype) -> Call:
    """NoiseStore.scatter_add_clamp_ of a store of this dtype, without the check for which the host waits."""
    noise, index, delta = inputs.values()
    backend = our_backend("noise_store", noise)
    store = NoiseStore(noise.shape[0], noise.shape[1:], dtype=dtype, device=noise.device, backend=backend)
    store.scatter_(torch.arange(len(noise)), noise)

    def once() -> Tensors:
        store.scatter_add_clamp_(index, delta, EPS / STEPS, checked=False)
        return {"noise": store.data}

    return once


def work(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """Read the delta in fp32, read and write int8 noise."""
    return 0.0, 6.0 * shape["B"] * 3 * shape["H"] ** 2


NOISE_UPDATE = Op(
    name="noise_update",
    kernel="noise_store",
    title="[B, 3, H, H] steps added to the noise of their rows in a store of R rows, cut to ±8/255, in place",
    make=make,
    expect=expect,
    errors=errors,
    providers=(
        Provider("eager", build_eager),
        Provider("eager_compiled", build_compiled, compiled=True),
        Provider("ccu_fast", partial(build_ours, dtype=torch.int8), role="ours"),
        Provider("ccu_fast_fp32", partial(build_ours, dtype=torch.float32), role="ours"),
        Provider("copy_ceiling", partial(build_copy, of="delta", work=work), role="ceiling"),
    ),
    shapes={"cpu": [], "cuda": [{"B": 128, "H": 224, "R": 512}]},
    quick=[{"B": 3, "H": 17, "R": 5}],
    work=work,
    baseline="eager",
)
