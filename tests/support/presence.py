"""Requirements of tests that this machine may lack."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import pytest

from ccu_fast import extras
from ccu_fast.data.espeak import PACKAGE
from ccu_fast.ops import machine
from ccu_fast.ops.backend import unavailable

CI = os.environ.get("CI", "").lower() in ("1", "true")


def absent(what: str, reason: str) -> None:
    """Skips the test and says why; fails it under CI=true, where everything must be available."""
    if CI:
        pytest.fail(f"{what} is missing, and nothing may be under CI=true: {reason}")
    pytest.skip(f"{what}: {reason}")


def require_backend(name: str) -> str:
    reason = unavailable(name)
    if reason is not None:
        absent(f"the {name} backend", reason)
    return name


def require_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        absent("the Triton interpreter", "the package triton is not installed")
    reason = machine.why_no_interpreter(importlib.metadata.version("triton"))
    if reason is not None:
        absent("the Triton interpreter", reason)


def require_espeak() -> None:
    try:
        extras.require(PACKAGE)
    except ImportError as error:
        pytest.skip(str(error))  # under the GPL: nobody gets it without asking, nor do the tests
