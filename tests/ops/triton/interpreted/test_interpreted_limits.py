"""Limits and guides on the Triton backend in tiles of 16×32: small shapes walk every path, fp16 takes small kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ccu_fast import ALL, OTHER, SELF, reduce_similarity
from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem, encode
from ccu_fast.ops.reduce_similarity.triton import plan
from tests.ops.reduce_similarity.test_limits import (  # noqa: F401 - collected again
    BANKS,
    CLIP,
    KEYS,
    MIX,
    limited,
    test_a_far_false_negative_does_not_cost_the_others_their_digits,
    test_counts,
    test_nan_is_not_left_out,
    test_no_gradient_flows_to_limits_and_guide,
    test_no_limit_all_limits_and_nan,
    test_nothing_to_reduce,
    test_one_sides_limits_do_not_concern_the_other,
    test_what_is_as_similar_as_the_limit_stays,
)
from tests.ops.reduce_similarity.test_limits import test_banks as whole_numbers_in_banks
from tests.ops.reduce_similarity.test_limits import test_losses_pass_limits_on as losses_pass_limits_on
from tests.support.oracle import SETS, Case, assert_same_bits, by_us, check, unit

FP32, FP16 = torch.float32, torch.float16


@pytest.fixture
def backend() -> str:
    return "triton"


@pytest.fixture(params=[FP32, FP16], ids=str)
def engine(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    return "triton", request.param


@pytest.mark.parametrize(
    ("kind", "keys", "sides"),
    [(kind, "paired", "both") for kind in ("lse", "sum", "softplus", "logsigmoid")]
    + [("lse", "paired", "rows"), ("lse", "labels and ids", "both"), ("softplus", "labels and ids", "both")],
)
def test_every_kind_over_every_relation(kind: str, keys: str, sides: str, engine: tuple[str, torch.dtype]) -> None:
    given = KEYS[keys](37, 37)
    refused = () if "row_labels" in given else (("lse", 2),)
    spec = tuple((kind, r) for r in SETS if (kind, r) not in refused)
    check(limited(Case(unit(37, 24), unit(37, 24), 6.0, -0.5, given, spec, spec), sides), *engine)


@pytest.mark.parametrize("keys", ["unrelated", "labels", "ids"])
def test_other_keys(keys: str, engine: tuple[str, torch.dtype]) -> None:
    check(limited(Case(unit(33, 24), unit(53, 24), 6.0, None, KEYS[keys](33, 53), MIX, MIX)), *engine)


@pytest.mark.parametrize("keys", ["paired", "labels and ids"])
@pytest.mark.parametrize("of", [FP32, FP16], ids=str)
def test_a_guide_decides(of: torch.dtype, keys: str, engine: tuple[str, torch.dtype]) -> None:
    """In large kernels, whatever the dtype. G in fp16 has too few digits for the sum that is the gradient of scale."""
    guide = unit(37, 21).to(of), unit(37, 21).to(of)
    frozen = ("scale",) if engine[1] == FP16 else ()
    case = Case(unit(37, 24), unit(37, 24), 6.0, None, KEYS[keys](37, 37), MIX, CLIP, frozen)
    check(limited(case, guide=guide), *engine)


@pytest.mark.parametrize(("name", "workspace"), [("y shared", 0), ("x shared", None), ("both", 1 << 14)])
@pytest.mark.parametrize(("dtype", "guided"), [(FP32, False), (FP16, False), (FP32, True)], ids=str)
def test_banks(name: str, workspace: int | None, dtype: torch.dtype, guided: bool) -> None:
    """In large kernels, in small ones, and with a guide, which large kernels serve in any dtype."""
    assert name in BANKS
    whole_numbers_in_banks(name, workspace, guided, ("triton", dtype))


@pytest.mark.parametrize("n", [8, 40])
def test_losses_pass_limits_on(n: int, backend: str) -> None:
    """No batch of fp32 is small here, so that one of several tiles shows as much as one of many."""
    losses_pass_limits_on(n, backend)


@pytest.mark.parametrize("workspace", [0, 1 << 14, 1 << 24])
def test_rows_that_need_their_own_maximum(workspace: int) -> None:
    """Logits so far apart that a common shift does not hold them: the online kernel and its gradient."""
    x, y = 30 * unit(37, 24), unit(37, 24)
    x[::2] *= 1e-3
    guide = unit(37, 9).float(), unit(37, 9).float()
    for given in (None, guide):
        case = limited(Case(x, y, 10.0, None, {}, (("lse", ALL), ("lse", OTHER)), CLIP), guide=given)
        check(case, "triton", FP32, ulps=64, workspace=workspace)  # an error of eps in S is one of |S| eps in exp(S)


def test_same_inputs_same_bits(engine: tuple[str, torch.dtype]) -> None:
    guide = unit(50, 9).float(), unit(50, 9).float()
    case = limited(Case(unit(50, 33), unit(50, 33), 20.0, None, {}, MIX, CLIP), guide=guide)
    assert_same_bits(*(by_us(case, engine[1], "triton") for _ in range(2)))


def test_nothing_is_kept_and_the_diagonal_is_told_apart() -> None:
    """Without limits a reduction over everything needs no look at the diagonal; with them SELF must not be left out."""
    codes = (encode("lse", int(ALL)), encode("sum", int(SELF)))
    x = torch.empty(1, 64, 16)
    p = SimilarityProblem(x, x, torch.ones(()), None, None, None, None, None, True, codes, codes)
    cut = replace(p, row_limits=torch.zeros(1, 64))
    assert plan.stash_shape(p, 1 << 24, True)[0] > plan.HEADER
    assert plan.stash_shape(cut, 1 << 24, True) == (plan.HEADER,)
    spec = plan.spec(p, codes)
    for limited_side, everywhere in ((False, 7), (True, 0)):
        always, near, far = plan.by_distance(p, spec, limited=limited_side)
        assert [entry[1] for entry in always] == [everywhere, 0]
        assert [entry[1] for entry in near] == [7 - everywhere, 1]
        assert [entry[1] for entry in far] == [7 - everywhere, 0]


def test_a_guide_in_bf16_is_refused() -> None:
    """The interpreter's dot of bf16 is wrong, whatever x is in."""
    x, guide = torch.randn(8, 16), torch.randn(8, 16, dtype=torch.bfloat16)
    limits = torch.zeros(8)
    with pytest.raises(ValueError, match="no correct bf16 dot"):
        reduce_similarity(
            x, x, scale=1.0, rows=[("lse", ALL)], row_limits=limits, guide=(guide, guide), backend="triton"
        )
