"""FlagEmbedding's dense embedders, patched, around a model whose features are the embeddings."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ccu_fast
from tests.support.drop_in import (
    counted,
    left_alone,
    require,
    same_numbers,
    same_on_ranks,
    same_training,
    speed,
    train_towers,
    unit,
)
from tests.support.forked import on_ranks
from tests.support.tolerance import assert_three_way

TARGET, WIDTH = "flag_embedding", 12
KINDS = {
    "encoder": "encoder_only.base.BiEncoderOnlyEmbedderModel",
    "decoder": "decoder_only.base.BiDecoderOnlyEmbedderModel",
    "icl": "decoder_only.icl.BiDecoderOnlyEmbedderICLModel",
}


class Base(nn.Module):
    """Stands in for a language model: its features are the hidden states."""

    config = SimpleNamespace(hidden_size=WIDTH)

    def forward(self, states: Tensor, attention_mask: Tensor, return_dict: bool) -> Any:
        return SimpleNamespace(last_hidden_state=states[:, None])


def make(kind: str = "encoder", **options: Any) -> Any:
    require("FlagEmbedding")
    module, _, name = KINDS[kind].rpartition(".")
    options = {"temperature": 0.1, "normalize_embeddings": True, "sentence_pooling_method": "last_token", **options}
    return getattr(importlib.import_module(f"FlagEmbedding.finetune.embedder.{module}"), name)(Base(), **options)


def features(states: Tensor) -> dict[str, Tensor]:
    return {"states": states, "attention_mask": torch.ones(len(states), 1, dtype=torch.int64)}


def loss_of(model: Any, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    value: Tensor = model(features(x), features(y), **options).loss
    return value


def texts(dtype: torch.dtype = torch.float32, group: int = 3, seed: int = 0) -> list[Tensor]:
    made = (1.5 * unit(n, WIDTH, seed=seed + n, dtype=dtype) for n in (17, 17 * group))
    return [t.requires_grad_() for t in made]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_has_the_same_numbers(kind: str, group: int) -> None:
    model = make(kind)

    def problem(dtype: torch.dtype) -> Any:
        leaves = texts(dtype, group)
        return lambda: loss_of(model, *leaves), leaves

    same_numbers(TARGET, problem)


def test_several_widths() -> None:
    try:
        model = make(use_mrl=True, mrl_dims=[WIDTH, 8, 4])
    except TypeError:
        pytest.skip("this version has no use_mrl")

    def problem(dtype: torch.dtype) -> Any:
        leaves = texts(dtype)
        return lambda: loss_of(model, *leaves), leaves

    same_numbers(TARGET, problem)


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_negatives_of_each_query_alone(kind: str, teacher: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only their scores are made."""
    model = make(kind)
    options = {"no_in_batch_neg_flag": True, "teacher_scores": torch.rand(17 * 3).tolist() if teacher else None}

    def evaluated(dtype: torch.dtype) -> list[Tensor]:
        leaves = texts(dtype)
        value = loss_of(model, *leaves, **options)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    theirs, exact = evaluated(torch.float32), evaluated(torch.float64)
    with ccu_fast.patch.applied(TARGET), monkeypatch.context() as change:
        matrix = torch.matmul
        made: list[Any] = []
        change.setattr(torch, "matmul", lambda a, b: [made.append((*a.shape[:-1], b.shape[-1])), matrix(a, b)][1])
        ours = evaluated(torch.float32)
    assert (17, 17 * 3) not in made
    for o, t, e in zip(ours, theirs, exact, strict=True):
        assert_three_way(f"own negatives of {kind}", o, t, e)


def test_training_is_the_same() -> None:
    model = make(temperature=0.2)
    same_training(TARGET, lambda steps: train_towers(lambda x, y, _: loss_of(model, x, y), steps))


WORLD = 2


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_negatives_of_all_devices(kind: str, tmp_path: Path) -> None:
    make(kind)

    def evaluated(rank: int, dtype: torch.dtype) -> list[Tensor]:
        leaves = texts(dtype, seed=100 * rank)
        value = loss_of(make(kind, negatives_cross_device=True), *leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    same_on_ranks(TARGET, tmp_path, evaluated, WORLD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_the_loss_has_the_library_s_dtype(dtype: torch.dtype, autocast: bool, alone: bool) -> None:
    model, given = make(), [t.detach() for t in texts(dtype)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        theirs = loss_of(model, *given, no_in_batch_neg_flag=alone)
        with ccu_fast.patch.applied(TARGET):
            ours = loss_of(model, *given, no_in_batch_neg_flag=alone)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def doubled(model: Any, name: str) -> Any:
    """A method of a user's own in a subclass."""
    own = getattr(type(model), name)

    @functools.wraps(own)
    def users(self: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * own(self, *args, **kwargs)

    model.__class__ = type("Users", (type(model),), {name: users})
    return model


def with_attribute(name: str, value: Any) -> Any:
    model = make()
    setattr(model, name, value)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "its own scores": lambda: doubled(make(), "compute_score"),
    "its own similarity": lambda: doubled(make(), "_compute_similarity"),
    "its own loss": lambda: doubled(make(), "compute_loss"),
    "another cross entropy": lambda: with_attribute("cross_entropy", nn.CrossEntropyLoss(label_smoothing=0.1)),
    "a temperature for each row": lambda: with_attribute("temperature", torch.linspace(1, 2, 17)[:, None]),
    "evaluation": lambda: make().eval(),
}


@pytest.mark.parametrize("name", ["compute_score", "_compute_similarity", "get_local_score", "compute_local_score"])
def test_scores_of_a_user_s_own_for_each_query_stay_with_the_library(name: str) -> None:
    model, given = doubled(make(), name), [t.detach() for t in texts()]
    theirs = loss_of(model, *given, no_in_batch_neg_flag=True)
    with ccu_fast.patch.applied(TARGET):
        ours = loss_of(model, *given, no_in_batch_neg_flag=True)
    torch.testing.assert_close(ours, theirs, **({} if name == "compute_local_score" else {"rtol": 0, "atol": 0}))


def reads_scores(name: str, on: str) -> Any:
    """A model whose own function for a loss adds a penalty for its scores."""
    model = make()
    own = getattr(type(model), name)

    def users(self: Any, *args: Any, **kwargs: Any) -> Any:
        scores, loss = own(self, *args, **kwargs)
        return scores, loss + scores.pow(2).mean()

    if on == "object":
        setattr(model, name, functools.partial(users, model))
    else:
        model.__class__ = type("Users", (type(model),), {name: users})
    return model


@pytest.mark.parametrize("on", ["object", "subclass"])
@pytest.mark.parametrize("name", ["_compute_in_batch_neg_loss", "_compute_cross_device_neg_loss"])
def test_scores_that_a_user_s_loss_reads_stay_with_the_library(name: str, on: str, tmp_path: Path) -> None:
    model = reads_scores(name, on)

    def work(rank: int) -> None:
        model.negatives_cross_device = "cross" in name
        model.process_rank, model.world_size = rank, WORLD
        given = [t.detach() for t in texts(seed=100 * rank)]
        left_alone(TARGET, lambda: loss_of(model, *given))
        assert torch.isfinite(loss_of(model, *given))

    if "cross" in name:
        on_ranks(WORLD, tmp_path, work)
    else:
        work(0)


def test_scores_that_a_user_s_encode_reads_stay_with_the_library() -> None:
    model = make()
    kind, seen = type(model), []

    class Users(kind):  # type: ignore[misc, valid-type]
        def encode(self, features: Any) -> Any:
            reps = super().encode(features)
            scores, _ = self._compute_in_batch_neg_loss(reps[:1], reps)
            seen.append(scores.shape)
            return reps

    model.__class__ = Users
    given = [t.detach() for t in texts()]
    left_alone(TARGET, lambda: loss_of(model, *given))
    assert seen == 2 * [(1, 17), (1, 51)]


def test_scores_that_a_wrapper_reads_stay_with_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that somebody put around the patched function."""
    model, given = make(), [t.detach() for t in texts()]
    base = importlib.import_module("FlagEmbedding.abc.finetune.embedder.AbsModeling").AbsEmbedderModel
    theirs = loss_of(model, *given)
    with counted(TARGET) as calls, monkeypatch.context() as change:
        below, seen = base._compute_in_batch_neg_loss, []

        def users(*args: Any, **kwargs: Any) -> Any:
            scores, loss = below(*args, **kwargs)
            seen.append(scores.shape)
            return scores, loss

        change.setattr(base, "_compute_in_batch_neg_loss", users)
        assert torch.equal(loss_of(model, *given), theirs)
    assert calls.kernels == 0
    assert seen == [(17, 51)]


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_is_not_the_stock_one_stays_with_the_library(case: str) -> None:
    model, given = MODELS[case](), [t.detach() for t in texts()]
    left_alone(TARGET, lambda: loss_of(model, *given))


CALLS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "a teacher": lambda m, x, y: loss_of(m, x, y, teacher_scores=[1.0, 0.5, 0.0] * 17),
    "passages of no query": lambda m, x, y: loss_of(m, x, y[:-1]),
    "more queries than passages": lambda m, x, y: loss_of(m, x, y[:5]),
    "meta": lambda m, x, y: loss_of(m, x.to("meta"), y.to("meta")),
    "func.grad": lambda m, x, y: torch.func.grad(lambda q: loss_of(m, q, y))(x),
    "scores that somebody reads": lambda m, x, y: m._compute_in_batch_neg_loss(x, y)[0],
    "scores of another kind": lambda m, x, y: m._compute_in_batch_neg_loss(
        x, y, compute_score_func=lambda q, p: (q @ p.T).tanh()
    )[1],
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_is_not_understood_stays_with_the_library(case: str) -> None:
    model, given = make(), [t.detach() for t in texts()]
    left_alone(TARGET, lambda: CALLS[case](model, *given))


def test_speed() -> None:
    model, given = make(temperature=0.02), [unit(n, 384, seed=n).requires_grad_() for n in (1024, 8192)]
    for what, alone in (("negatives of the batch", False), ("own negatives alone", True)):
        speed(
            TARGET,
            f"forward + backward of 1024 queries and 8192 passages, D = 384, {what}",
            lambda: loss_of(model, *given, no_in_batch_neg_flag=alone).backward(),  # noqa: B023
            rounds=3,
        )
