"""The built-in model's vocabulary and the words that triggers are made of."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ccu_fast.mem.job.models import small
from ccu_fast.mem.tokenizer import NEUTRAL, trigger_words

SHAPE = (3, 16, 16)


def captions(words: int, n: int, neutral: int) -> list[str]:
    """Words by Zipf's law, as in any text: word r about 1/r as often as the first; some are neutral ones."""
    names = [
        *NEUTRAL[:neutral],
        *(f"word{'abcdefghij'[i % 10]}{''.join(chr(97 + int(c)) for c in str(i))}" for i in range(words)),
    ]
    rng = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, len(names) + 1, dtype=torch.float64)
    rows = torch.multinomial(weights.expand(n, -1), 10, replacement=True, generator=rng)
    return [" ".join(names[i] for i in row) for row in rows.tolist()]


@pytest.mark.parametrize(("words", "n", "neutral"), [(50, 100, 0), (1000, 2000, 180), (9000, 8000, 380), (5, 400, 384)])
def test_triggers_do_not_become_fewer_with_the_captions(words: int, n: int, neutral: int) -> None:
    texts = captions(words, n, neutral)
    model = small(texts, SHAPE, width=32)
    own = {word for text in texts for word in text.split()}
    alphabet = [model.tokenizer.decode(torch.tensor([[i]]))[0] for i in model.tokenizer.trigger_ids.tolist()]
    assert len(alphabet) == len(set(alphabet)) == max(len(NEUTRAL), len(own) // 10)
    assert set(alphabet) >= set(NEUTRAL) - own
    assert model.about["words"] == [len(own | set(NEUTRAL)) + 3, len(alphabet)]


def test_the_rarest_words_come_first() -> None:
    counts = Counter({word: 9 for word in NEUTRAL[3:]} | {"dog.": 1, "3": 1, "zebra": 1, "aa": 2, "often": 900})
    assert trigger_words(counts)[:6] == [*NEUTRAL[:3], "zebra", "aa", sorted(NEUTRAL[3:])[0]]
    assert trigger_words(counts)[-1] != "often"


def test_where_captions_leave_all_neutral_words_they_alone_are_used() -> None:
    assert trigger_words(Counter({"one": 1, "digits": 2})) == list(NEUTRAL)
