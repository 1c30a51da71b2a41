"""nanogcg: from the gradient to candidates without a one-hot matrix.

nanogcg differentiates by a one-hot matrix over the vocabulary and sorts its gradient. Here the gradient is taken by the
embeddings of the tokens alone, and :func:`ccu_fast.topk_flips` finds the same ``topk`` tokens for each position. What
half precision rounds to a tie is decided by the exact score.
"""

from __future__ import annotations

import importlib
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from ccu_fast.ops.topk_flips.api import TokenTable, topk_flips
from ccu_fast.patch.site import Site, are_plain, arguments

_INDICES = (torch.int64, torch.int32, torch.bool)


@dataclass(frozen=True)
class _Weight:
    """The weight of an embedding as it was."""

    parameter: Tensor
    values: Tensor
    version: int

    @classmethod
    def of(cls, parameter: Tensor) -> _Weight:
        return cls(parameter, parameter.detach(), parameter._version)

    def is_still(self, parameter: Tensor) -> bool:
        """Whether an embedding's weight now is this one, not another, resized, converted or changed in place."""
        # values keeps its memory alive, so no other tensor has that address.
        now, then = (
            (t.data_ptr(), t.shape, t.stride(), t.dtype, t.device, t._version) for t in (parameter, self.values)
        )
        return parameter is self.parameter and now == then and parameter._version == self.version


class TokenGradient(Tensor):
    """The gradient by the tokens' one-hot matrix, ``[1, T, V]`` or ``[T, V]``, not made before somebody reads it.

    It holds the gradient by the tokens' embeddings, which is all that sampling needs. To everybody else it is a tensor:
    the first other use of it makes the matrix.
    """

    @staticmethod
    def __new__(cls, by_embedding: Tensor, layer: nn.Embedding, weight: _Weight, whole: Any = None) -> TokenGradient:
        shape = (*by_embedding.shape[:-1], len(weight.values))
        made: TokenGradient = Tensor._make_wrapper_subclass(
            cls, shape, dtype=by_embedding.dtype, device=by_embedding.device
        )
        return made

    def __init__(self, by_embedding: Tensor, layer: nn.Embedding, weight: _Weight, whole: Any = None) -> None:
        self.by_embedding, self.layer, self.weight = by_embedding, layer, weight
        self.whole: TokenGradient | None = whole  # of which this is a view
        self.matrix: Tensor | None = None

    @property
    def is_untouched(self) -> bool:
        """Nobody made the matrix, who may have written to it, and the embedding is what it was."""
        made = (self if self.whole is None else self.whole).matrix is not None
        return not made and self.weight.is_still(self.layer.weight)

    def dense(self) -> Tensor:
        """The gradient as a plain tensor, always the same one."""
        if self.whole is not None:
            return self.whole.dense().squeeze(0)
        if self.matrix is None:
            if self.weight.values._version != self.weight.version:
                raise RuntimeError(
                    "compute_token_gradient: expected the embedding unchanged until its gradient is used, got one "
                    "changed in place (revert ccu_fast.patch's nanogcg to allow that)"
                )
            self.matrix = self.by_embedding @ self.weight.values.T
        return self.matrix

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        self = args[0]
        if func is torch.ops.aten.squeeze.dim and self.is_untouched and self.ndim == 3 and args[1] == 0:
            return cls(self.by_embedding.squeeze(0), self.layer, self.weight, self)
        args, kwargs = tree_map_only(TokenGradient, TokenGradient.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def numpy(self, *, force: bool = False) -> Any:
        """As of a tensor; torch does not answer this one for subclasses."""
        return self.dense().numpy(force=force)


def sites() -> list[Site]:
    """What is replaced."""
    gcg = importlib.import_module("nanogcg.gcg")

    def gradient(original: Any, self: Any, optim_ids: Tensor) -> Any:
        if not _is_understood(self, optim_ids):
            return NotImplemented
        leaf = F.embedding(optim_ids, self.embedding_layer.weight.detach()).requires_grad_()
        loss = _loss(self, leaf, gcg.mellowmax)
        (grad,) = torch.autograd.grad(loss, leaf)
        return TokenGradient(grad, self.embedding_layer, _known_of(self.embedding_layer).weight)

    def sample(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = arguments(original, args, kwargs)
        gradient, topk = call["grad"], call["topk"]
        if not isinstance(gradient, TokenGradient):
            return NotImplemented
        table = _table(gradient.layer, call["not_allowed_ids"]) if gradient.is_untouched else None
        # For more than the table has nanogcg draws tokens that are not allowed.
        if table is not None and gradient.ndim == 2 and 0 < topk <= len(table):
            best, _, _, valid, _ = topk_flips(gradient.by_embedding, table, topk)
            if bool(valid.all()):
                ids, width, replaced = call["ids"], call["search_width"], call["n_replace"]
                # The same draws in the same order as nanogcg's.
                positions = torch.argsort(torch.rand((width, len(ids)), device=best.device))[..., :replaced]
                choice = torch.randint(0, topk, (width, replaced, 1), device=best.device)
                return ids.repeat(width, 1).scatter_(1, positions, best[positions].gather(2, choice).squeeze(2))
        return original(**{**call, "grad": gradient.dense()})

    return [
        Site(gcg.GCG, "compute_token_gradient", ("self", "optim_ids"), gradient),
        Site(
            gcg, "sample_ids_from_grad", ("ids", "grad", "search_width", "topk", "n_replace", "not_allowed_ids"), sample
        ),
    ]


def _is_understood(attack: Any, ids: Tensor) -> bool:
    """Whether a product of one-hot rows with the embedding is these rows of it."""
    layer, model = attack.embedding_layer, attack.model
    if type(layer) is not nn.Embedding or not are_plain(ids, layer.weight) or ids.dtype != torch.int64:
        return False
    weight = layer.weight
    return (
        (weight.dtype, weight.device) == (model.dtype, model.device)
        and len(weight) == layer.num_embeddings
        and not weight.is_inference()
        and not torch.is_autocast_enabled(weight.device.type)
        and _known_of(layer).finite  # zero times inf is NaN
    )


def _loss(attack: Any, leaf: Tensor, mellowmax: Any) -> Tensor:
    """GCG's loss of the target after the prompt with ``leaf`` in it."""
    behind = [leaf, attack.after_embeds, attack.target_embeds]
    if attack.prefix_cache:
        inputs = torch.cat(behind, 1)
        logits = attack.model(inputs_embeds=inputs, past_key_values=attack.prefix_cache, use_cache=True).logits
    else:
        inputs = torch.cat([attack.before_embeds, *behind], 1)
        logits = attack.model(inputs_embeds=inputs).logits
    target = attack.target_ids
    first = inputs.shape[1] - target.shape[1] - 1  # the position that predicts the first token of the target
    logits = logits[..., first:-1, :]
    if attack.config.use_mellowmax:
        chosen = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        return mellowmax(-chosen, alpha=attack.config.mellowmax_alpha, dim=-1)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1))


@dataclass
class _Known:
    """What was found out about an embedding, as long as its weight stays what it was."""

    weight: _Weight
    finite: bool
    banned: Tensor | None = None
    table: TokenTable | None = None


_known: weakref.WeakKeyDictionary[nn.Embedding, _Known] = weakref.WeakKeyDictionary()


def _known_of(layer: nn.Embedding) -> _Known:
    known = _known.get(layer)
    if known is None or not known.weight.is_still(layer.weight):
        weight = _Weight.of(layer.weight)
        known = _known[layer] = _Known(weight, bool(torch.isfinite(weight.values).all()))
    return known


def _table(layer: nn.Embedding, banned: Any) -> TokenTable | None:
    """The table of a layer's tokens but for the banned ones; None for what only nanogcg can answer."""
    known = _known_of(layer)
    if banned is not None and not (isinstance(banned, Tensor) and are_plain(banned) and banned.dtype in _INDICES):
        return None
    if known.table is None or not _are_equal(known.banned, banned):
        weight, allowed = known.weight.values, None
        if banned is not None:
            allowed = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
            allowed[banned.to(weight.device)] = False
            if not bool(allowed.any()):
                return None
        known.banned, known.table = None if banned is None else banned.clone(), TokenTable(weight, allowed)
    return known.table


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)
