"""Fixtures that every test module shares: the seed, and the backends that this machine can run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.paths import TESTS
from tests.support.presence import require_backend
from tests.support.signs_of_life import SignsOfLife

# The files that take longest. One process runs a file: if it started last, the others would wait for it.
FIRST = (
    "ops/triton/test_ahead_of_time.py",
    "ops/triton/test_interpreter.py",
    "csrc/test_emulation.py",
    "build_support/test_packaging.py",
    "csrc/test_emulation_races.py",
    "unlearn/test_ccu.py",
    "ops/test_compiling.py",
    "distributed/test_on_ranks.py",
    "benchmarks/visit/test_visit.py",
    "benchmarks/test_machinery.py",
    "unlearn/test_ccu_options.py",
    "test_examples.py",
    "cli/test_demo.py",
)
# Folders, files and tests that --quick leaves out: compilers, separate processes, long training runs.
SLOW = (
    "benchmarks/ops",
    "benchmarks/test_host_time.py",
    "benchmarks/test_machinery.py",
    "benchmarks/test_mem_phases.py",
    "benchmarks/visit",
    "build_support",
    "cli/test_demo.py",
    "cli/test_errors.py",
    "cli/test_main.py::test_bench_runs_the_benchmarks_of_the_checkout",
    "cli/test_main.py::test_ctrl_c_ends_with_one_line_and_130",
    "cli/test_main.py::test_without_typer_info_works_and_the_rest_says_what_to_install",
    "cli/test_mem.py",
    "cli/test_unlearn.py::TestCommand::test_two_processes_share_a_run",
    "cli/test_unlearn.py::TestTasks::test_parts_of_a_comparison_are_kept",
    "csrc",
    "distributed/test_on_ranks.py",
    "losses/test_modules.py",
    "mem/job/test_clip_surrogates.py",
    "mem/job/test_keep_size.py::test_24_megapixels_in_little_memory",
    "mem/job/test_protect.py::test_killed_at_any_moment_the_same_call_ends_with_the_same_bits",
    "mem/test_algorithm.py::TestVictim",
    "models/test_clip.py",
    "ops/l2_normalize/test_l2_normalize.py::test_compiles_in_one_graph_for_all_sizes",
    "ops/noise_store/test_file.py::test_a_kill_leaves_the_last_commit",
    "ops/test_compiling.py",
    "ops/test_process_defaults.py",
    "ops/test_smoke.py::test_in_the_interpreter",
    "ops/topk_flips/test_minilm.py",
    "ops/triton",
    "patch",
    "test_examples.py",
    "test_info.py",
    "unlearn/audit",
    "unlearn/baselines",
    "unlearn/study",
    "unlearn/test_ccu.py",
    "unlearn/test_ccu_options.py",
    "test_docs.py::test_the_blocks_of_a_page_run",
    "unlearn/test_docs.py::test_from_own_pairs_to_an_audit",
    "unlearn/test_parallel.py",
)
# The most cases that --quick runs of every other test function.
CASES = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help=f"no slow test, and at most {CASES} cases of every other one")
    parser.addoption("--signs-of-life", action="store_true", help="a line for every few seconds without another one")


@pytest.hookimpl(trylast=True)  # the reporter is there by then
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if config.getoption("--signs-of-life") and terminal is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SignsOfLife(terminal))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Slow files are not even imported."""
    if not config.getoption("--quick") or not collection_path.is_relative_to(TESTS):
        return None
    return True if collection_path.relative_to(TESTS).as_posix() in SLOW else None


def _cross_section(items: list[pytest.Item]) -> list[pytest.Item]:
    """Some cases of each function, spread evenly from the first to the last."""
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        name = item.nodeid.removeprefix("tests/").partition("[")[0]
        if not name.startswith(SLOW):
            functions.setdefault(name, []).append(item)
    chosen = []
    for cases in functions.values():
        step = max(1.0, (len(cases) - 1) / (CASES - 1))
        chosen += [cases[round(i * step)] for i in range(min(CASES, len(cases)))]
    return chosen


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        chosen = _cross_section(items)
        config.hook.pytest_deselected(items=[*{*items} - {*chosen}])
        items[:] = chosen
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
