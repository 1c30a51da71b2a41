"""The operators keep torch's contract (opcheck), and every loss compiles without a graph break."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from ccu_fast import (
    ALL,
    OTHER,
    SAME,
    SELF,
    ClipLoss,
    DistillClipLoss,
    InfoNCE,
    SigLipLoss,
    SigmoidLoss,
    info_nce,
    reduce_similarity,
)
from ccu_fast.ops import operator
from ccu_fast.ops.reduce_similarity.operator import flat
from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem, encode
from tests.losses.test_functional import ALL_LOSSES
from tests.support.presence import require_backend

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = (encode("lse", ALL), encode("sum", SELF), encode("softplus", OTHER))
COLS = (encode("lse", SAME | OTHER),)


def problem(
    dtype: torch.dtype, *, keys: bool, bias: bool, shared: bool, limits: bool = False, teacher: bool = False
) -> SimilarityProblem:
    n, m, d = 70, 81, 9
    beside = limits or teacher
    asked = ROWS
    if beside:
        asked = (*ROWS, encode("count", OTHER)) if limits else (*ROWS, encode("mass", ALL), encode("expected", OTHER))
    labels = (torch.randint(-1, 3, (1, n)), torch.randint(-1, 3, (2, m))) if keys else (None, None)
    ids = (torch.randint(0, 9, (2, n)), torch.randint(0, 9, (1, m))) if keys else (None, None)
    return SimilarityProblem(
        torch.randn(2, n, d).to(dtype),
        torch.randn(1 if shared else 2, m, d).to(dtype),
        torch.tensor(2.0),
        torch.tensor(-1.0) if bias else None,
        *labels,
        *ids,
        diagonal=not keys,
        rows=asked,
        cols=COLS,
        row_limits=torch.randn(1, n) if beside else None,
        col_limits=torch.randn(2, m) if beside else None,
        guide_x=torch.randn(2, n, 5) if teacher or (limits and keys) else None,
        guide_y=torch.randn(1, m, 5) if teacher or (limits and keys) else None,
        teacher_scale=torch.tensor(3.0) if teacher else None,
    )


# What a second call with other shapes of results needs: tracing it again would show nothing new, and takes longest.
SHAPES = ("test_schema", "test_faketensor")


# Every workspace with each dtype, and with keys or without.
@pytest.mark.parametrize(("dtype", "keys"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize(
    ("workspace", "beside", "swapped"),
    [
        (0, "", False),
        (1 << 17, "", True),
        (1 << 28, "", False),
        (0, "limits", True),
        (1 << 28, "limits", False),
        (1 << 17, "teacher", True),
    ],
)
def test_opcheck(dtype: torch.dtype, keys: bool, workspace: int, beside: str, swapped: bool, native: str) -> None:
    keys ^= swapped
    given = {beside: True} if beside else {}
    p = problem(dtype, keys=keys, bias=keys, shared=not keys, **given)
    op = torch.ops.ccu_fast.reduce_similarity
    torch.library.opcheck(op.default, (*flat(p), native, workspace, True))
    torch.library.opcheck(op.default, (*flat(p), native, workspace, False), test_utils=SHAPES)
    row_out, col_out, stash = op(*flat(p), native, workspace, True)
    backward = torch.ops.ccu_fast.reduce_similarity_backward.default
    for needs, how in (([True] * 4, {}), ([False, True, False, False], {"test_utils": SHAPES})):
        incoming = (torch.randn_like(row_out), torch.randn_like(col_out))
        torch.library.opcheck(backward, (*incoming, *flat(p), row_out, col_out, stash, needs, native, workspace), **how)


@pytest.mark.parametrize("workspace", [0, 1 << 28])
@pytest.mark.parametrize("unit", [True, False])
def test_opcheck_of_prefixes(unit: bool, workspace: int) -> None:
    p = replace(problem(torch.float32, keys=not unit, bias=True, shared=unit, limits=False), prefixes=(2, 5), unit=unit)
    op = torch.ops.ccu_fast.reduce_similarity
    how = ("native.prefixes", workspace)
    torch.library.opcheck(op.default, (*flat(p), *how, True))
    row_out, col_out, stash = op(*flat(p), *how, True)
    results = (torch.randn_like(row_out), torch.randn_like(col_out)), (row_out, col_out, stash)
    args = (*results[0], *flat(p), *results[1], [True] * 4, *how)
    torch.library.opcheck(torch.ops.ccu_fast.reduce_similarity_backward.default, args)


OPTIONS: dict[str, dict[str, Any]] = {
    "margin": {"margin": 0.1},
    "threshold": {"margin": 0.1, "relative": True, "threshold": 0.9},
    "joint": {"joint": ("x_to_y", "x_to_x"), "smoothing": 0.1},
    "weights": {"hardness": 0.5, "debias": 0.1, "focal": 1.0},
    "decoupled": {"decoupled": True, "negatives": torch.ones(5, 8)},
    "hard negatives": {"hard_negatives": torch.ones(40, 2, 8), "margin": 0.1},
    "guide": {"margin": 0.0, "guide": (torch.ones(40, 3), torch.ones(40, 3))},
    "prefixes": {"prefixes": (3, 8), "normalize": True, "margin": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_info_nce_are_one_graph(name: str) -> None:
    x, y = (F.normalize(torch.randn(40, 8), dim=1).requires_grad_() for _ in range(2))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return info_nce(x, y, scale=5.0, **OPTIONS[name])

    ours = torch.compile(loss, backend="eager", fullgraph=True)(x, y)
    for got, wanted in zip((ours, *torch.autograd.grad(ours, (x, y))), gradients(loss, x, y), strict=True):
        torch.testing.assert_close(got, wanted)


def gradients(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """The loss and the gradients of its inputs."""
    value = loss(*inputs)
    return value, *torch.autograd.grad(value, inputs)


def test_a_constant_is_marked_as_torch_marks_it() -> None:
    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    assert vars(operator.constant(ours)) == vars(torch.compiler.assume_constant_result(theirs))


def test_what_is_never_compiled_leaves_one_break_and_nothing_to_compile() -> None:
    """As with torch's own decorator: the same graphs, and no warning."""

    def total(x: Tensor, *, times: float, **options: object) -> Tensor:
        return x * times

    def graphs(disabled: Callable[..., Tensor]) -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        for number in range(5):
            name = f"option_{number}"

            def step(x: Tensor, name: str = name, number: int = number) -> Tensor:
                return disabled(x + 1, times=0.5 * number, **{name: number}) * 2

            compiled = torch.compile(step, backend=counter)
            assert torch.equal(compiled(torch.ones(3)), step(torch.ones(3)))
        return counter.frame_count

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert graphs(operator.never(total)) == graphs(torch.compiler.disable(total)) > 5


def test_what_takes_long_is_not_imported_by_those_who_do_not_compile() -> None:
    """The compiler takes longer to import than torch; --help needs neither it nor what draws and trains."""
    program = """
import sys, torch
before = set(sys.modules)
import ccu_fast
ours = {name for name in set(sys.modules) - before if name.split(".")[0] not in sys.stdlib_module_names}
assert {name.split(".")[0] for name in ours} <= {"ccu_fast", "torch"}, ours
assert len(ours) < 100, ours
x = torch.randn(9, 4, requires_grad=True)
ccu_fast.info_nce(x, x, scale=3.0).backward()
ccu_fast.ClipLoss()(x, x, torch.tensor(1.0)).backward()
ccu_fast.topk_flips(torch.randn(2, 4), ccu_fast.TokenTable(torch.randn(9, 4)), 1)
ccu_fast.pgd_step_(torch.zeros(2, 3), torch.rand(2, 3), torch.rand(2, 3), step=0.1, eps=0.1)
ccu_fast.l2_normalize(x)
ccu_fast.candidate_losses(x.detach()[:, None], x.detach(), x.detach(), scale=3.0)
ccu_fast.NoiseStore(2, [3]).gather(torch.arange(2))
found = {"torch._dynamo", "torch._inductor", "sympy", "triton"} & set(sys.modules) - before
assert not found, found

from ccu_fast.cli.main import main
assert main(["--help"]) == 0
slow = {"torch._dynamo", "torch._inductor", "sympy", "triton", "jinja2", "PIL", "matplotlib", "sklearn", "transformers"}
found = slow & set(sys.modules) - before
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(step: Step, n: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(n, 8, generator=generator).to(dtype).requires_grad_() for _ in "xy")
    scale = torch.tensor(3.0, requires_grad=True)
    loss = step(x, y, scale)
    return [loss, *torch.autograd.grad(loss.sum(), (x, y, scale))]


def assert_same(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# The reference keeps nothing of any loss, so that to the compiler they differ by what is around the operator alone.
ON_THE_REFERENCE = ("info_nce", "bounded, labels", "distill")


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "native") for name in ALL_LOSSES), *((name, "reference") for name in ON_THE_REFERENCE)],
)
def test_compiles_whole(name: str, backend: str) -> None:
    require_backend(backend)

    def step(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return ALL_LOSSES[name](x, y, scale=scale, backend=backend)

    assert_same(run(torch.compile(step, fullgraph=True, backend="aot_eager"), 20), run(step, 20))


MODULES: dict[str, Callable[[str], Any]] = {
    "ClipLoss": lambda b: ClipLoss(backend=b),
    "SigLipLoss": lambda b: SigLipLoss(backend=b),
    "InfoNCE, learnable": lambda b: InfoNCE(scale=2.0, learnable=True, backend=b),
    "SigmoidLoss, learnable": lambda b: SigmoidLoss(scale=2.0, bias=-1.0, learnable=True, backend=b),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_compile_whole(name: str, backend: str) -> None:
    module = MODULES[name](backend)

    def step(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        if isinstance(module, (InfoNCE, SigmoidLoss)):
            return module(scale * x, y)
        return module(x, y, scale, torch.tensor(-1.0))

    expected = run(step, 20)
    assert_same(run(torch.compile(step, fullgraph=True, backend="aot_eager"), 20), expected)
    for parameter in module.parameters():
        parameter.grad = None


@pytest.mark.parametrize(("workspace", "backend"), [(0, "native"), (None, "native"), (None, "reference")])
def test_one_graph_serves_any_batch(workspace: int | None, backend: str) -> None:
    require_backend(backend)

    def step(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return info_nce(x, y, scale=scale, backend=backend, workspace=workspace)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for n in (20, 33, 150, 64, 257):
        assert_same(run(compiled, n), run(step, n))
    assert counter.frame_count == 1


def test_one_graph_serves_any_batch_with_a_teacher(backend: str) -> None:
    """Its log-sum-exps are made in the graph."""

    def step(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        contrastive, distilled = DistillClipLoss(backend=backend)(x, y, scale, x[:, :5], y[:, :5], scale.detach() + 1)
        return contrastive + 2 * distilled

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for n in (20, 33, 150):
        assert_same(run(compiled, n), run(step, n))
    assert counter.frame_count == 1


@pytest.mark.parametrize(("guided", "backend"), [(False, "native"), (True, "native"), (True, "reference")])
def test_one_graph_serves_any_batch_with_limits(guided: bool, backend: str) -> None:
    """Limits made from the features inside the graph, and counts of what they leave."""
    require_backend(backend)

    def step(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        u, v = x[:, :5], y[:, :5]
        limits = (u * v).sum(-1) + 0.1 if guided else (x * y).sum(-1) + 0.1
        rows, cols = reduce_similarity(
            x, y, scale=scale, row_limits=limits, col_limits=limits, guide=(u, v) if guided else None,
            rows=[("lse", ALL), ("count", OTHER), ("sum", OTHER)], cols=[("lse", ALL)], backend=backend,
        )  # fmt: skip
        return rows[0].sum() + cols[0].sum() + (rows[2] / rows[1].clamp(min=1)).sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for n in (20, 33, 150, 64):
        assert_same(run(compiled, n), run(step, n))
    assert counter.frame_count == 1


def test_a_changing_batch_without_asking_for_it(backend: str) -> None:
    """torch.compile's default: the second size makes the graph dynamic, and no size after it compiles again."""

    def step(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return info_nce(x, y, scale=scale, backend=backend)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for n in (20, 33, 150, 64, 257):
        assert_same(run(compiled, n), run(step, n))
    assert counter.frame_count == 2


def test_inductor(native: str) -> None:
    """Through code generation, with work before and after that inductor may fuse and reorder.

    To it the operator is one node, whatever its backend.
    """

    def step(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        x, y = (torch.nn.functional.normalize(t, dim=-1) for t in (x, y))
        return 0.5 * info_nce(x, y, scale=scale.exp(), backend=native) + x.square().mean()

    assert_same(run(torch.compile(step, fullgraph=True), 70), run(step, 70))


def test_under_autocast(backend: str) -> None:
    def step(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            # Of a small batch the one operator, which a graph has not, rounds less than autocast does.
            return info_nce(x, y, scale=scale, backend=backend, paired=True)

    assert_same(run(torch.compile(step, fullgraph=True, backend="aot_eager"), 40), run(step, 40))


def test_frozen_side(backend: str) -> None:
    def step(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return info_nce(x, y.detach(), scale=scale, backend=backend) + 0 * y.sum()

    assert_same(run(torch.compile(step, fullgraph=True, backend="aot_eager"), 40), run(step, 40))
