"""sentence-transformers' ranking losses, patched, over a model that is a table of vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ccu_fast
from tests.support.drop_in import library, same_numbers, same_training, speed, train_towers, unit


class Towers(nn.Module):
    """Stands in for the model: the features are the embeddings."""

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        return features


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


def test_what_only_the_library_has_stays_with_it() -> None:
    columns = [unit(9, 8, seed=i) for i in range(3)]
    weird = losses().MultipleNegativesRankingLoss(Towers(), similarity_fct=lambda a, b: (a @ b.T).tanh())
    before = forward(weird, columns)
    with ccu_fast.patch.applied("sentence_transformers"):
        assert torch.equal(forward(weird, columns), before)


def test_speed() -> None:
    loss = losses().MultipleNegativesRankingLoss(Towers())
    columns = [unit(4096, 384, seed=i).requires_grad_() for i in range(2)]
    speed(
        "sentence_transformers",
        "MultipleNegativesRankingLoss forward + backward, N = 4096, D = 384",
        lambda: forward(loss, columns).backward(),
    )
