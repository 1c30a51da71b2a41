"""SSIM and PSNR against independent implementations."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

from ccu_fast.mem.fidelity import Fidelity, ssim


def by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """The published definition with scipy's Gaussian filter (radius 5), one channel."""
    from scipy.ndimage import gaussian_filter

    def blur(x: np.ndarray) -> np.ndarray:
        return gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]

    x, y = a.astype(float), b.astype(float)
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 2.55**2, 7.65**2
    return float((((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def test_ssim() -> None:
    a = torch.randint(0, 256, (3, 2, 13, 20), dtype=torch.uint8)
    b = (a.short() + torch.randint(-30, 31, a.shape)).clamp(0, 255).to(torch.uint8)
    got = ssim(a, b)
    for i in range(3):
        want = np.mean([by_scipy(a[i, c].numpy(), b[i, c].numpy()) for c in range(2)])
        assert float(got[i]) == pytest.approx(want, rel=1e-10)
    assert torch.allclose(ssim(a, a), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="at least 11 px"):
        ssim(a[..., :10], b[..., :10])


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    a = torch.randint(0, 248, (5, 3, 12, 12), dtype=torch.uint8)
    b = a + torch.randint(0, 9, a.shape, dtype=torch.uint8)
    whole, one, two = Fidelity(), Fidelity(), Fidelity()
    whole.add(a, b)
    one.add(a[:2], b[:2])
    two.add(a[2:], b[2:])
    one.merge(asdict(two))
    assert one.report() == pytest.approx(whole.report(), rel=1e-12)
    mean_square = float((b.double() - a.double()).square().mean())
    assert whole.report()["psnr_db"] == pytest.approx(10 * np.log10(255**2 / mean_square))
    assert whole.report()["eps_255"] == 8
    small = Fidelity()
    small.add(a[..., :4], a[..., :4])
    assert small.report() == {"eps_255": 0, "psnr_db": None, "ssim": None}
