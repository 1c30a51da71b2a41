"""noise_add: images plus the stored noise of their rows, cut to valid pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gate import relative_errors
from benchmarks.ops.common import build_copy, our_backend
from benchmarks.registry import Call, Expected, Op, Provider, Shape, Tensors, on_cpu, on_cuda


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Pixels in [0, 1], R rows of noise of up to 8/255 in fp32, as the reference stores it, and a shuffled index."""
    rng = torch.Generator().manual_seed(0)
    item = (3, shape["H"], shape["H"])
    images = torch.rand(shape["B"], *item, generator=rng)
    steps = torch.randint(-8, 9, (shape["R"], *item), generator=rng, dtype=torch.int8)
    index = torch.randperm(shape["R"], generator=rng)[: shape["B"]]
    return {"images": images.to(device, dtype), "noise": (steps.float() / 255).to(device), "index": index.to(device)}


def eager(images: Tensor, noise: Tensor, index: Tensor) -> Tensor:
    """Gather, add, clamp."""
    return (images + noise[index].to(images.dtype)).clamp(0, 1)


def authors(images: Tensor, noise: Tensor, index: Tensor) -> Tensor:
    """As the MEM authors do it: rows collected in a Python loop, stacked, added, cut by torch.max and torch.min."""
    rows = []
    for i in range(len(index)):
        rows.append(noise[index[i]])
    noisy = images + torch.stack(rows).to(images.dtype)
    return torch.max(torch.min(noisy, noisy.new_ones(())), noisy.new_zeros(()))


def loop(images: Tensor, noise: Tensor, index: Tensor) -> Tensor:
    """A leaner loop than theirs: a copy, each row added in place, clamped in place."""
    out = images.clone()
    for i in range(len(index)):
        out[i] += noise[index[i]].to(out.dtype)
    return out.clamp_(0, 1)


def expect(inputs: Tensors, shape: Shape) -> Expected:
    """In fp64."""
    return Expected({"images": eager(inputs["images"].double(), inputs["noise"].double(), inputs["index"])})


def _call(function: Callable[..., Tensor], inputs: Tensors) -> Tensors:
    return {"images": function(*inputs.values())}


def build_authors(inputs: Tensors, shape: Shape) -> Call:
    """The authors' passes."""
    return partial(_call, authors, inputs)


def build_loop(inputs: Tensors, shape: Shape) -> Call:
    """The loop."""
    return partial(_call, loop, inputs)


def build_eager(inputs: Tensors, shape: Shape) -> Call:
    """Three passes."""
    return partial(_call, eager, inputs)


def build_compiled(inputs: Tensors, shape: Shape) -> Call:
    """The three under torch.compile."""
    return partial(_call, torch.compile(eager, dynamic=False), inputs)


def build_ours(inputs: Tensors, shape: Shape, *, dtype: torch.dtype, kept: bool = False) -> Call:
    """NoiseStore.add_to of a store of this dtype; kept: into the same tensor every time, as a training loop can."""
    from ccu_fast import NoiseStore

    images, noise, index = inputs.values()
    backend = our_backend("noise_store", images)
    store = NoiseStore(*_size(noise), dtype=dtype, device=images.device, backend=backend)
    store.scatter_(torch.arange(len(noise)), noise)

    out = torch.empty_like(images) if kept else None

    def once() -> Tensors:
        return {"images": store.add_to(images, index, out=out)}

    return once


def _size(noise: Tensor) -> tuple[int, torch.Size]:
    return noise.shape[0], noise.shape[1:]


def build_ceiling(inputs: Tensors, shape: Shape) -> Call:
    """A copy: one read and one write of the images, into memory that is there."""
    return partial(_copy, inputs["images"], torch.empty_like(inputs["images"]))


def _copy(images: Tensor, out: Tensor) -> Tensors:
    out.copy_(images)
    return {}


def work(shape: Shape, dtype: torch.dtype) -> tuple[float, float]:
    """Read and write images, read int8 noise."""
    return 0.0, (2.0 * dtype.itemsize + 1) * shape["B"] * 3 * shape["H"] ** 2


NOISE_ADD = Op(
    name="noise_add",
    kernel="noise_store",
    title="[B, 3, H, H] images plus the noise of their rows in a store of R rows, clamped, into a new tensor",
    make=make,
    expect=expect,
    errors=relative_errors,
    providers=(
        Provider("mem_reference", build_authors),
        Provider("mem_loop", build_loop),
        Provider("eager", build_eager),
        Provider("eager_compiled", build_compiled, compiled=True),
        Provider("ccu_fast", partial(build_ours, dtype=torch.int8), role="ours"),
        Provider("ccu_fast_out", partial(build_ours, dtype=torch.int8, kept=True), role="ours"),
        Provider("ccu_fast_fp32", partial(build_ours, dtype=torch.float32), role="ours"),
        Provider("copy_ceiling", build_ceiling, role="ceiling", serves=on_cpu),
        # What the aim of a GPU compares with: the bytes of the noise too.
        Provider("same_bytes_ceiling", partial(build_copy, of="images", work=work), role="ceiling", serves=on_cuda),
    ),
    shapes={device: [{"B": 128, "H": 224, "R": 512}] for device in ("cpu", "cuda")},
    quick=[{"B": 3, "H": 17, "R": 5}],
    work=work,
    baseline="eager",
)
