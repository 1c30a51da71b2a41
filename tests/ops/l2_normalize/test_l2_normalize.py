"""l2_normalize and normalize=True: values and gradients against F.normalize in fp64, on every backend of the CPU."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import ccu_fast
from ccu_fast import ClipLoss, InfoNCE, SigLipLoss, info_nce, inverse_info_nce, l2_normalize, sigmoid_loss, sup_con
from ccu_fast.ops.l2_normalize.api import EPS
from tests.support.presence import absent, require_backend
from tests.support.tolerance import assert_three_way

HALVES = (torch.float16, torch.bfloat16)
SHAPES = [(7, 33), (2, 3, 130), (1, 1), (5,), (300, 64)]


def run(normalize: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = normalize(x)
    return {"out": out.detach(), "dx": torch.autograd.grad(out, x, grad.to(out.dtype))[0]}


def check(x: Tensor, grad: Tensor, backend: str, ulps: float = 4) -> dict[str, Tensor]:
    """x and grad are fp64 masters that are exact in the dtype of the test: the backend's or the rows'."""
    dtype = x.dtype
    exact = run(lambda t: F.normalize(t, dim=-1), x.double(), grad.double())
    torchs = run(lambda t: F.normalize(t, dim=-1), x, grad)
    ours = run(lambda t: l2_normalize(t, backend=backend), x, grad)
    for name, truth in exact.items():
        assert ours[name].dtype == dtype
        # The gradient is a difference: of two equal terms where D is 1.
        terms = float((grad.double() / x.double().norm(dim=-1, keepdim=True)).abs().max()) if name == "dx" else None
        assert_three_way(name, ours[name], torchs[name], truth, ulps=ulps, magnitude=terms)
    return ours


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_values_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    check((3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype), backend)


def test_fp64_is_served_by_the_reference() -> None:
    x, grad = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    check(x, grad, "auto")
    with pytest.raises(ValueError, match="backend: 'native' cannot run l2_normalize here"):
        l2_normalize(x, backend=require_backend("native"))
    leaf = x.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda t: l2_normalize(t, backend="reference"), (leaf,))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_half_type_is_rounded_once(dtype: torch.dtype, backend: str) -> None:
    """Half a unit in the last place of what F.normalize in fp64 gives, where F.normalize in the dtype needs more."""
    x = torch.randn(400, 96).to(dtype)
    exact = F.normalize(x.double(), dim=-1)
    ulp = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor()
    spacing = torch.maximum(ulp, torch.tensor(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps))

    def worst(unit: Tensor) -> float:
        return float(((unit.double() - exact).abs() / spacing).max())

    assert worst(l2_normalize(x, backend=backend)) <= 0.501
    assert worst(F.normalize(x, dim=-1)) > 0.75


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_rows_of_zeros_and_next_to_it(dtype: torch.dtype, backend: str) -> None:
    x = torch.randn(6, 40)
    x[0] = 0
    x[1] *= 1e-14  # shorter than eps in fp32; zero in fp16
    x[2] *= 1e-10
    x = x.to(dtype)
    # Exact in fp32, which is where F.normalize has its eps too.
    exact = run(lambda t: F.normalize(t, dim=-1), x.double(), 1e-12 * torch.ones(6, 40, dtype=torch.float64))
    torchs = run(lambda t: F.normalize(t.float(), dim=-1).to(dtype), x, 1e-12 * torch.ones(6, 40, dtype=dtype))
    ours = run(lambda t: l2_normalize(t, backend=backend), x, 1e-12 * torch.ones(6, 40, dtype=dtype))
    assert (ours["out"][0] == 0).all()
    for name in ("out", "dx") if dtype != torch.float16 else ("out",):  # 1e-12 is 0 in fp16
        for row in range(6):
            assert_three_way(f"{name} of row {row}", ours[name][row], torchs[name][row], exact[name][row], ulps=4)
    if dtype != torch.float16:
        torch.testing.assert_close(
            ours["dx"][0].double(), torch.full((40,), 1e-12 / EPS, dtype=torch.float64), rtol=1e-2, atol=0
        )


def test_nan_and_inf_spread_over_their_row_and_no_further(backend: str) -> None:
    x = torch.randn(5, 20)
    x[1, 3], x[3, 7] = torch.nan, torch.inf
    ours, torchs = l2_normalize(x, backend=backend), F.normalize(x, dim=-1)
    torch.testing.assert_close(ours, torchs, equal_nan=True)
    assert ours[1].isnan().all() and ours[[0, 2, 4]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 3, 8), (2, 0, 8)], ids=str)
def test_nothing_to_do(shape: tuple[int, ...], backend: str) -> None:
    assert run(lambda t: l2_normalize(t, backend=backend), torch.randn(shape), torch.randn(shape))["dx"].shape == shape


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (3, 8)], ids=str)
def test_a_second_backward_pass(shape: tuple[int, ...], backend: str) -> None:
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)
    out = l2_normalize(x, backend=backend)
    (first,) = torch.autograd.grad(out, x, grad, retain_graph=True)
    assert torch.equal(torch.autograd.grad(out, x, grad)[0], first)


def test_any_strides_and_the_same_bits(native: str) -> None:
    x = torch.randn(64, 200)
    wanted = l2_normalize(x, backend=native)
    for strided in (x.T.contiguous().T, torch.stack([x, x], 1)[:, 0], x.expand(2, 64, 200)[1]):
        assert torch.equal(l2_normalize(strided, backend=native), wanted)
    before = torch.get_num_threads()
    many = torch.randn(3000, 100)
    try:
        bits = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            bits.append(run(lambda t: l2_normalize(t, backend=native), many, many))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(bits[0][k], other[k]) for other in bits[1:] for k in bits[0])


def test_autocast_rounds_once_to_its_dtype(backend: str) -> None:
    x = torch.randn(8, 30)
    with torch.autocast("cpu", torch.bfloat16):
        unit = l2_normalize(x, backend=backend)
    assert unit.dtype == torch.bfloat16
    assert torch.equal(unit, l2_normalize(x, backend=backend).bfloat16())
    assert torch.equal(unit, l2_normalize(x, dtype=torch.bfloat16, backend=backend))


# --- as an operator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, native: str) -> None:
    x = torch.randn(6, 18).to(dtype)
    for out in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.ccu_fast.l2_normalize.default, (x, out, native))
        unit, inverse = torch.ops.ccu_fast.l2_normalize(x, out, native)
        torch.library.opcheck(torch.ops.ccu_fast.l2_normalize_backward.default, (unit, x, inverse, native))


def test_compiles_in_one_graph_for_all_sizes(native: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, y: Tensor) -> Tensor:
        return info_nce(x, y, scale=10.0, normalize=True, backend=native)

    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for n in (6, 9, 14):
        x, y = torch.randn(n, 16, requires_grad=True), torch.randn(n, 16, requires_grad=True)
        grads = torch.autograd.grad(compiled(x, y), (x, y))
        for got, want in zip(grads, torch.autograd.grad(step(x, y), (x, y)), strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1


def test_second_derivatives_are_those_of_the_formula(native: str) -> None:
    def gradient(normalize: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(normalize(x)[:, 0].square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return second

    x = torch.randn(3, 5)
    exact = gradient(lambda x: torch.nn.functional.normalize(x, dim=-1), x.double())
    ours = gradient(lambda x: l2_normalize(x, backend=native), x)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x: expected dtype"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \[..., D\]"),
        ({"x": torch.zeros(2, 3), "dtype": torch.int64}, TypeError, "dtype: expected float16 or bfloat16 or float32"),
        ({"x": torch.zeros(2, 3), "dtype": torch.float64}, TypeError, "dtype: expected float16"),
        ({"x": torch.zeros(2, 3).double(), "dtype": torch.float32}, TypeError, "dtype: expected torch.float64"),
        ({"x": torch.zeros(2, 3), "backend": "cuda"}, ValueError, "backend: expected one of"),
    ],
)
def test_bad_input(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    x = arguments.pop("x")
    with pytest.raises(error, match=said):
        l2_normalize(x, **arguments)
    with pytest.raises(TypeError, match="normalize: expected True or False, got int"):
        info_nce(torch.ones(2, 3), torch.ones(2, 3), scale=1.0, normalize=1)


# --- the keyword of the losses ---------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2])
LOSSES: dict[str, Callable[..., Tensor]] = {
    "info_nce": lambda x, y, **k: info_nce(x, y, scale=20.0, **k),
    "bounded": lambda x, y, **k: inverse_info_nce(x, y, scale=5.0, row_labels=LABELS, **k),
    "contrastive": lambda x, y, **k: inverse_info_nce(x, y, scale=5.0, kind="contrastive", row_labels=LABELS, **k),
    "sup_con": lambda x, y, **k: sup_con(x, y, scale=10.0, row_labels=LABELS, **k),
    "sigmoid": lambda x, y, **k: sigmoid_loss(x, y, scale=10.0, bias=-10.0, **k),
    "InfoNCE": lambda x, y, **k: InfoNCE(scale=20.0, **k)(x, y),
    "ClipLoss": lambda x, y, **k: ClipLoss(**k)(x, y, 20.0),
    "SigLipLoss": lambda x, y, **k: SigLipLoss(**k)(x, y, 10.0, -10.0),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_loss_of_unnormalised_features(name: str, dtype: torch.dtype, backend: str) -> None:
    x, y = (4 * torch.randn(8, 24)).to(dtype), (0.1 * torch.randn(8, 24)).to(dtype)

    def gradients(dtype: torch.dtype, normalise: bool, **options: Any) -> dict[str, Tensor]:
        a, b = (t.to(dtype, copy=True).requires_grad_() for t in (x, y))
        features = (F.normalize(a, dim=-1), F.normalize(b, dim=-1)) if normalise else (a, b)
        loss = LOSSES[name](*features, **options)
        da, db = torch.autograd.grad(loss, (a, b))
        return {"loss": loss.detach(), "dx": da, "dy": db}

    exact = gradients(torch.float64, True, backend="reference")
    torchs = gradients(dtype, True, backend="reference")
    ours = gradients(dtype, False, normalize=True, backend=backend)
    for key, truth in exact.items():
        # The logits are as large as the scale, and so are the terms of a loss. It is one number, where torch may be
        # right by luck: half features err by 2^-9 in each element, an average over 8 rows of 24 by a fraction of it.
        magnitude = 20.0 if key == "loss" else None
        luck = 2.0**-9 / 8 / torch.finfo(torch.float32).eps if key == "loss" and dtype != torch.float32 else 8
        assert_three_way(key, ours[key], torchs[key], truth, ulps=luck, magnitude=magnitude)


def test_one_bank_is_normalised_once(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    module = ccu_fast.ops.reduce_similarity.normalize
    real = module.l2_normalize
    monkeypatch.setattr(module, "l2_normalize", lambda x, **k: calls.append(x) or real(x, **k))
    z = torch.randn(8, 12, requires_grad=True)
    sup_con(z, z, scale=10.0, row_labels=LABELS, normalize=True).backward()
    assert len(calls) == 1
    again = z.detach().clone().requires_grad_()
    unit = F.normalize(again, dim=-1)
    sup_con(unit, unit, scale=10.0, row_labels=LABELS).backward()
    torch.testing.assert_close(z.grad, again.grad)


# --- the kernels of a GPU, compiled ----------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize(("dtype", "d"), [("bf16", 512), ("bf16", 130), ("fp16", 1024), ("fp32", 768)])
def test_resources(capability: int, dtype: str, d: int, tmp_path: Path) -> None:
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError:
        absent("ahead-of-time compilation", "the package triton is not installed")
    from ccu_fast.ops.l2_normalize import triton as normalize

    block = {"ROWS": normalize.ROWS, "BLOCK": min(triton.next_power_of_2(d), normalize.WIDEST)}
    forward = {"x": f"*{dtype}", "out": f"*{dtype}", "inverse_out": "*fp32", "rows": "i32", "D": "i32", "eps": "fp32"}
    backward = {
        "grad": f"*{dtype}",
        "x": f"*{dtype}",
        "inverse_in": "*fp32",
        "dx": f"*{dtype}",
        "rows": "i32",
        "D": "i32",
        "most": "fp32",
    }
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for kernel, arguments in ((normalize.normalize_kernel, forward), (normalize.normalize_backward_kernel, backward)):
        aligned = [name for name, kind in arguments.items() if kind[0] == "*" or (name == "D" and d % 16 == 0)]
        source = ASTSource(
            fn=kernel,
            signature={**arguments, "ROWS": "constexpr", "BLOCK": "constexpr"},
            constexprs={(list(kernel.arg_names).index(name),): value for name, value in block.items()},
            attrs={(list(kernel.arg_names).index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        compiled = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": normalize.WARPS}
        )
        (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
        dump = subprocess.run(
            [tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True, timeout=60
        ).stdout.splitlines()[-1]
        used = dict(word.split(":") for word in dump.split() if word.count(":") == 1)
        # The compiler of sm_120 keeps one register of the fp16 gradient in memory, outside the loops, to use 48 in all.
        assert int(used["STACK"]) <= (8 if capability == 120 else 0) and used["LOCAL"] == "0", dump
        assert int(used["REG"]) <= 128, dump  # two programs of four warps are then never all there is room for
        wide = [line for line in compiled.asm["ptx"].splitlines() if "ld.global" in line and ".v4." in line]
        assert bool(wide) == (d % 16 == 0), "a row's start is not known to be aligned"
