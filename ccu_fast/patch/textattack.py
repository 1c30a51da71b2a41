"""TextAttack: the gradient word swap without a words × vocabulary matrix and its full sort."""

from __future__ import annotations

import copy
import importlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ccu_fast.ops.topk_flips.api import TokenTable, topk_flips
from ccu_fast.patch.site import Site, are_plain

FIRST, MOST = 64, 1024


def sites() -> list[Site]:
    """What is replaced."""
    module = importlib.import_module("textattack.transformations.word_swaps.word_swap_gradient_based")
    utils = importlib.import_module("textattack.shared.utils")

    def replacements(original: Any, self: Any, attacked_text: Any, indices_to_replace: Any) -> Any:
        weight = self.model.get_input_embeddings().weight
        if not isinstance(indices_to_replace, (list, tuple, set)) or not indices_to_replace or not are_plain(weight):
            return NotImplemented
        found = self.model_wrapper.get_grad(attacked_text.tokenizer_input)
        words = _best_words(self, utils, weight.detach(), found, list(indices_to_replace))
        if words is None:  # TextAttack goes on from this gradient: dropout would give it another one
            theirs = copy.copy(self)
            theirs.model_wrapper = SimpleNamespace(get_grad=lambda _: found)
            return original(theirs, attacked_text, indices_to_replace)
        return words

    return [
        Site(
            module.WordSwapGradientBased,
            "_get_replacement_words_by_grad",
            ("self", "attacked_text", "indices_to_replace"),
            replacements,
        )
    ]


def _best_words(
    swap: Any, utils: Any, weight: Tensor, found: dict[str, Any], indices: list[int]
) -> list[tuple[str, int]] | None:
    """The ``top_n`` words that raise the loss most, each with the place it is for; None for what is not understood."""
    gradient, ids, pad = torch.as_tensor(found["gradient"]), found["ids"], swap.tokenizer.pad_token_id
    tokens, width = weight.shape
    usual = (
        isinstance(ids, list)
        and all(type(i) is int and 0 <= i < tokens for i in ids)
        and type(pad) is int
        and -tokens <= pad < tokens
        and gradient.ndim == 2
        and (gradient.shape[1], gradient.dtype) == (width, weight.dtype)
        and 0 < len(gradient) <= len(ids)
        and all(i >= 0 for i in indices)
        and swap.top_n >= 1
    )
    if not usual or not bool(torch.isfinite(gradient).all()):
        return None
    allowed = torch.ones(tokens, dtype=torch.bool, device=weight.device)
    allowed[pad] = False
    try:
        table = TokenTable(weight, allowed)
    except ValueError:  # NaN or inf in the embedding, or nothing but the pad token
        return None
    # A word beyond the gradient keeps zeros: every token changes it by nothing.
    inside = torch.tensor([i < len(gradient) for i in indices])
    at = torch.tensor(indices).where(inside, 0)
    rows = torch.where(inside[:, None], gradient[at], 0).to(weight.device)
    current = torch.where(inside, torch.tensor(ids)[at], 0).to(weight.device)
    k, every = max(FIRST, 4 * swap.top_n), len(table) * len(indices)
    while True:
        flips = topk_flips(rows, table, min(k, every), maximize=True, current_ids=current, scope="global")
        assert flips.rows is not None
        words = _words(swap, utils, indices, flips.ids.tolist(), flips.rows.tolist())
        if len(words) == swap.top_n:
            return words
        # Rare: the top is full of tokens that are no words. Behind all others TextAttack offers even the pad token.
        if k >= min(every, MOST):
            return None
        k *= 4


def _words(swap: Any, utils: Any, indices: list[int], ids: list[int], rows: list[int]) -> list[tuple[str, int]]:
    """The first ``top_n`` tokens that are one word each, with the place they are for."""
    chosen: list[tuple[str, int]] = []
    for token, row in zip(ids, rows, strict=True):
        word = swap.tokenizer.convert_id_to_word(token)
        if utils.has_letter(word) and len(utils.words_from_text(word)) == 1:
            chosen.append((word, indices[row]))
            if len(chosen) == swap.top_n:
                break
    return chosen
