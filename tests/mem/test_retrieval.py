"""Retrieval and reading against cases worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ccu_fast.mem.retrieval import groups, guessing, reading, retrieval
from ccu_fast.runs.retrieval import recall_at, retrieval_ranks

EYE = torch.eye(3)


def test_ranks_by_hand() -> None:
    # Scores: row 0 → 3, 2, 1; row 1 → 3, 2, 1; row 2 → 1, 1, 1.
    query = torch.tensor([[3.0, 2, 1], [3, 2, 1], [1, 1, 1]])
    own = torch.arange(3)
    ranks = retrieval_ranks(query, EYE, own, own)
    # Row 2 ties with two wrong answers, and both count against it.
    assert ranks.tolist() == [1, 2, 3]
    assert recall_at(ranks, (1, 2)) == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3)}
    with pytest.raises(ValueError, match="ks"):
        recall_at(ranks, (0,))


def test_equal_captions_are_equally_right() -> None:
    query = torch.tensor([[1.0, 3, 2], [1, 3, 2]])
    # Items 0 and 2 of the gallery both belong to group 5: the better of them counts, and the other is not wrong.
    ranks = retrieval_ranks(query, EYE, torch.tensor([5, 9]), torch.tensor([5, 9, 5]))
    assert ranks.tolist() == [2, 1]


def test_a_model_that_says_nothing_finds_nothing() -> None:
    flat = torch.ones(101, 4)
    own = torch.arange(101)
    result = retrieval(flat, flat, own, own)
    assert result["i2t_r1"] == result["t2i_r10"] == 0.0
    assert result["i2t_medr"] == 101.0


def test_retrieval_in_both_directions_with_five_captions_an_image() -> None:
    image = torch.eye(4)
    owner = torch.arange(4).repeat_interleave(5)
    text = image[owner]
    perfect = retrieval(image, text, torch.arange(4), owner)
    assert all(perfect[f"{side}_r{k}"] == 1.0 for side in ("i2t", "t2i") for k in (1, 5, 10))
    assert perfect["i2t_medr"] == perfect["t2i_medr"] == 1.0
    # All captions of image 0 now describe image 1: image 0 finds five wrong … and ties with all of them at 0.
    text = image[torch.where(owner == 0, 1, owner)]
    wrong = retrieval(image, text, torch.arange(4), owner)
    assert wrong["t2i_r1"] == 15 / 20
    # Image 0 scores 0 with everything: 1 + 15. Image 1's own five captions are right, five others tie: 1 + 5.
    assert wrong["i2t_r1"] == wrong["i2t_r5"] == 2 / 4
    assert wrong["i2t_r10"] == 3 / 4
    assert wrong["i2t_medr"] == (1 + 6) / 2


def test_groups_join_equal_captions_and_shared_images() -> None:
    got = groups(["a", "b", "a", "c", "d"], torch.tensor([0, 0, 1, 2, 1]))
    assert got.unique(return_inverse=True)[1].tolist() in ([0, 0, 0, 1, 0], [1, 1, 1, 0, 1])


def test_groups_and_guessing() -> None:
    g = groups(["b", "a", "b"], torch.arange(3))
    assert g.tolist() == [0, 1, 0]
    # Two queries have two right answers among three, one has one.
    assert guessing(g, g, (1, 2))[1] == pytest.approx((2 / 3 + 1 / 3 + 2 / 3) / 3)
    assert guessing(g, g, (1, 2))[2] == pytest.approx((1 + 2 / 3 + 1) / 3)
    many = torch.arange(200)
    order = torch.rand(200, 200, generator=torch.Generator().manual_seed(0))
    ranks = retrieval_ranks(order, torch.eye(200), many, many)
    expected = guessing(many, many)[10]
    assert (ranks <= 10).double().mean().item() == pytest.approx(expected, abs=4 * math.sqrt(expected / 200))


def test_scores_that_are_held_are_bounded_whatever_the_number_of_items(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.Generator().manual_seed(0)
    query, gallery, thing = torch.rand(90, 8, generator=numbers), torch.rand(90, 8, generator=numbers), torch.arange(90)
    whole = retrieval_ranks(query, gallery, thing, thing)
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            sizes.extend(
                x.numel() for x in (made if isinstance(made, tuple) else [made]) if isinstance(x, torch.Tensor)
            )
            return made

    monkeypatch.setattr("ccu_fast.runs.retrieval.SCORES", 10 * 90)
    with Watch():
        assert torch.equal(retrieval_ranks(query, gallery, thing, thing), whole)
    assert max(sizes) == 10 * 90 < 90 * 90


def test_reading_by_hand() -> None:
    # Two places: the class of number 10·a + b is a one-hot vector.
    classes = torch.eye(100)
    image = classes[[37, 30, 88]]
    result = reading(image, classes, torch.tensor([[3, 7], [3, 7], [1, 2]]))
    assert result["digit"] == pytest.approx(3 / 6)
    assert result["position"] == pytest.approx([2 / 3, 1 / 3])
    assert result["strip"] == pytest.approx(1 / 3)


def test_bad_input() -> None:
    own = torch.arange(3)
    with pytest.raises(ValueError, match="none for query 1"):
        retrieval_ranks(EYE, EYE, torch.tensor([0, 7, 2]), own)
    with pytest.raises(ValueError, match="gallery_group: expected shape"):
        retrieval_ranks(EYE, EYE, own, own[:2])
    with pytest.raises(TypeError, match="query"):
        retrieval_ranks(EYE.long(), EYE, own, own)
    with pytest.raises(ValueError, match="classes: expected shape"):
        reading(EYE, EYE, torch.zeros(3, 2, dtype=torch.int64))
