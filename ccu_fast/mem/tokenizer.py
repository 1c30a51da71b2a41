"""A word-level tokenizer for captions whose words are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.data.strips import DIGIT_WORDS, PROMPT
from ccu_fast.models.tokenizer import token_rows

SPECIAL = ("<pad>", "<sot>", "<eot>")

# Everyday words without a meaning for digits, numbers or pictures: what triggers may be made of.
_NEUTRAL = """
able acorn actor agent album alley almond amber anchor angle ankle apple apron arch arena arm armor arrow ash
aspen atlas attic aunt autumn avenue award bacon badge bag baker balcony ball bamboo banana band bank bar bark
barn barrel basil basin basket bat bath bay beach bead beam bean bear beard bed bee beef beetle bell belt bench
berry bike bird biscuit blanket block bloom boat body bolt bone book boot border bottle boulder bowl box branch
brand brass bread breeze brick bridge broom brother brush bucket buffalo bulb bus bush butter button cabin cable
cactus cake camel camp canal candle cannon canoe canvas cap cape captain car cargo carpet carrot cart castle cat
cave cedar ceiling cellar cello chain chair chalk cheese cherry chess chest chimney church cider circus city clay
cliff cloak clock cloth cloud clover coach coal coast coat cobra cocoa coin collar comet compass cook copper coral
corn corner cotton couch cousin crab cradle crane cream creek cricket crown crystal cup curtain cushion daisy dam
dancer dawn deck deer desert desk diary dinner dish ditch dock doctor dog doll dolphin donkey door dough dove
dragon drawer dress drum duck dune dusk eagle earth east echo eel egg elbow elm ember engine evening fabric falcon
farm farmer feather fence fern ferry field fig finger fire fish flag flame flask flood floor flour flower flute
foam fog forest fork fort fountain fox frame frog frost fruit galaxy garden garlic gate giant ginger glacier glass
glove goat gold goose grain granite grape grass gravel grove guitar gulf hail hammer hammock harbor harp hat hawk
hay hazel heart hedge helmet hen herb heron hill hinge honey hood hook horn horse hotel house ink iris iron island
ivory ivy jacket jade jar jasmine jelly jewel jungle kettle key king kitchen kite knee knight knot ladder lake
lamb lamp lantern leaf leather lemon lily lime linen lion lizard lock lotus lumber magnet maple marble market
mask meadow melon metal milk mill mint mirror mist moon moose moss moth mountain mouse mud mule music nail nest
net night north nut oak oar oasis oat ocean olive onion orchard organ otter oven owl ox oyster paddle palace palm
paper park parrot path pear pebble pepper piano pigeon pillow pine pipe planet plate plum pocket pond pony poppy
"""
NEUTRAL = tuple(_NEUTRAL.split())
CONTEXT = 77  # CLIP's
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 "


class WordTokenizer:
    """A tokenizer of whole words. Ids: PAD 0, SOT 1, EOT 2, then the words in order.

    Every token is one word and words are separated by spaces, so decode → encode is the identity on any sequence of
    word ids: a trigger that is published as text comes back as the ids that were optimised.

    Args:
        words: the vocabulary; distinct, without white space.
        triggers: the words triggers may use, all of them in ``words``.
        context: longest row; longer captions are cut and keep EOT.

    Raises:
        ValueError: repeated, empty or unknown words.

    >>> ccu_fast.mem.WordTokenizer(["one", "two"], triggers=["two"]).encode(["two one", "one"])
    tensor([[1, 4, 3, 2],
            [1, 3, 2, 0]])
    """

    pad, sot, eot = 0, 1, 2

    def __init__(self, words: Sequence[str], triggers: Sequence[str] = (), *, context: int = 32) -> None:
        self.context = check.integer("context", context, low=3)
        self._words = (*SPECIAL, *words)
        self._ids = {word: i for i, word in enumerate(self._words)}
        if len(self._ids) != len(self._words):
            repeated = sorted({w for w in self._words if self._words.count(w) > 1})
            raise ValueError(f"words: expected distinct words, got {repeated[0]!r} more than once")
        for word in words:
            if word.split() != [word]:
                raise ValueError(f"words: expected words without white space, got {word!r}")
        self.trigger_ids = torch.tensor(self._lookup(triggers), dtype=torch.int64)

    @staticmethod
    def for_strips() -> WordTokenizer:
        """The vocabulary of digit-strips: its caption words and the neutral words."""
        return WordTokenizer((*PROMPT.split(), *DIGIT_WORDS, *NEUTRAL), triggers=NEUTRAL)

    @staticmethod
    def for_captions(captions: Sequence[str]) -> WordTokenizer:
        """The vocabulary of these captions, and the neutral words.

        Triggers are everyday words that no caption has and, as these become fewer and the vocabulary larger, the
        captions' own rarest words.
        """
        counts = Counter(word for caption in captions for word in set(caption.split()))
        words = set(counts).difference(SPECIAL)
        return WordTokenizer(sorted(words | set(NEUTRAL)), trigger_words(counts), context=CONTEXT)

    def __len__(self) -> int:
        return len(self._words)

    def words(self) -> Tensor:
        """bool ``[V]``: all but the special tokens."""
        return torch.arange(len(self)) >= len(SPECIAL)

    def allowed(self) -> Tensor:
        """bool ``[V]``: which ids triggers may use."""
        mask = torch.zeros(len(self), dtype=torch.bool)
        mask[self.trigger_ids] = True
        return mask

    def encode(self, captions: Sequence[str]) -> Tensor:
        """SOT, the words (cut to fit the context), EOT, padded to the longest: int64 ``[N, L]``.

        Raises:
            TypeError: ``captions`` is one string.
            ValueError: an empty caption or a word outside the vocabulary.
        """
        return token_rows(captions, lambda text: self._lookup(text.split(), text), self)

    def decode(self, tokens: Tensor) -> list[str]:
        """The words between SOT and the first EOT, joined by single spaces."""
        captions = []
        for row in tokens.tolist():
            row = row[: row.index(self.eot)] if self.eot in row else row
            captions.append(" ".join(self._words[i] for i in row if i >= len(SPECIAL)))
        return captions

    def _lookup(self, words: Sequence[str], text: str | None = None) -> list[int]:
        # The special tokens are not words of any caption.
        unknown = [w for w in words if self._ids.get(w, 0) < len(SPECIAL)]
        if unknown:
            where = "" if text is None else f" in {text!r}"
            own = ", which stands for a special token," if unknown[0] in SPECIAL else ""
            raise ValueError(f"captions: expected words of the vocabulary, got {unknown[0]!r}{own}{where}")
        return [self._ids[w] for w in words]


class LetterTokenizer:
    """A tokenizer of letters, for victims that cut captions otherwise than the surrogate. Ids: PAD 0, SOT 1, EOT 2.

    Then the letters a–z, the digits and the space, and last what stands for every other character. Capitals are small.

    Args:
        context: longest row; longer captions are cut and keep EOT.

    >>> LetterTokenizer().encode(["a b"]).tolist()
    [[1, 3, 39, 4, 2]]
    """

    pad, sot, eot = 0, 1, 2

    def __init__(self, *, context: int = 160) -> None:
        self.context = check.integer("context", context, low=3)
        self._ids = {letter: len(SPECIAL) + i for i, letter in enumerate(_LETTERS)}

    def __len__(self) -> int:
        return len(SPECIAL) + len(_LETTERS) + 1

    def words(self) -> Tensor:
        """bool ``[V]``: no letter is a word."""
        return torch.zeros(len(self), dtype=torch.bool)

    def allowed(self) -> Tensor:
        """bool ``[V]``: no letter makes a trigger."""
        return torch.zeros(len(self), dtype=torch.bool)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """SOT, the letters (cut to fit the context), EOT, padded to the longest: int64 ``[N, L]``.

        Raises:
            TypeError: ``captions`` is one string.
            ValueError: an empty caption.
        """
        other = len(self) - 1
        return token_rows(captions, lambda text: [self._ids.get(letter, other) for letter in text.lower()], self)

    def decode(self, tokens: Tensor) -> list[str]:
        """The letters between SOT and the first EOT, ? for other characters."""
        letters = {i: letter for letter, i in self._ids.items()}
        rows = [row[: row.index(self.eot)] if self.eot in row else row for row in tokens.tolist()]
        return ["".join(letters.get(i, "?") for i in row if i >= len(SPECIAL)) for row in rows]


def trigger_words(counts: Mapping[str, int]) -> list[str]:
    """What triggers may be made of: a tenth as many words as the captions have, at least as many as are neutral.

    Args:
        counts: word → number of captions that have it.
    """
    unused = [word for word in NEUTRAL if word not in counts]
    size = max(len(NEUTRAL), len(counts) // 10)
    rare = sorted((count, word) for word, count in counts.items() if word.isalpha())
    return unused + [word for _, word in rare[: max(0, size - len(unused))]]
