"""What a model's tokenizer offers, and CLIP's byte-pair one from open_clip or transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# A token that is a word of its own: lower-case letters up to the end of a word. Such words, with spaces between, are
# split by CLIP's pattern one by one, so what stands beside them changes nothing.
_WORD = re.compile(r"[a-z]{2,}</w>")


class Tokenizer(Protocol):
    """What a model needs of a tokenizer: captions ↔ ids.

    Attributes:
        sot, eot, pad: ids that start a caption, end it, and fill the row after it.
        context: the longest row, SOT and EOT included.

    >>> words = ccu_fast.mem.WordTokenizer(["one", "two"])  # is one
    >>> words.decode(words.encode(["two one"]))
    ['two one']
    """

    @property
    def sot(self) -> int: ...

    @property
    def eot(self) -> int: ...

    @property
    def pad(self) -> int: ...

    @property
    def context(self) -> int: ...

    def __len__(self) -> int:
        """How many ids there are."""
        ...

    def encode(self, captions: Sequence[str]) -> Tensor:
        """int64 ``[N, L]``, L ≤ context: SOT, the caption cut to fit, EOT, PAD."""
        ...

    def decode(self, ids: Tensor) -> list[str]:
        """int64 ``[N, n]`` → N strings, without special tokens."""
        ...

    def words(self) -> Tensor:
        """bool ``[V]``: tokens that come back from decode and encode in a caption."""
        ...

    def allowed(self) -> Tensor:
        """bool ``[V]``: those of them that triggers are made of where captions do not give their words."""
        ...


def token_rows(captions: Sequence[str], ids: Callable[[str], list[int]], tokenizer: Tokenizer) -> Tensor:
    """What a tokenizer's ``encode`` gives, of ids that ``ids`` finds in a caption.

    Raises:
        TypeError: ``captions`` is one string.
        ValueError: a caption without a token.
    """
    if isinstance(captions, str):
        raise TypeError("captions: expected a sequence of strings, got one str")
    rows = [[tokenizer.sot, *ids(text)[: tokenizer.context - 2], tokenizer.eot] for text in captions]
    tokens = torch.full((len(rows), max(map(len, rows), default=2)), tokenizer.pad, dtype=torch.int64)
    for i, row in enumerate(rows):
        if len(row) == 2:
            raise ValueError(f"captions: expected at least one word, got an empty caption at index {i}")
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens


class ClipTokenizer:
    """Adapter of ``open_clip.SimpleTokenizer`` or ``transformers.CLIPTokenizer``.

    Args:
        tokenizer: one of theirs.
        context: the longest row, if it is known from the model; else what the tokenizer says, 77 at most.

    Raises:
        TypeError: it is neither.

    ``allowed`` has the tokens that are whole lower-case words and that the tokenizer, asked, gives back: no special
    token, no EOT, no part of a word, nothing unprintable.
    """

    def __init__(self, tokenizer: Any, *, context: int | None = None) -> None:
        self._open_clip = hasattr(tokenizer, "sot_token_id") and hasattr(tokenizer, "decoder")
        if not self._open_clip and not (hasattr(tokenizer, "bos_token_id") and hasattr(tokenizer, "get_vocab")):
            raise TypeError(
                "tokenizer: expected open_clip's SimpleTokenizer or transformers' CLIPTokenizer, "
                f"got {type(tokenizer).__name__}"
            )
        self._tokenizer = tokenizer
        if self._open_clip:
            self.sot, self.eot, self.pad = int(tokenizer.sot_token_id), int(tokenizer.eot_token_id), 0
            self.context = int(context or tokenizer.context_length or 77)
            self._words: dict[int, str] = dict(tokenizer.decoder)
        else:
            self.sot, self.eot = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
            # What stands behind EOT cannot matter.
            self.pad = self.eot if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
            self.context = min(int(tokenizer.model_max_length), context or 77)
            self._words = {i: word for word, i in tokenizer.get_vocab().items()}
        self._allowed: Tensor | None = None

    def __len__(self) -> int:
        return max(self._words) + 1

    def encode(self, captions: Sequence[str]) -> Tensor:
        """int64 ``[N, L]``: SOT, the caption cut to fit, EOT, PAD up to the longest.

        Raises:
            TypeError: ``captions`` is one string.
            ValueError: a caption without a token.
        """
        return token_rows(captions, self._ids, self)

    def decode(self, ids: Tensor) -> list[str]:
        """The text of the ids up to EOT, without special tokens."""
        texts = []
        for row in ids.tolist():
            row = row[: row.index(self.eot)] if self.eot in row else row
            row = [i for i in row if i != self.sot]
            texts.append(str(self._tokenizer.decode(row)).strip())
        return texts

    def words(self) -> Tensor:
        """bool ``[V]``."""
        return self.allowed()

    def allowed(self) -> Tensor:
        """bool ``[V]``."""
        if self._allowed is None:
            mask = torch.zeros(len(self), dtype=torch.bool)
            for i, word in self._words.items():
                if _WORD.fullmatch(word):
                    mask[i] = self._ids(word.removesuffix("</w>")) == [i]
            self._allowed = mask
        return self._allowed.clone()

    def _ids(self, text: str) -> list[int]:
        if self._open_clip:
            return list(self._tokenizer.encode(text))
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
