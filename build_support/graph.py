"""The compile graph of ccu_fast._C as a ninja file. It takes every kernel file under csrc; none is listed by hand."""

from __future__ import annotations

import shlex
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from build_support.cuda import Toolkit
from build_support.probe import ISA_FLAGS

# No -ffast-math: infinities, NaN and the order of additions matter here.
_MATH_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
_HIDDEN = ["-fvisibility=hidden", "-fvisibility-inlines-hidden"]
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", *_HIDDEN, *_MATH_FLAGS, "-Wall", "-Wextra"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-lineinfo"]
ONCE = ("dispatch.cpp",)

RULES = """ninja_required_version = 1.5

rule cxx
  command = {cxx} -MMD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = CXX $out

rule nvcc
  command = {nvcc} -MD -MF $out.d $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = NVCC $out

rule link
  command = {linker} -o $out $in $flags
  description = LINK $out

"""


@dataclass(frozen=True)
class Plan:
    """Everything that decides the compile graph."""

    csrc: Path
    cxx: list[str]
    isas: list[str]
    toolkit: Toolkit | None
    pybind_include: str
    extra_cxx: list[str]
    linker: list[str]
    extra_link: list[str]

    @property
    def defines(self) -> list[str]:
        """Definitions that tell the files compiled once which others exist."""
        have = [f"-DCCU_HAVE_{isa.upper()}=1" for isa in self.isas]
        return have + (["-DCCU_HAVE_CUDA=1"] if self.toolkit else [])

    def ninja(self, module: str) -> str:
        """The text of build.ninja; ``module`` is the file to link, relative to the build folder."""
        nvcc = self.toolkit.nvcc if self.toolkit else "false"
        lines = [RULES.format(cxx=_command(self.cxx), linker=_command(self.linker), nvcc=_command([nvcc]))]
        objects: list[str] = []

        def compile_(rule: str, source: Path, name: str, flags: Iterable[str]) -> None:
            objects.append(f"{name}.o")
            lines.append(f"build {_path(name)}.o: {rule} {_path(source)}\n  flags = {_command(flags)}\n")

        cxx_flags = [*CXX_FLAGS, *self.extra_cxx]
        python = [f"-isystem{self.pybind_include}", f"-isystem{sysconfig.get_path('include')}"]
        # First, because it takes longest; it includes the other files beside it.
        module_source = self.csrc / "bindings" / "module.cpp"
        compile_("cxx", module_source, "bindings/module", [*cxx_flags, *self.defines, *python])
        for name in ONCE:
            source = self.csrc / "cpu" / name
            compile_("cxx", source, f"cpu/{source.stem}", [*cxx_flags, *self.defines])
        # Narrowest first. Templates of the standard library are emitted in every object file and the linker keeps
        # the first copy it meets: that must be one that every CPU can run.
        for isa in sorted(self.isas, key=list(ISA_FLAGS).index):
            for source in kernels(self.csrc):
                flags = [*cxx_flags, *ISA_FLAGS[isa], f"-DCCU_ISA={isa}"]
                compile_("cxx", source, f"cpu/{source.stem}.{isa}", flags)
        link = [*_LINK_FLAGS, *self.extra_link]
        if self.toolkit:
            for source in cuda_kernels(self.csrc):
                compile_("nvcc", source, f"cuda/{source.stem}", [*NVCC_FLAGS, *self.toolkit.gencode])
            link += self.toolkit.link_flags
        lines.append(f"build {_path(module)}: link {' '.join(map(_path, objects))}\n  flags = {_command(link)}\n")
        return "\n".join(lines)


# libstdc++ stays a shared library, as in every other extension module: manylinux allows it, torch has already loaded
# it, and two copies in one process do not share exceptions. `make wheels` links it in and hides it: see wheels.py.
_LINK_FLAGS = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-lpthread", "-ldl"]


def kernels(csrc: Path) -> list[Path]:
    """The CPU kernel files, each compiled once per instruction set."""
    return sorted(path for path in (csrc / "cpu").glob("*.cpp") if path.name not in ONCE)


def cuda_kernels(csrc: Path) -> list[Path]:
    """The CUDA kernel files."""
    return sorted((csrc / "cuda").glob("*.cu"))


def _command(words: Iterable[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _path(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
