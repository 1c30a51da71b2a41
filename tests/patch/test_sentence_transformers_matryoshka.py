"""MatryoshkaLoss of sentence-transformers, patched, where somebody stands between it and the loss inside."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ccu_fast
from tests.patch.test_sentence_transformers import WIDTH, Towers, losses
from tests.patch.test_sentence_transformers_variants import matryoshka
from tests.support.drop_in import counted, left_alone, unit

TARGET = "sentence_transformers"
DIMS = 3


def texts() -> list[dict[str, Tensor]]:
    return [{"sentence_embedding": 1.5 * unit(23, WIDTH, seed=i)} for i in range(2)]


def evaluated(loss: Any) -> Tensor:
    value: Tensor = loss(texts(), None)
    return value


def distance(embeddings: list[Tensor]) -> Tensor:
    """A loss of the user's own, which is another in every dimension."""
    return (embeddings[0] - embeddings[1]).pow(2).sum(1).mean() + embeddings[0].shape[1]


def own_forward(self: Any) -> Callable[..., Tensor]:
    return lambda features, labels: distance([self.model(f)["sentence_embedding"] for f in features])


def with_hook(of: str, kind: str) -> Any:
    loss = matryoshka()
    module = loss.loss if of == "loss" else loss.model
    if kind == "forward":
        module.register_forward_hook(
            lambda module, given, found: (
                found.clamp(max=2.0) if of == "loss" else {"sentence_embedding": found["sentence_embedding"] + 0.1}
            )
        )
    elif kind == "pre":
        module.register_forward_pre_hook(lambda module, given: None)
    elif kind == "backward pre":
        module.register_full_backward_pre_hook(lambda module, grad: None)
    else:
        module.register_full_backward_hook(lambda module, before, after: None)
    return loss


@pytest.mark.parametrize("kind", ["forward", "pre", "backward pre", "backward"])
@pytest.mark.parametrize("of", ["loss", "model"])
def test_hooks_hear_of_every_dimension(of: str, kind: str) -> None:
    loss = with_hook(of, kind)
    theirs = evaluated(loss)
    with counted(TARGET) as calls:
        ours = evaluated(loss)
    assert calls.kernels == DIMS
    torch.testing.assert_close(ours, theirs)


def test_a_hook_of_all_modules_hears_of_every_dimension() -> None:
    loss, heard = matryoshka(), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, given, found: heard.append(type(m)))
    try:
        evaluated(loss)
        theirs = heard.count(type(loss.loss))
        with ccu_fast.patch.applied(TARGET):
            evaluated(loss)
        assert heard.count(type(loss.loss)) == 2 * theirs == 2 * DIMS
    finally:
        handle.remove()


def forward_on_object() -> Any:
    loss = matryoshka()
    loss.loss.forward = own_forward(loss.loss)
    return loss


def formula_on_object() -> Any:
    loss = matryoshka()
    loss.loss.compute_loss_from_embeddings = lambda embeddings, labels: distance(embeddings)
    return loss


@pytest.mark.parametrize("make", [forward_on_object, formula_on_object])
def test_functions_on_the_object_are_the_user_s(make: Callable[[], Any]) -> None:
    loss = make()
    left_alone(TARGET, lambda: evaluated(loss))
    assert evaluated(loss) > WIDTH + 8 + 4


REPLACED: dict[str, Any] = {
    "forward": lambda self, features, labels: own_forward(self)(features, labels),
    "compute_loss_from_embeddings": lambda self, embeddings, labels: distance(embeddings),
}


@pytest.mark.parametrize("name", REPLACED)
def test_functions_put_into_the_class_after_the_patch_are_the_user_s(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, kind = matryoshka(), losses().MultipleNegativesRankingLoss
    with monkeypatch.context() as change:
        change.setattr(kind, name, REPLACED[name])
        theirs = evaluated(loss)
    with counted(TARGET) as calls, monkeypatch.context() as change:
        change.setattr(kind, name, REPLACED[name])
        assert torch.equal(evaluated(loss), theirs)
    assert calls.kernels == 0


def test_a_forward_put_into_the_class_before_the_patch_is_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = matryoshka()
    monkeypatch.setattr(losses().MultipleNegativesRankingLoss, "forward", REPLACED["forward"])
    left_alone(TARGET, lambda: evaluated(loss))


def test_a_formula_put_into_the_class_before_the_patch_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "compute_loss_from_embeddings"
    monkeypatch.setattr(losses().MultipleNegativesRankingLoss, name, REPLACED[name])
    with pytest.warns(UserWarning, match=f"{name} is not sentence_transformers's own"):
        assert ccu_fast.patch.apply(TARGET) == []


@pytest.mark.parametrize("how", ["in place", "forward"])
def test_a_compiled_loss_has_the_same_numbers(how: str) -> None:
    torch._dynamo.reset()
    loss = matryoshka()
    theirs = evaluated(loss)
    if how == "in place":
        loss.loss.compile(backend="eager")
    else:
        loss.loss.forward = torch.compile(loss.loss.forward, backend="eager")
    with ccu_fast.patch.applied(TARGET):
        ours = evaluated(loss)
    torch.testing.assert_close(ours, theirs)


def test_a_shrink_of_the_user_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = matryoshka()
    module = importlib.import_module(type(loss).__module__)
    monkeypatch.setattr(module, "shrink", lambda tensor, dim: tensor[..., -dim:])
    theirs = evaluated(loss)
    with counted(TARGET) as calls:
        ours = evaluated(loss)
    assert calls.kernels == DIMS
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("how", ["class", "method"])
def test_a_decorator_of_the_user_s_own(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = matryoshka()
    module = importlib.import_module(type(loss).__module__)
    decorator = module.ForwardDecorator
    own = decorator.__call__

    def call(self: Any, features: Any) -> Any:
        found = own(self, features)
        return {**found, "sentence_embedding": found["sentence_embedding"] + 0.5}

    if how == "class":
        monkeypatch.setattr(module, "ForwardDecorator", type("Users", (decorator,), {"__call__": call}))
    else:
        monkeypatch.setattr(decorator, "__call__", call)
    theirs = evaluated(loss)
    with counted(TARGET) as calls:
        ours = evaluated(loss)
    assert calls.kernels == DIMS
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("weight", [math.inf, -math.inf, math.nan])
def test_a_weight_without_end_is_the_library_s(weight: float) -> None:
    loss = matryoshka(matryoshka_weights=[1.0, weight, 2.0])
    theirs = evaluated(loss)
    with counted(TARGET) as calls:
        ours = evaluated(loss)
    assert calls.kernels == DIMS
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_what_nobody_asked_for_is_computed_by_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the loss inside not come to its embeddings, its value is of one dimension and not returned."""
    loss = matryoshka()
    theirs = evaluated(loss)
    module = importlib.import_module("ccu_fast.patch.sentence_transformers")
    monkeypatch.setattr(module, "asked_of", lambda loss: None)
    with counted(TARGET) as calls:
        ours = evaluated(loss)
    assert calls.kernels == 1 + DIMS
    torch.testing.assert_close(ours, theirs)


CALLS: dict[str, Callable[[Any], Any]] = {
    "no labels": lambda loss: loss(texts()),
    "nothing": lambda loss: loss(),
    "too much": lambda loss: loss(texts(), None, None),
    "unknown": lambda loss: loss(texts(), None, weight=2),
    "an iterator": lambda loss: loss(iter(texts()), None),
    "formula without labels": lambda loss: loss.loss.compute_loss_from_embeddings([unit(5, WIDTH)] * 2),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_wrong_call_is_the_library_s_error(case: str) -> None:
    loss, errors = matryoshka(), []
    for patched in (False, True):
        if patched:
            ccu_fast.patch.apply(TARGET)
        try:
            with pytest.raises((TypeError, IndexError, ValueError)) as error:
                CALLS[case](loss)
        finally:
            ccu_fast.patch.revert(TARGET)
        errors.append((error.type, str(error.value)))
    assert errors[1] == errors[0]


def test_one_matryoshka_in_another_is_the_library_s() -> None:
    """Which cuts embeddings that are cut already."""

    class Embedding(Towers):
        def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
            return dict(features)

    model = Embedding()
    inner = losses().MultipleNegativesRankingLoss(model)
    middle = losses().MatryoshkaLoss(model, inner, [8, 4])
    loss = losses().MatryoshkaLoss(model, middle, [WIDTH, 8])
    with counted(TARGET) as calls, pytest.raises(ValueError, match="Dimension 8 in matryoshka_dims cannot be greater"):
        evaluated(loss)
    assert calls.kernels == 2  # the dimensions of the one inside, before the next cut is too long
