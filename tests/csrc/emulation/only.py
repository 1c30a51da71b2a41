"""Tests that only the emulation can run: what ends a kernel, and how many kernels a call launches.

A real GPU is unusable after the first; the second would need its profiler.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ccu_fast import NoiseStore, TokenTable, candidate_losses, check, pgd_step_, topk_flips

pytestmark = pytest.mark.gpu
MODULE = ctypes.CDLL(sys.modules["ccu_fast._C"].__file__ or "")
MODULE.emulation_launches.restype = ctypes.c_int64

ITEM = (3, 4, 8)


@pytest.fixture(autouse=True)
def _recovered() -> Iterator[None]:
    yield
    MODULE.emulation_recover()


def ended(call: Callable[[], object], capfd: pytest.CaptureFixture[str]) -> str:
    """What an aborting kernel prints; the error that follows gives CUDA's name for it."""
    with pytest.raises(RuntimeError, match=r"^\w+: CUDA error 719, unspecified launch failure$"):
        call()
    return capfd.readouterr().out


@pytest.mark.parametrize("row", [-1, 5, 2**40])
def test_a_row_out_of_range(native: str, row: int, capfd: pytest.CaptureFixture[str]) -> None:
    store = NoiseStore(5, ITEM, backend=native)
    index = torch.tensor([0, row])
    said = f"ccu_fast: index: expected 0 <= index < 5, got {row}\n"
    assert said in ended(lambda: store.add_to(torch.rand(2, *ITEM), index), capfd)
    MODULE.emulation_recover()
    delta = torch.ones(2, *ITEM, dtype=torch.int8)
    assert said in ended(lambda: store.scatter_add_clamp_(index, delta, 1.0), capfd)


def test_a_current_token_out_of_range(native: str, capfd: pytest.CaptureFixture[str]) -> None:
    table = TokenTable(torch.randn(40, 8), backend=native)
    out = ended(lambda: topk_flips(torch.randn(1, 8), table, 2, current_ids=torch.tensor([40]), backend=native), capfd)
    assert "ccu_fast: current_ids: expected 0 <= index < 40, got 40\n" in out


class Launches(TorchDispatchMode):
    """The work a GPU would get: torch's operations that compute or copy, and whether the host waits for one."""

    FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero"):
            self.waits += 1
        elif not view and name not in self.FREE:
            self.operations.append(name)
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], object]) -> tuple[int, list[str], int]:
    """The package's kernels, torch's operations, and how often the host waits, of a call that is not the first."""
    call()
    MODULE.emulation_launches()
    # Under a mode that records, the package's operator would be all that is seen.
    with Launches() as seen, mock.patch.object(check, "_traced", lambda: False):
        call()
    return MODULE.emulation_launches(), seen.operations, seen.waits


@pytest.mark.parametrize("options", [(), ("penalty",), ("allowed", "current_ids"), ("maximize",)], ids=str)
@pytest.mark.parametrize(
    ("rows", "expected"), [(5, (3, [], 0)), (6, (3, [], 0)), (7, (2, ["_to_copy", "_to_copy", "mm"], 0))]
)
def test_launches_of_topk_flips(native: str, rows: int, expected: tuple[Any, ...], options: tuple[str, ...]) -> None:
    """describe, the scores of up to six rows or one GEMM, select."""
    table, grad = TokenTable(torch.randn(90, 24), backend=native), torch.randn(rows, 24)
    given: dict[str, Any] = {
        "penalty": torch.rand(90),
        "allowed": torch.rand(90) < 0.9,
        "current_ids": torch.arange(rows),
        "maximize": True,
    }
    arguments = {name: given[name] for name in options}
    assert launches(lambda: topk_flips(grad, table, 4, **arguments, backend=native)) == expected


@pytest.mark.parametrize("options", [(), ("penalty",), ("allowed",)], ids=str)
def test_the_selection_of_few_rows_reads_groups_that_reach_low_alone(
    native: str, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores elsewhere may have any value."""
    rows, tokens, k = 3, 20_000, 4
    table, grad = TokenTable(torch.randn(tokens, 16), backend=native), torch.randn(rows, 16)
    given = {"penalty": torch.rand(tokens), "allowed": torch.rand(tokens) < 0.9}
    arguments: dict[str, Any] = {name: given[name] for name in options}
    expected = topk_flips(grad, table, k, **arguments, backend="reference")
    kernels = sys.modules["ccu_fast._C"].cuda_topk
    spoilt = []

    def twice(**given: Any) -> None:
        kernels(**given)
        group = given["group"]
        groups = -(-tokens // group)
        lowest = torch.frombuffer((ctypes.c_int32 * (rows * groups)).from_address(given["lowest"]), dtype=torch.int32)
        scores = torch.frombuffer((ctypes.c_float * (rows * tokens)).from_address(given["scores"]), dtype=torch.float32)
        rank = (lowest.view(rows, groups).long() & 0xFFFFFFFF).argsort(1).argsort(1)
        far = (rank >= 10 * k).repeat_interleave(group, 1)[:, :tokens]
        scores.view(rows, tokens)[far] = -1e30
        spoilt.append(float(far.float().mean()))
        kernels(**given | {"table": 0})

    monkeypatch.setattr(sys.modules["ccu_fast._C"], "cuda_topk", twice)
    found = topk_flips(grad, table, k, **arguments, backend=native)
    assert torch.equal(found.ids, expected.ids)
    assert spoilt[0] > 0.98


@pytest.mark.parametrize(
    ("tokens", "k", "usable"), [(4200, 1024, 4200), (1500, 300, 1500), (20_000, 1000, 20_000), (20_000, 512, 3000)]
)
def test_few_rows_are_settled_at_once(
    native: str, tokens: int, k: int, usable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of several tokens bound the k-th best as well, or are not used."""
    kernels, redone = sys.modules["ccu_fast._C"].cuda_topk, []

    def watched(**given: Any) -> None:
        kernels(**given)
        redone.extend((ctypes.c_uint8 * given["rows"]).from_address(given["redo"]))

    monkeypatch.setattr(sys.modules["ccu_fast._C"], "cuda_topk", watched)
    table, allowed = TokenTable(torch.randn(tokens, 24), backend=native), torch.arange(tokens) < usable
    topk_flips(torch.randn(2, 24), table, k, allowed=allowed, backend=native)
    assert redone == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [10.0, torch.tensor(10.0)], ids=["number", "tensor"])
@pytest.mark.parametrize(("batch", "own"), [(5, 1), (200, 2)])
def test_launches_of_candidate_losses(
    native: str, batch: int, own: int, scale: float | Tensor, dtype: torch.dtype
) -> None:
    """Two GEMMs and one kernel of a small batch, one more of a large one."""
    inputs = [torch.randn(*shape).to(dtype) for shape in ((batch, 2, 8), (batch, 8), (batch, 8))]
    # The product of 16-bit operands is one operation on a GPU, and here two copies and a product.
    gemms = ["mm", "mm"] if dtype == torch.float32 else 2 * ["_to_copy", "_to_copy", "mm"]
    assert launches(lambda: candidate_losses(*inputs, scale=scale, backend=native)) == (own, gemms, 0)


@pytest.mark.parametrize(("norm", "policy", "own"), [("linf", "zero", 1), ("linf", "raise", 2), ("l2", "raise", 3)])
@pytest.mark.parametrize("channels", [False, True])
def test_launches_of_a_step(native: str, norm: str, policy: str, own: int, channels: bool) -> None:
    """Checking a gradient takes one kernel, in l2 its first pass; nothing waits for it."""
    delta, grad, image = (torch.rand(2, *ITEM) for _ in range(3))
    options: dict[str, Any] = {"step": 0.1, "eps": 0.2}
    operations: list[str] = []
    if channels:
        options |= {"lower": torch.zeros(3, 1, 1), "upper": torch.ones(3, 1, 1)}
        # Numbers among channels are filled in; all are brought together once.
        operations = ["new_full", "new_full", "stack"]
    found = launches(lambda: pgd_step_(delta, grad, image, **options, norm=norm, nan_policy=policy, backend=native))
    assert found == (own, operations, 0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.float16, torch.float64])
def test_launches_of_a_checked_update(native: str, dtype: torch.dtype, delta_dtype: torch.dtype) -> None:
    """One kernel checks all values, and the host waits for one number."""
    store, index = NoiseStore(5, ITEM, dtype=dtype, backend=native), torch.tensor([3, 1])
    delta = torch.zeros(2, *ITEM, dtype=delta_dtype)
    found = launches(lambda: store.scatter_add_clamp_(index, delta, 0.1))
    assert found == (2, ["zeros", *(["_to_copy"] if delta_dtype == torch.float64 else []), "sort"], 1)
