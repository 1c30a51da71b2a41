"""What the loss benchmarks share: one training step's worth of loss and gradients, and where peers come from."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.registry import Call, Expected, Shape, Tensors, Unavailable
from ccu_fast.ops.backend import candidates, cannot_serve, choose

Loss = Callable[..., Tensor]
Build = Callable[..., Call]


def step(loss: Loss, inputs: Tensors) -> Tensors:
    """The loss of the inputs in order, and its gradient for every input that requires one, named ``d<input>``."""
    value = loss(*inputs.values())
    wanted = {k: t for k, t in inputs.items() if t.requires_grad}
    grads = torch.autograd.grad(value, tuple(wanted.values())) if wanted else ()
    return {"loss": value.detach(), **{f"d{k}": g for k, g in zip(wanted, grads, strict=True)}}


def build(inputs: Tensors, shape: Shape, *, loss: Loss) -> Call:
    """The loss as it is written."""
    return functools.partial(step, loss, inputs)


def build_copy(inputs: Tensors, shape: Shape, *, of: str, work: Callable[..., tuple[float, float]]) -> Call:
    """A copy of as many bytes as the work with inputs like ``of`` moves, half of them read and half written."""
    _, moved = work(shape, inputs[of].dtype)
    source = torch.zeros(int(moved) // 2, dtype=torch.uint8, device=inputs[of].device)
    return functools.partial(_copy, source, torch.empty_like(source))


def _copy(source: Tensor, out: Tensor) -> Tensors:
    out.copy_(source)
    return {}


def build_compiled(inputs: Tensors, shape: Shape, *, loss: Loss) -> Call:
    """The loss under torch.compile, specialised to the shape."""
    return functools.partial(step, torch.compile(loss, dynamic=False), inputs)


def build_medium(inputs: Tensors, shape: Shape, *, loss: Loss) -> Call:
    """The loss with ``torch.set_float32_matmul_precision("medium")`` during forward and backward."""
    return functools.partial(_medium_step, loss, inputs)


def _medium_step(loss: Loss, inputs: Tensors) -> Tensors:
    with matmul_precision("medium"):
        return step(loss, inputs)


def build_autocast(inputs: Tensors, shape: Shape, *, loss: Loss) -> Call:
    """The loss under ``torch.autocast`` to bfloat16."""
    return functools.partial(_autocast_step, loss, inputs)


def _autocast_step(loss: Loss, inputs: Tensors) -> Tensors:
    with torch.autocast(next(iter(inputs.values())).device.type, torch.bfloat16):
        return step(loss, inputs)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set torch's fp32 matmul precision and restore the old value."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def build_ours(inputs: Tensors, shape: Shape, *, loss: Loss, backend: str = "auto") -> Call:
    """A loss of ours, which takes its backend by name, on the kernels of this device."""
    name = our_backend("reduce_similarity", next(iter(inputs.values())), backend)
    return build(inputs, shape, loss=functools.partial(loss, backend=name))


def fp64_step(inputs: Tensors, shape: Shape, *, loss: Loss) -> Expected:
    """The right answer of a loss small enough to be written out in fp64."""
    exact = {
        k: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for k, t in inputs.items()
    }
    values = step(loss, exact)
    first = next(iter(inputs))
    return Expected(values, {"dscale": scale_terms(exact[first], values[f"d{first}"], exact["scale"])})


def scale_terms(x: Tensor, dx: Tensor, scale: Tensor) -> float:
    """Size of what is summed to dscale = Σ x∘dX / scale, where positives and negatives nearly cancel."""
    return float(((x * dx).abs().sum() / scale).detach())


def our_backend(op: str, tensor: Tensor, wanted: str = "auto") -> str:
    """The backend that was asked for; "auto" must find kernels, as the reference is there to be right and not fast.

    Raises:
        Unavailable: with the reasons the package gives.
    """
    device, dtype = tensor.device, tensor.dtype
    if wanted != "auto":
        reason = cannot_serve(wanted, op, device, dtype)
        if reason is not None:
            raise Unavailable(f"{wanted}: {reason}")
        return wanted
    name = choose("auto", op, device, dtype)
    if name == "reference":
        others = (c for c in candidates(device.type) if c != name)
        raise Unavailable("; ".join(f"{c}: {cannot_serve(c, op, device, dtype)}" for c in others))
    return name


def unit(*shape: int, generator: torch.Generator) -> Tensor:
    """fp64 unit vectors along the last dimension."""
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def leaf(value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An input that requires a gradient."""
    return value.to(device=device, dtype=dtype).requires_grad_()


@functools.cache
def open_clip_losses() -> ModuleType | None:
    """open_clip's own loss.py, loaded by file because the package imports torchvision; None if it is not installed."""
    try:
        path = importlib.metadata.distribution("open_clip_torch").locate_file("open_clip/loss.py")
    except importlib.metadata.PackageNotFoundError:
        return None
    name = "benchmarks_open_clip_loss"
    spec = importlib.util.spec_from_file_location(name, str(path))
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def build_open_clip(inputs: Tensors, shape: Shape, *, name: str, otherwise: Loss, how: Build = build) -> Call:
    """open_clip's own module, or the same formula where open_clip is not installed (:func:`open_clip_note` says so)."""
    module = open_clip_losses()
    return how(inputs, shape, loss=otherwise if module is None else getattr(module, name)())


def open_clip_note() -> str:
    """Which code runs under the name open_clip."""
    if open_clip_losses() is None:
        return "the same formula written in benchmarks/ops; open_clip_torch is not installed"
    return f"open_clip_torch {importlib.metadata.version('open_clip_torch')}"
