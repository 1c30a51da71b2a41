"""Which backend serves which operation, and why another one cannot."""

from __future__ import annotations

import functools
import logging
import os
import warnings

import torch

from ccu_fast.backends import machine

log = logging.getLogger("ccu_fast")

BACKENDS = ("triton", "native", "reference")

# What the compiled module also runs on cuda tensors.
NATIVE_CUDA = ("candidate_losses", "noise_store", "pgd_step_", "topk_flips")
TRITON = ("reduce_similarity", "l2_normalize")
OPERATIONS = tuple(sorted((*NATIVE_CUDA, *TRITON)))
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def unavailable(backend: str) -> str | None:
    """Why ``backend`` cannot be used in this process at all; None when it can."""
    if backend == "reference":
        return None
    if backend == "native":
        return machine.why_not_native()
    reason = machine.why_no_triton()
    if reason is None and not torch.cuda.is_available() and not _interpreted():
        return "no CUDA device is visible (set TRITON_INTERPRET=1 before import to run in the interpreter)"
    return reason


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def cannot_serve(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run ``op`` on tensors of this device and dtype; None when it can."""
    if backend == "reference":
        return None
    reason = unavailable(backend)
    if reason is not None:
        return reason
    if dtype not in KERNEL_DTYPES:
        return f"it computes fp32, fp16 and bf16, not {dtype}"
    if backend == "native":
        if device.type == "cpu":
            return None
        if device.type != "cuda" or op not in NATIVE_CUDA:
            return f"its {op} runs on cpu tensors, not {device.type}"
        return machine.why_no_cuda_kernels(_gpu(device))
    if op not in TRITON:
        return f"it has no {op}"
    if device.type == "cpu":
        if not _interpreted():
            return "it runs on cuda tensors, not cpu"
        return "Triton's interpreter has no correct bf16 dot" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"it runs on cuda tensors, not {device.type}"
    return machine.why_no_triton(_gpu(device))


def _gpu(device: torch.device) -> int | None:
    """Its number; None where there is no GPU to number."""
    if device.index is not None or not torch.cuda.is_available():
        return device.index
    return torch.cuda.current_device()


def candidates(device_type: str) -> tuple[str, ...]:
    """What ``auto`` tries, in this order."""
    # The interpreter is for tests: it is never what a user wants picked for them.
    return ("native", "reference") if device_type == "cpu" else BACKENDS


def pick(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, dict[str, str]]:
    """The first of the candidates that serves, and why those before it do not."""
    why_not: dict[str, str] = {}
    for name in candidates(device.type):
        reason = cannot_serve(name, op, device, dtype)
        if reason is None:
            return name, why_not
        why_not[name] = reason
    raise AssertionError("unreachable: the reference serves everything")


# What a call pays for the choice is one look-up. Each device has its own: a machine can hold old and new GPUs.
@functools.cache
def _automatic(op: str, device: torch.device, dtype: torch.dtype) -> str:
    name, why_not = pick(op, device, dtype)
    reasons = "; ".join(f"not {other} ({reason})" for other, reason in why_not.items())
    log.debug("%s on %s %s: %s%s", op, device, dtype, name, reasons and f"; {reasons}")
    if name == "reference" and device.type == "cuda" and dtype in KERNEL_DTYPES:
        _warn_of_slow_gpu(f"ccu_fast: {op} on {device} runs in plain torch: {reasons}. `ccu-fast info` has the rest.")
    return name


_warned = False


def _warn_of_slow_gpu(message: str) -> None:
    """Warn once a process: the results are right, only slow."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(message, RuntimeWarning, stacklevel=2)


# Under torch.compile the choice is made while tracing and is a constant of the graph.
@torch.compiler.assume_constant_result
def choose(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that will run ``op``.

    Raises:
        ValueError: ``backend`` is unknown, or named by the user and unable to serve; the message says why.
    """
    if backend == "auto":
        return _automatic(op, device, dtype)
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {('auto', *BACKENDS)}, got {backend!r}")
    reason = cannot_serve(backend, op, device, dtype)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot run {op} here: {reason}")
    return backend
