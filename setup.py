"""Builds ccu_fast._C from csrc: C++ kernels for the CPU and, where nvcc works, CUDA kernels. Needs no torch.

Environment:
    CCU_FAST_NATIVE     auto (default): without a C++ compiler install the Python part alone; 1: fail; 0: Python only.
    CCU_FAST_CUDA       auto (default): CUDA kernels if a working nvcc is found; 1: fail if not; 0: none.
    CCU_FAST_CUDA_ARCHS such as "80;90"; default: the visible GPUs, else Ampere to Blackwell.
                        "default": Ampere to Blackwell whatever GPUs are visible, for a build that others install.
    CXX, CXXFLAGS, LDFLAGS, LDCXXSHARED (the command that links), CUDA_HOME, CUDA_PATH, MAX_JOBS: as usual.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # PEP 517 runs this file without its folder on the path

from build_support.cuda import Toolkit, find_toolkit  # noqa: E402
from build_support.graph import CXX_FLAGS, Plan, cuda_kernels  # noqa: E402
from build_support.probe import Unavailable, find_cxx, find_isas, run  # noqa: E402


def switch(name: str) -> str:
    """An environment variable that is auto, 1 or 0."""
    value = os.environ.get(name, "auto").strip().lower() or "auto"
    if value not in ("auto", "1", "0"):
        raise PlatformError(f"{name}: expected auto, 1 or 0, got {value!r}")
    return value


def ninja_binary() -> str:
    """The ninja of the pip package, else the one on PATH."""
    try:
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise Unavailable("ninja is not installed: pip install ninja") from None
        return found


def git_sha() -> str | None:
    """The commit that is being built, with ``+changes`` if files differ from it; outside a checkout what is said."""
    if not (ROOT / ".git").exists():
        return os.environ.get("CCU_FAST_GIT_SHA")
    try:
        sha = run(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip()
        changed = run(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]).strip()
    except Unavailable:
        return None
    return sha + ("+changes" if changed else "")


class BuildNative(build_ext):
    """Compiles with ninja, and records in ``_build_info.json`` what was built and why the rest was not."""

    def run(self) -> None:
        """Build the module, or, if that is allowed and necessary, explain its absence."""
        module = Path(self.get_ext_fullpath("ccu_fast._C")).resolve()
        module.parent.mkdir(parents=True, exist_ok=True)
        info: dict[str, Any] = {"git_sha": git_sha(), "native": None, "cuda": None, "skipped": {}}
        native = switch("CCU_FAST_NATIVE")
        try:
            if native == "0":
                raise Unavailable("switched off by CCU_FAST_NATIVE=0")
            plan = self.plan(info)
        except Unavailable as reason:
            if native == "1":
                raise PlatformError(f"CCU_FAST_NATIVE=1, but {reason}") from reason
            info["skipped"]["native"] = str(reason)
            module.unlink(missing_ok=True)
            self.warn(f"installing ccu_fast without its compiled kernels: {reason}")
        else:
            self.compile(plan, module)
        (module.parent / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def plan(self, info: dict[str, Any]) -> Plan:
        """Find the tools and note them in ``info``."""
        try:
            import pybind11
        except ImportError as error:
            # Only without build isolation, which brings what pyproject.toml asks for.
            raise Unavailable(f"pybind11 cannot be imported ({error}): pip install pybind11 ninja") from error
        ninja_binary()
        cxx = find_cxx()
        isas, skipped = find_isas(cxx, platform.machine().lower())
        info["skipped"].update(skipped)
        extra_cxx = shlex.split(os.environ.get("CPPFLAGS", "")) + shlex.split(os.environ.get("CXXFLAGS", ""))
        extra_link = shlex.split(os.environ.get("LDFLAGS", ""))
        linker = shlex.split(os.environ.get("LDCXXSHARED", "")) or [*cxx, "-shared"]
        info["native"] = {
            "compiler": run([*cxx, "--version"]).splitlines()[0],
            "flags": [*CXX_FLAGS, *extra_cxx],
            "isas": isas,
            "python": platform.python_version(),
        }
        toolkit = self.toolkit(cxx, info)
        return Plan(ROOT / "csrc", cxx, isas, toolkit, pybind11.get_include(), extra_cxx, linker, extra_link)

    def toolkit(self, cxx: list[str], info: dict[str, Any]) -> Toolkit | None:
        """The CUDA toolkit to build with, or None and the reason in ``info``."""
        cuda = switch("CCU_FAST_CUDA")
        try:
            if cuda == "0":
                raise Unavailable("switched off by CCU_FAST_CUDA=0")
            if not cuda_kernels(ROOT / "csrc"):
                raise Unavailable("csrc/cuda has no kernels")
            found = find_toolkit(cxx)
        except Unavailable as reason:
            if cuda == "1":
                raise PlatformError(f"CCU_FAST_CUDA=1, but {reason}") from reason
            info["skipped"]["cuda"] = str(reason)
            return None
        info["cuda"] = {
            "nvcc": found.nvcc,
            "toolkit": found.root,
            "version": found.version,
            "archs": list(found.archs),
            "flags": found.gencode,
        }
        return found

    def compile(self, plan: Plan, module: Path) -> None:
        """Run ninja; objects stay in the build folder, so that a second build compiles what changed."""
        # pip gives an editable install a new temporary folder each time.
        folder = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
        if not getattr(self, "editable_mode", False):
            folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        import fcntl

        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "build.ninja").write_text(plan.ninja(module.name))
            jobs = os.environ.get("MAX_JOBS")
            command = [ninja_binary(), "-C", str(folder), *(["-j", jobs] if jobs else [])]
            if subprocess.run(command).returncode != 0:
                hint = ", CCU_FAST_CUDA=0 builds without CUDA" if plan.toolkit else ""
                raise CompileError(f"compiling ccu_fast._C failed (above){hint}; CCU_FAST_NATIVE=0 installs without it")
            # Renamed into place: a process that has the old module open keeps it.
            fresh = module.with_name(f".{module.name}.{os.getpid()}")
            shutil.copy2(folder / module.name, fresh)
            fresh.replace(module)


setup(ext_modules=[Extension("ccu_fast._C", sources=[])], cmdclass={"build_ext": BuildNative})
