"""What every caller of the compiled module needs: its names for dtypes, threads, device, stream, and a library GEMM."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ccu_fast import _C
from ccu_fast.ops.backend import fp32_sums

DTYPES = {
    torch.float32: _C.F32,
    torch.float16: _C.F16,
    torch.bfloat16: _C.BF16,
    torch.uint8: _C.U8,
    torch.int8: _C.I8,
    torch.float64: _C.F64,  # only checked, never computed with
}


def on_gpu(device: torch.device) -> bool:
    """Whether tensors on this device go to the CUDA kernels."""
    return device.type == "cuda"


def on(device: torch.device) -> tuple[AbstractContextManager[Any], dict[str, Any]]:
    """A guard to make the call under, and the arguments for torch's threads, or for its current stream on a GPU."""
    if not on_gpu(device):
        return nullcontext(), {"threads": torch.get_num_threads(), "cuda": False, "stream": 0}
    stream = torch.cuda.current_stream(device).cuda_stream
    return torch.cuda.device(device), {"threads": 1, "cuda": True, "stream": stream}


def address(t: Tensor | None) -> int:
    """Where the tensor's data starts; 0 for None."""
    return 0 if t is None else t.data_ptr()


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out = a @ b`` in fp32 with fp32 sums; a GPU reads fp16 and bf16 operands without a copy."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    if not a.is_cuda:
        return torch.mm(a.float(), b.float(), out=out)
    with fp32_sums():
        return torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
