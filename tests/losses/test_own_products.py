"""Products of rows with their own hard negatives: in half precision without a copy of them in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ccu_fast.losses import logits
from ccu_fast.losses.logits import products_of_own
from tests.support.tolerance import assert_three_way

HALF = (torch.bfloat16, torch.float16)
N, K, D = 37, 3, 24


def features(dtype: torch.dtype, *lead: int) -> list[Tensor]:
    return [torch.randn(*lead, N, *of, D).to(dtype).requires_grad_() for of in ((), (K,))]


def step(x: Tensor, others: Tensor, weights: Tensor) -> list[Tensor]:
    products = products_of_own(x, others)
    return [products.detach(), *torch.autograd.grad(products, (x, others), weights.to(products.dtype))]


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_in_parts_as_at_once(dtype: torch.dtype, lead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x, others = features(dtype, *lead)
    weights = torch.randn(*lead, N, K)
    whole = step(x, others, weights)
    wide = step(*(t.detach().float().requires_grad_() for t in (x, others)), weights)
    exact = step(*(t.detach().double().requires_grad_() for t in (x, others)), weights)
    for widened in (1, 4 * K * D * 5, 4 * K * D * N):  # a row at a time, some, not quite all of two banks
        monkeypatch.setattr(logits, "WIDENED", widened)
        for name, got, first, same, truth in zip("pxo", step(x, others, weights), whole, wide, exact, strict=True):
            assert got.dtype == first.dtype == (torch.float32 if name == "p" else dtype)
            assert_three_way(name, got, same.to(got.dtype), truth, ulps=4)
            assert_three_way(name, first, same.to(got.dtype), truth, ulps=4)


def test_only_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "WIDENED", 1)
    for learns in (0, 1):
        leaves = features(torch.bfloat16)
        leaves[1 - learns].requires_grad_(False)
        products_of_own(*leaves).sum().backward()
        assert leaves[learns].grad is not None and leaves[1 - learns].grad is None


def test_second_derivatives_and_many_cotangents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "WIDENED", 1)
    x, others = features(torch.bfloat16)
    products = products_of_own(x, others)
    (dx,) = torch.autograd.grad(products.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.float().sum(), others)
    a, b = (t.detach().double().requires_grad_() for t in (x, others))
    (da,) = torch.autograd.grad(torch.einsum("nd,nkd->nk", a, b).square().sum(), a, create_graph=True)
    (want,) = torch.autograd.grad(da.sum(), b)
    torch.testing.assert_close(second.double(), want, rtol=2e-2, atol=0.3)
    cotangents = torch.randn(5, N, K)
    many = torch.autograd.grad(products_of_own(x, others), (x, others), cotangents, is_grads_batched=True)
    each = [torch.autograd.grad(products_of_own(x, others), (x, others), of) for of in cotangents]
    for got, *rest in zip(many, *each, strict=True):
        torch.testing.assert_close(got, torch.stack(rest), rtol=1e-2, atol=1e-2)


class Largest(TorchDispatchMode):
    """The most bytes of any fp32 tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.bytes = max(self.bytes, 4 * out.numel())
        return out


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_never_whole_in_fp32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the hard negatives nor their gradient; and they are kept for it as they were given."""
    monkeypatch.setattr(logits, "WIDENED", 4 * 5 * K * D)
    x, others = features(dtype)
    weights = torch.randn(N, K)
    with Largest() as seen:
        step(x, others, weights)
    assert 0 < seen.bytes <= logits.WIDENED
    monkeypatch.setattr(logits, "WIDENED", 1 << 20)
    with Largest() as seen:
        step(x, others, weights)
    assert seen.bytes == 4 * others.numel()  # what the line above would see
    products = products_of_own(x, others)  # held: torch 2.8 frees what a dropped result saved
    saved = products.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert [t.data_ptr() for t in saved] == [x.data_ptr(), others.data_ptr()]


def test_a_gpu_multiplies_half_precision_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the GEMM that sums in fp32, which a CPU lacks: its arguments, and that nothing is widened."""
    asked, sums_in_half = [], []

    def bmm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        asked.append((a.dtype, b.dtype, a.shape, b.shape, out_dtype, a.data_ptr()))
        sums_in_half.append(torch.backends.cuda.matmul.allow_fp16_accumulation)
        return torch.matmul(a.to(out_dtype), b.to(out_dtype))

    x, others = features(torch.bfloat16, 2)
    want = products_of_own(x, others)
    matmul = torch.backends.cuda.matmul
    monkeypatch.setattr(torch, "bmm", bmm)
    monkeypatch.setattr(logits, "_multiplied_in_half", lambda x, others: True)
    before, matmul.allow_fp16_accumulation = matmul.allow_fp16_accumulation, True
    try:
        got = products_of_own(x, others)
        assert sums_in_half == [False] and matmul.allow_fp16_accumulation  # which is the user's again
    finally:
        matmul.allow_fp16_accumulation = before
    half = torch.bfloat16
    assert asked == [(half, half, (2 * N, K, D), (2 * N, D, 1), torch.float32, others.data_ptr())]
    torch.testing.assert_close(got, want)
