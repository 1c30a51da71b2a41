"""Fixtures that every test module shares: the seed, and the backends that this machine can run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from presence import require_backend

# The files that take longest. A file is run by one process: started last, it would keep the others waiting.
FIRST = (
    "test_packaging.py",
    "test_triton_interpreter.py",
    "test_emulation.py",
    "test_triton_aot.py",
    "test_visit.py",
    "test_distributed.py",
    "test_unlearn.py",
    "test_unlearn_ccu.py",
    "test_demo.py",
    "test_emulation_races.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
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
