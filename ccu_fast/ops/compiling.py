"""What torch.compile has to know about functions of ours, said without importing it.

``torch.compiler.disable`` and ``assume_constant_result`` import the compiler when a function is decorated, which takes
longer than the rest of ``import torch``. These two do the same and leave that to whoever compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """Called while tracing; its result is a constant of the graph. As ``torch.compiler.assume_constant_result``."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def never(function: F) -> F:
    """Runs between two graphs. As ``torch.compiler.disable``, in the form that torch uses for its own functions.

    It imports the compiler at the first call, as any of torch's optimizers does.
    """
    disable: Callable[[F], F] = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    return disable(function)
