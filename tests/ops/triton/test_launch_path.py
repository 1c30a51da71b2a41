"""The host's whole way to a launch on an H100: Triton's own launchers, and a CUDA driver that launches nothing.

What a kernel is handed and what its tensor descriptors are made with has to suit each release of Triton and the rules
of CUDA. No GPU is needed to see that.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.no_launch import TargetOnly
from ccu_fast.ops.reduce_similarity.problem import encode
from ccu_fast.ops.reduce_similarity.relations import ALL, SELF
from tests.ops.triton.test_ahead_of_time import VARIANTS, problem
from tests.support.paths import ROOT
from tests.support.presence import absent

DRIVER = Path(__file__).with_name("libcuda.c")
CALLS = 3


def test_every_launch_and_descriptor_is_one_that_cuda_takes(tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        absent("Triton's launchers", "the package triton is not installed")
    compiler = shutil.which("cc") or shutil.which("gcc")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if compiler is None or not headers.is_file():
        absent("Triton's launchers", f"there is no C compiler, or no {headers}")
    library = tmp_path / "libcuda.so.1"
    subprocess.run([str(compiler), "-shared", "-fPIC", str(DRIVER), "-o", str(library)], check=True, timeout=60)
    (tmp_path / "libcuda.so").symlink_to(library)
    here = {"TRITON_LIBCUDA_PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path)}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | here
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.triton.test_launch_path"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    said = done.stdout.split("\n")
    # own, bound, forward, merge and online, whose plan is kept: the first call binds, the others launch at once.
    assert said.count("launch ok") == 5 * CALLS, said
    assert said.count("descriptor ok") == 2 * CALLS, said


def main() -> None:
    """One problem again and again, of features at an odd address whose rows fill no 16 bytes."""
    import triton
    from triton.backends.nvidia import driver

    from ccu_fast.ops.reduce_similarity import triton as similarity

    class Driver(TargetOnly):
        def __init__(self) -> None:
            super().__init__(90)
            self.launcher_cls = driver.CudaLauncher
            self.real = driver.CudaUtils()

        def __getattr__(self, name: str) -> object:
            return getattr(vars(self)["real"], name)

    drivers = triton.runtime.driver
    setattr(drivers, "_active" if hasattr(drivers, "_active") else "active", Driver())
    x, y = (torch.zeros(1 + items * 41, dtype=torch.bfloat16)[1:].view(1, items, 41) for items in (250, 2061))
    p = replace(problem(VARIANTS["bounded labels"], torch.bfloat16), x=x, y=y, diagonal=True)
    p = replace(p, row_labels=torch.zeros(1, 250).long(), col_labels=torch.zeros(1, 2061).long())
    p = replace(p, rows=(encode("lse", ALL), encode("sum", SELF)), cols=(encode("lse", ALL),))
    for _ in range(CALLS):
        similarity.forward(p, 1 << 24, False)


if __name__ == "__main__":
    main()
