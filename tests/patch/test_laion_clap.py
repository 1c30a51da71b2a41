"""laion-clap's ClipLoss, patched."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ccu_fast
from tests.support import torchvision_stub
from tests.support.drop_in import (
    left_alone,
    require,
    same_numbers,
    same_on_ranks,
    same_training,
    speed,
    train_towers,
    unit,
)

TARGET, WIDTH, WORLD = "laion_clap", 12, 2


@pytest.fixture(scope="module")
def module() -> Any:
    """The part with the loss, under the name by which the package's own training imports it.

    The package itself loads tokenizers from the network when it is imported, this part does not.
    """
    require("laion_clap")
    torchvision_stub.install()
    spec = importlib.util.find_spec("laion_clap")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = spec.submodule_search_locations[0]
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("clap_module.loss")


def features(n: int, dtype: torch.dtype = torch.float32, seed: int = 0, mlp: bool = False) -> list[Tensor]:
    leaves = [unit(n, WIDTH, seed=seed + i, dtype=dtype).requires_grad_() for i in range(4 if mlp else 2)]
    return [*leaves, *(torch.tensor(t, dtype=dtype, requires_grad=True) for t in ((9.0, 5.0) if mlp else (9.0,)))]


def loss_of(loss: Any, given: list[Tensor]) -> Tensor:
    audio, text, *rest = given
    if len(rest) == 1:
        value: Tensor = loss(audio, text, rest[0])
        return value
    audio_mlp, text_mlp, scale, other = rest
    value = loss(audio, text, scale, other, audio_features_mlp=audio_mlp, text_features_mlp=text_mlp)
    return value


@pytest.mark.parametrize("mlp", [False, True])
def test_the_loss_has_the_same_numbers(module: Any, mlp: bool) -> None:
    loss = module.ClipLoss(mlp_loss=mlp)

    def problem(dtype: torch.dtype) -> Any:
        leaves = features(23, dtype, mlp=mlp)
        return lambda: loss_of(loss, leaves), leaves

    same_numbers(TARGET, problem)


@pytest.mark.parametrize("local_loss", [False, True])
@pytest.mark.parametrize("gather_with_grad", [False, True])
@pytest.mark.parametrize("mlp", [False, True])
def test_several_processes(module: Any, local_loss: bool, gather_with_grad: bool, mlp: bool, tmp_path: Path) -> None:
    def evaluated(rank: int, dtype: torch.dtype) -> list[Tensor]:
        loss = module.ClipLoss(local_loss, gather_with_grad, rank=rank, world_size=WORLD, mlp_loss=mlp)
        leaves = features(7, dtype, seed=50 * rank, mlp=mlp)
        value = loss_of(loss, leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    same_on_ranks(TARGET, tmp_path, evaluated, WORLD)


def test_training_is_the_same(module: Any) -> None:
    loss = module.ClipLoss()
    same_training(TARGET, lambda steps: train_towers(loss, steps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_has_the_library_s_dtype(module: Any, dtype: torch.dtype, autocast: bool) -> None:
    loss, given = module.ClipLoss(), [t.detach() for t in features(23, dtype)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        theirs = loss_of(loss, given)
        with ccu_fast.patch.applied(TARGET):
            ours = loss_of(loss, given)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


CALLS: dict[str, Callable[[Any, list[Tensor]], Any]] = {
    "weights": lambda m, given: loss_of(m.ClipLoss(mlp_loss=True, weight_loss_kappa=1), given),
    "a rank without a group": lambda m, given: loss_of(m.ClipLoss(world_size=2), [*given[:2], given[4]]),
    "a scale for each row": lambda m, given: m.ClipLoss()(given[0], given[1], torch.linspace(1, 2, 9)[:, None]),
    "texts of another number": lambda m, given: m.ClipLoss()(given[0], given[1][:5], given[4]),
    "func.grad": lambda m, given: torch.func.grad(lambda x: m.ClipLoss()(x, given[1], given[4]))(given[0]),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_is_not_understood_stays_with_the_library(module: Any, case: str) -> None:
    given = [t.detach() for t in features(9, mlp=True)]
    left_alone(TARGET, lambda: CALLS[case](module, given))


def test_a_loss_that_somebody_replaced_is_left_alone(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = module.ClipLoss.forward
    monkeypatch.setattr(
        module.ClipLoss, "forward", functools.wraps(own)(lambda *args, **options: 2 * own(*args, **options))
    )
    with pytest.warns(UserWarning, match="ClipLoss.forward is not clap_module's own"):
        assert ccu_fast.patch.apply(TARGET) == []


def test_speed(module: Any) -> None:
    loss, given = module.ClipLoss(), [unit(4096, 512, seed=i).requires_grad_() for i in range(2)]
    speed(
        TARGET,
        "ClipLoss forward + backward, B = 4096, D = 512",
        lambda: loss(*given, torch.tensor(10.0)).backward(),
        rounds=3,
    )
