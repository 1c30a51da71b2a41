"""info-nce-pytorch, patched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ccu_fast
from tests.support.drop_in import counted, left_alone, library, same_numbers, same_training, speed, train_towers, unit


def module() -> Any:
    return library("info_nce")


def keys(kind: str, dtype: torch.dtype) -> list[Tensor]:
    counts = {"others": (23, 23), "keys": (23, 23, 40), "one key": (23, 23, 1)}[kind]
    return [(1.5 * unit(n, 12, seed=i, dtype=dtype)).requires_grad_() for i, n in enumerate(counts)]


KINDS = ["others", "keys", "one key"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_has_the_same_numbers(kind: str, reduction: str) -> None:
    loss = module().InfoNCE(temperature=0.1, reduction=reduction)

    def problem(dtype: torch.dtype) -> Any:
        leaves = keys(kind, dtype)
        weights = torch.linspace(1, 2, 23, dtype=dtype)
        return lambda: (weights * loss(*leaves)).sum() if reduction == "none" else loss(*leaves), leaves

    same_numbers("info_nce", problem)


def test_training_is_the_same() -> None:
    loss = module()

    def train(steps: int) -> list[float]:
        return train_towers(lambda x, y, scale: loss.info_nce(x, y, temperature=1 / scale), steps)

    same_training("info_nce", train)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_has_the_library_s_dtype(kind: str, dtype: torch.dtype, autocast: bool) -> None:
    loss = module().InfoNCE()
    given = [t.detach() for t in keys(kind, dtype)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        theirs = loss(*given)
        with counted("info_nce") as calls:
            ours = loss(*given)
    assert ours.dtype == theirs.dtype
    assert calls.kernels > 0 or dtype == torch.float64  # which the reference serves
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_a_gradient_penalty() -> None:
    loss = module().InfoNCE()

    def penalty() -> Tensor:
        leaves = keys("keys", torch.float32)
        grads = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        second: Tensor = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)[0]
        return second

    theirs = penalty()
    with ccu_fast.patch.applied("info_nce"):
        torch.testing.assert_close(penalty(), theirs, rtol=1e-4, atol=1e-5)


CALLS: dict[str, Callable[[Any, Tensor], Any]] = {
    "keys of each query": lambda f, x: f(x, x, torch.stack([x, x], 1), negative_mode="paired"),
    "no keys": lambda f, x: f(x, x, x[:0]),
    "another width": lambda f, x: f(x, x, x[:, :3]),
    "another mode": lambda f, x: f(x, x, x, negative_mode="all"),
    "another reduction": lambda f, x: f(x, x, reduction="median"),
    "three dimensions": lambda f, x: f(x[None], x[None]),
    "another number of positives": lambda f, x: f(x, x[1:]),
    "temperature 0": lambda f, x: f(x, x, temperature=0),
    "a temperature for each row": lambda f, x: f(x, x, temperature=torch.linspace(1, 2, 9)[:, None]),
    "integers": lambda f, x: f((9 * x).long(), (9 * x).long()),
    "meta": lambda f, x: f(x.to("meta"), x.to("meta")),
    "func.grad": lambda f, x: torch.func.grad(lambda q: f(q, x))(x),
    "vmap": lambda f, x: torch.vmap(lambda q: f(q, x))(torch.stack([x, x])),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_not_understood_stays_with_the_library(call: str) -> None:
    loss = module()

    def outcome() -> Any:
        try:
            return CALLS[call](loss.info_nce, unit(9, 8))
        except (ZeroDivisionError, UnboundLocalError):
            return None

    left_alone("info_nce", outcome)


@pytest.mark.parametrize("name", ["normalize", "transpose"])
def test_a_function_that_somebody_replaces_is_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = module()
    own = getattr(loss, name)
    monkeypatch.setattr(loss, name, lambda *args: own(*args))
    left_alone("info_nce", lambda: loss.InfoNCE()(unit(9, 8), unit(9, 8)))


@pytest.mark.parametrize("keys", [0, 65536])
def test_speed(keys: int) -> None:
    loss = module().InfoNCE()
    n = 256 if keys else 4096
    given = [unit(n, 128, seed=i).requires_grad_() for i in range(2)]
    negatives = [unit(keys, 128, seed=2)] if keys else []
    what = f"{keys} unpaired negatives" if keys else "other positives as negatives"
    speed(
        "info_nce", f"InfoNCE forward + backward, N = {n}, D = 128, {what}", lambda: loss(*given, *negatives).backward()
    )
