"""MatryoshkaLoss of sentence-transformers around a ranking loss: all of its dimensions in one pass.

The library calls the loss inside once for each dimension, with a model whose embeddings are cut and made unit vectors.
Here it is called once, and where it gets its embeddings (see sentence_transformers.py) the losses of all dimensions are
one :func:`ccu_fast.info_nce`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccu_fast.patch.site import Site


class Prefixes(NamedTuple):
    """What a MatryoshkaLoss asks of the loss inside.

    Attributes:
        loss: that loss.
        dims: ascending; weights: one for each.
        shrink: the library's function that cuts embeddings.
    """

    loss: Any
    dims: tuple[int, ...]
    weights: tuple[float, ...]
    shrink: Callable[[Tensor, int], Tensor]

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
    return prefixes if prefixes is not None and prefixes.loss is loss else None


def site(module: Any, inside: Sequence[type]) -> Site:
    """MatryoshkaLoss.forward around an object of exactly one of these classes."""

    def forward(original: Any, self: Any, sentence_features: Any, labels: Any) -> Any:
        prefixes = _prefixes(self, module)
        if prefixes is None or type(self.loss) not in inside or torch.compiler.is_compiling():
            return NotImplemented
        with _inside(prefixes):
            return self.loss(sentence_features, labels)

    return Site(module.MatryoshkaLoss, "forward", ("self", "sentence_features", "labels"), forward)


def _prefixes(matryoshka: Any, module: Any) -> Prefixes | None:
    """None where the library would not just add up the losses of all dimensions."""
    dims, weights = matryoshka.matryoshka_dims, matryoshka.matryoshka_weights
    fits = isinstance(dims, tuple | list) and isinstance(weights, tuple | list) and len(dims) == len(weights) > 0
    if not fits or any(type(d) is not int for d in dims) or any(type(w) not in (int, float) for w in weights):
        return None
    ascending = sorted(zip(dims, weights, strict=True))
    if len({d for d, _ in ascending}) < len(dims) or ascending[0][0] < 1:
        return None
    sampled = 0 < matryoshka.n_dims_per_step < len(dims)
    if sampled or getattr(matryoshka.loss, "model", None) is not matryoshka.model:
        return None
    of = tuple(d for d, _ in ascending), tuple(float(weight) for _, weight in ascending)
    return Prefixes(matryoshka.loss, *of, module.shrink)
