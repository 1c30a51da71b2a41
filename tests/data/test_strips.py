"""digit-strips: what the data promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ccu_fast.data.strips import caption, load_strips


def test_strips_show_their_digits_and_captions_read_them() -> None:
    train, test = load_strips(40, 20, seed=3)
    digits = load_digits()
    assert train.images.shape == (40, 1, 16, 64)
    assert test.images.shape == (20, 1, 16, 64)
    assert train.images.dtype == torch.uint8
    for strips in (train, test):
        assert torch.equal(torch.from_numpy(digits.target)[strips.sources], strips.digits)
        for i in (0, 7):
            for place in range(4):
                tile = strips.images[i, 0, :, 16 * place : 16 * (place + 1)].double()
                # Bilinear enlargement by two keeps the mean of interior pixels close to that of the original.
                original = digits.images[strips.sources[i, place]] * (255 / 16)
                small = tile.reshape(8, 2, 8, 2).mean((1, 3)).numpy()
                assert np.corrcoef(small.ravel(), original.ravel())[0, 1] > 0.95
    assert train.captions[0] == caption(train.digits[0].tolist())
    assert caption([3, 7, 1, 0]) == "a photo of the digits three seven one zero"


def test_no_digit_is_in_both_splits() -> None:
    train, test = load_strips(2000, 500)
    assert not set(train.sources.flatten().tolist()) & set(test.sources.flatten().tolist())
    # 4 · 2000 draws from about 1258 digits: nearly all are used.
    assert len(train.sources.unique()) > 1200


def test_strips_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = (load_strips(30, 10, seed=s)[0] for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a.images, b.images)
    assert not torch.equal(a.sources, c.sources)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"n_train": 0}, "n_train"), ({"n_test": -1}, "n_test"), ({"seed": -1}, "seed")],
)
def test_bad_counts(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_strips(**arguments)
