"""What was built, and what this machine has to run it: the reasons that the registry and the report give."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check

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
        importlib.import_module(".._C", __package__)
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
    if driver[0] < _two(torch.version.cuda)[0]:
        return f"the driver serves CUDA {_dotted(driver)}, torch is built with {torch.version.cuda}"
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
    built = _two(info["cuda"]["version"])
    driver = driver_cuda()
    if driver is not None and driver[0] < built[0]:
        return f"the driver serves CUDA {_dotted(driver)}, the kernels are built with {_dotted(built)}"
    reason = why_no_devices()
    if reason is not None or gpu is None:
        return reason
    return _why_no_device(gpu) or _why_no_machine_code(info["cuda"]["archs"], built, driver, gpu)


def _why_no_machine_code(
    archs: list[str], built: tuple[int, int], driver: tuple[int, int] | None, gpu: int
) -> str | None:
    """Machine code runs on later minors of its major, that of an "a" nowhere else; PTX of the highest on all later."""
    device = capability(gpu)
    if any(_runs_on(arch, device) for arch in archs):
        return None
    if device < max(int(arch.rstrip("af")) for arch in archs):
        return f"the kernels are built for sm_{', sm_'.join(archs)}, GPU {gpu} is sm_{device}"
    # Newer machine code runs on an older driver of its major; newer PTX is not compiled by one.
    if driver is not None and driver < built:
        return (
            f"GPU {gpu} is sm_{device}, for which the kernels are PTX of CUDA {_dotted(built)}; "
            f"the driver compiles that of {_dotted(driver)} at most"
        )
    return None


def _runs_on(arch: str, device: int) -> bool:
    number = int(arch.rstrip("af"))
    return number == device or (not arch.endswith("a") and number // 10 == device // 10 and number < device)


def _why_no_device(gpu: int) -> str | None:
    """A device that a compiler traces for need not be there."""
    count = torch.cuda.device_count()
    return None if gpu < count else f"torch sees no GPU {gpu}: there are {count}"


def capability(gpu: int) -> int:
    """The compute capability of a GPU, written as 80, 90, 103, …"""
    major, minor = torch.cuda.get_device_capability(gpu)
    return 10 * major + minor


# tl.make_tensor_descriptor, triton.tools.tensor_descriptor and triton.knobs came with it.
TRITON_AT_LEAST = (3, 4)
# wgmma or mma with bf16 and TF32, asynchronous copies.
CAPABILITY_AT_LEAST = 80


@functools.cache
def why_no_triton(gpu: int | None = None) -> str | None:
    """Why the Triton kernels cannot run on a GPU, or here at all; None when they can."""
    if gpu is None:
        return _why_no_triton_package()
    missing = why_no_triton() or _why_no_device(gpu)
    if missing is not None or interpreting():
        return missing
    device = capability(gpu)
    if device < CAPABILITY_AT_LEAST:
        needed = CAPABILITY_AT_LEAST / 10
        return f"its kernels need compute capability {needed} or later, GPU {gpu} has {device / 10}"
    no_code: str | None = _probe().why_no_code(device)
    return no_code


def _why_no_triton_package() -> str | None:
    if torch.version.hip is not None and not interpreting():
        return f"its kernels are for NVIDIA GPUs, torch is built for ROCm {torch.version.hip}"
    try:
        triton = importlib.import_module("triton")
        found = _two(triton.__version__)
        if found < TRITON_AT_LEAST:
            return f"it needs Triton {_dotted(TRITON_AT_LEAST)} or later, {triton.__version__} is installed"
        if interpreting() and (why_not := why_no_interpreter(triton.__version__)) is not None:
            return why_not
        probe = _probe()
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "the package triton is not installed"
        return f"the package triton cannot be imported: {error}"
    except Exception as error:
        # A broken installation raises whatever it likes, and none of it is the user's concern.
        return f"the package triton cannot be imported: {type(error).__name__}: {error}"
    no_driver: str | None = None if interpreting() else probe.why_no_driver()
    return no_driver


def _probe() -> Any:
    return importlib.import_module(".triton.probe", __package__)


def interpreting() -> bool:
    """Whether Triton's interpreter takes the place of a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_no_interpreter(triton: str) -> str | None:
    """Why the interpreter of this release of Triton cannot run here; None if it can.

    Before 3.7 it makes an int of an array with one element, which NumPy refuses from 2.4 on.
    """
    numpy = importlib.metadata.version("numpy")
    if _two(triton) >= (3, 7) or _two(numpy) < (2, 4):
        return None
    return f"the interpreter of Triton {triton} fails with NumPy {numpy}: pip install 'numpy<2.4'"


def _two(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def host_sees(device: torch.device) -> bool:
    """Whether the host can read values there without waiting for pending work."""
    return device.type == "cpu"


def check_range(name: str, what: str, index: Tensor, size: int) -> None:
    """Raise unless an index on the host is in [0, size). Kernels check that of a GPU, operators that of a graph."""
    if not host_sees(index.device) or check.by_operator(index) or not index.numel():
        return
    low, high = (int(v) for v in index.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"{name}: expected {what} in [0, {size - 1}], got {low if low < 0 else high}")


def moved(t: Tensor, device: torch.device) -> Tensor:
    """``t`` on a device. The host waits for a copy to itself, which it could otherwise read before it has arrived."""
    return t.to(device, non_blocking=device.type == "cuda")
