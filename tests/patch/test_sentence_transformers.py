"""sentence-transformers' ranking losses, patched, over a model that is a table of vectors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import ccu_fast
from tests.support.drop_in import counted, library, same_numbers, same_training, speed, train_towers, unit
from tests.support.tolerance import assert_three_way

WIDTH = 12


class Towers(nn.Module):
    """Stands in for the model: the features are the embeddings."""

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        return features

    def __getitem__(self, index: int) -> nn.Module:
        return self

    def get_embedding_dimension(self) -> int:
        return WIDTH

    get_sentence_embedding_dimension = get_embedding_dimension


class Sub(Tensor):
    pass


def losses() -> Any:
    return library("sentence_transformers.losses")


def forward(loss: Any, columns: list[Tensor]) -> Tensor:
    value: Tensor = loss.compute_loss_from_embeddings(columns, None)
    return value


def kinds() -> dict[str, Callable[[], Any]]:
    module = losses()
    dot = library("sentence_transformers.util").dot_score
    return {
        "one_way": lambda: module.MultipleNegativesRankingLoss(Towers()),
        "dot": lambda: module.MultipleNegativesRankingLoss(Towers(), scale=3.0, similarity_fct=dot),
        "symmetric": lambda: module.MultipleNegativesSymmetricRankingLoss(Towers()),
    }


GTE = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
VARIANTS: dict[str, dict[str, Any]] = {
    "gte": {"directions": GTE},
    "queries": {"directions": ("query_to_doc", "query_to_query")},
    "documents": {"directions": ("query_to_doc", "doc_to_doc")},
    "joint": {"directions": ("query_to_doc", "doc_to_query")},
    "in_batch": {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    "hard": {"hardness_mode": "hard_negatives", "hardness_strength": 5},
    "all": {"hardness_mode": "all_negatives", "hardness_strength": 3.0, "scale": 7.0},
    "no strength": {"hardness_mode": "all_negatives", "hardness_strength": 0.0},
    "gte, in_batch": {"directions": GTE, "hardness_mode": "in_batch_negatives", "hardness_strength": 2.0},
    "per_direction, in_batch": {
        **{"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
        **{"hardness_mode": "in_batch_negatives", "hardness_strength": 2.0},
    },
}


def variant(name: str, kind: str = "MultipleNegativesRankingLoss", **more: Any) -> Any:
    made = getattr(losses(), kind)
    options = VARIANTS.get(name, {})
    if not set(options) <= set(inspect.signature(made).parameters):
        pytest.skip("this version has one direction and no penalties")
    return made(Towers(), **options, **more)


@pytest.mark.parametrize("columns", [2, 4], ids=["pairs", "two_hard_negatives"])
@pytest.mark.parametrize("kind", ["one_way", "dot", "symmetric"])
def test_the_loss_has_the_same_numbers(kind: str, columns: int) -> None:
    make = kinds()[kind]

    def problem(dtype: torch.dtype) -> Any:
        leaves = [(1.5 * unit(23, 12, seed=i, dtype=dtype)).requires_grad_() for i in range(columns)]
        return lambda: forward(make(), leaves), leaves

    same_numbers("sentence_transformers", problem)


def test_training_is_the_same() -> None:
    module = losses()

    def train(steps: int) -> list[float]:
        loss = module.MultipleNegativesRankingLoss(Towers())
        return train_towers(lambda x, y, scale: forward(loss, [x, y]), steps)

    same_training("sentence_transformers", train)


HALF = [torch.float16, torch.bfloat16]


def batch(*dtypes: torch.dtype, grad: bool = False) -> list[Tensor]:
    """A column for each dtype, with the values of bf16."""
    columns = [1.5 * unit(23, WIDTH, seed=i, dtype=torch.bfloat16) for i in range(len(dtypes))]
    return [c.to(dtype).requires_grad_(grad) for c, dtype in zip(columns, dtypes, strict=True)]


def evaluated(loss: Any, columns: list[Tensor], autocast: torch.dtype | None = None) -> list[Tensor]:
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        value = forward(loss, columns)
    return [value.detach(), *torch.autograd.grad(value, columns)]


def same_as_the_library(kind: str, dtypes: list[torch.dtype], autocast: torch.dtype | None = None) -> None:
    """Loss and gradients have the library's dtypes and are at least as near to float64 as the library's."""
    make = kinds()[kind]
    theirs = evaluated(make(), batch(*dtypes, grad=True), autocast)
    with counted("sentence_transformers") as calls:
        ours = evaluated(make(), batch(*dtypes, grad=True), autocast)
    assert calls.kernels > 0
    exact = evaluated(make(), batch(*[torch.float64] * len(dtypes), grad=True))
    for name, o, t, e in zip(["loss", *map(str, dtypes)], ours, theirs, exact, strict=True):
        assert o.dtype == t.dtype, name
        assert_three_way(f"{kind} {name}", o, t, e)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["one_way", "dot", "symmetric"])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """Since version 6 the library widens it before it normalises, and its loss is fp32."""
    same_as_the_library(kind, [dtype] * 3)


@pytest.mark.parametrize("kind", ["one_way", "dot", "symmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(kind: str, dtype: torch.dtype) -> None:
    same_as_the_library(kind, [dtype] * 2, torch.bfloat16)


def test_queries_and_documents_of_different_dtypes() -> None:
    columns = [torch.bfloat16, torch.float32, torch.float16]
    loss = losses().MultipleNegativesRankingLoss(Towers())
    try:
        forward(loss, batch(*columns))
    except RuntimeError:  # before version 6
        with ccu_fast.patch.applied("sentence_transformers"), pytest.raises(RuntimeError):
            forward(loss, batch(*columns))
    else:
        same_as_the_library("one_way", columns)


@pytest.mark.parametrize("name", ["usual", "gte", "in_batch"])
def test_a_gradient_penalty(name: str) -> None:
    """create_graph=True: the gradient is differentiated again."""
    loss = variant(name)

    def penalty(dtype: torch.dtype) -> Tensor:
        columns = batch(dtype, dtype, dtype, grad=True)
        grads = torch.autograd.grad(forward(loss, columns), columns, create_graph=True)
        second: Tensor = torch.autograd.grad(sum(g.square().sum() for g in grads), columns)[0]
        return second

    theirs, exact = penalty(torch.float32), penalty(torch.float64)
    with counted("sentence_transformers") as calls:
        ours = penalty(torch.float32)
    assert calls.kernels > 0
    assert_three_way("second derivative", ours, theirs, exact)


def tanh(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T).tanh()


OBJECTS: dict[str, Callable[[Any], Any]] = {
    "similarity_fct": lambda loss: setattr(loss, "similarity_fct", tanh),
    "similarity_fct that wraps": lambda loss: setattr(loss, "similarity_fct", doubled(loss.similarity_fct)),
    "scale for each row": lambda loss: setattr(loss, "scale", torch.linspace(1, 20, 9)[:, None]),
    "scale for each column": lambda loss: setattr(loss, "scale", torch.linspace(1, 20, 27)),
    "scale for each pair": lambda loss: setattr(loss, "scale", torch.linspace(1, 20, 9 * 27).reshape(9, 27)),
    "integer tensor as scale": lambda loss: setattr(loss, "scale", torch.tensor(20)),
    "scale in double": lambda loss: setattr(loss, "scale", torch.tensor([20.0], dtype=torch.float64)),
    "infinite scale": lambda loss: setattr(loss, "scale", float("inf")),
    "True as scale": lambda loss: setattr(loss, "scale", True),
    "cross_entropy_loss": lambda loss: setattr(loss, "cross_entropy_loss", nn.CrossEntropyLoss(label_smoothing=0.1)),
    "directions without the positives": lambda loss: setattr(loss, "directions", ("query_to_query", "doc_to_doc")),
    "directions at a negative scale": lambda loss: vars(loss).update(directions=GTE, scale=-2.0),
    "directions at a tensor's scale": lambda loss: vars(loss).update(directions=GTE, scale=torch.tensor(20.0)),
    "directions of which one has no positives": lambda loss: vars(loss).update(
        directions=GTE, partition_mode="per_direction"
    ),
    "hardness_mode that is unknown": lambda loss: vars(loss).update(hardness_mode="some", hardness_strength=2.0),
    "hardness_mode with a tensor": lambda loss: vars(loss).update(
        hardness_mode="all_negatives", hardness_strength=torch.tensor(2.0)
    ),
}


def doubled(similarity: Any) -> Any:
    @functools.wraps(similarity)
    def wrapper(a: Tensor, b: Tensor) -> Tensor:
        value: Tensor = 2 * similarity(a, b)
        return value

    return wrapper


@pytest.mark.parametrize("change", OBJECTS)
def test_an_object_that_is_not_the_stock_one_stays_with_the_library(change: str) -> None:
    attribute = change.split()[0]
    loss = losses().MultipleNegativesRankingLoss(Towers())
    if attribute in ("cross_entropy_loss", "directions", "hardness_mode") and not hasattr(loss, attribute):
        pytest.skip(f"this version has no {attribute}")
    OBJECTS[change](loss)
    stays_with_the_library(lambda columns: forward(loss, columns))


def test_a_subclass_keeps_what_it_changes() -> None:
    base = losses().MultipleNegativesRankingLoss

    class Warm(base):  # type: ignore[misc, valid-type]
        """Its scale and similarity are its own."""

        scale = property(lambda self: 3.0, lambda self, value: None)

        def similarity_fct(self, a: Tensor, b: Tensor) -> Tensor:
            return tanh(a, b)

    loss = Warm(Towers())
    del loss.similarity_fct
    stays_with_the_library(lambda columns: forward(loss, columns))

    class Twice(base):  # type: ignore[misc, valid-type]
        scale = property(lambda self: 3.0, lambda self, value: None)

        def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any) -> Tensor:
            value: Tensor = 2 * super().compute_loss_from_embeddings([2 * e for e in embeddings], labels)
            return value

    columns = [unit(9, 8, seed=i) for i in range(3)]
    before = forward(Twice(Towers()), columns)
    with counted("sentence_transformers") as calls:
        ours = forward(Twice(Towers()), columns)
    assert calls.kernels > 0
    torch.testing.assert_close(ours, before)


def stays_with_the_library(evaluate: Callable[[list[Tensor]], Tensor]) -> None:
    """The same bits, or the same error, and no kernel of ours."""

    def outcome() -> Any:
        try:
            return evaluate([unit(9, 8, seed=i) for i in range(4)])
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    before = outcome()
    with counted("sentence_transformers") as calls:
        after = outcome()
    assert calls.kernels == 0
    if isinstance(before, Tensor):
        assert type(after) is type(before)
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert before.is_meta or torch.equal(torch.nan_to_num(after), torch.nan_to_num(before))
    else:
        assert after == before


def dual(columns: list[Tensor]) -> Tensor:
    with forward_ad.dual_level():
        first = forward_ad.make_dual(columns[0], torch.ones_like(columns[0]))
        tangent = forward_ad.unpack_dual(forward(one_way(), [first, *columns[1:]])).tangent
        assert tangent is not None
        return tangent


def one_way() -> Any:
    return losses().MultipleNegativesRankingLoss(Towers())


EMBEDDINGS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "meta": lambda columns: forward(one_way(), [c.to("meta") for c in columns]),
    "subclass": lambda columns: forward(one_way(), [c.as_subclass(Sub) for c in columns]),
    "integers": lambda columns: forward(one_way(), [(9 * c).long() for c in columns]),
    "sparse": lambda columns: forward(one_way(), [c.to_sparse() for c in columns]),
    "more hard negatives than queries": lambda columns: forward(one_way(), [*columns[:2], torch.cat(columns[2:])]),
    "three dimensions": lambda columns: forward(one_way(), [torch.stack([c, c]) for c in columns]),
    "one dimension": lambda columns: forward(one_way(), [c[0] for c in columns]),
    "no items": lambda columns: forward(one_way(), [c[:0] for c in columns]),
    "one tensor": lambda columns: forward(one_way(), torch.stack(columns)),  # type: ignore[arg-type]
    "queries alone": lambda columns: forward(one_way(), columns[:1]),
    "vmap": lambda columns: torch.vmap(lambda x: forward(one_way(), [x, x]))(torch.stack(columns)),
    "func.grad": lambda columns: torch.func.grad(lambda x: forward(one_way(), [x, *columns[1:]]))(columns[0]),
    "forward mode": dual,
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings_that_are_not_understood_stay_with_the_library(kind: str) -> None:
    stays_with_the_library(EMBEDDINGS[kind])


def test_speed() -> None:
    loss = losses().MultipleNegativesRankingLoss(Towers())
    columns = [unit(4096, 384, seed=i).requires_grad_() for i in range(2)]
    speed(
        "sentence_transformers",
        "MultipleNegativesRankingLoss forward + backward, N = 4096, D = 384",
        lambda: forward(loss, columns).backward(),
    )
