"""Compiles the kernels of csrc/cuda and the files they need for a CPU: see README.md."""

from __future__ import annotations

import filecmp
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ccu_fast.ops import machine

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"
LAUNCH = re.compile(r"([\w:]+(?:<[\w:,\s]*>)?)<<<(.*?)>>>\(", re.DOTALL)
QUIET = ["-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-psabi", "-Wno-sign-compare"]
WARNINGS = ["-Wall", "-Wextra", *QUIET, "-Werror"]
COMMON = ["-std=c++17", "-fPIC", "-g1", "-fvisibility=hidden", "-ffp-contract=fast", "-mfma", *WARNINGS]

# Code that is only called, not under test: optimising it takes two minutes.
QUICK = ["-O0", "-g0"]


def rewritten(source: str) -> str:
    """The text with every kernel<<<grid, block>>>(arguments) as a call; all lines stay where they are."""
    text, _ = LAUNCH.subn(r"::emulation::launch(::emulation::Launch(\2), \1, ", source)
    if "<<<" in text:
        raise ValueError("a kernel launch was not understood")
    return text


def kernels() -> list[Path]:
    """The files of csrc/cuda that hold kernels."""
    return sorted((CSRC / "cuda").glob("*.cu"))


@dataclass(frozen=True)
class Build:
    """One way to compile: a folder for its objects, and its flags."""

    folder: Path
    flags: tuple[str, ...] = ("-O1",)

    def objects(self, sources: Iterable[Path], *, extra: Iterable[str] = ()) -> list[Path]:
        """Compile .cu and .cpp files side by side."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(lambda source: self._object(source, list(extra)), sources))

    def _object(self, source: Path, extra: list[str]) -> Path:
        out = self.folder / f"{source.parent.name}-{source.stem}.o"
        text = source
        if source.suffix == ".cu":
            text = out.with_suffix(".cpp")
            text.write_text(f'#line 1 "{source}"\n' + rewritten(source.read_text()))
        folders = [f"-I{folder}" for folder in (HERE, CSRC, source.parent)]
        run(compiler(), *COMMON, *self.flags, *extra, *folders, "-c", str(text), "-o", str(out))
        return out

    def program(self, objects: Iterable[Path], name: str) -> Path:
        """Link an executable."""
        out = self.folder / name
        run(compiler(), *self.flags, *map(str, objects), "-o", str(out), "-ldl", "-lpthread")
        return out

    def module(self, objects: Iterable[Path]) -> Path:
        """Link a ccu_fast._C whose CUDA kernels are the emulated ones."""
        out = self.folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        run(compiler(), *self.flags, "-shared", *map(str, objects), "-o", str(out), "-ldl", "-lpthread")
        return out


def emulated(build: Build) -> list[Path]:
    """Objects of all kernels and of the code that runs them."""
    scheduler = ["-fno-sanitize=thread", "-DEMULATION_TSAN"] if "-fsanitize=thread" in build.flags else []
    return build.objects(kernels()) + build.objects([HERE / "fibers.cpp"], extra=scheduler)


def around(build: Build) -> list[Path]:
    """Objects of the CPU kernels and of the Python side, which are called and are not under test.

    Those of the module in use where it was compiled here; compiling them again takes a minute. Without CUDA, its Python
    side lacks what calls the kernels.
    """
    record, objects = machine.build_info(), linked()
    if record is not None and objects:
        if record["cuda"] is not None:
            return [path for path in objects if path.parent.name != "cuda"]
        return [path for path in objects if path.parent.name == "cpu"] + bindings(build)
    sources = sorted(path for path in (CSRC / "cpu").glob("*.cpp") if path.name != "dispatch.cpp")
    portable = build.objects(sources, extra=[*QUICK, "-DCCU_ISA=base"])
    dispatch = build.objects([CSRC / "cpu" / "dispatch.cpp"], extra=[*QUICK, "-DCCU_HAVE_BASE=1"])
    return portable + dispatch + bindings(build)


def linked() -> list[Path]:
    """The objects of the module in use, in the order of linking; none if it was not compiled in this folder."""
    in_use = CSRC.parent / "ccu_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    # An editable install's, and that of setup.py build_ext --inplace.
    for folder in sorted((CSRC.parent / "build").glob(f"*-{sys.implementation.cache_tag}")):
        built = folder / in_use.name
        if in_use.exists() and built.exists() and filecmp.cmp(in_use, built, shallow=False):
            [names] = re.findall(r"^build \S+: link (.*)$", (folder / "build.ninja").read_text(), re.MULTILINE)
            return [folder / name for name in names.split()]
    return []


def bindings(build: Build) -> list[Path]:
    """The Python side as one object."""
    import pybind11

    python = [f"-isystem{pybind11.get_include()}", f"-isystem{sysconfig.get_path('include')}"]
    flags = [*QUICK, "-DCCU_HAVE_CUDA=1", "-DCCU_HAVE_BASE=1", *python]
    return build.objects([CSRC / "bindings" / "module.cpp"], extra=flags)


def compiler() -> str:
    """g++, whose sanitizers know about fibers."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise FileNotFoundError("g++ is not installed")
    return found


def run(*command: str) -> None:
    """A command that has to succeed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-6000:]}")


def runtimes() -> str:
    """What has to be loaded first where the program, Python, is not sanitized itself: LD_PRELOAD.

    The library of C++ with that of the sanitizer, which else finds no exceptions to watch.
    """
    names = [f"-print-file-name={name}.so" for name in ("libasan", "libstdc++")]
    found = [subprocess.run([compiler(), name], capture_output=True, text=True).stdout.strip() for name in names]
    return " ".join(found)


def impossible() -> str | None:
    """Why nothing can be built here; None if it can."""
    if platform.machine() != "x86_64":
        return f"the fibers are switched in x86-64 assembly, this is {platform.machine()}"
    return None if shutil.which(os.environ.get("CXX", "g++")) else "g++ is not installed"
