"""A Triton driver that knows a target and launches nothing: kernels compile, arguments are bound, no GPU is needed.

With it the backend's own launch code runs on CPU tensors, up to the call that would hand the kernel to CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SHARED_LIMIT = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
PROCESSORS = 132


class TargetOnly:
    """The driver for a compute capability written as 80, 89, 90, 100 or 120, for ``triton.runtime.driver.set_active``.

    Attributes:
        launched: names of the kernels, in the order they were launched in.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.utils = self
        self.launched: list[str] | None = None

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"multiprocessor_count": PROCESSORS, "max_shared_mem": SHARED_LIMIT[self.capability], "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Nothing was loaded. Triton from 3.8 on asks for it when a kernel is forgotten."""

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            if self.launched is not None:
                self.launched.append(source.fn.__name__)

        return launch
