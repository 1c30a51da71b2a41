"""lightly's NTXentLoss, patched, with and without a memory bank."""

from __future__ import annotations

import copy
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

WIDTH = 12
BANKS = [0, (64, WIDTH)]


@pytest.fixture(scope="module")
def made() -> Callable[..., Any]:
    require("lightly")
    torchvision_stub.install()
    kind = library("lightly.loss.ntx_ent_loss").NTXentLoss

    def make(size: Any = 0, **options: Any) -> Any:
        torch.manual_seed(0)
        return kind(memory_bank_size=size, **options)

    return make


def views(dtype: torch.dtype = torch.float32, n: int = 23) -> list[Tensor]:
    return [(1.5 * unit(n, WIDTH, seed=i, dtype=dtype)).requires_grad_() for i in range(2)]


@pytest.mark.parametrize("size", BANKS)
def test_the_loss_has_the_same_numbers(made: Callable[..., Any], size: Any) -> None:
    def problem(dtype: torch.dtype) -> Any:
        loss, leaves = made(size, temperature=0.2).to(dtype), views(dtype)
        return lambda: loss(*leaves), leaves

    same_numbers("lightly", problem)


def test_training_is_the_same(made: Callable[..., Any]) -> None:
    def train(steps: int) -> list[float]:
        loss = made(temperature=0.2)
        return train_towers(lambda x, y, _: loss(x, y), steps)

    same_training("lightly", train)


def test_the_bank_is_filled_as_the_library_fills_it(made: Callable[..., Any]) -> None:
    first = made((64, WIDTH))
    second = copy.deepcopy(first)
    for step in range(5):
        given = [unit(23, WIDTH, seed=10 * step + i).requires_grad_(step != 2) for i in range(2)]
        theirs = first(*given)
        with counted("lightly") as calls:
            ours = second(*given)
        assert calls.kernels > 0
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(first.memory_bank.bank, second.memory_bank.bank)
    assert torch.equal(first.memory_bank.bank_ptr, second.memory_bank.bank_ptr)


@pytest.mark.parametrize("size", BANKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_has_the_library_s_dtype(
    made: Callable[..., Any], size: Any, dtype: torch.dtype, autocast: bool
) -> None:
    loss, given = made(size).to(dtype), [t.detach() for t in views(dtype)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        theirs = loss(*given)
        with ccu_fast.patch.applied("lightly"):
            ours = loss(*given)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


OBJECTS: dict[str, Callable[[Any], Any]] = {
    "cross_entropy": lambda loss: setattr(loss, "cross_entropy", nn.CrossEntropyLoss(label_smoothing=0.1)),
    "sum": lambda loss: setattr(loss, "cross_entropy", nn.CrossEntropyLoss(reduction="sum")),
    "gather_distributed": lambda loss: setattr(loss, "gather_distributed", True),
    "memory_bank": lambda loss: setattr(loss.memory_bank, "forward", lambda output, update: (output, None)),
    "dtype of the bank": lambda loss: loss.double(),
    "order of the bank": lambda loss: setattr(loss.memory_bank, "feature_dim_first", False),
    "temperature of each row": lambda loss: setattr(loss, "temperature", torch.linspace(1, 2, 23)[:, None]),
}


@pytest.mark.parametrize("change", OBJECTS)
def test_an_object_that_is_not_the_stock_one_stays_with_the_library(made: Callable[..., Any], change: str) -> None:
    loss = made((64, WIDTH))
    OBJECTS[change](loss)
    given = [t.detach() for t in views()]
    left_alone("lightly", lambda: loss(*given))


VIEWS: dict[str, Callable[[Any, Tensor], Any]] = {
    "one item": lambda loss, x: loss(x[:1], x[:1]),
    "another number": lambda loss, x: loss(x, x[1:]),
    "three dimensions": lambda loss, x: loss(x[None], x[None]),
    "meta": lambda loss, x: loss(x.to("meta"), x.to("meta")),
    "func.grad": lambda loss, x: torch.func.grad(lambda q: loss(q, x))(x),
}


@pytest.mark.parametrize("change", VIEWS)
def test_views_that_are_not_understood_stay_with_the_library(made: Callable[..., Any], change: str) -> None:
    loss = made()
    left_alone("lightly", lambda: VIEWS[change](loss, unit(9, WIDTH)))


@pytest.mark.parametrize("size", [0, (65536, 128)])
def test_speed(made: Callable[..., Any], size: Any) -> None:
    loss, n = made(size), 256 if size else 2048
    given = [unit(n, 128, seed=i).requires_grad_() for i in range(2)]
    what = f"a memory bank of {size[0]}" if size else "no memory bank"
    speed("lightly", f"NTXentLoss forward + backward, N = {n}, D = 128, {what}", lambda: loss(*given).backward())
