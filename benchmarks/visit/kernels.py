"""Where a call spends its time: every kernel it launches, by torch's profiler."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.registry import Call

GEMM = "library GEMMs"
_GEMM = re.compile(r"gemm|cutlass|nvjet|cublas|xmma|bmm|\bmm\b", re.IGNORECASE)
CALLS = 3


@dataclass(frozen=True)
class Kernel:
    """One kind of kernel in one call.

    Attributes:
        name: as the profiler has it, shortened.
        count: launches a call.
        ms: of all of them.
    """

    name: str
    count: float
    ms: float


def profile(call: Call, device: torch.device) -> list[Kernel]:
    """The kernels of one call, the costliest first, a mean of three calls; on a CPU torch's operators."""
    from torch.profiler import ProfilerActivity

    cuda = device.type == "cuda"
    call()
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(CALLS):
            call()
        if cuda:
            torch.cuda.synchronize(device)
    found = [
        Kernel(_short(e.key), e.count / CALLS, _microseconds(e, cuda) / 1e3 / CALLS) for e in recorded.key_averages()
    ]
    return sorted((k for k in found if k.ms > 0), key=lambda k: -k.ms)


def of_parts(kernels: list[Kernel]) -> dict[str, float]:
    """Milliseconds of each kernel of ours by its name, of the GEMMs together, and of the rest together."""
    parts: dict[str, float] = {}
    for kernel in kernels:
        own = re.search(r"\b(?:small_)?(forward|gradient|scale|finish|bound|merge|own|online|norm)_kernel", kernel.name)
        name = own[0] if own else GEMM if _GEMM.search(kernel.name) else "rest"
        parts[name] = parts.get(name, 0.0) + kernel.ms
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def _microseconds(event: Any, cuda: bool) -> float:
    return float(event.self_device_time_total if cuda else event.self_cpu_time_total)


def _short(name: str) -> str:
    """The name without template arguments, which are most of a C++ kernel's name."""
    return re.sub(r"<.*|\(.*", "", name.removeprefix("void ")).strip()[:80] or name[:80]
