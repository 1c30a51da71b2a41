"""Which backend serves which operation, and why another one cannot."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os

import torch

from ccu_fast.backends import machine

log = logging.getLogger("ccu_fast")

BACKENDS = ("triton", "native", "reference")

# What the compiled module also runs on cuda tensors.
NATIVE_CUDA = ("candidate_losses", "noise_store", "pgd_step_", "topk_flips")
TRITON = ("reduce_similarity", "l2_normalize")


@functools.cache
def unavailable(backend: str) -> str | None:
    """Why ``backend`` cannot be used in this process; None when it can."""
    if backend == "reference":
        return None
    if backend == "native":
        return machine.why_not_native()
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device is visible (set TRITON_INTERPRET=1 before import to run in the interpreter)"
    return None


def cannot_serve(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run ``op`` on tensors of this device and dtype; None when it can."""
    if backend == "reference":
        return None
    reason = unavailable(backend)
    if reason is not None:
        return reason
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes fp32, fp16 and bf16, not {dtype}"
    if backend == "native" and device.type != "cpu" and not (device.type == "cuda" and op in NATIVE_CUDA):
        return f"its {op} runs on cpu tensors, not {device.type}"
    if backend == "native" and device.type == "cuda":
        return machine.why_no_cuda_kernels()
    if backend == "triton":
        if op not in TRITON:
            return f"it has no {op}"
        if device.type == "cpu":
            if os.environ.get("TRITON_INTERPRET") != "1":
                return "it runs on cuda tensors, not cpu"
            if dtype == torch.bfloat16:
                return "Triton's interpreter has no correct bf16 dot"
        elif device.type != "cuda":
            return f"it runs on cuda tensors, not {device.type}"
    return None


def candidates(device_type: str) -> tuple[str, ...]:
    """What ``auto`` tries, in this order."""
    # The interpreter is for tests: it is never what a user wants picked for them.
    return ("native", "reference") if device_type == "cpu" else BACKENDS


@functools.cache
def _automatic(op: str, device_type: str, dtype: torch.dtype) -> str:
    device = torch.device(device_type)
    reasons: list[str] = []
    for name in candidates(device_type):
        reason = cannot_serve(name, op, device, dtype)
        if reason is None:
            log.debug("%s on %s %s: %s%s", op, device_type, dtype, name, "".join(f"; not {r}" for r in reasons))
            return name
        reasons.append(f"{name} ({reason})")
    raise AssertionError("unreachable: the reference serves everything")


# Under torch.compile the choice is made while tracing and is a constant of the graph.
@torch.compiler.assume_constant_result
def choose(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that will run ``op``.

    Raises:
        ValueError: ``backend`` is unknown, or named by the user and unable to serve; the message says why.
    """
    if backend == "auto":
        return _automatic(op, device.type, dtype)
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {('auto', *BACKENDS)}, got {backend!r}")
    reason = cannot_serve(backend, op, device, dtype)
    if reason is not None:
        raise ValueError(f"backend: {backend!r} cannot run {op} here: {reason}")
    return backend
