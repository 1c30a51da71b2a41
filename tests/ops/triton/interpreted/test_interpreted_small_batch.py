"""The kernels of small batches, by the same tests as those of large ones."""

from __future__ import annotations

import pytest
import torch

from ccu_fast.ops.reduce_similarity.operator import specialised
from ccu_fast.ops.reduce_similarity.triton import small
from tests.ops.reduce_similarity import test_reduce_similarity as on_a_cpu
from tests.ops.small_info_nce.test_small_info_nce import (  # noqa: F401 - the same
    Way,
    only,
    test_a_graph_may_be_walked_twice,
    test_features_that_are_made_unit_vectors,
    test_loss_and_gradients,
    test_nan_goes_through,
    test_views_one_bank_for_both_and_no_gradient,
)
from tests.ops.small_info_nce.test_small_info_nce import (
    test_any_subset_of_gradients as test_any_subset_of_gradients_of_the_loss,  # noqa: F401
)
from tests.ops.triton.interpreted.test_interpreted_similarity import (  # noqa: F401 - collected again, for the small kernels
    BIASED,
    CLIP,
    KINDS_AT,
    MIX,
    RECOMPUTED,
    at_extreme_logits,
    problem,
    test_an_empty_set_is_minus_infinity_and_sends_nothing_back,
    test_banks_in_two_dimensions,
    test_every_loss,
    test_every_reduction_over_every_relation,
    test_fp16,
    test_fp16_gradients_keep_their_digits,
    test_frozen_inputs,
    test_labels_of_a_paired_problem,
    test_nan_reaches_what_it_touches_and_nothing_else,
    test_one_side_only,
    test_same_inputs_same_bits,
    test_shapes,
    test_sharp_logits,
    test_unnormalised_logits,
)
from tests.ops.triton.interpreted.test_interpreted_similarity import test_banks as in_banks
from tests.support.oracle import Case, unit


@pytest.fixture(autouse=True)
def always_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccu_fast.ops.reduce_similarity.api.specialised", lambda p, backend, keep: "triton.small")


@pytest.fixture
def backend() -> str:
    return "triton"


@pytest.fixture
def way(monkeypatch: pytest.MonkeyPatch) -> Way:
    only(monkeypatch)
    return "triton", torch.float16


# They keep nothing, so that the workspace changes nothing.
@pytest.mark.parametrize(("kinds", "extreme"), KINDS_AT, ids=lambda of: "-".join(map(str, of)))
def test_every_reduction_at_extreme_logits(kinds: tuple[str, ...], extreme: tuple[float, float, str]) -> None:
    at_extreme_logits(kinds, extreme, RECOMPUTED, BIASED)


@pytest.mark.parametrize("which", ["y shared", "x shared", "neither"])
def test_banks(which: str) -> None:
    in_banks(which, 0)


@pytest.mark.parametrize(("banks", "normalize"), [(1, True), (2, False)])
def test_what_an_ignored_item_holds_does_not_matter(banks: int, normalize: bool) -> None:
    shape = on_a_cpu.ONE_BANK if banks == 1 else on_a_cpu.TWO_BANKS
    on_a_cpu.nothing_comes_of_ignored_items(shape, normalize, "triton", on_a_cpu.WITH_BIAS, on_a_cpu.RECOMPUTED)


def test_any_subset_of_gradients() -> None:
    """Unneeded gradients are not computed, and the others keep their bits."""
    p = problem(Case(unit(37, 20), unit(37, 20), 5.0, 0.25, {}, MIX, CLIP))
    row_out, col_out, stash = small.forward(p, 0, True)
    assert stash.shape == small.stash_shape(p, 0, True)
    incoming = torch.randn_like(row_out), torch.randn_like(col_out)
    full = small.backward(p, (*incoming, row_out, col_out), stash, [True] * 4, 0)
    subsets = [(i == j for i in range(4)) for j in range(5)] + [(True, True, False, False), (False, False, True, True)]
    for needs in map(tuple, subsets):
        some = small.backward(p, (*incoming, row_out, col_out), stash, list(needs), 0)
        for value, whole, need, like in zip(some, full, needs, (p.x, p.y, p.scale, p.scale), strict=True):
            assert value.dtype == like.dtype
            if need:
                assert torch.equal(value, whole)
            else:
                assert value.shape == (() if like.ndim == 0 else (0,))


def test_which_batches_are_small() -> None:
    def name(n: int, m: int, d: int, dtype: torch.dtype, backend: str = "triton") -> str:
        return specialised(problem(Case(unit(n, d), unit(m, d)), dtype), backend, True)

    half = torch.float16
    assert name(1024, 1024, 512, half) == name(512, 2048, 1024, torch.bfloat16) == "triton.small"
    assert name(8, 8, 8, torch.float32) == name(1024, 1025, 8, half) == name(8, 2049, 8, half) == "triton"
    assert name(8, 8, 1025, half) == "triton"
    assert name(8, 8, 8, half, "native") == "native"
