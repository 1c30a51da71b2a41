"""What torch has to know of our functions: which are operators, which are constants of a graph, which stay out of it.

``torch.compiler.disable`` and ``assume_constant_result`` import the compiler when a function is decorated, which takes
longer than the rest of ``import torch``. :func:`never` and :func:`constant` do the same and leave that to whoever
compiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("ccu_fast", "FRAGMENT")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[F], F]:
    """Register a function as ``torch.ops.ccu_fast.NAME``, so that a compiled graph never breaks on it.

    The function itself stays as it is. Who calls it takes the operator only while a graph is made: in eager mode the
    dispatcher would cost more than a small problem's arithmetic. ::

        call = torch.ops.ccu_fast.NAME if torch.compiler.is_compiling() else function

    Args:
        schema: ``"NAME(Tensor x, …) -> Tensor"``. Arguments are positional.
        fake: the function's arguments to empty tensors of the results' shapes, dtypes and devices.
    """

    def register(function: F) -> F:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ccu_fast::{name}", fake, lib=_LIBRARY)
        return function

    return register


def in_place(*_: Any) -> None:
    """The ``fake`` of an operator that returns nothing."""


def once_differentiable(op: str, gradient: Callable[..., Any]) -> Callable[..., Any]:
    """``gradient``, for create_graph=True: differentiating what it returns raises an error that names ``op``.

    torch's decorator of this name raises only when the incoming gradient requires grad. That of a loss does not, and
    the second derivative would silently be zero.
    """
    return functools.partial(_OnceDifferentiable.apply, op, gradient)


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, gradient: Callable[..., Any], *args: Any) -> Any:
        ctx.op = op
        return gradient(*args)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(f"{ctx.op}: second derivatives need backend='reference'")


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
