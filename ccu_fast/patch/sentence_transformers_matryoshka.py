"""MatryoshkaLoss of sentence-transformers around a ranking loss: all of its dimensions in one pass.

The library calls the loss inside once for each dimension, with a model whose embeddings are cut and made unit vectors.
Here it is called once, and where it gets its embeddings (see sentence_transformers.py) the losses of all dimensions are
one :func:`ccu_fast.info_nce`. So nobody may stand between the two: with hooks, functions of the user's own or a
compiled loss, each dimension is the library's.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ccu_fast.patch.site import Site, arguments, below_patches, home, is_hooked, is_stock


@dataclass
class Prefixes:
    """What a MatryoshkaLoss asks of the loss inside.

    Attributes:
        loss: that loss.
        dims: ascending.
        weights: one for each.
        shrink: the library's function that cuts embeddings.
        taken: whether that loss has asked.
    """

    loss: Any
    dims: tuple[int, ...]
    weights: tuple[float, ...]
    shrink: Callable[[Tensor, int], Tensor]
    taken: bool = False

    def options(self) -> dict[str, Any]:
        """As keywords of :func:`ccu_fast.info_nce`."""
        return {"prefixes": self.dims, "prefix_weights": self.weights, "normalize": True}

    def one_by_one(self, embeddings: Sequence[Tensor], loss: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """As the library has it, the longest first."""
        pairs = list(zip(self.dims, self.weights, strict=True))[::-1]
        with _inside(None):
            values = [weight * loss([self.shrink(e, d) for e in embeddings]) for d, weight in pairs]
        return sum(values[1:], values[0])


_within: ContextVar[Prefixes | None] = ContextVar("prefixes of a MatryoshkaLoss", default=None)


@contextmanager
def _inside(prefixes: Prefixes | None) -> Iterator[None]:
    token = _within.set(prefixes)
    try:
        yield
    finally:
        _within.reset(token)


def asked_of(loss: Any) -> Prefixes | None:
    """What the MatryoshkaLoss that calls ``loss`` asks of it; None without one."""
    prefixes = None if torch.compiler.is_compiling() else _within.get()
    if prefixes is None or prefixes.loss is not loss:
        return None
    prefixes.taken = True
    return prefixes


def site(module: Any, inside: Sequence[type]) -> Site:
    """MatryoshkaLoss.forward around an object of exactly one of these classes."""

    def forward(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = arguments(original, args, kwargs)
        self, features, labels = call.pop("self"), call.pop("sentence_features"), call.pop("labels")
        if call or torch.compiler.is_compiling() or not isinstance(features, (list, tuple)):
            return NotImplemented
        prefixes = _prefixes(self, module) if type(self.loss) in inside and _is_usual(self, module) else None
        if prefixes is None:
            return NotImplemented
        with _inside(prefixes):
            value = self.loss(features, labels)
        return value if prefixes.taken else NotImplemented  # of one dimension, where nobody asked for all

    return Site(module.MatryoshkaLoss, "forward", ("self", "sentence_features", "labels"), forward)


def _is_usual(matryoshka: Any, module: Any) -> bool:
    """Whether there is nothing but the library's functions between a MatryoshkaLoss and the embeddings of its loss."""
    loss, model, decorator = matryoshka.loss, matryoshka.model, module.ForwardDecorator
    kind: Any = type(loss)
    of = f"{module.__name__}.ForwardDecorator"
    embeds = getattr(importlib.import_module(kind.__module__), "embed_columns", None)  # since version 6
    return (
        getattr(loss, "model", None) is model
        and isinstance(model, nn.Module)
        and all(
            name not in vars(loss) and is_stock(getattr(loss, name), home(kind, name))
            for name in ("forward", "compute_loss_from_embeddings")
        )
        and (embeds is None or is_stock(embeds, "sentence_transformers.base.losses.merged_forward.embed_columns"))
        and is_stock(module.shrink, f"{module.__name__}.shrink")
        and all(is_stock(getattr(decorator, n, None), f"{of}.{n}") for n in ("__init__", "__call__", "set_dim"))
        and kind.__call__ is nn.Module.__call__
        and loss._compiled_call_impl is None
        and not (is_hooked(loss) or is_hooked(model))
        # Inside another MatryoshkaLoss, whose embeddings the library cuts in place.
        and not isinstance(vars(model).get("forward"), decorator)
    )


def _prefixes(matryoshka: Any, module: Any) -> Prefixes | None:
    """None where the library would not just add up the losses of all dimensions."""
    dims, weights = matryoshka.matryoshka_dims, matryoshka.matryoshka_weights
    fits = isinstance(dims, (tuple, list)) and isinstance(weights, (tuple, list)) and len(dims) == len(weights) > 0
    if not fits or any(type(d) is not int for d in dims) or any(type(w) not in (int, float) for w in weights):
        return None
    if not all(map(math.isfinite, weights)):
        return None
    ascending = sorted(zip(dims, weights, strict=True))
    if len({d for d, _ in ascending}) < len(dims) or ascending[0][0] < 1:
        return None
    if 0 < matryoshka.n_dims_per_step < len(dims):  # some are drawn
        return None
    of = tuple(d for d, _ in ascending), tuple(float(weight) for _, weight in ascending)
    return Prefixes(matryoshka.loss, *of, module.shrink)


def up_to_date(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """A decorator of MatryoshkaLoss around the function that its loss has now, where that is still the class's."""
    loss, name = getattr(self.fn, "__self__", None), getattr(self.fn, "__name__", "")
    now = getattr(type(loss), name, None)
    if now is None or not inspect.ismethod(self.fn) or below_patches(now) is not below_patches(self.fn.__func__):
        return NotImplemented
    theirs = copy.copy(self)
    theirs.fn = now.__get__(loss)
    return original(theirs, *args, **kwargs)
