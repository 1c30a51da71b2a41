"""TextAttack: the gradient word swap without a words × vocabulary matrix and its full sort."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ccu_fast.ops.topk_flips.api import TokenTable, topk_flips
from ccu_fast.patch.site import Site

FIRST, MOST = 64, 1024


def sites() -> list[Site]:
    """What is replaced."""
    module = importlib.import_module("textattack.transformations.word_swaps.word_swap_gradient_based")
    utils = importlib.import_module("textattack.shared.utils")

    def replacements(original: Any, self: Any, attacked_text: Any, indices_to_replace: Any) -> Any:
        indices = list(indices_to_replace)
        if not indices:
            return []
        weight = self.model.get_input_embeddings().weight.detach()
        found = self.model_wrapper.get_grad(attacked_text.tokenizer_input)
        gradient = torch.as_tensor(found["gradient"], dtype=weight.dtype, device=weight.device)
        ids = torch.as_tensor(found["ids"], device=weight.device).reshape(-1)
        inside = torch.tensor([i < len(gradient) for i in indices], device=weight.device)
        at = torch.tensor([i if i < len(gradient) else 0 for i in indices], device=weight.device)
        # A word beyond the gradient keeps zeros: every token changes it by nothing.
        rows = torch.where(inside[:, None], gradient[at], 0)
        current = torch.where(inside, ids[at], 0)
        allowed = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        allowed[self.tokenizer.pad_token_id] = False
        table = TokenTable(weight, allowed)

        k = min(max(FIRST, 4 * self.top_n), len(table) * len(indices))
        while True:
            flips = topk_flips(rows, table, k, maximize=True, current_ids=current, scope="global")
            assert flips.rows is not None
            words = _words(self, utils, indices, flips.ids.tolist(), flips.rows.tolist())
            if len(words) == self.top_n or k == len(table) * len(indices):
                return words
            if k == MOST:  # rare: the top is full of tokens that are not words
                return NotImplemented
            k = min(4 * k, MOST, len(table) * len(indices))

    return [
        Site(
            module.WordSwapGradientBased,
            "_get_replacement_words_by_grad",
            ("self", "attacked_text", "indices_to_replace"),
            replacements,
        )
    ]


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
