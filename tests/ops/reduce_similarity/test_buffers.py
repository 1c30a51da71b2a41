"""The large buffer that is kept between calls: lent to one user at a time, never reused while a graph needs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import ccu_fast
from ccu_fast.ops.reduce_similarity.native import buffers

pytestmark = pytest.mark.usefixtures("native", "fresh")
LARGE = buffers.WORTH_KEEPING // 4


@pytest.fixture
def fresh() -> Iterator[None]:
    buffers.release()
    yield
    buffers.release()


def test_lends_the_same_memory_again_but_not_while_it_is_used() -> None:
    first = buffers.borrow(LARGE)
    address = first.data_ptr()
    second = buffers.borrow(LARGE)
    assert second.data_ptr() != address
    view = first[10:20]
    del first
    assert buffers.borrow(LARGE).data_ptr() != address, "a view still looks at it"
    del view
    assert buffers.borrow(LARGE).data_ptr() == address
    assert buffers.borrow(LARGE - 5).shape == (LARGE - 5,)


def test_keeps_the_largest() -> None:
    buffers.borrow(2 * LARGE)
    buffers.borrow(LARGE)
    assert buffers._kept is not None and buffers._kept.numel() == 2 * LARGE
    buffers.borrow(3 * LARGE)
    assert buffers._kept.numel() == 3 * LARGE
    buffers.release()
    assert buffers._kept is None


def loss_of(x: Tensor, y: Tensor) -> Tensor:
    return ccu_fast.info_nce(x, y, scale=10.0, backend="native", workspace=256 << 20)


def test_two_living_graphs_do_not_share_a_stash() -> None:
    # 3000 x 3000 pairs are 34 MiB: large enough to be kept.
    x, y, u, v = (torch.nn.functional.normalize(torch.randn(3000, 8), dim=1).requires_grad_() for _ in range(4))
    expected = torch.autograd.grad(loss_of(x, y), (x, y))
    first, second = loss_of(x, y), loss_of(u, v)
    torch.autograd.grad(second, (u, v))
    found = torch.autograd.grad(first, (x, y), retain_graph=True)
    again = torch.autograd.grad(first, (x, y))
    for a, b, c in zip(expected, found, again, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_the_stash_of_a_finished_step_is_reused() -> None:
    x, y = (torch.nn.functional.normalize(torch.randn(3000, 8), dim=1).requires_grad_() for _ in range(2))
    loss_of(x, y).backward()
    assert buffers._kept is not None
    address = buffers._kept.data_ptr()
    loss_of(x, y).backward()
    assert buffers._kept.data_ptr() == address and buffers._is_free(buffers._kept)
