"""Our kernels called several times on small shapes: wrong or varying results are detected."""

from __future__ import annotations

import pytest
import torch

from benchmarks import exercise
from benchmarks.gate import Gate
from benchmarks.ops import pgd_step
from benchmarks.registry import Call, Case, Provider, Shape, Tensors


def unsteady(inputs: Tensors, shape: Shape) -> Call:
    """Right, but another last bit at every call."""
    image = pgd_step.build_eager(inputs, shape)()["image"]
    first = image.flatten()[0]
    first.copy_(torch.nextafter(first, torch.rand(())))
    return lambda: {"image": image}


def off(inputs: Tensors, shape: Shape) -> Call:
    image = pgd_step.build_eager(inputs, shape)()["image"]
    return lambda: {"image": image + 0.01}


@pytest.mark.parametrize(
    ("build", "problem"), [(unsteady, "image differs from call to call"), (off, "image is off by")]
)
def test_exercise_sees_what_is_wrong(build: object, problem: str) -> None:
    case = Case(pgd_step.PGD_STEP, {"B": 2, "H": 5}, torch.float32, torch.device("cpu"))
    gate = Gate(case, case.inputs())
    right = Provider("ours", pgd_step.build_eager, role="ours")
    assert exercise.exercise(case, right, gate, 3) is None
    said = exercise.exercise(case, Provider("ours", build, role="ours"), gate, 3)  # type: ignore[arg-type]
    assert said is not None and problem in said


def test_exercise_fails_if_nothing_ran(capsys: pytest.CaptureFixture[str]) -> None:
    assert exercise.main(["--ops", "pgd_step", "--device", "cpu", "--once"]) == 0
    assert "1 exercised on cpu, 0 wrong" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert exercise.main(["--device", "cuda"]) == 2
