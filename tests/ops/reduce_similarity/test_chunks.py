"""How the work on a CPU is cut, and that all memory is written before it is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ccu_fast
from ccu_fast import ALL, OTHER, SAME
from ccu_fast.ops.reduce_similarity.native import buffers, chunks
from ccu_fast.ops.reduce_similarity.native.chunks import even_rows

pytestmark = pytest.mark.usefixtures("native")


@given(n=st.integers(1, 20_000), most=st.integers(0, 4000), fewest=st.sampled_from([16, 64]))
def test_chunks_are_as_few_as_fit_and_alike(n: int, most: int, fewest: int) -> None:
    rows = even_rows(n, most, fewest)
    assert rows % fewest == 0
    assert rows <= max(fewest, most)
    whole = max(fewest, most // fewest * fewest)
    assert -(-n // rows) <= -(-n // whole), "no more chunks than before"
    assert -(-n // rows) * rows - n < -(-n // rows) * fewest, "the last lacks less than `fewest` rows of each"


@pytest.fixture
def filled_with_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[False, True], ids=["own", "lent"])
def lent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With True every buffer is lent, and full of NaN."""
    if not request.param:
        return
    borrow = buffers.Buffer.borrow

    def poisoned(self: buffers.Buffer, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return borrow(self, size, dtype).fill_(torch.nan)

    for module in (buffers, chunks):
        monkeypatch.setattr(module, "WORTH_KEEPING", 1)
    monkeypatch.setattr(buffers.Buffer, "borrow", poisoned)


SHAPES = {
    "one bank": ((200, 24), (150, 24)),
    "x serves all banks": ((200, 24), (3, 150, 24)),
    "y serves all banks": ((3, 200, 24), (150, 24)),
    "as many of both": ((3, 70, 24), (3, 150, 24)),
}


@pytest.mark.parametrize("workspace", [0, 1 << 18, 1 << 20, 1 << 28])
@pytest.mark.parametrize("prefixes", [None, (8, 20)])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("filled_with_nan", "lent")
def test_no_memory_is_read_before_it_is_written(name: str, prefixes: tuple[int, ...] | None, workspace: int) -> None:
    """Torch fills what it hands out with NaN. Dimensions after the last prefix get a gradient of zero."""
    torch.manual_seed(0)
    x, y = (torch.randn(*shape).requires_grad_() for shape in SHAPES[name])
    labels = torch.arange(x.shape[-2]) % 7, torch.arange(y.shape[-2]) % 7
    spec = {"rows": [("lse", ALL), ("sum", SAME)], "cols": [("lse", OTHER)]}

    def reduced(u: Tensor, v: Tensor, backend: str) -> list[Tensor]:
        asked: dict[str, Any] = {
            "scale": 0.3,
            "row_labels": labels[0],
            "col_labels": labels[1],
            "workspace": workspace,
            "backend": backend,
            **spec,
        }
        if prefixes is None:
            results = ccu_fast.reduce_similarity(u, v, **asked)
        else:
            results = ccu_fast.reduce_prefixes(u, v, prefixes=prefixes, normalize=True, **asked)
        found = [*results[0], *results[1]]
        return [*found, *torch.autograd.grad(sum(t.sin().sum() for t in found), (u, v))]

    exact = reduced(x.double(), y.double(), "reference")
    for ours, wanted in zip(reduced(x, y, "native"), exact, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=2e-4, atol=2e-5)
