"""candidate_losses against the loss of the changed batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ccu_fast import candidate_losses, info_nce
from tests.support.tolerance import assert_three_way


def brute_losses(candidates: Tensor, image: Tensor, text: Tensor, scale: Any) -> Tensor:
    rows = []
    for b in range(candidates.shape[0]):
        for k in range(candidates.shape[1]):
            changed = text.clone()
            changed[b] = candidates[b, k]
            rows.append(info_nce(image, changed, scale=scale, backend="reference"))
    return torch.stack(rows).view(candidates.shape[:2])


@pytest.mark.parametrize(("batch", "k", "dim"), [(1, 3, 5), (2, 1, 4), (7, 5, 16), (33, 4, 8), (2, 3, 0)])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_candidate_losses_are_those_of_the_changed_batch(
    backend: str, batch: int, k: int, dim: int, scale: float
) -> None:
    normalize = torch.nn.functional.normalize
    candidates = normalize(torch.randn(batch, k, dim), dim=-1)
    image, text = normalize(torch.randn(batch, dim), dim=-1), normalize(torch.randn(batch, dim), dim=-1)
    # Matched pairs dominate their row: what is removed is nearly all of the sum.
    text[::2] = image[::2]
    exact = brute_losses(candidates.double(), image.double(), text.double(), scale)
    got = candidate_losses(candidates.double(), image.double(), text.double(), scale=scale)
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    single = candidate_losses(candidates, image, text, scale=torch.tensor(scale), bias=-3.0, backend=backend)
    assert single.dtype == torch.float32
    assert_three_way("losses", single, brute_losses(candidates, image, text, scale), exact, magnitude=scale)
    for dtype in (torch.float16, torch.bfloat16):
        low = [t.to(dtype) for t in (candidates, image, text)]
        exact = brute_losses(*(t.double() for t in low), scale)
        same = brute_losses(*(t.float() for t in low), scale)
        assert_three_way(str(dtype), candidate_losses(*low, scale=scale, backend=backend), same, exact, magnitude=scale)


def test_candidate_losses_in_chunks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (torch.randn(9, 3, 4), torch.randn(9, 4), torch.randn(9, 4))
    whole = candidate_losses(*arguments, scale=2.0, backend=backend)
    monkeypatch.setattr("ccu_fast.ops.candidate_losses.reference._CHUNK_ELEMENTS", 60)
    if backend == "native":
        monkeypatch.setattr("ccu_fast.ops.candidate_losses.native._CHUNK_BYTES", {"cpu": 240})
    torch.testing.assert_close(candidate_losses(*arguments, scale=2.0, backend=backend), whole)


def test_a_term_that_is_all_of_a_sum(backend: str) -> None:
    # Without it 1e-40 of the sum is left: less than fp32's and fp64's last place.
    image, text = torch.eye(4), torch.eye(4)
    text[1] += 0.01
    candidates = torch.randn(4, 6, 4)
    exact = brute_losses(candidates.double(), image.double(), text.double(), 92.0)
    same = brute_losses(candidates, image, text, 92.0)
    got = candidate_losses(candidates, image, text, scale=92.0, backend=backend)
    assert_three_way("losses", got, same, exact, magnitude=92.0)


def test_threads_change_no_bit(native: str) -> None:
    arguments = (torch.randn(70, 9, 20), torch.randn(70, 20), torch.randn(70, 20))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            results.append(candidate_losses(*arguments, scale=1.0, backend=native))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-6, atol=0)  # the GEMM is torch's


def test_opcheck(backend: str) -> None:
    arguments = (torch.randn(5, 3, 4), torch.randn(5, 4), torch.randn(5, 4), 2.0)
    for factor in (None, torch.tensor(0.5)):
        torch.library.opcheck(torch.ops.ccu_fast.candidate_losses.default, (*arguments, factor, backend))


def test_compiles_as_one_graph(backend: str) -> None:
    def f(candidates: Tensor, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return candidate_losses(2 * candidates, image, text, scale=scale, backend=backend).argmin(1)

    arguments = (torch.randn(5, 3, 4), torch.randn(5, 4), torch.randn(5, 4), torch.tensor(3.0))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), f(*arguments))


def test_the_kernels_have_no_gradient(native: str) -> None:
    arguments = (torch.randn(5, 3, 4, requires_grad=True), torch.randn(5, 4), torch.randn(5, 4))
    assert candidate_losses(*arguments, scale=1.0).requires_grad
    with pytest.raises(ValueError, match=r"^backend: 'native' has no gradient"):
        candidate_losses(*arguments, scale=1.0, backend=native)
    with torch.no_grad():
        assert not candidate_losses(*arguments, scale=1.0, backend=native).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "k"), [(1, 2), (5, 3), (300, 17)])
def test_the_cuda_kernels(native: str, batch: int, k: int) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    normalize = torch.nn.functional.normalize
    shapes = ((batch, k, 64), (batch, 64), (batch, 64))
    arguments = [normalize(torch.randn(*shape), dim=-1) for shape in shapes]
    exact = candidate_losses(*(t.double() for t in arguments), scale=50.0)
    same = candidate_losses(*arguments, scale=50.0, backend="reference")
    got = candidate_losses(*(t.cuda() for t in arguments), scale=50.0, backend=native).cpu()
    assert_three_way("losses", got, same, exact, magnitude=50.0)


def test_candidate_losses_differentiate() -> None:
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 2, 3), (4, 3), (4, 3))]
    assert torch.autograd.gradcheck(lambda *t: candidate_losses(*t, scale=2.0), inputs)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text_candidates": torch.randn(3, 4)}, ValueError, "text_candidates: expected 3 dimensions"),
        ({"image": torch.randn(2, 4)}, ValueError, r"image: expected shape \[3, 4\]"),
        ({"text": torch.randn(3, 5)}, ValueError, r"text: expected shape \[3, 4\]"),
        ({"text": torch.randn(3, 4).double()}, TypeError, "text: expected dtype"),
        ({"scale": torch.ones(2)}, ValueError, "scale: expected one element"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number"),
        ({"bias": "0"}, TypeError, "bias: expected a number"),
    ],
)
def test_bad_candidate_losses(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"text_candidates": torch.randn(3, 2, 4), "image": torch.randn(3, 4), "text": torch.randn(3, 4)}
    with pytest.raises(error, match=f"^{message}"):
        candidate_losses(**(arguments | {"scale": 1.0} | changes))
