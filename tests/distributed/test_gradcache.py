"""Gradient caching in one process: the gradients of the uncached pass, with the same random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ccu_fast
from ccu_fast.distributed import cached_step

pytestmark = pytest.mark.usefixtures("one_thread")


def towers() -> tuple[nn.Module, nn.Module, nn.Parameter]:
    torch.manual_seed(2)
    image, text = (nn.Sequential(nn.Linear(d, 16), nn.Dropout(0.4), nn.GELU(), nn.Linear(16, 8)) for d in (5, 6))
    return image, text, nn.Parameter(torch.tensor(1.0))


def gradients(*modules: Any) -> list[Tensor]:
    found = [p.grad for m in modules for p in (m.parameters() if isinstance(m, nn.Module) else [m])]
    assert all(g is not None for g in found)
    return found


def uncached(
    image: nn.Module,
    text: nn.Module,
    scale: nn.Parameter,
    x: Tensor,
    y: Tensor,
    chunk: int,
    loss: Callable[..., Tensor],
) -> Tensor:
    """One graph over the same chunks in the same order: the same dropout."""
    z = [torch.cat([tower(part) for part in t.split(chunk)]) for tower, t in ((image, x), (text, y))]
    value = loss(*z)
    value.backward()
    return value.detach()


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_gradients_are_those_of_the_uncached_pass(chunk: int) -> None:
    x, y = torch.randn(10, 5), torch.randn(10, 6)
    answers = []
    for cached in (False, True):
        image, text, scale = towers()

        def loss(a: Tensor, b: Tensor, scale: nn.Parameter = scale) -> Tensor:
            return ccu_fast.info_nce(a, b, scale=scale.exp())

        torch.manual_seed(5)
        if cached:
            value = cached_step(loss, [(image, x), (text, y)], chunk)
            assert not value.requires_grad
        else:
            value = uncached(image, text, scale, x, y, chunk, loss)
        answers.append([value, *gradients(image, text, scale), torch.rand(3)])  # the random state after it, too
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other)


def test_only_one_chunk_keeps_activations() -> None:
    graphs = []

    class Spy(nn.Linear):
        def forward(self, t: Tensor) -> Tensor:
            graphs.append((len(t), torch.is_grad_enabled()))
            return super().forward(t)

    cached_step(lambda z: z.square().sum(), [(Spy(3, 2), torch.randn(7, 3))], 3)
    assert graphs == [(3, False), (3, False), (1, False), (3, True), (3, True), (1, True)]


def test_one_module_for_both_towers_and_nested_inputs() -> None:
    module = nn.Linear(3, 2)
    data = {"a": torch.randn(5, 3), "rest": [torch.randn(5, 3), "kept as it is"]}

    def tower(inputs: dict[str, Any]) -> Tensor:
        assert inputs["rest"][1] == "kept as it is"
        return module(inputs["a"]) * module(inputs["rest"][0])

    z = tower(data)
    ccu_fast.info_nce(z, z, scale=2.0).backward()
    expected = gradients(module)
    module.zero_grad()
    cached_step(lambda a, b: ccu_fast.info_nce(a, b, scale=2.0), [(tower, data), (tower, data)], 2)
    for got, truth in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(got, truth)


def test_a_scaled_backward_and_autocast() -> None:
    module, x = nn.Linear(3, 2), torch.randn(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        module(x).square().sum().backward()
    expected = [8 * g for g in gradients(module)]
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        cached_step(lambda z: z.square().sum(), [(module, x)], 2, backward=lambda loss: (8 * loss).backward())
    for got, truth in zip(gradients(module), expected, strict=True):
        torch.testing.assert_close(got, truth, rtol=0.02, atol=0.02)


def test_a_tower_the_loss_does_not_use() -> None:
    used, unused = nn.Linear(3, 2), nn.Linear(3, 2)
    cached_step(lambda a, b: a.sum(), [(used, torch.randn(4, 3)), (unused, torch.randn(4, 3))], 2)
    assert all(bool(g.any()) for g in gradients(used))
    assert not any(bool(g.any()) for g in gradients(unused))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 2), "towers: expected at least one pair"),
        (([(nn.Linear(3, 2), torch.randn(4, 3))], 0), "chunk: expected an int at least 1, got 0"),
        (
            ([(nn.Linear(3, 2), [torch.randn(4, 3), torch.randn(5, 3)])], 2),
            r"towers\[0\]: expected tensors with the same",
        ),
        (([(nn.Linear(3, 2), torch.randn(0, 3))], 2), r"towers\[0\]: expected .* at least 1, got \[0\]"),
        (([(nn.Linear(3, 2), "text")], 2), r"towers\[0\]: expected inputs with tensors"),
    ],
)
def test_bad_arguments(arguments: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        cached_step(lambda z: z.sum(), *arguments)
