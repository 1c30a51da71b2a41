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
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

# What stands below torch.ops. The build for the Kernel Hub puts another name here and at every ``torch.ops.ccu_fast``.
NAMESPACE = "ccu_fast"

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[F], F]:
    """Register a function as ``torch.ops.ccu_fast.NAME``, so that a compiled graph never breaks on it.

    The function itself stays as it is. Who calls it takes the operator only while a graph is made: in eager mode the
    dispatcher would cost more than a small problem's arithmetic. ::

        call = torch.ops.ccu_fast.NAME if check.by_operator(x) else function

    Args:
        schema: ``"NAME(Tensor x, …) -> Tensor"``. Arguments are positional.
        fake: the function's arguments to empty tensors of the results' shapes, dtypes and devices.
    """

    def register(function: F) -> F:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
        return function

    return register


def in_place(*_: Any) -> None:
    """The ``fake`` of an operator that returns nothing."""


def changed(*tensors: Tensor | None) -> None:
    """Have torch count what a kernel wrote to as changed, so that a graph that needs the old values raises.

    In a graph the operator's schema says what it changes.
    """
    if not torch.compiler.is_compiling():
        for t in tensors:
            if t is not None:
                torch.autograd.graph.increment_version(t)


def twice_differentiable(gradient: Callable[..., Any], again: Callable[..., Any]) -> Callable[..., Any]:
    """``gradient``, for create_graph=True: it can be differentiated, and what it returns has the gradient of ``again``.

    Args:
        gradient: a backward pass, by a kernel.
        again: the same of the same arguments, in operations of torch. Called only for a second derivative.
    """
    return functools.partial(_TwiceDifferentiable.apply, gradient, again)


class _TwiceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Callable[..., Any], again: Callable[..., Any], *args: Any) -> Any:
        ctx.again = again
        ctx.rest = [None if isinstance(a, Tensor) else a for a in args]
        ctx.places = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        ctx.save_for_backward(*(args[i] for i in ctx.places))
        return gradient(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        args, third = list(ctx.rest), torch.is_grad_enabled()
        for i, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            args[i] = tensor
        places = [i for i in ctx.places if ctx.needs_input_grad[2 + i]]
        with torch.enable_grad():
            # Another tensor of the same values: y may be made from x.
            inputs = [args[i].view_as(args[i]) for i in places]
            for i, tensor in zip(places, inputs, strict=True):
                args[i] = tensor
            pairs = [(own, g) for own, g in zip(ctx.again(*args), grads, strict=True) if own is not None]
            pairs = [(own, g) for own, g in pairs if own.requires_grad]  # that of a bias in a sum is a constant
            if not pairs:
                return None, None, *[None] * len(args)
            firsts, seconds = zip(*pairs, strict=True)
            found = torch.autograd.grad(firsts, inputs, seconds, create_graph=third, allow_unused=True)
        by_place = dict(zip(places, found, strict=True))
        return None, None, *(by_place.get(i) for i in range(len(args)))


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
