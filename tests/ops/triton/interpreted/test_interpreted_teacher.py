"""A teacher on the Triton backend in tiles of 16×32: always in large kernels, its log-sum-exps in small ones too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ccu_fast import ALL, OTHER
from ccu_fast.ops.reduce_similarity.operator import specialised
from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem, encode
from ccu_fast.ops.reduce_similarity.triton import plan
from tests.ops.reduce_similarity.test_teacher import (  # noqa: F401 - collected again
    BANKS,
    LOSS,
    taught,
    test_an_ignored_item_may_hold_nan,
    test_mass_has_no_gradient,
    test_nan_is_seen_where_it_counts,
    test_no_gradient_flows_to_the_teacher,
    test_nothing_to_reduce,
    test_probabilities_add_up,
)
from tests.ops.reduce_similarity.test_teacher import test_banks as whole_numbers_in_banks
from tests.support.oracle import SETS, assert_same_bits, by_us, check, unit

FP32, FP16 = torch.float32, torch.float16


@pytest.fixture
def backend() -> str:
    return "triton"


@pytest.fixture(params=[FP32, FP16], ids=str)
def engine(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    return "triton", request.param


@pytest.mark.parametrize("keys", ["paired", "labels and ids"])
@pytest.mark.parametrize("kind", ["expected", "mass"])
def test_every_relation(kind: str, keys: str, engine: tuple[str, torch.dtype]) -> None:
    # G in fp16 has too few digits for the sum that is the gradient of scale.
    frozen = ("scale",) if engine[1] == FP16 else ()
    spec = tuple((kind, r) for r in SETS)
    check(taught(37, 37, keys, rows=(*spec, ("lse", ALL)), cols=(("lse", OTHER), *spec), frozen=frozen), *engine)


@pytest.mark.parametrize("keys", ["unrelated", "labels", "ids"])
def test_other_keys(keys: str, engine: tuple[str, torch.dtype]) -> None:
    frozen = ("scale",) if engine[1] == FP16 else ()
    check(taught(33, 53, keys, frozen=frozen), *engine)


@pytest.mark.parametrize("of", [FP32, FP16], ids=str)
def test_the_teacher_has_a_dtype_of_its_own(of: torch.dtype, engine: tuple[str, torch.dtype]) -> None:
    frozen = ("scale",) if engine[1] == FP16 else ()
    check(taught(37, 37, of=21, teacher_dtype=of, frozen=frozen), *engine)


@pytest.mark.parametrize(
    ("name", "workspace", "labelled"),
    [("y shared", 0, False), ("teacher shared", None, True), ("both", 1 << 14, False), ("both", 0, True)],
)
def test_banks(name: str, workspace: int | None, labelled: bool, engine: tuple[str, torch.dtype]) -> None:
    assert name in BANKS
    whole_numbers_in_banks(name, labelled, workspace, engine)


@pytest.mark.parametrize("workspace", [0, 1 << 24])
def test_rows_that_need_their_own_maximum(workspace: int) -> None:
    """The student's and the teacher's: neither's log-sum-exps are limits to the online kernel."""
    case = taught(37, 37, rows=(("lse", ALL), ("expected", OTHER)), cols=LOSS)
    case = replace(case, x=30 * case.x, scale=10.0, teacher_scale=300.0)
    case.x[::2] *= 1e-3
    # An error of eps in S or T is one of |S| or |T| eps in their exponentials.
    check(case, "triton", FP32, ulps=256, workspace=workspace)


def test_same_inputs_same_bits(engine: tuple[str, torch.dtype]) -> None:
    case = taught(50, 50, d=33)
    assert_same_bits(*(by_us(case, engine[1], "triton") for _ in range(2)))


def test_nothing_is_kept_and_large_kernels_serve() -> None:
    codes = (encode("lse", int(ALL)), encode("expected", int(OTHER)))
    x = unit(1, 64, 16).half()
    p = SimilarityProblem(x, x, torch.ones(()), None, None, None, None, None, True, codes[:1], codes[:1])
    taught_too = replace(p, rows=codes, row_limits=torch.zeros(1, 64), guide_x=x, guide_y=x, teacher_scale=p.scale)
    assert plan.stash_shape(p, 1 << 24, True)[0] > plan.HEADER
    assert plan.stash_shape(taught_too, 1 << 24, True) == (plan.HEADER,)
    assert specialised(p, "triton", True) == "triton.small"
    assert specialised(taught_too, "triton", True) == "triton"
    assert not taught_too.limited
