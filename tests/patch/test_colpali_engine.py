"""colpali-engine's bi-encoder losses, patched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ccu_fast
from tests.support import torchvision_stub
from tests.support.drop_in import (
    counted,
    left_alone,
    library,
    require,
    same_numbers,
    same_training,
    speed,
    train_towers,
    unit,
)

KINDS = ["BiEncoderLoss", "BiPairedEncoderLoss"]


@pytest.fixture(scope="module")
def module() -> Any:
    require("colpali_engine")
    torchvision_stub.install()
    return library("colpali_engine.loss.bi_encoder_losses")


def embeddings(dtype: torch.dtype = torch.float32, documents: int = 23) -> list[Tensor]:
    return [unit(n, 12, seed=n + i, dtype=dtype).requires_grad_() for i, n in enumerate((23, documents))]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_has_the_same_numbers(module: Any, kind: str) -> None:
    loss = getattr(module, kind)()

    def problem(dtype: torch.dtype) -> Any:
        leaves = embeddings(dtype)
        return lambda: loss(*leaves), leaves

    same_numbers("colpali_engine", problem)


@pytest.mark.parametrize("offset", [0, 7, 23])
def test_documents_of_several_ranks(module: Any, offset: int) -> None:
    loss = module.BiEncoderLoss(temperature=0.1)

    def problem(dtype: torch.dtype) -> Any:
        leaves = embeddings(dtype, 46)
        return lambda: loss(*leaves, offset), leaves

    same_numbers("colpali_engine", problem)


def test_training_is_the_same(module: Any) -> None:
    loss = module.BiPairedEncoderLoss(temperature=0.2)
    same_training("colpali_engine", lambda steps: train_towers(lambda x, y, _: loss(x, y), steps))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_has_the_library_s_dtype(module: Any, kind: str, dtype: torch.dtype, autocast: bool) -> None:
    loss, given = getattr(module, kind)(temperature=0.1), [t.detach() for t in embeddings(dtype)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        theirs = loss(*given)
        with ccu_fast.patch.applied("colpali_engine"):
            ours = loss(*given)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


CALLS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "filtering": lambda m, x, y: m.BiEncoderLoss(pos_aware_negative_filtering=True)(x, y),
    "more queries than its buffer": lambda m, x, y: m.BiEncoderLoss(max_batch_size=5)(x, y),
    "more queries than documents": lambda m, x, y: m.BiEncoderLoss()(x, y[:5]),
    "positives beyond the documents": lambda m, x, y: m.BiEncoderLoss()(x, y, 7),
    "ignored positives": lambda m, x, y: m.BiEncoderLoss()(x, y, -123),
    "two ways of another shape": lambda m, x, y: m.BiPairedEncoderLoss()(x[:5], y),
    "sigmoid": lambda m, x, y: m.BiSigmoidLoss()(x, y),
    "three dimensions": lambda m, x, y: m.BiEncoderLoss()(x[None], y[None]),
    "another width": lambda m, x, y: m.BiEncoderLoss()(x[:, :3], y),
    "func.grad": lambda m, x, y: torch.func.grad(lambda q: m.BiEncoderLoss()(q, y))(x),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_not_understood_stays_with_the_library(module: Any, call: str) -> None:
    x, y = (t.detach() for t in embeddings())
    left_alone("colpali_engine", lambda: CALLS[call](module, x, y))


def test_the_part_in_the_batch_of_a_loss_with_negatives(module: Any) -> None:
    loss = module.BiNegativeCELoss(in_batch_term_weight=0.5)
    x, y = (t.detach() for t in embeddings())
    negatives = torch.stack([x, y], 1)
    theirs = loss(x, y, negatives)
    with counted("colpali_engine") as calls:
        torch.testing.assert_close(loss(x, y, negatives), theirs)
    assert calls.kernels == 1


def test_a_cross_entropy_of_somebody_else_is_used(module: Any) -> None:
    loss = module.BiEncoderLoss()
    loss.ce_loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    x, y = (t.detach() for t in embeddings())
    left_alone("colpali_engine", lambda: loss(x, y))


def test_speed(module: Any) -> None:
    loss, given = module.BiPairedEncoderLoss(max_batch_size=4096), [unit(4096, 128, seed=i) for i in range(2)]
    leaves = [t.requires_grad_() for t in given]
    speed(
        "colpali_engine",
        "BiPairedEncoderLoss forward + backward, N = 4096, D = 128",
        lambda: loss(*leaves).backward(),
    )
