"""Whether Triton can do its part on this machine, found out with a kernel that does nothing."""

from __future__ import annotations

import contextlib
import io

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ccu_fast.ops.triton.launch import OPTIONS


@triton.jit
def nothing() -> None:
    """Compiles wherever anything does."""


def why_no_driver() -> str | None:
    """Why Triton cannot start its CUDA driver (no C compiler, say); None when it can."""
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:
        return f"Triton {triton.__version__} cannot start its CUDA driver: {_first_line(error)}"
    return None


def why_no_code(capability: int) -> str | None:
    """Why Triton makes no machine code for a compute capability such as 90; None when it does."""
    # Of an error inside ptxas Triton prints the whole input.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            triton.compile(ASTSource(nothing, {}, {}), target=GPUTarget("cuda", capability, 32), options=OPTIONS)
        except Exception as error:
            reason = next((line for line in str(error).splitlines() if "fatal" in line), _first_line(error))
            return f"Triton {triton.__version__} cannot compile for sm_{capability}: {reason}"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
