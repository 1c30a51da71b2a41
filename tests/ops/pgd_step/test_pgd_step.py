"""pgd_step_ against its formula in plain torch, written here independently."""

from __future__ import annotations

import importlib
import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ccu_fast import check_pgd_steps, pgd_step_
from ccu_fast.ops.backend import cannot_serve
from tests.support.tolerance import assert_three_way

STEP, EPS = 1 / 255, 8 / 255


def linf(delta: Tensor, grad: Tensor, image: Tensor, step: Any, eps: Any, lower: Any = 0.0, upper: Any = 1.0) -> Tensor:
    def number(x: Any) -> Any:
        return x.to(delta.dtype) if isinstance(x, Tensor) else x

    step, eps, lower, upper = map(number, (step, eps, lower, upper))
    ball = torch.maximum(
        torch.minimum(delta - step * grad.sign(), eps * torch.ones_like(delta)), -eps * torch.ones_like(delta)
    )
    return (
        torch.maximum(torch.minimum(ball + image, upper * torch.ones_like(ball)), lower * torch.ones_like(ball)) - image
    )


def l2(delta: Tensor, grad: Tensor, image: Tensor, step: float, eps: float) -> Tensor:
    out = []
    for d, g, x in zip(delta, grad, image, strict=True):
        d = d - step * g / g.norm() if g.norm() > 0 else d
        d = d * min(1.0, eps / float(d.norm())) if d.norm() > 0 else d
        out.append((d + x).clamp(0, 1) - x)
    return torch.stack(out)


def problem(*shape: int, dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None) -> list[Tensor]:
    delta = (torch.rand(shape) * 2 - 1) * EPS
    grad = torch.randn(shape) * 10.0 ** torch.randint(-30, 30, shape)
    image = torch.rand(shape)
    grad[torch.rand(shape) < 0.1] = 0
    image[torch.rand(shape) < 0.1] = 0
    image[torch.rand(shape) < 0.1] = 1
    return [delta.to(dtype), grad.to(grad_dtype or dtype).clamp(-6e4, 6e4), image.to(dtype)]


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 7, 11), (4, 1, 16, 16), (2, 3, 129, 257), (70_000,)])
def test_linf_has_the_bits_of_the_formula(backend: str, shape: tuple[int, ...]) -> None:
    delta, grad, image = problem(*shape)
    expected = linf(delta, grad, image, STEP, EPS)
    got = pgd_step_(delta, grad, image, step=STEP, eps=EPS, backend=backend)
    assert got is delta
    assert torch.equal(got, expected)
    inside = (image + delta).double()
    ulp = 2.0**-24
    assert float(delta.abs().max()) <= EPS * (1 + ulp) + ulp
    assert float(inside.max()) <= 1 + ulp and float(inside.min()) >= -ulp


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("dtype", "grad_dtype"),
    list(itertools.product((torch.float32, torch.float16, torch.bfloat16), repeat=2)),
)
def test_dtypes(backend: str, norm: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    delta, grad, image = problem(3, 2, 19, 23, dtype=dtype, grad_dtype=grad_dtype)
    step, eps = (STEP, EPS) if norm == "linf" else (0.2, 0.3)
    formula = linf if norm == "linf" else l2
    exact = formula(delta.double(), grad.double(), image.double(), step, eps)
    same = formula(delta.float(), grad.float(), image.float(), step, eps).to(dtype)
    pgd_step_(delta, grad, image, step=step, eps=eps, norm=norm, backend=backend)
    assert delta.dtype == dtype
    assert_three_way("delta", delta, same, exact, magnitude=1.0 if dtype == torch.float32 else None)


def test_fp64_runs_on_the_reference() -> None:
    delta, grad, image = (t.double() for t in problem(2, 3, 4))
    expected = linf(delta, grad, image, STEP, EPS)
    torch.testing.assert_close(pgd_step_(delta, grad, image, step=STEP, eps=EPS), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 4), (5, 3, 40, 41), (2, 300_000)])
def test_l2(backend: str, shape: tuple[int, ...]) -> None:
    delta, grad, image = torch.randn(shape), torch.randn(shape) * 1e-25, torch.rand(shape)
    grad[0] = 0
    for eps in (0.0, 0.05, 100.0):
        ours, exact = delta.clone(), l2(delta.double(), grad.double(), image.double(), 0.7, eps)
        same = l2(delta, grad, image, 0.7, eps)
        pgd_step_(ours, grad, image, step=0.7, eps=eps, norm="l2", backend=backend)
        assert_three_way(f"eps {eps}", ours, same, exact, magnitude=4.0)
        # The last operation, the subtraction of the image, rounds every element by up to 2^-24.
        assert float(ours.double().flatten(1).norm(dim=1).max()) <= eps * (1 + 1e-6) + 2**-24 * shape[1] ** 0.5 * 41


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(5,), (0,), (0, 3), (3, 0), (2, 3, 0)], ids=str)
def test_samples_of_one_number_and_of_none(shape: tuple[int, ...], norm: str, backend: str) -> None:
    """Samples that are flattened to rows may have no other dimension, or no element."""
    delta, grad, image = (
        torch.full(shape, 0.1),
        torch.linspace(-2, 2, 5)[: shape[0]].expand(shape[::-1]),
        torch.rand(shape),
    )
    grad = grad.mT.clone() if len(shape) > 1 else grad.clone()
    out = pgd_step_(delta.clone(), grad.view(shape), image, step=0.05, eps=0.12, lower=-9.0, norm=norm, backend=backend)
    assert out.shape == shape
    if out.numel():
        # A sample of one number: its gradient over its norm is its sign.
        torch.testing.assert_close(out, (delta - 0.05 * grad.sign()).clamp(-0.12, 0.12), rtol=0, atol=1e-6)


@pytest.mark.parametrize("channel_shape", [(3, 1, 1), (1, 3, 1, 1)])
def test_parameters_per_channel(backend: str, channel_shape: tuple[int, ...]) -> None:
    std, mean = (
        torch.tensor([0.27, 0.26, 0.28]).view(channel_shape),
        torch.tensor([0.48, 0.46, 0.41]).view(channel_shape),
    )
    pixels = torch.rand(2, 3, 9, 13)
    image, grad = (pixels - mean) / std, torch.randn(2, 3, 9, 13)
    delta = (torch.rand(2, 3, 9, 13) - 0.5) / std * EPS
    parameters = {"step": STEP / std, "eps": EPS / std, "lower": -mean / std, "upper": (1 - mean) / std}
    expected = linf(delta, grad, image, **parameters)
    assert torch.equal(pgd_step_(delta, grad, image, **parameters, backend=backend), expected)
    # Mixed with numbers, one-element tensors and float64 ones.
    mixed = parameters | {"step": 0.01, "eps": torch.tensor(0.1), "lower": parameters["lower"].double()}
    expected = linf(delta, grad, image, **mixed)
    assert torch.equal(pgd_step_(delta, grad, image, **mixed, backend=backend), expected)


def test_range_per_channel_for_l2(backend: str) -> None:
    delta, grad, image = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.rand(2, 3, 5)
    lower = torch.tensor([[0.0], [0.5], [0.9]])
    pgd_step_(delta, grad, image, step=1.0, eps=3.0, lower=lower, norm="l2", backend=backend)
    assert bool((delta + image >= lower - 1e-6).all())


def test_layouts(backend: str) -> None:
    delta, grad, image = problem(4, 3, 10, 12)
    expected = linf(delta, grad, image, STEP, EPS)
    last = delta.clone().contiguous(memory_format=torch.channels_last)
    pgd_step_(last, grad, image.contiguous(memory_format=torch.channels_last), step=STEP, eps=EPS, backend=backend)
    assert torch.equal(last, expected) and last.is_contiguous(memory_format=torch.channels_last)
    store = torch.zeros(9, 3, 10, 12)
    store[::2][:4] = delta
    pgd_step_(store[::2][:4], grad, image, step=STEP, eps=EPS, backend=backend)
    assert torch.equal(store[::2][:4], expected) and not bool(store[1::2].any())
    # One image for the whole batch, which the user need not copy.
    shared = image[:1].expand(4, -1, -1, -1)
    expected = linf(delta, grad, shared, STEP, EPS)
    assert torch.equal(pgd_step_(delta, grad, shared, step=STEP, eps=EPS, backend=backend), expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_image_comes_along(backend: str, norm: str, dtype: torch.dtype) -> None:
    delta, grad, image = problem(3, 2, 19, 23, dtype=dtype)
    alone, out = delta.clone(), torch.full_like(image, torch.nan)
    version = out._version
    pgd_step_(alone, grad, image, step=STEP, eps=EPS, norm=norm, backend=backend)
    pgd_step_(delta, grad, image, step=STEP, eps=EPS, norm=norm, backend=backend, out=out)
    assert torch.equal(delta, alone) and out._version > version
    assert float(out.max()) <= 1 and float(out.min()) >= 0
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, image + delta, rtol=eps, atol=eps)


def test_nothing_to_do(backend: str) -> None:
    empty = torch.zeros(0, 3, 4, 4)
    assert pgd_step_(empty, empty.clone(), empty.clone(), step=STEP, eps=EPS, backend=backend) is empty
    out = torch.empty_like(empty)  # all empty memory is at one address
    assert pgd_step_(empty, empty.clone(), empty.clone(), step=STEP, eps=EPS, backend=backend, out=out) is empty
    delta, grad, image = problem(2, 3, 4)
    expected = linf(delta, torch.zeros_like(grad), image, STEP, EPS)
    assert torch.equal(pgd_step_(delta, 0 * grad, image, step=STEP, eps=EPS, backend=backend), expected)


@pytest.mark.parametrize("size", [1e-30, 1e-38, 1e-43])
def test_a_short_gradient_makes_a_step_and_no_nan(backend: str, size: float) -> None:
    delta, _, image = problem(2, 3, 4)
    delta, grad = torch.zeros_like(delta), torch.full_like(delta, size)
    pgd_step_(delta, grad, image, step=STEP, eps=EPS, lower=-1.0, upper=2.0, norm="l2", backend=backend)
    assert (delta < 0).all()
    if size > 1e-40:
        torch.testing.assert_close(delta.flatten(1).norm(dim=1), torch.full((2,), min(STEP, EPS)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", [0, 12345, -1])
def test_nan_in_the_gradient(backend: str, where: int) -> None:
    delta, grad, image = problem(2, 3, 100, 101)
    grad.view(-1)[where] = torch.nan
    before = delta.clone()
    for norm in ("linf", "l2"):
        with pytest.raises(ValueError, match=r"^grad: expected .*, got 1 others"):
            pgd_step_(delta, grad, image, step=STEP, eps=EPS, norm=norm, backend=backend)
        assert torch.equal(delta, before)
    expected = linf(delta, grad.nan_to_num(0), image, STEP, EPS)
    assert torch.equal(pgd_step_(delta, grad, image, step=STEP, eps=EPS, nan_policy="zero", backend=backend), expected)


def test_inf_in_the_gradient(backend: str) -> None:
    delta, grad, image = problem(2, 50)
    grad[0, 0], grad[1, 1] = torch.inf, -torch.inf
    before = delta.clone()
    with pytest.raises(ValueError, match=r"^grad: expected finite values, got 2 others"):
        pgd_step_(delta, grad, image, step=STEP, eps=EPS, norm="l2", backend=backend)
    assert torch.equal(delta, before)
    zeroed = before.clone()
    pgd_step_(zeroed, grad, image, step=STEP, eps=EPS, norm="l2", nan_policy="zero", backend=backend)
    exact = l2(before.double(), grad.double().nan_to_num(0, 0, 0), image.double(), STEP, EPS)
    torch.testing.assert_close(zeroed.double(), exact, rtol=1e-5, atol=1e-6)
    # Infinity has a sign like any other number.
    expected = linf(delta, grad, image, STEP, EPS)
    assert torch.equal(pgd_step_(delta, grad, image, step=STEP, eps=EPS, backend=backend), expected)


def test_autograd_sees_the_change(backend: str) -> None:
    delta, grad, image = problem(2, 5)
    delta.requires_grad_()
    loss = (delta * delta).sum()
    version = delta._version
    assert pgd_step_(delta, grad, image, step=STEP, eps=EPS, backend=backend).requires_grad
    assert delta._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_number_of_threads_changes_no_bit(native: str, norm: str) -> None:
    delta, grad, image = torch.randn(3, 200_000), torch.randn(3, 200_000), torch.rand(3, 200_000)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            results.append(pgd_step_(delta.clone(), grad, image, step=0.1, eps=0.5, norm=norm, backend=native))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_registry_says_what_runs_where(native: str) -> None:
    cuda = torch.device("cuda")
    reason = cannot_serve(native, "pgd_step_", cuda, torch.float32)
    usable = importlib.import_module("ccu_fast._C").CUDA and torch.cuda.is_available()
    assert reason is None if usable else re.search("CUDA|NVIDIA driver", str(reason))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, r"eps: expected a finite number in \[0.0, inf\], got -0.1"),
        ({"step": -1}, ValueError, "step: expected a finite number"),
        ({"step": float("nan")}, ValueError, "step: expected a finite number"),
        ({"eps": "8/255"}, TypeError, "eps: expected a number"),
        ({"lower": 2.0}, ValueError, r"lower: expected at most upper \(1.0\), got 2.0"),
        ({"eps": torch.tensor([0.1, -0.1, 0.1]).view(3, 1, 1)}, ValueError, "eps: expected a finite number"),
        ({"upper": torch.tensor([1.0, -0.1, 1.0]).view(3, 1, 1)}, ValueError, "lower: expected at most upper"),
        ({"eps": torch.ones(3)}, ValueError, r"eps: expected a number or shape \[3, 1, 1\], got shape \[3\]"),
        ({"eps": torch.ones(4, 1, 1)}, ValueError, r"eps: expected a number or shape \[3, 1, 1\]"),
        ({"step": torch.ones(2, 3, 4, 4)}, ValueError, "step: expected a number or shape"),
        ({"step": torch.ones(3, 1, 1), "norm": "l2"}, TypeError, "step: expected a number for norm 'l2'"),
        ({"norm": "l1"}, ValueError, "norm: expected one of"),
        ({"nan_policy": "ignore"}, ValueError, "nan_policy: expected one of"),
        ({"backend": "triton"}, ValueError, "backend: 'triton' cannot run pgd_step_ here"),
        ({"delta": torch.zeros(())}, ValueError, r"delta: expected shape \[B, \.\.\.\]"),
        ({"delta": torch.zeros(1, 3, 4, 4).expand(2, 3, 4, 4)}, ValueError, "delta: expected memory"),
        ({"delta": torch.zeros(2, 3, 4, 4).int()}, TypeError, "delta: expected dtype"),
        ({"delta": 0.0}, TypeError, "delta: expected a torch.Tensor"),
        ({"grad": torch.zeros(2, 3, 4, 5)}, ValueError, r"grad: expected shape \[2, 3, 4, 4\]"),
        ({"image": torch.zeros(3, 4, 4)}, ValueError, r"image: expected shape \[2, 3, 4, 4\]"),
        ({"image": torch.zeros(2, 3, 4, 4).half()}, TypeError, "image: expected dtype"),
        ({"out": torch.zeros(2, 3, 4, 5)}, ValueError, r"out: expected shape \[2, 3, 4, 4\]"),
        ({"out": torch.zeros(2, 3, 4, 4).half()}, TypeError, "out: expected dtype"),
        ({"out": torch.zeros(2, 3, 4, 8)[..., ::2]}, ValueError, "out: expected contiguous"),
        ({"grad": torch.zeros(2, 3, 4, 4, device="meta")}, ValueError, "grad: expected device"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    delta = torch.full((2, 3, 4, 4), 0.5)
    arguments = {"delta": delta, "grad": torch.ones(2, 3, 4, 4), "image": torch.rand(2, 3, 4, 4)}
    with pytest.raises(error, match=f"^{message}"):
        pgd_step_(**(arguments | {"step": STEP, "eps": EPS} | changes))
    assert bool((delta == 0.5).all())


def test_opcheck(backend: str) -> None:
    delta, grad, image = problem(2, 3, 4, 5)
    channels = torch.tensor([[0.1], [0.2], [0.0], [1.0]]).expand(4, 3).contiguous()
    for parameters, norm in ((None, False), (channels, False), (None, True)):
        torch.library.opcheck(
            torch.ops.ccu_fast.pgd_step_.default,
            (delta, grad, image, 0.1, 0.2, 0.0, 1.0, parameters, norm, True, backend),
        )
        torch.library.opcheck(
            torch.ops.ccu_fast.pgd_step_.default,
            (delta, grad, image, 0.1, 0.2, 0.0, 1.0, parameters, norm, True, backend, torch.empty_like(delta)),
        )


def test_compiles_as_one_graph(backend: str) -> None:
    std = torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)

    def f(delta: Tensor, grad: Tensor, image: Tensor, eps: Any) -> Tensor:
        pgd_step_(delta, grad * 2, image, step=STEP, eps=eps, backend=backend)
        return delta + 1

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for eps in (EPS, EPS / std):
        delta, grad, image = problem(2, 3, 8, 8)
        eager = delta.clone()
        expected = f(eager, grad, image, eps)
        assert torch.equal(compiled(delta, grad, image, eps), expected)
        assert torch.equal(delta, eager)


def test_compiles_noise_that_requires_grad(native: str) -> None:
    def f(delta: Tensor, grad: Tensor, image: Tensor) -> Tensor:
        return pgd_step_(delta, grad, image, step=STEP, eps=EPS, backend=native)

    delta, grad, image = problem(2, 3, 8, 8)
    expected = linf(delta, grad, image, STEP, EPS)
    with torch.no_grad():
        torch.compile(f, fullgraph=True, backend="aot_eager")(delta.requires_grad_(), grad, image)
    assert torch.equal(delta, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1,), (2, 3, 7, 11), (2, 3, 128, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_cuda_kernel_has_the_bits_of_the_formula(native: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    delta, grad, image = (t.cuda() for t in problem(*shape, dtype=dtype))
    eps: Any = EPS
    if len(shape) == 4:
        eps = torch.tensor([0.01, 0.02, 0.03], device="cuda").view(3, 1, 1)
    expected = linf(delta.float(), grad.float(), image.float(), STEP, eps).to(dtype)
    pgd_step_(delta, grad, image, step=STEP, eps=eps, backend=native)
    assert torch.equal(delta, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3), (5, 3, 7, 11), (3, 3, 64, 128)])
def test_l2_on_cuda(native: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    delta, grad, image = problem(*shape, dtype=dtype)
    exact = l2(delta.double(), grad.double(), image.double(), 0.2, 0.3)
    same = l2(delta.float(), grad.float(), image.float(), 0.2, 0.3).to(dtype)
    there, out = delta.cuda(), torch.empty_like(delta, device="cuda")
    pgd_step_(there, grad.cuda(), image.cuda(), step=0.2, eps=0.3, norm="l2", out=out, backend=native)
    assert_three_way("delta", there.cpu(), same, exact, magnitude=1.0 if dtype == torch.float32 else None)
    assert float(out.max()) <= 1 and float(out.min()) >= 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("at", [0, 7, 191])
def test_a_gradient_that_is_no_number_on_cuda(native: str, norm: str, at: int, dtype: torch.dtype) -> None:
    """No step is made from then on; the next call, or a check, tells the host."""
    delta, grad, image = (t.cuda() for t in problem(2, 3, 4, 8, dtype=dtype))
    wrong = grad.clone()
    wrong.view(-1)[at] = torch.nan if norm == "linf" else -torch.inf
    options: dict[str, Any] = {"step": STEP, "eps": EPS, "norm": norm, "backend": native}
    before, out = delta.clone(), torch.full_like(image, 7)
    said = rf"^grad: expected no NaN \(for l2: finite values\), got another at its element {at}, counted through, in an"

    pgd_step_(delta, wrong, image, out=out, **options)
    with pytest.raises(ValueError, match=said):
        check_pgd_steps()
    check_pgd_steps()
    pgd_step_(delta, wrong, image, out=out, **options)
    if delta.is_cuda:
        torch.cuda.synchronize()
    with pytest.raises(ValueError, match=said):
        pgd_step_(delta, grad, image, out=out, **options)
    # Nothing was written, not even where the gradient was right.
    assert torch.equal(delta, before) and bool((out == 7).all())
    pgd_step_(delta, grad, image, **options)
    check_pgd_steps(delta.device)
    assert bool(delta.isfinite().all()) and not torch.equal(delta, before)
    zeroed = before.clone()
    pgd_step_(zeroed, wrong, image, nan_policy="zero", **options)
    check_pgd_steps()
    assert bool(zeroed.isfinite().all()) and not torch.equal(zeroed, before)


@pytest.mark.parametrize("device", [None, "cpu", "cuda", torch.device("cuda", 0)])
def test_where_no_step_was_refused_nothing_is_raised(backend: str, device: Any) -> None:
    delta, grad, image = problem(2, 3, 4, 8)
    pgd_step_(delta, grad, image, step=STEP, eps=EPS, backend=backend)
    check_pgd_steps(device)


@pytest.mark.gpu
def test_steps_behind_one_that_is_refused_on_cuda(native: str) -> None:
    """Noise stays as the last valid step left it, however many follow before the host checks."""
    delta, grad, image = (t.cuda() for t in problem(2, 3, 4, 8))
    wrong = torch.full_like(grad, torch.nan)
    pgd_step_(delta, grad, image, step=STEP, eps=EPS, backend=native)
    before = delta.clone()
    pgd_step_(delta, wrong, image, step=STEP, eps=EPS, backend=native)
    with pytest.raises(ValueError, match=r"^grad: "):
        for _ in range(100_000):
            pgd_step_(delta, grad, image, step=STEP, eps=EPS, backend=native)
    assert torch.equal(delta, before)


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"step": [0.1, -0.1, 0.1]},
        {"eps": [0.1, torch.nan, 0.1]},
        {"lower": [0.0, 2.0, 0.0]},
        {"upper": [1, torch.inf, 1]},
    ],
    ids=str,
)
def test_wrong_parameters_of_a_channel_on_cuda(native: str, wrong: dict[str, Any], norm: str) -> None:
    if norm == "l2" and wrong.keys() & {"step", "eps"}:
        wrong = {"lower": [0.0, -torch.inf, 0.0]}
    delta, grad, image = (t.cuda() for t in problem(2, 3, 4, 8))
    before = delta.clone()
    options: dict[str, Any] = {"step": STEP, "eps": EPS, "norm": norm, "backend": native}
    options |= {name: torch.tensor(value, device="cuda").view(3, 1, 1) for name, value in wrong.items()}
    pgd_step_(delta, grad, image, **options)
    with pytest.raises(
        ValueError, match=r"^step, eps, lower, upper: expected .* got others for channel 1 in an earlier"
    ):
        check_pgd_steps()
    assert torch.equal(delta, before)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["zero", "raise"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_cuda_graph_holds_the_step(native: str, norm: str, policy: str) -> None:
    delta, grad, image = (t.cuda() for t in problem(4, 3, 32, 32))
    expected, start = delta.clone(), delta.clone()
    options = {"step": STEP, "eps": EPS, "norm": norm, "nan_policy": policy, "backend": native}
    for _ in range(3):
        pgd_step_(expected, grad, image, **options)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        pgd_step_(delta, grad, image, **options)
    torch.cuda.synchronize()
    delta.copy_(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pgd_step_(delta, grad, image, **options)
    for _ in range(3):
        graph.replay()
    assert torch.equal(delta, expected)
    if policy == "raise":
        grad.fill_(torch.nan)
        graph.replay()
        with pytest.raises(ValueError, match=r"^grad: "):
            check_pgd_steps()
        assert torch.equal(delta, expected)


def test_one_element_on_the_host_is_a_number_beside_noise_on_a_device() -> None:
    """A copy of it to a GPU would wait, and could not be captured."""

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            assert name not in ("_to_copy", "copy_"), name
            return func(*args, **(kwargs or {}))

    delta = torch.zeros(2, 3, 4, device="meta")
    one, some = torch.tensor([0.5]), torch.zeros(3, 1, device="meta")
    with Copies():
        pgd_step_(delta, delta + 1, delta + 1, step=one, eps=one[0], upper=one, nan_policy="zero")
        pgd_step_(delta, delta + 1, delta + 1, step=one, eps=one[0], lower=some, nan_policy="zero")
    with pytest.raises(ValueError, match="step: expected a finite number"):
        pgd_step_(delta, delta + 1, delta + 1, step=-one, eps=one)
