"""How a function of another library is replaced and given back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

ABSENT = object()

Replacement = Callable[..., Any]
"""Called as ``replacement(original, *args, **kwargs)``; returns NotImplemented for a call that it leaves alone."""


@dataclass(frozen=True)
class Site:
    """One function to replace.

    Attributes:
        owner: the class or module that has it.
        attribute: its name there.
        parameters: the names its signature must begin with. Another signature is another function: it is left alone.
        replacement: what takes its calls.
    """

    owner: Any
    attribute: str
    parameters: tuple[str, ...]
    replacement: Replacement

    @property
    def name(self) -> str:
        owner = self.owner.__name__
        return f"{owner if inspect.ismodule(self.owner) else f'{self.owner.__module__}.{owner}'}.{self.attribute}"

    def mismatch(self) -> str | None:
        """Why this is not the function that is known; None when it is."""
        function = getattr(self.owner, self.attribute, None)
        if not callable(function):
            return f"{self.name} does not exist"
        found = tuple(inspect.signature(function).parameters)
        if found[: len(self.parameters)] != self.parameters:
            return f"{self.name} has the parameters {found}, expected them to begin with {self.parameters}"
        return None


@dataclass
class Installed:
    """A site whose calls go to its replacement until :meth:`remove`."""

    site: Site
    original: Any = field(init=False)
    wrapper: Any = field(init=False)
    on: bool = field(init=False, default=True)
    _own: Any = field(init=False)

    def __post_init__(self) -> None:
        owner, attribute = self.site.owner, self.site.attribute
        self._own = vars(owner).get(attribute, ABSENT)
        self.original = original = getattr(owner, attribute)
        replacement = self.site.replacement

        # wraps: libraries read the signature of a forward to decide what to pass it.
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = replacement(original, *args, **kwargs) if self.on else NotImplemented
            return original(*args, **kwargs) if result is NotImplemented else result

        call.installed = self  # type: ignore[attr-defined]
        self.wrapper = call
        setattr(owner, attribute, call)

    def remove(self) -> None:
        """Give the function back.

        When somebody wrapped it after us the wrapper stays inside theirs and passes every call on: taking ours out
        would take theirs out too.
        """
        self.on = False
        owner, attribute = self.site.owner, self.site.attribute
        if vars(owner).get(attribute, ABSENT) is not self.wrapper:
            return
        below = self._own
        while isinstance(inner := getattr(below, "installed", None), Installed) and not inner.on:
            below = inner._own  # reverted while ours lay over it
        if below is ABSENT:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, below)


@functools.lru_cache(maxsize=64)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in, those of ``**kwargs`` beside the others.

    Names that the signature does not have are kept too: decorators remove them before the function sees them.
    """
    parameters = _signature(function).parameters
    extra = {name: value for name, value in kwargs.items() if name not in parameters}
    bound = _signature(function).bind(*args, **{name: kwargs[name] for name in kwargs if name not in extra})
    bound.apply_defaults()
    named = dict(bound.arguments)
    for parameter in parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            del named[parameter.name]
    return {**named, **extra}
