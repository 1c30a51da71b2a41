"""Behaviour under settings of the process: default dtype and device, matmul precision, autocast."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ccu_fast
from tests.support.forked import in_child

pytestmark = pytest.mark.usefixtures("native")


# In a process of its own: a wrong buffer corrupts the heap.
def changes_nothing(setting: Callable[[], object], same: Callable[[Tensor, Tensor], bool]) -> None:
    x, y = (torch.randn(300, 16).requires_grad_() for _ in "xy")
    embedding, grad, delta, image = torch.randn(100, 16), torch.randn(3, 16), torch.zeros(2, 3), torch.rand(2, 3)

    def everything() -> list[Tensor]:
        loss = ccu_fast.info_nce(x, y, scale=3.0, backend="native")
        flips = ccu_fast.topk_flips(grad, ccu_fast.TokenTable(embedding, backend="native"), 4)
        step = ccu_fast.pgd_step_(delta.clone(), -image, image, step=0.01, eps=0.02, backend="native")
        return [loss.detach(), *torch.autograd.grad(loss, (x, y)), flips.ids, flips.delta, step]

    before = everything()
    setting()
    after = everything()
    assert all(a.dtype == b.dtype and a.device == b.device and same(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "setting",
    [
        partial(torch.set_default_dtype, torch.float64),
        partial(torch.set_default_dtype, torch.bfloat16),
        partial(torch.set_default_device, "meta"),
    ],
    ids=["float64", "bfloat16", "meta"],
)
def test_defaults_of_the_process_do_not_reach_the_buffers(setting: Callable[[], object]) -> None:
    assert in_child(lambda: changes_nothing(setting, torch.equal)) == 0


def test_the_newer_precision_setting_is_understood() -> None:
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has only the older setting")
    setting = partial(setattr, torch.backends.cuda.matmul, "fp32_precision", "tf32")
    assert in_child(lambda: changes_nothing(setting, torch.allclose)) == 0


def test_precision_may_change_between_compilation_and_call() -> None:
    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ccu_fast.info_nce(x, y, scale=3.0, backend="native")

    x, y = (torch.randn(80, 8).requires_grad_() for _ in "xy")
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        exact = torch.autograd.grad(compiled(x, y), (x, y))
        torch.set_float32_matmul_precision("medium")
        rounded = torch.autograd.grad(compiled(x, y), (x, y))
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b in zip(exact, rounded, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * float(a.abs().max()))


def test_mixed_dtypes_under_autocast_are_multiplied_as_matmul_does() -> None:
    x, y = torch.randn(5, 4), torch.randn(5, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ccu_fast.info_nce(x, y, scale=2.0)
    # Not by the operator of small batches, which takes two of one dtype.
    assert torch.equal(mixed, ccu_fast.info_nce(x.bfloat16(), y, scale=2.0, paired=True))


@pytest.mark.parametrize("shape", [(2, 0, 4), (0, 3, 4), (1, 0, 4), (2, 3, 0)])
def test_empty_problems_of_every_kind(shape: tuple[int, ...], backend: str) -> None:
    x = torch.randn(shape, requires_grad=True)
    loss = ccu_fast.info_nce(x, x, scale=2.0, backend=backend)
    assert loss.shape == shape[:1] and bool(loss.isfinite().all())
    labels = torch.zeros(shape[:2], dtype=torch.int64)
    assert ccu_fast.sup_con(x, x, scale=2.0, row_labels=labels, backend=backend).shape == shape[:1]


@pytest.mark.parametrize(("scale", "bias"), [(30.0, -15.0), (100.0, -50.0)])
@pytest.mark.parametrize("ids", [False, True])
def test_sure_positives_keep_their_precision(scale: float, bias: float, ids: bool, backend: str) -> None:
    x = torch.eye(16, 32).requires_grad_()
    keys = {"row_ids": torch.arange(16)} if ids else {}
    ours = ccu_fast.sigmoid_loss(x, x.detach(), scale=scale, bias=bias, backend=backend, **keys)
    sign = 2 * torch.eye(16) - 1
    z = x.detach().double().requires_grad_()
    exact = -F.logsigmoid(sign * (scale * z @ x.detach().double().T + bias)).sum() / 16
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)
    (mine,), (true,) = torch.autograd.grad(ours, x), torch.autograd.grad(exact, z)
    torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-4 * float(true.abs().max()))


def test_both_sides_of_the_c_interface_agree_on_how_many_reductions_fit() -> None:
    from ccu_fast import _C
    from ccu_fast.ops.reduce_similarity.problem import MAX_REDUCTIONS

    assert MAX_REDUCTIONS == _C.MAX_REDUCTIONS
