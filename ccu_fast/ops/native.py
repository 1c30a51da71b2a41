"""Where and how a call of the compiled module runs: dtypes as it names them, threads, device and stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ccu_fast import _C

DTYPES = {
    torch.float32: _C.F32, torch.float16: _C.F16, torch.bfloat16: _C.BF16, torch.uint8: _C.U8, torch.int8: _C.I8,
    torch.float64: _C.F64,  # to look at alone
}  # fmt: skip


def on_gpu(device: torch.device) -> bool:
    """Whether it is the CUDA kernels that compute there."""
    return device.type == "cuda"


def on(device: torch.device) -> tuple[AbstractContextManager[Any], dict[str, Any]]:
    """A guard to call under, and the arguments that say where: torch's current stream of a GPU, or its threads."""
    if not on_gpu(device):
        return nullcontext(), {"threads": torch.get_num_threads(), "cuda": False, "stream": 0}
    stream = torch.cuda.current_stream(device).cuda_stream
    return torch.cuda.device(device), {"threads": 1, "cuda": True, "stream": stream}


def address(t: torch.Tensor | None) -> int:
    """0 for None."""
    return 0 if t is None else t.data_ptr()
