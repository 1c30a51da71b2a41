"""Requirements of tests that this machine may lack."""

from __future__ import annotations

import os

import pytest

from ccu_fast import extras
from ccu_fast.data.espeak import PACKAGE
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


def require_espeak() -> None:
    try:
        extras.require(PACKAGE)
    except ImportError as error:
        pytest.skip(str(error))  # under the GPL: nobody gets it without asking, nor do the tests
