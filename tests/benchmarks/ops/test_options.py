"""The rows of InfoNCE's options: what they are compared with, and that the gate sees an option that is left out."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.gate import Gate
from benchmarks.ops import OPS, options
from benchmarks.ops.common import step
from benchmarks.registry import Case, label
from benchmarks.visit import program

CPU = torch.device("cpu")
KINDS = {"margin": options.eager_margin, "guide": options.eager_guide, "hard": options.eager_hard}
KINDS["prefixes"] = options.eager_prefixes


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_in_blocks_is_that_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "BLOCK", 40)
    op = OPS[f"info_nce_{kind}"]
    inputs = op.make({"B": 96, "D": 64}, torch.float64, CPU)
    whole = step(KINDS[kind], {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in inputs.items()})
    for name, value in op.expect(inputs, op.quick[0]).values.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_an_option_that_is_left_out_does_not_pass(kind: str, native: str) -> None:
    """In bf16 too, whose limits are loose."""
    case = Case(OPS[f"info_nce_{kind}"], {"B": 512, "D": 256}, torch.bfloat16, CPU)
    gate = Gate(case, case.inputs())
    *answering, _ = case.providers()  # the last is the ceiling
    ours = next(provider for provider in answering if provider.name == "ccu_fast")
    for provider in answering:
        answer = provider.build(gate.inputs, case.shape)()
        assert gate.judge(provider, answer).passed, provider.name
    without = step(partial(options.ours, backend=native), {name: gate.inputs[name] for name in options.PLAIN})
    verdict = gate.judge(ours, {**gate.expected.values, **without})
    assert not verdict.passed and "loss" in verdict.failure()


def test_a_visit_measures_them_at_two_sizes_before_all_other_rows_of_its_second_half() -> None:
    names = [f"info_nce_{kind}" for kind in ("hard", "margin", "guide")]
    assert program.REST[:2] == ((("info_nce_prefixes",), ("B=8192",)), (tuple(names), ()))
    sizes = [(case.op.name, label(case.shape)) for case in program.cases("cuda", names, quick=False)]
    assert sizes == [(name, f"B={b},D=512") for name in names for b in (8192, 32768)]
