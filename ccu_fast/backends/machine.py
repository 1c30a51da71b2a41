"""What was built, and what this machine has to run it: the reasons that the registry and the report give."""

from __future__ import annotations

import ctypes
import importlib
import json
import platform
from pathlib import Path
from typing import Any

import torch

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


def why_no_cuda_kernels() -> str | None:
    """Why the CUDA C++ kernels cannot run here; None when they can. Triton's kernels do not depend on this."""
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
    return why_no_devices() or _why_no_machine_code(info["cuda"]["archs"])


def _why_no_machine_code(archs: list[str]) -> str | None:
    """Machine code runs on later minors of its major; the PTX of the highest on everything later."""
    built = sorted(int(arch.rstrip("af")) for arch in archs)
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        device = 10 * major + minor
        if device < built[-1] and not any(arch // 10 == major and arch <= device for arch in built):
            return f"the kernels are built for sm_{', sm_'.join(archs)}, GPU {index} is sm_{device}"
    return None
