"""nanogcg's gradient and sampling, patched, on a small random language model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import ccu_fast
from tests.support.drop_in import counted, library, record, speed

V, T = 300, 6


def attack(dtype: torch.dtype = torch.float32, vocabulary: int = V) -> Any:
    """A GCG object in the middle of a run: prompt, suffix and target are embedded, the model is random."""
    gcg, transformers = library("nanogcg.gcg"), library("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(config).to(dtype).eval()
    tokenizer = SimpleNamespace(chat_template="{{ m }}", vocab_size=vocabulary)
    run = gcg.GCG(model, tokenizer, gcg.GCGConfig(use_prefix_cache=False, allow_non_ascii=True))
    pieces = {name: torch.randint(0, vocabulary, (1, n)) for name, n in (("before", 4), ("after", 3), ("target", 5))}
    for name, ids in pieces.items():
        setattr(run, f"{name}_embeds", model.get_input_embeddings()(ids).detach())
    run.target_ids = pieces["target"]
    return run


def sample(run: Any, gradient: Any, **options: Any) -> torch.Tensor:
    gcg = library("nanogcg.gcg")
    torch.manual_seed(5)
    ids = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(1))
    result: torch.Tensor = gcg.sample_ids_from_grad(ids, gradient.squeeze(0), 64, **options)
    return result


@pytest.mark.parametrize("mellowmax", [False, True])
@pytest.mark.parametrize("banned", [None, torch.arange(0, V, 3)], ids=["all tokens", "a third banned"])
def test_the_same_candidates(mellowmax: bool, banned: torch.Tensor | None) -> None:
    run = attack()
    run.config.use_mellowmax = mellowmax
    ids = torch.randint(0, V, (1, T), generator=torch.Generator().manual_seed(2))
    options = {"topk": 32, "n_replace": 2, "not_allowed_ids": banned}
    theirs = sample(run, run.compute_token_gradient(ids), **options)
    with counted("nanogcg") as calls:
        gradient = run.compute_token_gradient(ids)
        ours = sample(run, gradient, **options)
    assert calls.kernels == 1
    assert not isinstance(gradient, torch.Tensor)
    torch.testing.assert_close(gradient.dense(), run.compute_token_gradient(ids))
    assert torch.equal(ours, theirs)
    record("nanogcg", check="numbers")


def test_a_gradient_of_one_hots_is_sampled_by_the_library() -> None:
    run = attack()
    gradient = run.compute_token_gradient(torch.zeros(1, T, dtype=torch.int64))
    options = {"topk": 8, "not_allowed_ids": None}
    theirs = sample(run, gradient.clone(), **options)
    with ccu_fast.patch.applied("nanogcg"):
        assert torch.equal(sample(run, gradient.clone(), **options), theirs)


def test_a_hundred_steps_are_the_same() -> None:
    """The loss of the best candidate after each step: the same tokens throughout."""

    def steps() -> list[float]:
        gcg = library("nanogcg.gcg")
        run = attack()
        ids = torch.zeros(1, T, dtype=torch.int64)
        torch.manual_seed(7)
        losses = []
        for _ in range(100):
            gradient = run.compute_token_gradient(ids)
            with torch.no_grad():
                tried = gcg.sample_ids_from_grad(ids[0], gradient.squeeze(0), 16, topk=16, not_allowed_ids=None)
                inputs = [run.before_embeds, run.after_embeds, run.target_embeds]
                before, after, target = (e.expand(len(tried), -1, -1) for e in inputs)
                embeds = torch.cat([before, run.model.get_input_embeddings()(tried), after, target], 1)
                logits = run.model(inputs_embeds=embeds).logits[:, -6:-1]
                target_ids = run.target_ids.expand(len(tried), -1)
                loss = F.cross_entropy(logits.transpose(1, 2), target_ids, reduction="none").mean(1)
                ids = tried[loss.argmin()][None]
                losses.append(float(loss.min()))
        return losses

    before = steps()
    with counted("nanogcg") as calls:
        ours = steps()
    assert calls.kernels == 100
    assert ours == before == steps()
    record("nanogcg", check="training", difference=0.0)


def test_speed() -> None:
    run = attack(vocabulary=50257)
    ids = torch.zeros(1, 20, dtype=torch.int64)

    def step() -> None:
        gradient = run.compute_token_gradient(ids)
        library("nanogcg.gcg").sample_ids_from_grad(ids[0], gradient.squeeze(0), 512, not_allowed_ids=None)

    speed("nanogcg", "gradient and 512 candidates, V = 50257, D = 32, 20 tokens, topk 256", step)
