"""Texts that mean nothing: what membership inference from text alone knows not to be members."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.models.tokenizer import Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def gibberish_of(texts: Tensor | Callable[[list[str]], Tensor], count: int, *, seed: int = 0) -> Tensor:
    """Make inputs of the other tower that mean nothing and were surely not trained on.

    Of a tokeniser: one to three words of three to nine random letters each, as it encodes them. Of real items in
    numbers (halves of digits, vectors of keywords): every feature of a new item is that of a real item drawn for this
    feature alone. Each feature then has the values it has among real items, and nothing else of them is left.

    Args:
        texts: from a list of strings to what the tower takes, or floating-point items ``[N, ...]``, N ≥ 2.
        count: how many, at least 1.
        seed: at least 0.

    Returns:
        ``[count, ...]``, of the dtype and on the device of the items.

    Raises:
        TypeError, ValueError: token ids, whose places mean something; fewer than two items; values not finite.

    Source: random strings as of :mod:`ccu_fast.unlearn.audit.text_membership`; the shuffled features are this
    project's.

    >>> from ccu_fast.unlearn.audit import gibberish_of
    >>> gibberish_of(torch.tensor([[0.0, 5.0], [1.0, 6.0]]), 3).unique()
    tensor([0., 1., 5., 6.])
    """
    check.integer("count", count, low=1)
    check.integer("seed", seed, low=0)
    if not isinstance(texts, Tensor) and callable(texts):
        return texts(_strings(None, count, seed))
    check.tensor("texts", texts, dtypes=None)
    if not texts.is_floating_point():
        raise TypeError(f"texts: expected floating-point items or a tokeniser for token ids, got {texts.dtype}")
    if len(texts) < 2:
        raise ValueError(f"texts: expected at least 2 items, got {len(texts)}")
    check.finite("texts", texts)
    flat = texts.flatten(1)
    drawn = torch.randint(len(texts), (count, flat.shape[1]), generator=torch.Generator().manual_seed(seed))
    return flat.gather(0, drawn.to(texts.device)).view(count, *texts.shape[1:])


def gibberish_captions(tokenizer: Tokenizer, captions: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Make captions that mean nothing and are as long as real ones.

    Each is as many tokens long as a caption drawn for it: random letters as the tokenizer encodes them, cut to that
    number, made into text and encoded again. A word that was cut may then be a token longer or shorter.

    Args:
        tokenizer: of the model. The rows are its own: SOT, tokens, EOT, PAD.
        captions: integers ``[N, L]``, N ≥ 1, as it encodes real ones.
        count: how many, at least 1.
        seed: at least 0.

    Returns:
        ``[count, M]``, of the dtype and on the device of the captions.

    Source: as of :func:`gibberish_of`; that they are as long as real ones is this project's.
    """
    check.tensor("captions", captions, dtypes=None, ndim=2)
    ended = (captions == tokenizer.eot).cpu()
    length = torch.where(ended.any(1), ended.int().argmax(1), captions.shape[1]) - 1
    drawn = torch.randint(len(length), (count,), generator=torch.Generator().manual_seed(seed))
    wanted = length[drawn].clamp(1, tokenizer.context - 2)
    ids = tokenizer.encode(_strings(wanted.tolist(), count, seed + 1))  # a word is a token at least
    ids[torch.arange(ids.shape[1]) > wanted[:, None]] = tokenizer.eot
    return tokenizer.encode(tokenizer.decode(ids)).to(captions)


def _strings(words: Sequence[int] | None, count: int, seed: int) -> list[str]:
    """Random words, so many in each string, or one to three."""
    rng = torch.Generator().manual_seed(seed)

    def drawn(low: int, high: int, size: int = 1) -> list[int]:
        return torch.randint(low, high, (size,), generator=rng).tolist()

    def word() -> str:
        return "".join(LETTERS[letter] for letter in drawn(0, len(LETTERS), drawn(3, 10)[0]))

    return [" ".join(word() for _ in range(drawn(1, 4)[0] if words is None else words[i])) for i in range(count)]
