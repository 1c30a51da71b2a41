"""Finding a CUDA toolkit that works, and the architectures to compile for."""

from __future__ import annotations

import glob
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from build_support.probe import Unavailable, run

OLDEST_TOOLKIT = 12
# Ampere to Blackwell; architectures that the toolkit does not know are dropped.
DEFAULT_ARCHS = ("80", "86", "89", "90", "100", "120")

PROBE = """
#include <cuda_runtime.h>
__global__ void probe(float* p) { p[threadIdx.x] = 1.0f; }
extern "C" int launch(float* p) { probe<<<1, 32>>>(p); return static_cast<int>(cudaGetLastError()); }
"""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that compiled, and linked, a test kernel."""

    nvcc: str
    root: str
    version: str
    library_dir: str
    archs: tuple[str, ...]

    @property
    def gencode(self) -> list[str]:
        """SASS for every architecture, and PTX of the highest for GPUs that come later."""
        flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        ptx = max(_number(arch) for arch in self.archs)
        return [*flags, f"-gencode=arch=compute_{ptx},code=compute_{ptx}"]

    @property
    def link_flags(self) -> list[str]:
        """The runtime as a static library: the module loads on machines without CUDA."""
        return [f"-L{self.library_dir}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]


def _number(arch: str) -> int:
    return int(arch.rstrip("af"))


def _find_nvcc() -> str:
    places = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places += os.environ.get("PATH", os.defpath).split(os.pathsep)
    # pip's nvidia-cuda-nvcc; under build isolation sys.path does not hold the environment being installed into.
    for site in dict.fromkeys([*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]):
        places += sorted(glob.glob(os.path.join(site, "nvidia", "c*", "bin")), reverse=True)
    places.append("/usr/local/cuda/bin")
    nvcc = shutil.which("nvcc", path=os.pathsep.join(places))
    if nvcc is None:
        raise Unavailable("no nvcc in CUDA_HOME, CUDA_PATH, PATH, pip's nvidia-cuda-nvcc or /usr/local/cuda")
    return nvcc


def _locate(nvcc: str) -> tuple[str, str]:
    """Root and cudart's folder, from nvcc itself: what is on PATH may be a wrapper script far from both."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cu").write_text(PROBE)
        dryrun = run([nvcc, "--dryrun", "-c", "probe.cu", "-o", "probe.o"], cwd=folder)
    top = re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
    if top is None:
        raise Unavailable(f"`{nvcc} --dryrun` names no toolkit root")
    root = os.path.realpath(top[1].strip())
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", dryrun, re.MULTILINE)
    folders = re.findall(r'-L([^"]+)"', libraries[1]) if libraries else []
    for folder in [*folders, os.path.join(root, "lib64"), os.path.join(root, "lib")]:
        if os.path.exists(os.path.join(folder, "libcudart_static.a")):
            return root, os.path.realpath(folder)
    raise Unavailable(f"the toolkit in {root} has no libcudart_static.a")


def _visible_gpus() -> list[str]:
    """The compute capabilities that nvidia-smi sees, such as ``90``; none without a driver."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    try:
        listed = run([smi, "--query-gpu=compute_cap", "--format=csv,noheader"])
    except Unavailable:
        return []
    return sorted({f"{major}{minor}" for major, minor in re.findall(r"^(\d+)\.(\d)$", listed, re.MULTILINE)}, key=int)


def _choose_archs(known: set[int]) -> tuple[str, ...]:
    asked = re.findall(r"[^\s;,]+", os.environ.get("CCU_FAST_CUDA_ARCHS", ""))
    if asked and asked != ["default"]:
        archs = [arch.replace(".", "") for arch in asked]
        bad = [arch for arch in archs if not re.fullmatch(r"\d+[af]?", arch) or _number(arch) not in known]
        if bad:
            raise Unavailable(f"CCU_FAST_CUDA_ARCHS names {bad}; this nvcc compiles for {sorted(known)}")
    elif not asked and (visible := _visible_gpus()):
        archs = [arch for arch in visible if int(arch) in known]
        if not archs:
            raise Unavailable(f"the visible GPUs are {visible}; this nvcc compiles for {sorted(known)}")
    else:
        archs = [arch for arch in DEFAULT_ARCHS if int(arch) in known]
        if not archs:
            raise Unavailable(f"this nvcc compiles for {sorted(known)}, none of {DEFAULT_ARCHS}")
    return tuple(sorted(dict.fromkeys(archs), key=lambda arch: (_number(arch), arch)))


def find_toolkit(cxx: list[str]) -> Toolkit:
    """The first nvcc found, if it compiles a kernel that links with ``cxx``.

    Raises:
        Unavailable: there is no nvcc, or it does not work; the message says why.
    """
    nvcc = _find_nvcc()
    release = re.search(r"release (\d+)\.(\d+)", run([nvcc, "--version"]))
    if release is None:
        raise Unavailable(f"`{nvcc} --version` names no release")
    version = f"{release[1]}.{release[2]}"
    if int(release[1]) < OLDEST_TOOLKIT:
        raise Unavailable(f"{nvcc} is CUDA {version}, older than {OLDEST_TOOLKIT}.0")
    root, library_dir = _locate(nvcc)
    known = {int(arch) for arch in re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"]))}
    toolkit = Toolkit(nvcc, root, version, library_dir, _choose_archs(known))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cu").write_text(PROBE)
        highest = toolkit.gencode[-2:]  # machine code and PTX; every other architecture would only take time
        run([nvcc, "-std=c++17", "-Xcompiler=-fPIC", *highest, "-c", "probe.cu", "-o", "probe.o"], cwd=folder)
        run([*cxx, "-shared", "probe.o", "-o", "probe.so", *toolkit.link_flags], cwd=folder)
    return toolkit
