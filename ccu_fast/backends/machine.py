"""What was built, and what this machine has to run it: the reasons that the registry and the report give."""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import platform
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = Path(__file__).resolve().parents[1]


def build_info() -> dict[str, Any] | None:
    """What the build recorded (compiler, instruction sets, CUDA, what it skipped and why); None if it did not run."""
    try:
        info: dict[str, Any] = json.loads((PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return None
    return info


def why_not_native() -> str | None:
    """Why the compiled kernels cannot be used, the build's own reason first; None when they can."""
    try:
        importlib.import_module("ccu_fast._C")
        return None
    except ImportError as error:
        reason = f"the compiled module ccu_fast._C cannot be loaded: {error}"
    info = build_info()
    if info is not None and "native" in info["skipped"]:
        return f"not built: {info['skipped']['native']}"
    others = sorted(path.name for path in PACKAGE.glob("_C.*.so"))
    if others:
        return f"{reason}; {', '.join(others)} is there, this is Python {platform.python_version()}"
    if info is None:
        return f"not built: run `pip install .` or `python setup.py build_ext --inplace` in the checkout ({reason})"
    return reason


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the installed NVIDIA driver serves; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def why_no_devices() -> str | None:
    """Why torch sees no CUDA device; None when it sees one."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    driver = driver_cuda()
    if driver is None:
        return "no NVIDIA driver is loaded (libcuda.so.1)"
    if driver[0] < int(torch.version.cuda.split(".")[0]):
        return f"the driver serves CUDA {driver[0]}.{driver[1]}, torch is built with {torch.version.cuda}"
    return "the driver shows no device (CUDA_VISIBLE_DEVICES?)"


def why_no_cuda_kernels(gpu: int | None = None) -> str | None:
    """Why the CUDA C++ kernels cannot run on a GPU, or here at all; None when they can. Triton's do not need them."""
    if torch.version.hip is not None:
        return f"the kernels are for NVIDIA GPUs, torch is built for ROCm {torch.version.hip}"
    native = why_not_native()
    if native is not None:
        return native
    info = build_info()
    if info is None:
        return "the build left no record"
    if info["cuda"] is None:
        return f"not built: {info['skipped'].get('cuda', 'no reason recorded')}"
    built = info["cuda"]["version"]
    driver = driver_cuda()
    if driver is not None and driver[0] < int(built.split(".")[0]):
        return f"the driver serves CUDA {driver[0]}.{driver[1]}, the kernels are built with {built}"
    return why_no_devices() or (None if gpu is None else _why_no_machine_code(info["cuda"]["archs"], gpu))


def _why_no_machine_code(archs: list[str], gpu: int) -> str | None:
    """Code runs on later minors of its major, with an "a" on its own alone; PTX of the highest on all later."""
    device = capability(gpu)
    highest = max(int(arch.rstrip("af")) for arch in archs)
    if device >= highest or any(_runs_on(arch, device) for arch in archs):
        return None
    return f"the kernels are built for sm_{', sm_'.join(archs)}, GPU {gpu} is sm_{device}"


def _runs_on(arch: str, device: int) -> bool:
    number = int(arch.rstrip("af"))
    return number == device or (not arch.endswith("a") and number // 10 == device // 10 and number < device)


def capability(gpu: int) -> int:
    """The compute capability of a GPU, written as 80, 90, 103, …"""
    major, minor = torch.cuda.get_device_capability(gpu)
    return 10 * major + minor


# tl.make_tensor_descriptor, triton.tools.tensor_descriptor and triton.knobs came with it.
TRITON_AT_LEAST = (3, 4)
# wgmma or mma with bf16 and TF32, asynchronous copies.
CAPABILITY_AT_LEAST = 80


def why_no_triton(gpu: int | None = None) -> str | None:
    """Why the Triton kernels cannot run on a GPU, or here at all; None when they can."""
    if torch.version.hip is not None:
        return f"its kernels are for NVIDIA GPUs, torch is built for ROCm {torch.version.hip}"
    missing = _why_no_triton_package()
    if missing is not None or gpu is None:
        return missing
    has, needed = capability(gpu) / 10, CAPABILITY_AT_LEAST / 10
    return None if has >= needed else f"its kernels need compute capability {needed} or later, GPU {gpu} has {has}"


@functools.cache
def _why_no_triton_package() -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "the package triton is not installed"
        return f"the package triton cannot be imported: {error}"
    except Exception as error:
        # A broken installation raises whatever it likes, and none of it is the user's concern.
        return f"the package triton cannot be imported: {type(error).__name__}: {error}"
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    if found is None or (int(found[1]), int(found[2])) < TRITON_AT_LEAST:
        return f"it needs Triton {'.'.join(map(str, TRITON_AT_LEAST))} or later, {triton.__version__} is installed"
    return None


def moved(t: Tensor, device: torch.device) -> Tensor:
    """``t`` on a device; the host goes on at once only where the copy's readers wait for it, that is on a GPU.

    A copy towards the host that is not waited for would be read before it has arrived.
    """
    return t.to(device, non_blocking=device.type == "cuda")
