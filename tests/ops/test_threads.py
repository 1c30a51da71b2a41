"""Small calls wake no threads: the amount of work decides how many threads share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from ccu_fast import NoiseStore, TokenTable, candidate_losses, l2_normalize, pgd_step_, topk_flips

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def flips(tokens: int) -> Callable[[], object]:
    table, grad = TokenTable(torch.randn(tokens, 64), backend="native"), torch.randn(8, 64)
    return lambda: topk_flips(grad, table, 4, backend="native")


def candidates(batch: int) -> Callable[[], object]:
    text, image, rows = torch.randn(batch, 4, 8), torch.randn(batch, 8), torch.randn(batch, 8)
    return lambda: candidate_losses(text, image, rows, scale=10.0, backend="native")


def step(samples: int) -> Callable[[], object]:
    delta, image = torch.zeros(samples, 3, 32, 32), torch.rand(samples, 3, 32, 32)
    return lambda: pgd_step_(delta, image, image, step=0.01, eps=0.03, backend="native")


def noise(rows: int) -> Callable[[], object]:
    store, images = NoiseStore(rows, (3, 32, 32)), torch.zeros(rows, 3, 32, 32, dtype=torch.uint8)
    return lambda: store.add_to(images, torch.arange(rows))


def normalize(rows: int) -> Callable[[], object]:
    x = torch.randn(rows, 64)
    return lambda: l2_normalize(x, backend="native")


@pytest.mark.parametrize(
    ("make", "small", "large"),
    [(flips, 64, 30000), (candidates, 4, 128), (step, 1, 128), (noise, 1, 512), (normalize, 16, 20000)],
)
def test_threads_go_with_the_work(make: Callable[[int], Callable[[], object]], small: int, large: int) -> None:
    from ccu_fast import _C

    for size, threads in ((small, 1), (large, 4)):
        call = make(size)
        _C.largest_team()
        call()
        assert _C.largest_team() == threads, size
