"""What runs an operation: which backend, why another one cannot, and under which of torch's settings."""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ccu_fast.ops import machine
from ccu_fast.ops.operator import constant

log = logging.getLogger("ccu_fast")

BACKENDS = ("triton", "native", "reference")

# What has kernels of its own on cuda tensors, in CUDA C++ and in Triton; on cpu tensors the compiled module has all.
NATIVE_CUDA = ("candidate_losses", "noise_store", "pgd_step_", "topk_flips")
TRITON = ("reduce_similarity", "l2_normalize")
OPERATIONS = (*TRITON, *NATIVE_CUDA)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# A call costs one look-up here. Devices of one type may differ, so the key holds the device.
_chosen: dict[tuple[str, str, torch.device, torch.dtype], str] = {}
_told = False
_NOTHING = nullcontext()


def unavailable(backend: str) -> str | None:
    """Why ``backend`` cannot be used in this process at all; None when it can."""
    if backend == "reference":
        return None
    if backend == "native":
        return machine.why_not_native()
    if not machine.interpreting() and torch.version.hip is None and not torch.cuda.is_available():
        return "no CUDA device is visible (set TRITON_INTERPRET=1 before import to run in the interpreter)"
    return machine.why_no_triton()


def has_kernel(backend: str, op: str, device_type: str) -> bool:
    """Whether ``backend`` has a kernel of ``op`` for such tensors, even if this machine cannot run it."""
    if backend == "reference":
        return True
    if backend == "native":
        return device_type == "cpu" or (device_type == "cuda" and op in NATIVE_CUDA)
    return op in TRITON and (device_type == "cuda" or (device_type == "cpu" and machine.interpreting()))


def cannot_serve(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run ``op`` on tensors of this device and dtype; None when it can."""
    if backend == "reference":
        return None
    reason = unavailable(backend)
    if reason is not None:
        return reason
    if dtype not in KERNEL_DTYPES:
        return f"it computes fp32, fp16 and bf16, not {dtype}"
    if not has_kernel(backend, op, device.type):
        if backend == "native":
            return f"its {op} runs on cpu tensors, not {device.type}"
        return f"it has no {op}" if op not in TRITON else f"it runs on cuda tensors, not {device.type}"
    if device.type == "cuda":
        gpu = device.index
        if gpu is None and torch.cuda.is_available():
            gpu = torch.cuda.current_device()
        return machine.why_no_cuda_kernels(gpu) if backend == "native" else machine.why_no_triton(gpu)
    if backend == "triton" and dtype == torch.bfloat16:
        return "Triton's interpreter has no correct bf16 dot"
    return None


def candidates(device_type: str) -> tuple[str, ...]:
    """What ``auto`` tries, in this order."""
    # The interpreter is for tests: it is never what a user wants picked for them.
    return ("native", "reference") if device_type == "cpu" else BACKENDS


def pick(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """The backend that ``auto`` picks, and why each backend it tried before that cannot serve."""
    reasons: dict[str, str] = {}
    for name in candidates(device.type):
        reason = cannot_serve(name, op, device, dtype)
        if reason is None:
            return name, reasons
        reasons[name] = reason
    raise AssertionError("unreachable: the reference serves everything")


# Under torch.compile the choice is made while tracing and is a constant of the graph.
@constant
def choose(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that will run ``op``.

    Warns once a process when ``auto`` falls back to plain torch on a GPU although there is a kernel.

    Raises:
        ValueError: ``backend`` is unknown, or named by the user and unable to serve; the message says why.
    """
    return _chosen.get((backend, op, device, dtype)) or _choose(backend, op, device, dtype)


def _choose(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str:
    if backend == "auto":
        name, reasons = pick(op, device, dtype)
        log.debug("%s on %s %s: %s%s", op, device, dtype, name, "".join(f"; not {b}: {r}" for b, r in reasons.items()))
        if name == "reference":
            _tell(op, device, dtype, reasons)
    elif backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {('auto', *BACKENDS)}, got {backend!r}")
    else:
        reason = cannot_serve(backend, op, device, dtype)
        if reason is not None:
            raise ValueError(f"backend: {backend!r} cannot run {op} here: {reason}")
        name = backend
    # "cuda" without an index is the current device, which changes.
    if device.type != "cuda" or device.index is not None:
        _chosen[backend, op, device, dtype] = name
    return name


@functools.cache
def load(op: str, backend: str) -> Any:
    """The module that runs ``op``: the file named after the backend, or a part of it, as "native.frozen_keys"."""
    return importlib.import_module(f".{op.rstrip('_')}.{backend}", __package__)


def _tell(op: str, device: torch.device, dtype: torch.dtype, reasons: dict[str, str]) -> None:
    """Warn once a process that a GPU is slower than it could be; fp64, which has no kernels, does not warn."""
    global _told
    # A compiler may trace for devices that are not there.
    if _told or device.type != "cuda" or dtype not in KERNEL_DTYPES or not torch.cuda.is_available():
        return
    _told = True
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if has_kernel(name, op, device.type))
    warnings.warn(
        f"{op} on {device} ({torch.cuda.get_device_name(device)}) runs in plain torch, not in a kernel of ccu_fast: "
        f"{why}. `ccu-fast info` lists what serves each device; this is said once.",
        RuntimeWarning,
        stacklevel=2,
    )


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """The dtypes were decided at the door; a GEMM inside must not be cast again."""
    if autocast_dtype(device.type) is not None:
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


def transformed(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors is inside a transform of torch.func, which no kernel can look into."""
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return any(t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)


def outside_transforms(op: str, *tensors: Tensor | None) -> None:
    """Raise for a tensor inside a transform of torch.func: of an operation that has no gradient."""
    if transformed(*tensors):
        raise RuntimeError(f"{op}: expected tensors from outside torch.func's transforms (vmap, grad), got one inside")


def reverse_mode_alone(op: str, *inputs: Tensor | None) -> None:
    """Raise where torch needs a rule beyond the backward pass, which the kernels of ``op`` do not have."""
    if torch.compiler.is_compiling():
        return
    if torch._C._are_functorch_transforms_active():  # torch refuses the call then, whatever its inputs are
        raise RuntimeError(f"{op}: torch.func's transforms (vmap, grad, jvp) need backend='reference'")
    if has_tangent(*inputs):
        raise RuntimeError(f"{op}: forward-mode derivatives need backend='reference'")


def has_tangent(*inputs: Tensor | None) -> bool:
    """Whether one of them carries a forward-mode derivative."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in inputs)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast multiplies in there; None where it is off."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def fp32_precision(device_type: str) -> str:
    """The name that ``torch.set_float32_matmul_precision`` has for it: "highest", "high" (TF32) or "medium" (bf16)."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer, per-backend setting was used, which forbids the older question
        backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
        names = {"tf32": "high", "bf16": "medium"}
        return names.get(backend.matmul.fp32_precision, "highest")


def has_bf16() -> bool:
    """Whether this machine's CPU multiplies bf16 natively."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def gemm_dtype(dtype: torch.dtype, *, settings: bool = True) -> torch.dtype:
    """What the GEMMs on a CPU multiply: bf16, if it has that, of bf16 and at the precision "medium" of fp32.

    Args:
        settings: False to leave the precision out, which may change before a compiled graph runs.
    """
    wanted = dtype == torch.bfloat16 or (settings and dtype == torch.float32 and fp32_precision("cpu") == "medium")
    return torch.bfloat16 if wanted and has_bf16() else torch.float32


@contextmanager
def fp32_sums() -> Iterator[None]:
    """GEMMs of fp16 in here add in fp32, although the user allowed cuBLAS to add in fp16.

    Ours have operands scaled to the top of fp16's range, whose sums would overflow, or a bound that counts on fp32.
    """
    matmul = torch.backends.cuda.matmul
    if not matmul.allow_fp16_accumulation:
        yield
        return
    matmul.allow_fp16_accumulation = False
    try:
        yield
    finally:
        matmul.allow_fp16_accumulation = True


def forget() -> None:
    """Forget all choices and the warning, so that both are made again; otherwise a machine is examined once."""
    global _told
    _told = False
    _chosen.clear()
    machine.why_no_triton.cache_clear()
