"""topk_flips on a real embedding: that of all-MiniLM-L6-v2, and triggers that survive being written as text."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.ops import minilm
from benchmarks.registry import Unavailable
from ccu_fast import TokenTable, topk_flips
from tests.support.presence import absent


@pytest.fixture(scope="module")
def table() -> Tensor:
    try:
        return minilm.embedding()
    except Unavailable as reason:
        absent("a real embedding", str(reason))
        raise


def test_certified_ids_are_those_of_float64(native: str, table: Tensor) -> None:
    grad = minilm.gradients(40, table)
    ids = topk_flips(grad, TokenTable(table), 16, backend=native).ids
    assert torch.equal(ids, (grad.double() @ table.double().T).sort(dim=1, stable=True).indices[:, :16])


def test_the_fp16_scan_settles_the_real_table(native: str, table: Tensor) -> None:
    candidates, redone = minilm.scan_report(minilm.gradients(12, table), table, 16)
    print(f"{candidates:.1f} candidates a row for k=16; {redone} of 12 rows redone")
    assert redone == 0 and 16 <= candidates <= 64


def test_triggers_survive_as_text(table: Tensor) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    tokenizer = tokenizers.Tokenizer.from_file(str(minilm.folder() / "tokenizer.json"))
    tokenizer.no_padding()

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    # Words that come back alone; word pieces ("##ing"), special and unused tokens do not.
    words = [tokenizer.id_to_token(i) for i in range(len(table))]
    safe = torch.tensor([word.isalpha() and encode(word) == [i] for i, word in enumerate(words)])
    assert 15_000 < int(safe.sum()) < len(table)
    grad = minilm.gradients(60, table).view(20, 3, -1)
    free = topk_flips(grad, TokenTable(table), 16).ids
    assert not bool(safe[free].all())  # without the mask, pieces are among the best
    flips = topk_flips(grad, TokenTable(table, safe), 16)
    for triggers in flips.ids[..., 0].tolist():
        text = " ".join(words[i] for i in triggers)
        assert encode(text) == triggers, text
        assert encode(tokenizer.decode(triggers)) == triggers
    score = (grad.double() @ table.double().T).masked_fill(~safe, torch.inf)
    assert torch.equal(flips.ids, score.sort(dim=-1, stable=True).indices[..., :16])
