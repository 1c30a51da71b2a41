"""reduce_similarity on a GPU: numerics in every arithmetic, the same bits every time, graphs, streams, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ccu_fast
from ccu_fast import info_nce
from tests.support.oracle import gap, unit
from tests.support.tolerance import assert_three_way

pytestmark = pytest.mark.gpu


def between(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Limits that no rounding of a product crosses."""
    similar = x.detach().double() @ y.detach().double().mT
    return {"row_limits": gap(similar, -1), "col_limits": gap(similar, -2)}


LABELS = torch.arange(300) % 7
LOSSES: dict[str, Callable[..., Tensor]] = {
    "info_nce": info_nce,
    "bounded": lambda x, y, **o: ccu_fast.inverse_info_nce(x, y, row_labels=LABELS.to(x.device), **o),
    "contrastive": lambda x, y, **o: ccu_fast.inverse_info_nce(
        x, y, kind="contrastive", row_labels=LABELS.to(x.device), **o
    ),
    "sup_con": lambda x, y, **o: ccu_fast.sup_con(x, y, row_labels=LABELS.to(x.device), **o),
    "sigmoid": lambda x, y, **o: ccu_fast.sigmoid_loss(x, y, bias=-10.0, **o),
    "limits": lambda x, y, **o: info_nce(x, y, **between(x, y), **o),
    "guide": lambda x, y, **o: info_nce(x, y, guide=(x[:, :72], y[:, :72]), **between(x[:, :72], y[:, :72]), **o),
    "distill": lambda x, y, **o: ccu_fast.distill(x, y, teacher=(x[:, :72], y[:, :72]), teacher_scale=40.0, **o),
    "prefixes": lambda x, y, **o: info_nce(x, y, prefixes=(16, 64, 192), **o),
    "unit prefixes": lambda x, y, **o: info_nce(x, y, prefixes=(64, 128, 192), normalize=True, **o),
    "prefixes, labels": lambda x, y, **o: info_nce(
        x, y, prefixes=(32, 200 // 16 * 16), normalize=True, row_labels=LABELS.to(x.device), **o
    ),
}
ARITHMETIC = {
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
}


def step(loss: Callable[..., Tensor], x: Tensor, y: Tensor, **options: object) -> list[Tensor]:
    """The loss and the gradients of x, y and scale."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
    scale = torch.tensor(20.0, dtype=compute, device=x.device, requires_grad=True)
    value = loss(*leaves, scale=scale, **options)
    return [value, *torch.autograd.grad(value, [*leaves, scale])]


def inputs(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return unit(n, d).to("cuda", dtype), unit(n, d).to("cuda", dtype)


@pytest.fixture(autouse=True, params=["small", "large"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with the kernels of small batches wherever they serve, and without them."""
    if request.param == "large":
        monkeypatch.setattr("ccu_fast.ops.reduce_similarity.operator.SMALL_PAIRS", 0)


@pytest.mark.parametrize("workspace", [0, None], ids=["recomputed", "kept"])
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("name", LOSSES)
def test_against_fp64(name: str, arithmetic: str, workspace: int | None) -> None:
    dtype, precision = ARITHMETIC[arithmetic]
    x, y = inputs(300, 200, dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        ours = step(LOSSES[name], x, y, backend="triton", workspace=workspace)
        # Plain torch in the same arithmetic: fp32 from inputs rounded as the tensor cores round them.
        same = step(LOSSES[name], x, y, backend="reference")
    finally:
        torch.set_float32_matmul_precision(before)
    exact = step(LOSSES[name], x.double(), y.double(), backend="reference")
    ulps = {"fp32": 64.0, "tf32": 2.0**15}.get(arithmetic, 16.0)
    for what, a, b, c in zip(("loss", "dx", "dy", "dscale"), ours, same, exact, strict=True):
        # Scalars are fp32 whatever the inputs, so they show how G was rounded.
        rounded = 2.0**14 if a.ndim == 0 and dtype != torch.float32 else 1.0
        assert_three_way(f"{name} {what}", a, b, c, ulps=ulps * rounded)


@pytest.mark.parametrize("scale", [100.0, 400.0])
def test_sharp_logits(scale: float) -> None:
    """Above scale 60 sums may underflow: the online maximum then takes over and must lose nothing."""
    x, y = inputs(512, 128, torch.bfloat16)
    x[7] = -x[7:].float().mean(0).to(x.dtype)
    ours = info_nce(x, y, scale=scale, reduction="none", symmetric=False, backend="triton")
    exact = info_nce(x.double(), y.double(), scale=scale, reduction="none", symmetric=False, backend="reference")
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-3)
    x[:, :64] = -x[:, :64]  # so that one prefix alone is far below what bounds all
    given: dict[str, Any] = {"scale": scale, "symmetric": False, "prefixes": (64, 128), "normalize": True}
    pairs = ((t.double().requires_grad_(), t.clone().requires_grad_()) for t in (x, y))
    exact_leaves, leaves = zip(*pairs, strict=True)
    ours = info_nce(*leaves, backend="triton", **given)
    exact = info_nce(*exact_leaves, backend="reference", **given)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-3)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(exact, exact_leaves), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


@pytest.mark.parametrize("prefixes", [(), (64, 128, 256, 512)])
@pytest.mark.parametrize("n", [128, 1000, 4096])
def test_same_inputs_same_bits(n: int, prefixes: tuple[int, ...]) -> None:
    x, y = inputs(n, 512, torch.bfloat16)
    first, second = (step(info_nce, x, y, backend="triton", workspace=16 << 20, prefixes=prefixes) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_a_cuda_graph_replays_the_step() -> None:
    x, y = (t.requires_grad_() for t in inputs(1024, 256, torch.bfloat16))
    scale = torch.tensor(20.0, device="cuda", requires_grad=True)

    def once() -> tuple[Tensor, ...]:
        loss = info_nce(x, y, scale=scale, backend="triton")
        return loss, *torch.autograd.grad(loss, [x, y, scale])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once()
    other = inputs(1024, 256, torch.bfloat16)
    with torch.no_grad():
        x.copy_(other[0])
        y.copy_(other[1])
    graph.replay()
    for a, b in zip(captured, once(), strict=True):
        assert torch.equal(a, b)


def test_the_current_stream_is_used() -> None:
    """Work queued on a side stream before the call is seen by it."""
    x, y = inputs(2048, 256, torch.bfloat16)
    want = info_nce(x, y, scale=20.0, backend="triton")
    late = torch.zeros_like(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = info_nce(late, y, scale=20.0, backend="triton")
    side.synchronize()
    assert torch.equal(got, want)


def test_memory_does_not_grow_with_the_matrix() -> None:
    n, d, workspace = 65536, 256, 128 << 20
    x, y = (t.requires_grad_() for t in inputs(n, d, torch.bfloat16))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    info_nce(x, y, scale=20.0, backend="triton", workspace=workspace).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= workspace + 2 * n * d * 2 + n * d * 4 + 600 * n * 4 + (48 << 20)  # the library's own workspace too
    assert extra < n * n * 2 // 8


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_data_is_used() -> None:
    x, y = (t.to("cuda:1") for t in inputs(256, 64, torch.bfloat16))
    with torch.cuda.device(0):
        assert info_nce(x, y, scale=20.0, backend="triton").device == x.device
