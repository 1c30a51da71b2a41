"""The kernels of l2_normalize in the interpreter, against F.normalize in fp64."""

from __future__ import annotations

import pytest
import torch

from ccu_fast import info_nce, l2_normalize
from tests.support.tolerance import assert_three_way


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (2, 3, 16), (3, 1030), (0, 4)], ids=str)
def test_values_and_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, grad = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)

    def run(normalize, t, g):
        t = t.clone().requires_grad_()
        out = normalize(t)
        return out.detach(), torch.autograd.grad(out, t, g)[0]

    def torchs(t):
        return torch.nn.functional.normalize(t, dim=-1)

    ours = run(lambda t: l2_normalize(t, backend="triton"), x, grad)
    peers, exact = run(torchs, x, grad), run(torchs, x.double(), grad.double())
    for name, *values in zip(("out", "dx"), ours, peers, exact, strict=True):
        terms = (grad.double() / x.double().norm(dim=-1, keepdim=True)).abs()
        magnitude = float(terms.max()) if name == "dx" and x.numel() else None
        assert_three_way(name, *values, ulps=4, magnitude=magnitude)


def test_zero_short_and_bad_rows() -> None:
    x = torch.randn(5, 20)
    x[0], x[1] = 0, 1e-14 * x[1]
    x[2, 3] = torch.nan
    x.requires_grad_()
    out = l2_normalize(x, backend="triton")
    wanted = torch.nn.functional.normalize(x, dim=-1)
    torch.testing.assert_close(out, wanted, equal_nan=True)
    grad = torch.randn(5, 20)
    for got, want in zip(*(torch.autograd.grad(o, x, grad) for o in (out, wanted)), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-5, atol=1e-5)


def test_autocast_and_the_keyword_of_a_loss() -> None:
    x, y = 3 * torch.randn(6, 20), torch.randn(6, 20)
    unit = l2_normalize(x, dtype=torch.float16, backend="triton")
    assert torch.equal(unit, l2_normalize(x, dtype=torch.float16, backend="reference"))
    ours, reference = (info_nce(x, y, scale=5.0, normalize=True, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(ours, reference)
