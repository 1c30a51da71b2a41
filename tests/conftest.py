"""Fixtures that every test module shares: the seed, and the backends that this machine can run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.support.paths import TESTS
from tests.support.presence import require_backend

# The files that take longest. A file is run by one process: started last, it would keep the others waiting.
FIRST = (
    "build_support/test_packaging.py",
    "ops/triton/test_interpreter.py",
    "csrc/test_emulation.py",
    "ops/triton/test_ahead_of_time.py",
    "benchmarks/visit/test_visit.py",
    "distributed/test_on_ranks.py",
    "unlearn/test_ccu.py",
    "unlearn/test_ccu_options.py",
    "cli/test_demo.py",
    "csrc/test_emulation_races.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [item.path.relative_to(TESTS).as_posix() for item in items]
    place = {id(item): FIRST.index(name) for item, name in zip(items, names, strict=True) if name in FIRST}
    items.sort(key=lambda item: place.get(id(item), len(FIRST)))
    if torch.cuda.is_available() or "CCU_FAST_EMULATED_GPU" in os.environ:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device is visible"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of many tiny problems, where threads wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend of the CPU."""
    return require_backend(request.param)


@pytest.fixture
def native() -> str:
    return require_backend("native")


@pytest.fixture(params=["reference-fp64", "reference-fp32", "native-fp32"])
def engine(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    """Each backend of the CPU with each dtype it computes in."""
    name, dtype = request.param.split("-")
    return require_backend(name), {"fp64": torch.float64, "fp32": torch.float32}[dtype]
