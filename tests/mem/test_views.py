"""Pictures that keep their size: the geometry between the grid of noise, the picture and what a model sees."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ccu_fast.data.captions import DiskSource, list_pairs, scan
from ccu_fast.data.pictures import decode
from ccu_fast.mem.noise import pgd
from ccu_fast.mem.publish.whole import with_noise
from ccu_fast.mem.source import ahead
from ccu_fast.mem.views import Pictures, Views, seen, stretch, taps, window_box
from ccu_fast.models.dual_encoder import SmallDualEncoder
from tests.support import mem_datasets as made

SHAPE = (3, 12, 20)  # rows and columns must not be exchangeable
SIZES = [(20, 12), (33, 50), (90, 41), (5, 3), (300, 9), (7, 200), (1, 1), (64, 64)]  # (width, height)
pytestmark = pytest.mark.usefixtures("one_thread")


def dense(index: np.ndarray, weight: np.ndarray, size: int) -> np.ndarray:
    """Taps as a matrix."""
    out = np.zeros((len(index), size))
    np.add.at(out, (np.arange(len(index))[:, None], index), weight)
    return out


@pytest.mark.parametrize(
    ("size", "out", "low", "high"),
    [(50, 16, 0, 50), (50, 16, 3.3, 41.7), (10, 33, 0, 10), (10, 33, 2.5, 7.25), (16, 16, 0, 16), (1, 9, 0.2, 0.7)],
)
@pytest.mark.parametrize("cubic", [True, False])
def test_taps_are_pillows(size: int, out: int, low: float, high: float, cubic: bool) -> None:
    """Of pictures of fractions, which Pillow does not round in between; within the rounding of fp32."""
    line = np.random.default_rng(size).random((1, size), dtype=np.float32)
    kind = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    want = np.array(Image.fromarray(line).resize((out, 1), kind, box=(low, 0, high, 1)))
    got = line @ dense(*taps(size, out, np.arange(out), low, high, cubic=cubic), size).T
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("grid", "size"), [(16, 16), (16, 61), (16, 5), (16, 1), (16, 17), (1, 9)])
def test_the_grid_is_stretched_by_convex_weights(grid: int, size: int) -> None:
    matrix = dense(*stretch(grid, size, np.arange(size)), grid)
    assert matrix.min() >= 0
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix[::-1, ::-1], rtol=0, atol=1e-12)
    assert np.array_equal(matrix, np.eye(grid)) == (grid == size)


def test_what_is_seen_is_the_product_of_both() -> None:
    for size, out, low, high, grid in [
        (61, 12, 0, 61, 12),
        (61, 12, 7.5, 40.25, 24),
        (5, 12, 0, 5, 12),
        (9, 30, 1, 8, 4),
    ]:
        resize = dense(*taps(size, out, np.arange(out), low, high, cubic=True), size)
        want = resize @ dense(*stretch(grid, size, np.arange(size)), grid)
        np.testing.assert_allclose(seen(size, out, low, high, grid), want, rtol=0, atol=1e-6)
    assert np.array_equal(seen(12, 12, 0, 12, 12), np.eye(12, dtype=np.float32))


def smooth(number: int, size: tuple[int, int], *, grey: bool = False) -> Image.Image:
    """A picture without black and white, where noise would be clipped."""
    values = np.random.default_rng(number).integers(40, 216, (5, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(values).resize(size, Image.Resampling.BILINEAR)
    return picture.convert("L") if grey else picture


@pytest.fixture
def pictures(tmp_path: Path) -> Any:
    """A folder with a picture of each size, some grey, and what reads them."""
    for number, size in enumerate(SIZES):
        smooth(number, size, grey=number % 3 == 2).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(made.caption(number))
    listing = list_pairs(tmp_path)
    with closing(DiskSource(listing, SHAPE, threads=2)) as source:
        every = range(len(SIZES))
        sizes = scan(source, every, whole=True).sizes
        assert sizes is not None
        assert sizes.tolist() == [[h, w, 1 if i % 3 == 2 else 3] for i, (w, h) in enumerate(SIZES)]
        yield Pictures(source, torch.arange(len(SIZES)), sizes, (SHAPE[1], SHAPE[2])), source


def draws(k: int, n: int, least: float = 0.3) -> torch.Tensor:
    found = torch.rand(k, n, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    found[..., 0] = least + (1 - least) * found[..., 0]
    return found


def test_windows_have_the_models_aspect_and_lie_within_the_picture() -> None:
    for size in SIZES:
        for share, x, y in draws(1, 50)[0].tolist():
            left, top, right, bottom = window_box(size, (20, 12), [share, x, y])
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
            assert (right - left) / (bottom - top) == pytest.approx(20 / 12)
            largest = min(size[0] / 20, size[1] / 12) ** 2 * 20 * 12
            assert (right - left) * (bottom - top) / largest == pytest.approx(share)


def test_the_own_window_is_what_a_model_decodes(pictures: Any) -> None:
    """Up to Pillow's rounding between its two passes; exactly where nothing is resized."""
    part, source = pictures
    every = torch.arange(len(SIZES))
    views = part.views(every, draws(0, len(SIZES)))
    assert len(views) == 1 and torch.equal(views.pixels[0, 0], source.images(every)[0])
    assert int((views.pixels[0].int() - source.images(every).int()).abs().max()) <= 2


def test_a_published_picture_shows_what_was_optimised(pictures: Any) -> None:
    """Bound: rounding of the published pixels, 1/2 through windows with some negative weights (≤ 1.6 times in all), and
    Pillow's rounding of both views after each pass: 3 levels at most, less than 1/2 on average."""
    part, source = pictures
    n = len(SIZES)
    index, asked = torch.arange(n), draws(3, n)
    views = part.views(index, asked)
    noise = torch.randint(-8, 9, (n, *part.noise_shape), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    for image in range(n):
        published = with_noise(source.whole(image), noise[image])
        picture = Image.fromarray(published.pixels.squeeze(2) if published.colours == 1 else published.pixels)
        boxes = [window_box(SIZES[image], (20, 12), draw) for draw in asked[:, image].tolist()]
        for window, box in enumerate(boxes, 1):
            read = np.array(picture.convert("RGB").resize((20, 12), Image.Resampling.BICUBIC, box=box))
            error = torch.from_numpy(read).permute(2, 0, 1) - views.shown(noise.float(), window)[image]
            assert float(error.abs().max()) < 3 and float(error.abs().mean()) < 0.5, (image, window)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        error = decode(buffer.getvalue(), SHAPE) - views.shown(noise.float())[image]
        assert float(error.abs().max()) < 3 and float(error.abs().mean()) < 0.5, image
        if SIZES[image] == (20, 12):
            assert not error.any()  # nothing is rounded


def test_the_gradient_through_views_is_that_of_the_pipeline(pictures: Any) -> None:
    """Of the grid stretched, added to the whole picture and resized with dense matrices, one picture at a time."""
    part, _ = pictures
    part.noise_shape = (3, 9, 14)
    n = len(SIZES)
    views = part.views(torch.arange(n), draws(2, n))
    rng = torch.Generator().manual_seed(2)
    noise = torch.randint(-8, 9, (n, 3, 9, 14), generator=rng).double().requires_grad_()
    weight = torch.randn(n, *SHAPE, generator=rng, dtype=torch.float64)
    shown = views.shown(noise, 2)
    (gradient,) = torch.autograd.grad((shown * weight).sum(), noise)
    again = noise.detach().clone().requires_grad_()
    for i, (width, height) in enumerate(SIZES):
        left, top, right, bottom = window_box((width, height), (20, 12), draws(2, n)[1, i].tolist())
        used = again[i].mean(0).expand(3, 9, 14) if i % 3 == 2 else again[i]
        u, v = (dense(*stretch(g, s, np.arange(s)), g) for g, s in ((9, height), (14, width)))
        whole = torch.from_numpy(u) @ used @ torch.from_numpy(v).T
        a = dense(*taps(height, 12, np.arange(12), top, bottom, cubic=True), height)
        b = dense(*taps(width, 20, np.arange(20), left, right, cubic=True), width)
        want = views.pixels[2, i] + torch.from_numpy(a) @ whole @ torch.from_numpy(b).T
        torch.testing.assert_close(shown[i], want, rtol=0, atol=1e-4)
        (want * weight[i]).sum().backward()
    torch.testing.assert_close(gradient, again.grad, rtol=0, atol=1e-4)


def test_one_noise_for_all_has_the_gradient_of_all(pictures: Any) -> None:
    part, _ = pictures
    views = part.views(torch.arange(4), draws(0, 4))
    one = torch.zeros(1, *part.noise_shape, requires_grad=True)
    each = torch.zeros(4, *part.noise_shape, requires_grad=True)
    for noise in (one, each):
        views.shown(noise).square().sum().backward()
    torch.testing.assert_close(one.grad, each.grad.sum(0, keepdim=True))  # type: ignore[union-attr]


def test_the_steps_go_through_the_windows_and_keep_the_budget(pictures: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    part, _ = pictures
    torch.manual_seed(0)
    model = SmallDualEncoder(5, eot=2, image_size=SHAPE[1:], channels=3, width=32)
    views = part.views(torch.arange(4), draws(2, 4))
    text = torch.nn.functional.normalize(torch.randn(4, model.encode_text(torch.tensor([[1, 3, 2]])).shape[1]), dim=1)
    asked: list[int] = []
    inner: Callable[..., torch.Tensor] = Views.shown
    monkeypatch.setattr(Views, "shown", lambda self, noise, k=0: (asked.append(k), inner(self, noise, k))[1])
    noise = pgd(model, views, torch.zeros(4, *part.noise_shape, dtype=torch.int8), text, eps=5, step=2, steps=5)[0]
    assert asked == [0, 1, 2, 0, 1]
    assert noise.dtype == torch.int8 and int(noise.abs().max()) == 5


def test_autocast_does_not_round_the_noise(pictures: Any) -> None:
    part, _ = pictures
    views = part.views(torch.arange(4), draws(0, 4))
    noise = torch.full((4, *part.noise_shape), 7.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shown = views.shown(noise)
    torch.testing.assert_close(shown, views.pixels[0] + 7.0, rtol=0, atol=1e-4)


def test_reading_ahead_of_anything_keeps_the_order() -> None:
    assert list(ahead(lambda x: x * 2, [1, 2, 3])) == [(1, 2), (2, 4), (3, 6)]
