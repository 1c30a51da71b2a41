"""digit-features: the spectrum and the edges of the embedded digits."""

from __future__ import annotations

import numpy as np
import torch
from scipy.fft import dctn

from ccu_fast.data.features import EDGES, WAVES, edges, load_features, spectrum
from ccu_fast.data.halves import load_halves


def test_features_are_those_of_the_same_items() -> None:
    features, halves = load_features(1), load_halves(1)
    for part, before in zip(vars(features).values(), vars(halves).values(), strict=True):
        assert torch.equal(part.ids, before.ids) and torch.equal(part.labels, before.labels)
        assert part.visual.shape == (len(part), WAVES) and part.other.shape == (len(part), EDGES)
        assert part.visual.dtype == part.other.dtype == torch.float32
    for columns in (features.train.visual, features.train.other):
        torch.testing.assert_close(columns.mean(0), torch.zeros(columns.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(columns.std(0), torch.ones(columns.shape[1]), atol=1e-4, rtol=0)
    again = load_features(1)
    assert torch.equal(again.test.visual, features.test.visual)
    assert not torch.equal(load_features(2).test.ids, features.test.ids)


def test_the_spectrum_is_that_of_scipy() -> None:
    images = torch.rand(3, 8, 8)
    expected = dctn(images.double().numpy(), axes=(1, 2), norm="ortho")[:, :6, :6]
    np.testing.assert_allclose(spectrum(images).view(3, 6, 6), expected, atol=1e-5)


def test_edges_point_where_an_image_grows() -> None:
    right = torch.arange(8.0).expand(1, 8, 8)
    for image, direction in ((right, 4), (right.mT, 6), (right.flip(2), 0), (right.mT.flip(1), 2)):
        expected = torch.zeros(4, 8)
        expected[:, direction] = 0.25
        torch.testing.assert_close(edges(image).view(4, 8), expected, atol=1e-5, rtol=0)
    corner = torch.zeros(1, 8, 8)
    corner[0, 1, 6] = 1
    found = edges(corner).view(4, 8).sum(1)
    assert found.argmax() == 1 and found[2:].eq(0).all()  # in the upper right quarter
    assert edges(torch.zeros(1, 8, 8)).eq(0).all()
