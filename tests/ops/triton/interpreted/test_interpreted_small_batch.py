"""The kernels of small batches, by the same tests as those of large ones."""

from __future__ import annotations

import pytest
import torch

from ccu_fast.ops.reduce_similarity.operator import specialised
from ccu_fast.ops.reduce_similarity.triton import small
from tests.ops.reduce_similarity.test_reduce_similarity import test_what_an_ignored_item_holds_does_not_matter  # noqa: F401 - the same
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
    CLIP,
    MIX,
    problem,
    test_an_empty_set_is_minus_infinity_and_sends_nothing_back,
    test_banks,
    test_banks_in_two_dimensions,
    test_every_loss,
    test_every_reduction_at_extreme_logits,
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
