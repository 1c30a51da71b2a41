"""Trigger words by HotFlip: gradient scores propose, exact losses decide, position by position."""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast.candidates import candidate_losses
from ccu_fast.losses import info_nce
from ccu_fast.mem.surrogate import frozen
from ccu_fast.models.dual_encoder import DualEncoder
from ccu_fast.tokens import TokenTable, topk_flips


def random_triggers(n: int, length: int, ids: Tensor, rng: torch.Generator) -> Tensor:
    """int64 ``[n, length]`` drawn uniformly from ``ids``."""
    return ids[torch.randint(len(ids), (n, length), generator=rng)]


def improve_triggers(
    model: DualEncoder,
    image: Tensor,
    tokens: Tensor,
    length: int,
    *,
    allowed: Tensor,
    candidates: int,
) -> tuple[Tensor, Tensor]:
    """Lower the batch's symmetric InfoNCE by changing the trigger words, tokens 1..length of each row.

    For each position from left to right: the gradient with respect to the embedding there (taken anew, the words to
    the left have changed), the ``candidates`` words with the lowest first-order loss, the exact loss of the batch
    with one row's caption replaced, and for each row its best word or the current one. Should the rows' choices
    together raise the loss of the batch, the position keeps its words. The image tower is not run.

    Args:
        model: the surrogate; its weights get no gradient.
        image: ``[N, D]`` image embeddings, computed once by the caller.
        tokens: int64 ``[N, L]`` captions with triggers at 1..length.
        length: trigger words, at least 1.
        allowed: bool ``[V]``, the ids triggers may use.
        candidates: words tried at each position.

    Returns:
        The triggers int64 ``[N, length]``, and the batch's losses fp32 ``[length + 1]``: before, and after each
        position. They never increase.
    """
    n = len(tokens)
    tokens = tokens.clone()
    with frozen(model):
        scale = model.scale.detach()
        table = TokenTable(model.embedding_matrix.detach(), allowed=allowed)
        losses: list[Tensor] = []
        for position in range(1, length + 1):
            embeddings = model.embedding_matrix[tokens].detach().requires_grad_(True)
            text = model.encode_text(tokens, embeddings)
            loss = info_nce(image, text, scale=scale)
            (grad,) = torch.autograd.grad(loss, embeddings)
            text, loss = text.detach(), loss.detach()
            if not losses:
                losses.append(loss)

            flips = topk_flips(
                grad[:, position], table, candidates, current_ids=tokens[:, position], exclude_current=True
            )
            # The current word is candidate 0; where fewer words are allowed, padding repeats it.
            current = tokens[:, position : position + 1]
            words = torch.cat([current, torch.where(flips.ids < 0, current, flips.ids)], 1)
            variants = tokens[:, None].repeat(1, words.shape[1], 1)
            variants[:, :, position] = words
            with torch.no_grad():
                encoded = model.encode_text(variants[:, 1:].flatten(0, 1)).view(n, -1, text.shape[-1])
                encoded = torch.cat([text[:, None], encoded], 1)
                choice = candidate_losses(encoded, image, text, scale=scale).argmin(1)
                together = info_nce(image, encoded[torch.arange(n), choice], scale=scale)
            if together <= loss:
                tokens[:, position] = words.gather(1, choice[:, None])[:, 0]
                loss = together
            losses.append(loss)
    return tokens[:, 1 : length + 1].clone(), torch.stack(losses)
