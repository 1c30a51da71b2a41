"""Functions that a user names as "module:function": what makes a model, what trains one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn


def users_function(argument: str, name: str) -> Callable[..., Any]:
    """The function that a name means.

    Raises:
        ValueError: not of the form "module:function", no such module or function; names the argument.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"{argument}: expected 'module:function', got {name!r}")
    try:
        with _modules_here():
            found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{argument}: expected a function {function} in a module {module}, got {error}") from error
    if not callable(found):
        raise ValueError(f"{argument}: expected a function {function} in a module {module}, got {found!r}")
    return found


def made_by(argument: str, name: str, *inputs: Any) -> nn.Module:
    """The module that a function returns for these inputs.

    Raises:
        ValueError: see :func:`users_function`.
        TypeError: it returned no module.
    """
    function = users_function(argument, name)
    with _modules_here():
        made = function(*inputs)
    if not isinstance(made, nn.Module):
        raise TypeError(f"{argument}: expected a torch.nn.Module from {name}, got {type(made).__name__}")
    return made


@contextmanager
def _modules_here() -> Iterator[None]:
    """As python -m does: modules of the folder one stands in."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
