"""Running compilers, and asking them what they can do."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

# Widest last, which is the order of linking: see build_support/graph.py.
ISA_FLAGS = {
    "base": (),
    "neon": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
}


class Unavailable(Exception):
    """Why something cannot be built on this machine."""


def run(command: list[str], cwd: str | None = None) -> str:
    """The output of a command, with stdout and stderr together.

    Raises:
        Unavailable: it cannot be started or fails; the message holds the command and the end of what it printed.
    """
    shown = shlex.join(command)
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=300,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"`{shown}` cannot be run: {error}") from error
    if done.returncode != 0:
        printed = done.stdout.strip()[-600:] or "nothing printed"
        raise Unavailable(f"`{shown}` failed with status {done.returncode}: {printed}")
    return done.stdout


def compiles(compiler: list[str], source: str, flags: tuple[str, ...] = ()) -> None:
    """Compile one C++ source text.

    Raises:
        Unavailable: the compiler does not take it.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "probe.cpp").write_text(source)
        run([*compiler, "-std=c++17", *flags, "-c", "probe.cpp", "-o", "probe.o"], cwd=folder)


def find_cxx() -> list[str]:
    """The command of a working C++17 compiler: $CXX, or else the first of c++, g++ and clang++.

    Raises:
        Unavailable: there is none.
    """
    if os.name == "nt":
        raise Unavailable("the C++ kernels are written for GCC and Clang; there is no Windows build")
    cxx = shlex.split(os.environ.get("CXX", ""))
    if not cxx:
        cxx = [path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))][:1]
    if not cxx:
        raise Unavailable("no C++ compiler: none of c++, g++, clang++ is on PATH and CXX is not set")
    compiles(cxx, "#include <vector>\nint main() { std::vector<int> v(1); return v[0]; }\n")
    return cxx


def find_isas(cxx: list[str], machine: str) -> tuple[list[str], dict[str, str]]:
    """The instruction sets to compile every CPU kernel for, and why the others of this machine type are left out."""
    if machine in ("x86_64", "amd64"):
        wanted = ["base", "avx2", "avx512"]
    elif machine in ("aarch64", "arm64"):
        wanted = ["neon"]
    else:
        wanted = ["base"]
    built, skipped = [], {}
    for isa in wanted:
        try:
            compiles(cxx, "int main() {}\n", ISA_FLAGS[isa])
            built.append(isa)
        except Unavailable as reason:
            skipped[isa] = str(reason)
    return built, skipped
