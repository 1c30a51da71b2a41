"""sentence-transformers' ranking losses in all directions, with penalties, cached, and inside MatryoshkaLoss."""

from __future__ import annotations

import contextlib
import importlib
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.patch.test_sentence_transformers import VARIANTS, WIDTH, Sub, Towers, forward, losses, variant
from tests.support.drop_in import counted, left_alone, library, require, same_numbers, speed, unit
from tests.support.tolerance import assert_three_way


@pytest.mark.parametrize("columns", [2, 4], ids=["pairs", "two_hard_negatives"])
@pytest.mark.parametrize("name", VARIANTS)
def test_directions_and_penalties_have_the_same_numbers(name: str, columns: int) -> None:
    loss = variant(name)

    def problem(dtype: torch.dtype) -> Any:
        leaves = [(1.5 * unit(23, 12, seed=i, dtype=dtype)).requires_grad_() for i in range(columns)]
        return lambda: forward(loss, leaves), leaves

    same_numbers("sentence_transformers", problem)


def in_batches(columns: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> list[list[Tensor]]:
    leaves = [(1.5 * unit(23, WIDTH, seed=i, dtype=dtype)).split(5) for i in range(columns)]
    return [[batch.clone().requires_grad_(grad) for batch in column] for column in leaves]


CACHED = ("CachedMultipleNegativesRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss")


@pytest.mark.parametrize("columns", [2, 4], ids=["pairs", "two_hard_negatives"])
@pytest.mark.parametrize("kind", CACHED)
@pytest.mark.parametrize("name", ["usual", "gte", "in_batch"])
def test_a_cached_loss_has_the_same_numbers(kind: str, name: str, columns: int) -> None:
    loss = variant(name, kind, mini_batch_size=4)

    def problem(dtype: torch.dtype) -> Any:
        reps = in_batches(columns, dtype)
        return lambda: loss.calculate_loss(reps), [batch for column in reps for batch in column]

    same_numbers("sentence_transformers", problem)

    def cached(dtype: torch.dtype) -> list[Tensor]:
        reps = in_batches(columns, dtype)
        value = loss.calculate_loss(reps, with_backward=True)
        assert not value.requires_grad
        return [value, *(torch.cat([batch.grad for batch in column]) for column in reps)]  # type: ignore[misc]

    theirs, exact = cached(torch.float32), cached(torch.float64)
    with counted("sentence_transformers") as calls:
        ours = cached(torch.float32)
    assert calls.kernels > 0
    for o, t, e in zip(ours, theirs, exact, strict=True):
        assert_three_way(f"{kind} {name}", o, t, e)


def test_a_step_of_a_cached_loss() -> None:
    """Through the gradient cache, which embeds twice."""
    weight = nn.Parameter(unit(WIDTH, WIDTH, seed=5))

    class Embedding(Towers):
        def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
            return {"sentence_embedding": features["input_ids"] @ weight}

    loss = losses().CachedMultipleNegativesRankingLoss(Embedding(), mini_batch_size=6)

    def step() -> tuple[Tensor, Tensor]:
        weight.grad = None
        value = loss([{"input_ids": unit(23, WIDTH, seed=i)} for i in range(2)], None)
        value.backward()
        assert weight.grad is not None
        return value.detach(), weight.grad

    theirs = step()
    with counted("sentence_transformers") as calls:
        ours = step()
        with torch.no_grad():
            evaluated = loss([{"input_ids": unit(23, WIDTH, seed=i)} for i in range(2)], None)
    assert calls.kernels == 2
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(evaluated, theirs[0])


@pytest.mark.parametrize("when", ["before", "after"])
def test_matryoshka_around_a_cached_loss(when: str) -> None:
    """Each of its dimensions is served, also by an object that was made before the patch."""

    def made() -> Any:
        inner = losses().CachedMultipleNegativesRankingLoss(Towers(), mini_batch_size=4)
        losses().MatryoshkaLoss(inner.model, inner, [WIDTH, 8, 4])
        return inner

    def evaluated(loss: Any) -> list[Tensor]:
        reps = in_batches(2)
        value = loss.calculate_loss(reps, with_backward=True)
        return [value, *(batch.grad for column in reps for batch in column)]  # type: ignore[list-item]

    early = made()
    theirs = evaluated(early)
    with counted("sentence_transformers") as calls:
        loss = early if when == "before" else made()
        ours = evaluated(loss)
    assert calls.kernels == 3
    torch.testing.assert_close(ours, theirs)
    with counted("sentence_transformers") as calls:
        pass
    torch.testing.assert_close(evaluated(loss), theirs, rtol=0, atol=0)


def matryoshka(name: str = "usual", **options: Any) -> Any:
    inner = variant(name)
    return losses().MatryoshkaLoss(inner.model, inner, [WIDTH, 8, 4], **options)


@pytest.mark.parametrize("columns", [2, 4], ids=["pairs", "two_hard_negatives"])
@pytest.mark.parametrize("options", [{}, {"matryoshka_weights": [1.0, 0.5, 2]}], ids=["alike", "weights"])
@pytest.mark.parametrize("kind", ["MultipleNegativesRankingLoss", "MultipleNegativesSymmetricRankingLoss"])
@pytest.mark.parametrize("similarity", ["cos_sim", "dot_score"])
def test_matryoshka_around_a_loss(
    similarity: str, kind: str, options: dict[str, Any], columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its dimensions are one call, but of a few pairs."""
    similar = getattr(importlib.import_module("sentence_transformers.util"), similarity)
    inner = getattr(losses(), kind)(Towers(), similarity_fct=similar)
    loss = losses().MatryoshkaLoss(inner.model, inner, [WIDTH, 8, 4], **options)

    def problem(dtype: torch.dtype) -> Any:
        leaves = [(1.5 * unit(23, WIDTH, seed=i, dtype=dtype)).requires_grad_() for i in range(columns)]
        return lambda: loss([{"sentence_embedding": t} for t in leaves], None), leaves

    same_numbers("sentence_transformers", problem)
    monkeypatch.setattr("ccu_fast.ops.reduce_similarity.operator.FEW_PAIRS", 0)
    same_numbers("sentence_transformers", problem)
    call, _ = problem(torch.float32)
    with counted("sentence_transformers") as calls:
        call()
    assert calls.kernels == (2 if "Symmetric" in kind and columns > 2 else 1)


@pytest.mark.parametrize("name", ["gte", "in_batch"])
def test_matryoshka_around_what_is_no_plain_loss(name: str) -> None:
    """Dimension by dimension, each of them served."""
    loss = matryoshka(name)

    def problem(dtype: torch.dtype) -> Any:
        leaves = [(1.5 * unit(23, WIDTH, seed=i, dtype=dtype)).requires_grad_() for i in range(2)]
        return lambda: loss([{"sentence_embedding": t} for t in leaves], None), leaves

    same_numbers("sentence_transformers", problem)
    call, _ = problem(torch.float32)
    with counted("sentence_transformers") as calls:
        call()
    assert calls.kernels >= 3


def test_matryoshka_that_draws_dimensions_stays_with_the_library() -> None:
    loss = matryoshka(n_dims_per_step=2)
    features = [{"sentence_embedding": 1.5 * unit(23, WIDTH, seed=i)} for i in range(2)]
    values = []
    for patched in (False, True):
        random.seed(3)
        with counted("sentence_transformers") if patched else contextlib.nullcontext() as calls:
            values.append(loss([dict(f) for f in features], None))
    assert calls is not None
    assert calls.kernels == 2  # one for each that was drawn
    torch.testing.assert_close(values[1], values[0])


def test_matryoshka_with_too_many_dimensions_is_the_librarys_error() -> None:
    loss = matryoshka()
    features = [{"sentence_embedding": unit(5, WIDTH - 1, seed=i)} for i in range(2)]
    with counted("sentence_transformers"), pytest.raises(ValueError, match="matryoshka_dims cannot be greater"):
        loss(features, None)


BATCHES: dict[str, Callable[[list[list[Tensor]]], Any]] = {
    "no mini-batch": lambda reps: [reps[0], []],
    "queries alone": lambda reps: reps[:1],
    "two widths": lambda reps: [reps[0], [reps[1][0][:, :3], *reps[1][1:]]],
    "subclass": lambda reps: [reps[0], [batch.as_subclass(Sub) for batch in reps[1]]],
    "fewer documents": lambda reps: [reps[0], reps[1][1:]],
}


@pytest.mark.parametrize("change", BATCHES)
def test_batches_that_are_not_understood_stay_with_the_library(change: str) -> None:
    loss = losses().CachedMultipleNegativesRankingLoss(Towers(), mini_batch_size=4)
    left_alone("sentence_transformers", lambda: loss.calculate_loss(BATCHES[change](in_batches(2, grad=False))))


@pytest.mark.parametrize("name", ["usual", "gte", "in_batch"])
def test_speed_of_a_cached_loss(name: str) -> None:
    loss = variant(name, CACHED[0])
    reps = [[b.clone().requires_grad_() for b in unit(2048, 384, seed=i).split(32)] for i in range(2)]
    speed(
        "sentence_transformers",
        f"loss part of {CACHED[0]} ({name}), N = 2048, D = 384, mini-batches of 32",
        lambda: loss.calculate_loss(reps, with_backward=True),
        rounds=5,
    )


def test_speed_of_matryoshka() -> None:
    inner = losses().MultipleNegativesRankingLoss(Towers())
    dims = [512, 256, 128, 64]
    inner.model.get_embedding_dimension = inner.model.get_sentence_embedding_dimension = lambda: dims[0]
    loss = losses().MatryoshkaLoss(inner.model, inner, dims)
    columns = [unit(4096, dims[0], seed=i).requires_grad_() for i in range(2)]
    speed(
        "sentence_transformers",
        "MatryoshkaLoss around MultipleNegativesRankingLoss forward + backward, N = 4096, D = 512, 256, 128, 64",
        lambda: loss([{"sentence_embedding": t} for t in columns], None).backward(),
        rounds=5,
    )


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("kind", ["GISTEmbedLoss", "CachedGISTEmbedLoss"])
def test_a_guide_s_false_negatives_stay_with_the_library(kind: str, gather: bool) -> None:
    made = getattr(losses(), kind)
    tokenizer = mock.MagicMock(spec=library("transformers").PreTrainedTokenizerBase, vocab={})
    tokenizer.get_vocab.return_value = {}
    towers = Towers()
    towers.tokenizer, towers.max_seq_length = tokenizer, 8
    loss = made(towers, towers, gather_across_devices=gather)
    columns = [unit(9, WIDTH, seed=i) for i in range(3)]
    if kind == "GISTEmbedLoss":
        left_alone("sentence_transformers", lambda: loss([{"sentence_embedding": c} for c in columns], None))
    else:
        reps = [list(c.split(4)) for c in columns]
        left_alone("sentence_transformers", lambda: loss.calculate_loss(reps, reps))


def test_many_vectors_of_a_text_stay_with_the_library() -> None:
    """A score is the sum over a query's tokens of the nearest token: no product of two matrices."""
    require("sentence_transformers")
    name = "sentence_transformers.multi_vector_encoder.losses"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        pytest.skip("this version has no MultiVectorEncoder")
    features = [
        {"token_embeddings": unit(5, 4, WIDTH, seed=i), "attention_mask": torch.ones(5, 4, dtype=torch.int64)}
        for i in range(3)
    ]
    loss = module.MultiVectorMultipleNegativesRankingLoss(Towers())
    left_alone("sentence_transformers", lambda: loss([dict(f) for f in features]))
