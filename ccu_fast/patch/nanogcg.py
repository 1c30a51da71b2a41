"""nanogcg: from the gradient to candidates without a one-hot matrix.

nanogcg differentiates by a one-hot matrix over the vocabulary and sorts its gradient. Here the gradient is taken by the
embeddings of the tokens alone, and :func:`ccu_fast.topk_flips` finds the same ``topk`` tokens for each position.
"""

from __future__ import annotations

import importlib
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.ops.topk_flips.api import TokenTable, topk_flips
from ccu_fast.patch.site import Site, arguments


class TokenGradient:
    """The gradient by the tokens' embeddings ``[.., T, D]`` in place of the one by their one-hot matrix ``[.., T, V]``.

    It offers what nanogcg does with the latter, ``squeeze``; :meth:`dense` is the matrix.
    """

    def __init__(self, grad: Tensor, layer: nn.Embedding) -> None:
        self.grad, self.layer = grad, layer

    def squeeze(self, dim: int) -> TokenGradient:
        """As of a tensor."""
        return TokenGradient(self.grad.squeeze(dim), self.layer)

    def dense(self) -> Tensor:
        """The gradient by the one-hot matrix."""
        return self.grad @ self.layer.weight.detach().T


def sites() -> list[Site]:
    """What is replaced."""
    gcg = importlib.import_module("nanogcg.gcg")

    def gradient(original: Any, self: Any, optim_ids: Tensor) -> Any:
        if type(self.embedding_layer) is not nn.Embedding:
            return NotImplemented
        leaf = self.embedding_layer.weight.detach()[optim_ids].to(self.model.dtype).requires_grad_()
        loss = _loss(self, leaf, gcg.mellowmax)
        (grad,) = torch.autograd.grad(loss, leaf)
        return TokenGradient(grad, self.embedding_layer)

    def sample(original: Any, *args: Any, **kwargs: Any) -> Any:
        call = arguments(original, args, kwargs)
        gradient, banned, topk = call["grad"], call["not_allowed_ids"], call["topk"]
        if not isinstance(gradient, TokenGradient):
            return NotImplemented
        table = _table(gradient.layer, banned if isinstance(banned, Tensor) else None)
        if topk > len(table):  # nanogcg then draws tokens that are not allowed
            return original(**{**call, "grad": gradient.dense()})
        best = topk_flips(gradient.grad, table, topk).ids
        ids, width, replaced = call["ids"], call["search_width"], call["n_replace"]
        # The same draws in the same order as nanogcg's.
        positions = torch.argsort(torch.rand((width, len(ids)), device=best.device))[..., :replaced]
        choice = torch.randint(0, topk, (width, replaced, 1), device=best.device)
        return ids.repeat(width, 1).scatter_(1, positions, best[positions].gather(2, choice).squeeze(2))

    return [
        Site(gcg.GCG, "compute_token_gradient", ("self", "optim_ids"), gradient),
        Site(
            gcg, "sample_ids_from_grad", ("ids", "grad", "search_width", "topk", "n_replace", "not_allowed_ids"), sample
        ),
    ]


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
    logits = logits[:, first:-1]
    if attack.config.use_mellowmax:
        chosen = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        return mellowmax(-chosen, alpha=attack.config.mellowmax_alpha, dim=-1)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), target.reshape(-1))


_tables: weakref.WeakKeyDictionary[nn.Embedding, tuple[Tensor | None, TokenTable]] = weakref.WeakKeyDictionary()


def _table(layer: nn.Embedding, banned: Tensor | None) -> TokenTable:
    """The table of a layer and a choice of tokens, made once as long as both stay the same."""
    known = _tables.get(layer)
    if known is None or known[0] is not banned or known[1].version != layer.weight._version:
        allowed = None
        if banned is not None:
            allowed = torch.ones(layer.num_embeddings, dtype=torch.bool, device=layer.weight.device)
            allowed[banned.to(allowed.device)] = False
        known = _tables[layer] = (banned, TokenTable(layer.weight, allowed))
    return known[1]
