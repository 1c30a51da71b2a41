"""The large buffer that is kept between calls: lent to one user at a time, never reused while a graph needs it."""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import ccu_fast
from ccu_fast.ops.reduce_similarity.native import buffers
from tests.support.forked import in_child

pytestmark = pytest.mark.usefixtures("native", "fresh")
LARGE = buffers.WORTH_KEEPING // 4
STASH, SCRATCH = buffers.STASH, buffers.SCRATCH


@pytest.fixture
def fresh() -> Iterator[None]:
    buffers.release()
    yield
    buffers.release()


def test_lends_the_same_memory_again_but_not_while_it_is_used() -> None:
    first = STASH.borrow(LARGE)
    address = first.data_ptr()
    second = STASH.borrow(LARGE)
    assert second.data_ptr() != address
    view = first[10:20]
    del first
    assert STASH.borrow(LARGE).data_ptr() != address, "a view still looks at it"
    del view
    assert STASH.borrow(LARGE).data_ptr() == address
    assert STASH.borrow(LARGE - 5).shape == (LARGE - 5,)
    assert STASH.borrow(2 * LARGE, torch.bfloat16).data_ptr() == address
    assert SCRATCH.borrow(LARGE).data_ptr() != address, "the two are never one"


def test_keeps_the_largest() -> None:
    STASH.borrow(2 * LARGE)
    STASH.borrow(LARGE)
    assert STASH.kept is not None and STASH.kept.numel() == 8 * LARGE
    STASH.borrow(3 * LARGE)
    assert STASH.kept.numel() == 12 * LARGE
    buffers.release()
    assert STASH.kept is None


def test_keeps_nothing_that_is_small_or_beyond_its_limit() -> None:
    small, large = SCRATCH.borrow(LARGE - 1), SCRATCH.borrow(SCRATCH.most // 4 + 1)
    assert small.shape == (LARGE - 1,) and large.shape == (SCRATCH.most // 4 + 1,)
    assert SCRATCH.kept is None


def test_without_a_count_of_references_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_references", None)
    assert STASH.borrow(LARGE, torch.bfloat16).dtype == torch.bfloat16
    assert STASH.kept is None


@pytest.mark.parametrize("large_pages", [True, False])
def test_memory_can_be_written_to_its_end(monkeypatch: pytest.MonkeyPatch, large_pages: bool) -> None:
    monkeypatch.setattr(buffers, "_has_large_pages", large_pages and buffers._has_large_pages)
    buffer = STASH.borrow(LARGE + 3).fill_(2)
    assert buffer.sum(dtype=torch.float64) == 2 * (LARGE + 3)
    address = buffer.data_ptr()
    assert address % 64 == 0
    del buffer
    assert STASH.borrow(LARGE).data_ptr() == address


def test_a_kernel_without_large_pages_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    if buffers._has_large_pages:
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12_345)  # which the kernel refuses
        with pytest.raises(OSError, match="Invalid argument"):
            mmap.mmap(-1, 4096).madvise(mmap.MADV_HUGEPAGE)
    assert STASH.borrow(LARGE).fill_(1)[-1] == 1


def test_without_memory_the_error_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refused)
    assert STASH.borrow(LARGE).fill_(1)[-1] == 1
    with pytest.raises(RuntimeError, match="allocate"):
        buffers._allocate(1 << 60)


def test_threads_may_borrow_while_another_releases() -> None:
    before, done = sys.getswitchinterval(), threading.Event()
    sys.setswitchinterval(1e-6)

    def borrow() -> int:
        turns = 0
        while not done.is_set():
            STASH.borrow(LARGE)
            turns += 1
        return turns

    try:
        with ThreadPoolExecutor(2) as pool:
            turns = [pool.submit(borrow) for _ in range(2)]
            for _ in range(5_000):
                buffers.release()
            done.set()
            assert all(turn.result() for turn in turns)
    finally:
        done.set()
        sys.setswitchinterval(before)


def test_a_forked_child_has_memory_of_its_own() -> None:
    buffer = STASH.borrow(LARGE).fill_(1)

    def write() -> None:
        buffer[0] = 7
        assert buffer[0] == 7

    assert in_child(write) == 0
    assert buffer[0] == 1


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
    assert STASH.kept is not None and STASH.is_free
    address = STASH.kept.data_ptr()
    loss_of(x, y).backward()
    assert STASH.kept.data_ptr() == address and STASH.is_free


def test_a_step_borrows_what_it_works_on_once() -> None:
    x, y = (torch.nn.functional.normalize(torch.randn(3000, 8), dim=1).requires_grad_() for _ in range(2))
    loss_of(x, y).backward()
    assert SCRATCH.kept is not None and SCRATCH.is_free
    address = SCRATCH.kept.data_ptr()
    loss_of(x, y).backward()
    assert SCRATCH.kept.data_ptr() == address and SCRATCH.kept.numel() <= SCRATCH.most
