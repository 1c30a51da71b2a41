"""Operations whose calls torch records: a kernel called past the dispatcher would leave no trace, or read no memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ccu_fast import candidate_losses, l2_normalize


def normalized(x: Tensor) -> Tensor:
    return l2_normalize(x)


def losses(x: Tensor) -> Tensor:
    return candidate_losses(torch.stack([x, 2 * x], 1), x.flip(0), x.roll(1, 0), scale=2.0)


OPERATIONS = pytest.mark.parametrize("operation", [normalized, losses])


@OPERATIONS
@pytest.mark.parametrize(
    "record", [make_fx, lambda f: lambda x: torch.jit.trace(f, x, check_trace=False)], ids=["make_fx", "trace"]
)
def test_a_recorded_call_computes_again(operation: Callable[[Tensor], Tensor], record: Callable[..., Any]) -> None:
    first, second = torch.randn(6, 4), torch.randn(6, 4)
    torch.testing.assert_close(record(operation)(first)(second), operation(second))


@OPERATIONS
def test_fake_tensors_give_fake_results(operation: Callable[[Tensor], Tensor]) -> None:
    with FakeTensorMode() as mode:
        x = torch.randn(6, 4)
        result = operation(x)
    assert result.fake_mode is mode  # type: ignore[attr-defined]
    assert result.shape == operation(torch.randn(6, 4)).shape
