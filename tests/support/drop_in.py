"""What every drop-in must show: the same numbers, the same training, a clean undo; and how this is recorded."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ccu_fast
from benchmarks import memory
from tests.support.forked import on_ranks
from tests.support.tolerance import assert_three_way

RECORD = os.environ.get("CCU_FAST_COMPAT_RECORD")
STEPS = 100

Problem = Callable[[torch.dtype], tuple[Callable[[], Tensor], Sequence[Tensor]]]
"""From a dtype to a loss and the leaves it is differentiated by; the same numbers for every dtype."""


def library(module: str) -> ModuleType:
    """The library under test. Under ``make compat`` and in CI it must be there."""
    require(module)
    return importlib.import_module(module)


def require(module: str) -> None:
    """Skips, outside ``make compat``, where a library is not installed."""
    if importlib.util.find_spec(module.split(".")[0]) is None and RECORD is None:
        pytest.skip(f"{module} is not installed (make compat builds an environment that has it)")


def same_numbers(target: str, problem: Problem, *, magnitude: float | None = None, ulps: float = 16) -> None:
    """Loss and gradients of the patched library within the three-way tolerance of its own in float64.

    Checks that the patch is active: a library that runs its own code would pass trivially.
    """
    exact, theirs = _evaluate(problem, torch.float64), _evaluate(problem, torch.float32)
    with counted(target) as calls:
        ours = _evaluate(problem, torch.float32)
    assert calls.kernels > 0, f"{target}: no ccu_fast operation ran"
    for name, o, t, e in zip(("loss", *(f"gradient {i}" for i in range(9))), ours, theirs, exact, strict=False):
        assert_three_way(f"{target} {name}", o.float(), t, e.double(), ulps=ulps, magnitude=magnitude)
    record(target, check="numbers")


def same_on_ranks(target: str, folder: Path, evaluated: Callable[[int, torch.dtype], list[Tensor]], world: int) -> None:
    """What each of several processes gets from its items is the library's, judged by the library in float64.

    Args:
        target: the library.
        folder: an empty one.
        evaluated: from a rank and a dtype to loss and gradients.
        world: how many processes.
    """

    def work(rank: int) -> Any:
        theirs, exact = evaluated(rank, torch.float32), evaluated(rank, torch.float64)
        with counted(target) as calls:
            ours = evaluated(rank, torch.float32)
        return calls.kernels, ours, theirs, exact

    for kernels, *found in on_ranks(world, folder, work):
        assert kernels > 0
        for i, values in enumerate(zip(*found, strict=True)):
            assert_three_way(f"value {i}", *values)
    record(target, check="numbers")


def same_training(target: str, train: Callable[[int], list[float]]) -> None:
    """The losses of 100 steps, patched and not, agree to 1e-3 of the first; reverting gives the very same bits."""
    before = train(STEPS)
    with counted(target) as calls:
        patched = train(STEPS)
    after = train(STEPS)
    assert calls.kernels >= STEPS, f"{target}: {calls.kernels} operations in {STEPS} steps"
    assert len(patched) == STEPS
    assert before[-1] < before[0], f"{target}: the model did not train"
    difference = max(abs(a - b) for a, b in zip(before, patched, strict=True))
    assert difference <= 1e-3 * before[0], f"{target}: training curves differ by {difference:.3g}"
    assert after == before, f"{target}: not what it was after revert"
    record(target, check="training", difference=difference)


class counted:
    """Applies a patch for a block and counts the ccu_fast operations that run in it."""

    def __init__(self, target: str) -> None:
        self.target, self.kernels = target, 0

    def __enter__(self) -> counted:
        from ccu_fast.losses import functional as losses
        from ccu_fast.ops.reduce_similarity import api as similarity
        from ccu_fast.ops.topk_flips import api as tokens

        places = ((similarity.SimilarityReduction, "apply"), (losses, "small_info_nce"), (tokens, "topk"))
        self._saved = [(place, name, getattr(place, name)) for place, name in places]
        for place, name, call in self._saved:
            setattr(place, name, self._counting(call))
        assert ccu_fast.patch.apply(self.target), f"{self.target}: nothing was replaced"
        return self

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **options: Any) -> Any:
            self.kernels += 1
            return call(*args, **options)

        return counting

    def __exit__(self, *error: object) -> None:
        ccu_fast.patch.revert(self.target)
        for module, name, value in self._saved:
            setattr(module, name, value)


def left_alone(target: str, call: Callable[[], Any]) -> None:
    """With the patch a call does what it does without: the same bits or the same error, and none of our kernels."""

    def outcome() -> Any:
        try:
            return call()
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            return type(error)

    theirs = outcome()
    with counted(target) as calls:
        ours = outcome()
    assert calls.kernels == 0, f"{target}: taken, not left alone"
    assert type(ours) is type(theirs)
    if not isinstance(theirs, Tensor):
        assert ours == theirs
    elif theirs.device.type != "meta":
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def speed(target: str, what: str, call: Callable[[], Any], rounds: int = 7) -> None:
    """Records how much faster ``call`` is with the patch, the median ratio of rounds in turns, and its memory."""
    if RECORD is None:
        return
    times: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * rounds + 2):
        patched = bool(turn % 2)
        if patched:
            ccu_fast.patch.apply(target)
        start = time.perf_counter()
        call()
        times[patched].append(time.perf_counter() - start)
        if patched:
            ccu_fast.patch.revert(target)
    ratios = [t / o for t, o in zip(times[False][1:], times[True][1:], strict=True)]  # the first of each warms up
    ms = {
        name: 1e3 * statistics.median(times[patched][1:]) for name, patched in (("library", False), ("patched", True))
    }
    megabytes = {"library": memory.peak_of(call) / 1e6}
    with ccu_fast.patch.applied(target):
        megabytes["patched"] = memory.peak_of(call) / 1e6
    facts = {"ms": ms, "megabytes": megabytes, "threads": torch.get_num_threads()}
    record(target, check="speed", what=what, ratio=statistics.median(ratios), **facts)


def record(target: str, **row: Any) -> None:
    """One line of JSON in the file that ``make compat`` names."""
    if RECORD is None:
        return
    distribution = ccu_fast.patch.TARGETS[target].distribution
    version = os.environ.get("CCU_FAST_COMPAT_VERSION") or importlib.metadata.version(str(distribution))
    with Path(RECORD).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"target": target, "version": version, **row}) + "\n")


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit vectors, the same ones in every dtype."""
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.functional.normalize(rows.float().double(), dim=-1).float().to(dtype)


def train_towers(loss: Callable[[Tensor, Tensor, Tensor], Tensor], steps: int) -> list[float]:
    """A small two-tower model trained on pairs with noise; the losses of all steps."""
    torch.manual_seed(1)
    towers = nn.ModuleList([nn.Linear(24, 16), nn.Linear(20, 16)])
    scale = nn.Parameter(torch.tensor(2.0))
    hidden = torch.randn(256, 8)
    first, second = hidden @ torch.randn(8, 24), hidden @ torch.randn(8, 20)
    optimizer = torch.optim.AdamW([*towers.parameters(), scale], lr=1e-2)
    losses = []
    for step in range(steps):
        rows = torch.arange(64) + 64 * (step % 4)
        x = nn.functional.normalize(towers[0](first[rows]), dim=-1)
        y = nn.functional.normalize(towers[1](second[rows]), dim=-1)
        value = loss(x, y, scale.exp())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def _evaluate(problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    loss, leaves = problem(dtype)
    value = loss()
    return [value.detach(), *torch.autograd.grad(value, leaves)]
