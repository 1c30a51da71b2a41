"""The compiled CUDA C++ kernels, for every kind of GPU: registers, shared memory, no register spills.

No GPU is needed: the machine code is in the compiled module.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from ccu_fast.ops.machine import build_info
from tests.support.presence import absent, require_backend

# The most registers per thread, by kernel: 64 allow four blocks of 256 threads, or two of 512, on a multiprocessor.
MOST_REGISTERS = {
    "linf_packs": 64,
    "l2_packs": 64,
    "add_packs": 64,
    "update_packs": 64,
    "few_rows": 128,
    "select": 64,
    "check_packs": 64,
    "check_values": 64,
    "describe": 64,
    "rest_and_columns": 64,
    "losses": 64,
}
MOST_SHARED = 48 << 10
# What calls put on the stack: printf of an index out of range, with three arguments; a refusal.
CALLS = {"add_packs": 32, "update_packs": 32, "select": 32, "check_packs": 16}


def _cuobjdump() -> str:
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    if bundled is not None and bundled.exists():
        return str(bundled)
    found = shutil.which("cuobjdump")
    if found is None:
        absent("cuobjdump", "neither Triton nor PATH has it")
    return str(found)


@functools.cache
def _usage() -> dict[str, list[tuple[str, int, int, int, int]]]:
    """By architecture: kernel, registers, stack, shared memory, local memory."""
    require_backend("native")
    info = build_info()
    if info is None or info["cuda"] is None:
        absent("the CUDA kernels", "not built" if info is None else str(info["skipped"].get("cuda")))
    module = importlib.util.find_spec("ccu_fast._C")
    assert module is not None and module.origin is not None
    dump = subprocess.run(
        [_cuobjdump(), "--dump-resource-usage", module.origin], check=True, capture_output=True, text=True
    ).stdout
    usage, architecture = defaultdict(list), ""
    for line in dump.splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            architecture = found[1]
        if name := re.search(r"Function (\S+?):", line):
            kernel = name[1]
        if size := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            usage[architecture].append((kernel, *map(int, size.groups())))
    return usage


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_resources(architecture: str) -> None:
    usage = _usage()
    if architecture not in usage:
        absent(architecture, f"the module is built for {', '.join(usage)}")
    seen = set()
    for name, registers, stack, shared, local in usage[architecture]:
        found = [kernel for kernel in MOST_REGISTERS if f"{len(kernel)}{kernel}" in name]
        assert len(found) == 1, f"{name} is not one of the kernels listed here"
        seen.add(found[0])
        most = CALLS.get(found[0], 0)
        assert stack <= most and local == 0, f"{name} spills: {stack} bytes of stack, {local} local"
        assert registers <= MOST_REGISTERS[found[0]], f"{name}: {registers} registers"
        assert shared <= MOST_SHARED, f"{name}: {shared} bytes of shared memory"
    assert seen == MOST_REGISTERS.keys()


def test_no_access_is_wider_than_what_was_checked() -> None:
    """Blackwell loads 32 bytes at once where a type promises that alignment; tensors are only checked for 16."""
    _usage()
    module = importlib.util.find_spec("ccu_fast._C")
    assert module is not None and module.origin is not None
    tool = Path(_cuobjdump())
    dump = subprocess.run(
        [tool, "-sass", "-arch", "sm_100", module.origin],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": f"{tool.parent}{os.pathsep}{os.environ['PATH']}"},
    ).stdout
    accesses = set(re.findall(r"\b(?:LD|LDG|ST|STG)\.E[A-Z0-9.]*", dump))
    if not accesses:
        absent("sm_100", "the module is not built for it")
    assert "LDG.E.128" in accesses and "STG.E.128" in accesses
    assert not [access for access in accesses if "256" in access]
