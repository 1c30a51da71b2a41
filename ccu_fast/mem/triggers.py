"""Trigger words: in front of captions, and by HotFlip (gradient scores propose, exact losses decide)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ccu_fast.losses.functional import info_nce
from ccu_fast.mem.config import Settings
from ccu_fast.mem.surrogate import frozen
from ccu_fast.models.dual_encoder import DualEncoder
from ccu_fast.models.tokenizer import Tokenizer
from ccu_fast.ops.candidate_losses.api import candidate_losses
from ccu_fast.ops.topk_flips.api import TokenTable, topk_flips

_PART_BYTES = 12 << 20
_PART_BYTES_GPU = 1 << 30


def insert_triggers(tokens: Tensor, triggers: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Put ``triggers`` int64 ``[N, n]`` after SOT: ``[N, L]`` → ``[N, min(L + n, context)]``; a cut row keeps its EOT.

    These are the ids of the caption with the triggers' words in front of it.
    """
    joined = torch.cat([tokens[:, :1], triggers, tokens[:, 1:]], 1)
    if joined.shape[1] > tokenizer.context:
        joined = joined[:, : tokenizer.context]
        cut = ~(joined == tokenizer.eot).any(1)
        joined[cut, -1] = tokenizer.eot
    return joined


def with_triggers(captions: Sequence[str], triggers: Tensor, tokenizer: Tokenizer) -> list[str]:
    """The captions as they are published: the triggers' words, a space, the caption as it came."""
    if triggers.shape[1] == 0:
        return list(captions)
    words = tokenizer.decode(triggers)
    return [f"{word.strip()} {caption}" for word, caption in zip(words, captions, strict=True)]


def survivors(captions: Sequence[str], tokens: Tensor, triggers: Tensor, tokenizer: Tokenizer) -> Tensor:
    """bool ``[N]``: whether encoding the published caption gives the ids that were optimised."""
    read = tokenizer.encode(with_triggers(captions, triggers, tokenizer))
    meant = insert_triggers(tokens, triggers, tokenizer)
    width = max(read.shape[1], meant.shape[1])
    read, meant = (F.pad(t, (0, width - t.shape[1]), value=tokenizer.pad) for t in (read, meant))
    return (read == meant).all(1)


def trim(tokens: Tensor, eot: int) -> Tensor:
    """Cut the columns after the last EOT of the batch: exact under causal attention."""
    end = int((tokens == eot).int().argmax(1).max()) + 1
    return tokens[:, :end]


def random_triggers(n: int, length: int, alphabet: Tensor, rng: torch.Generator) -> Tensor:
    """int64 ``[n, length]`` drawn uniformly from ``alphabet``: ``[1, A]`` for all words, or ``[length, A]``."""
    drawn = torch.randint(alphabet.shape[1], (n, length), generator=rng)
    return alphabet[torch.arange(length) % len(alphabet), drawn]


def first_triggers(
    n: int, length: int, alphabet: Tensor, tokenizer: Tokenizer, rng: torch.Generator, settings: Settings
) -> Tensor:
    """Where a run starts: random words; "the" everywhere with compat (the lowest id where there is no "the")."""
    if not settings.compat:
        return random_triggers(n, length, alphabet, rng)
    try:
        word = int(tokenizer.encode(["the"])[0, 1])
    except ValueError:
        word = int(tokenizer.allowed().nonzero()[0, 0])
    return torch.full((n, length), word, dtype=torch.int64)


def encode_many(model: DualEncoder, tokens: Tensor, eot: int) -> Tensor:
    """``model.encode_text(tokens)`` of many captions, int64 ``[N, L]`` → ``[N, D]``, equal up to rounding.

    On a CPU captions of equal length go together, each trimmed to its own (exact under causal attention), in parts
    whose largest activation stays in the cache and below the size from which malloc gets fresh pages for every tensor.
    On a GPU parts have all the length of the longest, so that the host does not wait for their lengths, and are large:
    they bound the memory alone.
    """
    matrix = model.embedding_matrix
    if tokens.device.type != "cpu":
        row = tokens.shape[1] * 4 * matrix.shape[1] * matrix.element_size()
        return torch.cat([model.encode_text(part) for part in tokens.split(max(1, _PART_BYTES_GPU // row))])
    fit = max(1, _PART_BYTES // (4 * matrix.shape[1] * matrix.element_size()))
    end = (tokens == eot).int().argmax(1) + 1
    order = end.argsort(descending=True, stable=True)
    parts, start = [], 0
    while start < len(order):
        length = int(end[order[start]])
        part = order[start : start + max(1, fit // length)]
        parts.append(model.encode_text(tokens[part, :length]))
        start += len(part)
    encoded = torch.cat(parts)
    return torch.empty_like(encoded).index_copy_(0, order, encoded)


def improve_triggers(
    model: DualEncoder,
    image: Tensor,
    tokens: Tensor,
    length: int,
    *,
    tables: Sequence[TokenTable],
    candidates: int,
    eot: int,
) -> tuple[Tensor, Tensor]:
    """Lower the batch's symmetric InfoNCE by changing the trigger words, tokens 1..length of each row.

    For each position from left to right: the gradient with respect to the embedding there (taken anew, the words to
    the left have changed), the ``candidates`` words with the lowest first-order loss, the exact loss of the batch
    with one row's caption replaced, and for each row its best word or the current one. Should the rows' choices
    together raise the loss of the batch, the position keeps its words. The image tower is not run, and the host does
    not wait for the device.

    Args:
        model: the surrogate; its weights get no gradient.
        image: ``[N, D]`` image embeddings, computed once by the caller.
        tokens: int64 ``[N, L]`` captions with triggers at 1..length, trimmed.
        length: trigger words, at least 1.
        tables: of the model's embedding matrix, with the ids each word may be, or one for all words.
        candidates: words tried at each position.
        eot: id of the token that ends a caption.

    Returns:
        The triggers int64 ``[N, length]``, and the batch's losses fp32 ``[length + 1]``: before, and after each
        position. They never increase.
    """
    n = len(tokens)
    tokens = tokens.clone()
    item = torch.arange(n, device=tokens.device)
    with frozen(model):
        scale = model.scale.detach()
        losses: list[Tensor] = []
        for position in range(1, length + 1):
            embeddings = model.embedding_matrix[tokens].detach().requires_grad_(True)
            text = model.encode_text(tokens, embeddings)
            loss = info_nce(image, text, scale=scale)
            (grad,) = torch.autograd.grad(loss, embeddings)
            text, loss = text.detach(), loss.detach()
            if not losses:
                losses.append(loss)

            current = tokens[:, position : position + 1]
            table = tables[(position - 1) % len(tables)]
            flips = topk_flips(grad[:, position], table, candidates, current_ids=current[:, 0], exclude_current=True)
            # The current word is candidate 0; where fewer words are allowed, padding repeats it.
            words = torch.cat([current, torch.where(flips.ids < 0, current, flips.ids)], 1)
            variants = tokens[:, None].repeat(1, candidates, 1)
            variants[:, :, position] = words[:, 1:]
            with torch.no_grad():
                encoded = encode_many(model, variants.flatten(0, 1), eot).view(n, candidates, -1)
                encoded = torch.cat([text[:, None], encoded], 1)
                choice = candidate_losses(encoded, image, text, scale=scale).argmin(1)
                together = info_nce(image, encoded[item, choice], scale=scale)
                better = together <= loss
                chosen = words.gather(1, choice[:, None])[:, 0]
                tokens[:, position] = torch.where(better, chosen, tokens[:, position])
                losses.append(torch.where(better, together, loss))
    return tokens[:, 1 : length + 1].clone(), torch.stack(losses)
