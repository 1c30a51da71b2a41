"""What torch.compile is told of our functions, without importing it.

``torch.compiler.disable`` and ``assume_constant_result`` import the compiler when a function is decorated, which takes
longer than all else of ``import torch``. So what it looks for is set here, and tests/test_compile.py holds it against
what torch's own decorators set.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """Called while tracing; its result is a constant of the graph. As ``torch.compiler.assume_constant_result``."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def never(function: F) -> F:
    """Runs between two graphs. As ``torch.compiler.disable``."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **options)
        return _disabled(function)(*args, **options)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    call._torchdynamo_disable_msg = None  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


@functools.cache
def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    disabled: Callable[..., Any] = torch.compiler.disable(function)
    return disabled
