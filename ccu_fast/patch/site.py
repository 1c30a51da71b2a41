"""How a function of another library is replaced and given back."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ccu_fast import check
from ccu_fast.ops.operator import constant

ABSENT = object()


class DoesNotBind(TypeError):
    """The arguments of a call do not fit its function, which has an error of its own for that."""


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
        package: under whose name it was imported, where that is not the target's.
    """

    owner: Any
    attribute: str
    parameters: tuple[str, ...]
    replacement: Replacement
    package: str | None = None

    @property
    def name(self) -> str:
        owner = self.owner.__name__
        return f"{owner if inspect.ismodule(self.owner) else f'{self.owner.__module__}.{owner}'}.{self.attribute}"

    def mismatch(self, package: str | None) -> str | None:
        """Why this is not the function that is known; None when it is.

        Args:
            package: whose functions are known; None for any.
        """
        package = self.package or package
        function = getattr(self.owner, self.attribute, None)
        if not callable(function):
            return f"{self.name} does not exist"
        if package is not None:
            if self.name.partition(".")[0] != package:
                return f"{self.name.rpartition('.')[0]} is not {package}'s own"
            theirs = _stranger(_layers(function), package)
            if theirs is not None:
                return f"{self.name} is not {package}'s own but {theirs}"
        found = tuple(inspect.signature(function).parameters)
        if found[: len(self.parameters)] != self.parameters:
            return f"{self.name} has the parameters {found}, expected them to begin with {self.parameters}"
        return None


@dataclass
class Installed:
    """A site whose calls go to its replacement until :meth:`remove`.

    Attributes:
        ours: calls that the replacement answered; theirs: those that it left to the library.
    """

    site: Site
    original: Any = field(init=False)
    wrapper: Any = field(init=False)
    on: bool = field(init=False, default=True)
    ours: int = field(init=False, default=0)
    theirs: int = field(init=False, default=0)
    _own: Any = field(init=False)

    def __post_init__(self) -> None:
        owner, attribute = self.site.owner, self.site.attribute
        self._own = vars(owner).get(attribute, ABSENT)
        self.original = original = getattr(owner, attribute)
        replacement = self.site.replacement
        inherited = self._own is ABSENT and inspect.isclass(owner)

        # wraps: libraries read the signature of a forward to decide what to pass it.
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            # What a class inherits may be replaced there after the patch.
            theirs = getattr(super(owner, owner), attribute) if inherited else original
            if not self.on:
                return theirs(*args, **kwargs)
            try:
                result = replacement(theirs, *args, **kwargs)
            except DoesNotBind:
                result = NotImplemented
            if not torch.compiler.is_compiling():  # a graph that counts would be made anew at every call
                if result is NotImplemented:
                    self.theirs += 1
                else:
                    self.ours += 1
            return theirs(*args, **kwargs) if result is NotImplemented else result

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
        while (inner := _installed(below)) is not None and not inner.on:
            below = inner._own  # reverted while ours lay over it
        if below is ABSENT:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, below)


def is_stock(found: Any, name: str) -> bool:
    """Whether a function is the one that a library's source defines under a name.

    It is not when a subclass, the object itself or anybody who changed the class or module has put another in its
    place, whether before or after the patch.

    Args:
        found: the function or bound method that the library would call: ``loss.get_logits``.
        name: its dotted name: ``"open_clip.loss.ClipLoss.get_logits"``.
    """
    return _is_stock(found.__func__ if inspect.ismethod(found) else found, name)


@constant
def _is_stock(function: Any, name: str) -> bool:
    layers = _layers(function)
    return _stranger(layers, name.partition(".")[0]) is None and _name(layers[-1]) == name


def torch_is_stock() -> bool:
    """Whether cross-entropy and log-sigmoid are torch's own, which some libraries replace for everybody."""
    return is_stock(F.cross_entropy, "torch.nn.functional.cross_entropy") and is_stock(
        F.logsigmoid, "builtins.log_sigmoid"
    )


def is_mean_cross_entropy(held: Any) -> bool:
    """Whether this is torch's module for the mean cross-entropy, as it comes."""
    return (
        type(held) is nn.CrossEntropyLoss
        and is_stock(held.forward, "torch.nn.modules.loss.CrossEntropyLoss.forward")
        and not (held._forward_hooks or held._forward_pre_hooks)
        and (held.weight, held.ignore_index, held.reduction, held.label_smoothing) == (None, -100, "mean", 0)
    )


def are_plain(*tensors: Any) -> bool:
    """Whether a kernel may read these tensors, and nobody but autograd wants to know what it does with them.

    It may not under vmap, func.grad, forward-mode AD, tracing and dispatch modes, nor read subclasses (fake tensors,
    DTensor) and tensors without values or with another layout than strides.
    """
    if torch._C._are_functorch_transforms_active() or not all(
        type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided and t.device.type != "meta" for t in tensors
    ):
        return False
    if torch.compiler.is_compiling():  # the graph is made with the rest in mind
        return True
    if torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    return not any(t.is_nested or t.is_neg() or forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def are_pairs(x: Any, y: Any) -> bool:
    """Whether these are two plain matrices of one shape, dtype and device, with at least one number."""
    return (
        are_plain(x, y)
        and x.ndim == 2
        and x.shape == y.shape
        and x.numel() > 0
        and x.dtype == y.dtype
        and x.dtype in check.FLOATS
        and x.device == y.device
    )


def is_one_number(value: Any, like: Tensor) -> bool:
    """Whether a scale or bias is one finite number, or a plain tensor of one that leaves ``like`` its dtype.

    What else a library takes, by broadcasting, is a matter of its own: one number for each row, a matrix.
    """
    if isinstance(value, Tensor):
        one = are_plain(value) and value.numel() == 1 and value.ndim <= 2 and value.is_floating_point()
        same_dtype = value.ndim == 0 or torch.promote_types(like.dtype, value.dtype) == like.dtype
        return one and same_dtype and value.device == like.device
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def cross_entropy_dtype(logits: Tensor) -> torch.dtype:
    """What torch's cross-entropy returns, also of logits that are a product of half-precision features."""
    autocast = torch.is_autocast_enabled(logits.device.type) and logits.dtype != torch.float64
    return torch.float32 if autocast else logits.dtype


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody is told of every call of a module."""
    kinds = ("forward_pre", "forward", "backward_pre", "backward")
    return torch.nn.modules.module._has_any_global_hook() or any(getattr(module, f"_{kind}_hooks") for kind in kinds)


@functools.cache
def home(kind: type, name: str) -> str:
    """The dotted name of a method, after the class that defines it."""
    owner = next(c for c in kind.__mro__ if name in vars(c))
    return f"{owner.__module__}.{owner.__qualname__}.{name}"


def is_own(thing: Any, kind: type, *names: str) -> bool:
    """Whether methods are those that the library wrote for a class: nobody's subclass, object or class has others.

    A method that this version does not have is called by nobody.
    """
    return all(is_stock(getattr(thing, name), home(kind, name)) for name in names if hasattr(kind, name))


def below_patches(function: Any) -> Any:
    """The function that lies below the wrappers of patches."""
    while (ours := _installed(function)) is not None:
        function = ours.original
    return function


def _layers(function: Any) -> list[Any]:
    """A function and what it wraps, outermost first, without the wrappers that patches put there."""
    layers = [below_patches(function)]
    while (inner := getattr(layers[-1], "__wrapped__", None)) is not None:
        layers.append(below_patches(inner))
    return layers


def _installed(function: Any) -> Installed | None:
    """The patch whose wrapper this is. functools.wraps copies the mark to the wrappers of others."""
    installed = getattr(function, "installed", None)
    return installed if isinstance(installed, Installed) and installed.wrapper is function else None


def _name(function: Any) -> str:
    """Where the source defines a function. ``__module__`` is what a decorator says."""
    kind = type(function)
    module = getattr(function, "__globals__", {}).get("__name__", kind.__module__)
    return f"{module}.{getattr(function, '__qualname__', kind.__qualname__)}"


def _stranger(layers: list[Any], package: str) -> str | None:
    """The name of the first layer that is neither the package's own nor one of torch's decorators."""
    names = (_name(layer) for layer in layers)
    return next((name for name in names if name.partition(".")[0] not in (package, "torch")), None)


_cached_signature = functools.lru_cache(maxsize=64)(inspect.signature)


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    # torch.compile traces what a cache wraps, and warns the user that this might be wrong.
    return inspect.signature(function) if torch.compiler.is_compiling() else _cached_signature(function)


def arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in, those of ``**kwargs`` beside the others.

    Names that the signature does not have are kept too: decorators remove them before the function sees them.

    Raises:
        DoesNotBind: an argument is missing, or there are too many.
    """
    signature = _signature(function)
    parameters = signature.parameters
    extra = {name: value for name, value in kwargs.items() if name not in parameters}
    try:
        bound = signature.bind(*args, **{name: kwargs[name] for name in kwargs if name not in extra})
    except TypeError as error:
        raise DoesNotBind(str(error)) from None
    bound.apply_defaults()
    named = dict(bound.arguments)
    for parameter in parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            del named[parameter.name]
    return {**named, **extra}
