"""Which words triggers are made of, and which of them each row begins with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ccu_fast.mem.config import Method, Settings
from ccu_fast.mem.look import SAMPLE, Codebook, coarse
from ccu_fast.mem.surrogate import generator
from ccu_fast.models.tokenizer import Tokenizer
from ccu_fast.runs.progress import Progress, silent

COMMON = 0.05  # share of the captions from which on a word says nothing about any of them
_MOST = 64  # words to choose one from, where nothing limits them
_CHUNK = 256
_COUNTED = 4096  # captions whose words are counted at a time


def alphabet(tokenizer: Tokenizer, tokens: Tensor, method: Method, settings: Settings, seed: int) -> Tensor:
    """What each trigger word is chosen from: int64 ``[n, A]`` if words tell of the look, else ``[1, A]`` for all.

    Args:
        tokenizer: its ids.
        tokens: int64 ``[rows, L]``, all captions of the dataset.
        method: how many words.
        settings: which and how many.
        seed: of the words that are drawn.

    Raises:
        ValueError: there are too few words, or no room for them in a caption.
    """
    if settings.compat:
        return torch.arange(len(tokenizer))[None]
    if method.triggers + 3 > tokenizer.context:
        raise ValueError(
            f"method: expected triggers that leave room for a caption in {tokenizer.context} "
            f"tokens, got {method.triggers}"
        )
    ids = _everyday(tokenizer, seed)
    if settings.words == "captions":
        own = _common_words(tokenizer, tokens)
        ids = torch.cat([own, ids[~torch.isin(ids, own)]])
    positions = max(1, method.triggers) if settings.first == "look" else 1
    size = settings.trigger_words
    if size is None:
        size = min(_MOST, len(ids) // positions) if settings.first == "look" else len(ids)
    size = min(size, len(ids) // positions)
    needed = settings.candidates if settings.search_rounds else 1
    if method.triggers and len(ids) < positions * needed:
        raise ValueError(
            f"tokenizer: expected at least {needed} trigger words for each of {positions} alphabets, "
            f"got {len(ids)} in all"
        )
    if method.triggers and size < needed:
        raise ValueError(f"trigger_words: expected at least as many as candidates, {needed}, got {size}")
    ids = ids[: positions * size]
    if settings.words == "captions":  # which came in order, so that each position gets its share of the common ones
        ids = ids[torch.randperm(len(ids), generator=generator(seed, "alphabet of words"))]
    return ids.view(positions, size)


def _everyday(tokenizer: Tokenizer, seed: int) -> Tensor:
    ids = tokenizer.allowed().nonzero()[:, 0]
    return ids[torch.randperm(len(ids), generator=generator(seed, "alphabet"))]


def _common_words(tokenizer: Tokenizer, tokens: Tensor) -> Tensor:
    """Words of the captions, those of most captions first; what is in one of twenty or more is left out."""
    rows = torch.zeros(len(tokenizer), dtype=torch.int64)
    for part in tokens.split(_COUNTED):  # sorting all of them would take many times their memory
        pairs = part + len(tokenizer) * torch.arange(len(part))[:, None]
        rows += torch.bincount(torch.unique(pairs) % len(tokenizer), minlength=len(tokenizer))
    usable = tokenizer.words() & (rows > 0) & (rows <= COMMON * len(tokens))
    ids = usable.nonzero()[:, 0]
    return ids[rows[ids].argsort(descending=True, stable=True)]


def words_of_the_look(
    read: Callable[[Tensor], Tensor],
    n_images: int,
    alphabet: Tensor,
    seed: int,
    gather: Callable[[Tensor], list[Tensor]] | None = None,
    progress: Progress = silent,
) -> Tensor:
    """The words that tell what pictures look like, see :mod:`ccu_fast.mem.look`: int64 ``[n_images, n]``.

    Args:
        read: int64 ``[k]`` image numbers → uint8 ``[k, C, H, W]``.
        n_images: how many there are.
        alphabet: int64 ``[n, A]``.
        seed: of the codebook.
        gather: one process's tensor → those of all: they make one codebook.
        progress: called as ``progress(stage, done, total, note)``.
    """
    found = []
    for part in torch.arange(n_images).split(_CHUNK):
        progress("looking at pictures", int(part[0]), n_images, "")
        found.append(coarse(read(part)))
    progress("looking at pictures", n_images, n_images, "")
    progress("choosing trigger words", 0, 1, "")
    features = torch.cat(found)
    parts = [features] if gather is None else gather(features[:SAMPLE])
    some = torch.cat([part[: SAMPLE // len(parts)] for part in parts])
    words, size = alphabet.shape
    codes = Codebook.fit(some, words, size, generator(seed, "look")).codes(features)
    return alphabet[torch.arange(words), codes]
