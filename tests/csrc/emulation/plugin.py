"""A pytest plugin: the project's own tests run on the emulated kernels, those marked gpu included.

    CCU_FAST_EMULATED_GPU=/path/of/_C.so python -m pytest -p tests.csrc.emulation.plugin tests/ops/pgd_step …

The named module replaces ccu_fast._C, and every check whether tensors are on a GPU answers yes, so that all operations
of the backend "native" use their CUDA kernels. Whatever a test asks of the device "cuda" runs on the CPU.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Tests that an emulation of kernels cannot run.
BEYOND = {
    "test_a_cuda_graph_holds_the_step": "CUDA graphs",
    "test_a_cuda_graph_holds_the_search": "CUDA graphs",
    "test_scores_are_never_stored": "a process of its own, with the CPU's kernels",
    "test_offsets_beyond_31_bits": "2.4 billion scores",
    "test_the_registry_says_what_runs_where": "it asks for a real device",
    "test_noise_of_a_gpu_on_images_of_the_host": "the order of a copy and a read",
    "test_nan_in_the_gradient": "a CPU raises at once, a GPU later: it has a test of its own",
    "test_inf_in_the_gradient": "a CPU raises at once, a GPU later: it has a test of its own",
}
# Tests that take minutes here; of the CPU's ids, small shapes stay.
SLOW = ("test_ties_go_to_the_lowest_id", "test_many_blocks_of_rows")
MOST_SCORES = 4000
# Tests of the CPU kernels or of plain torch, neither of which is used here.
OF_THE_CPU = (
    "test_a_reference_table_does_not_serve_native",
    "test_fp64_runs_on_the_reference",
    "test_the_number_of_threads_changes_no_bit",
    "test_threads_change_no_bit",
)


def load() -> Any:
    """Install the emulated module as ccu_fast._C, and make the package believe that it computes on a GPU."""
    spec = importlib.util.spec_from_file_location("ccu_fast._C", os.environ["CCU_FAST_EMULATED_GPU"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["ccu_fast._C"] = module

    from ccu_fast.ops import machine
    from ccu_fast.ops import native as launch

    assert "ccu_fast.ops.topk_flips.native" not in sys.modules, "imported before it could be told"
    machine.why_not_native = lambda: None
    launch.on_gpu = lambda device: True
    launch.on = lambda device: (nullcontext(), {"threads": 1, "cuda": True, "stream": 0})

    return module


load()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that cannot run here; the caller checks the count of the rest."""
    left = [item for item in items if not _left_out(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in left])
    items[:] = left


def _left_out(item: pytest.Item) -> bool:
    name = item.name.split("[")[0]
    values = item.callspec.params if hasattr(item, "callspec") else {}
    if name in (*BEYOND, *SLOW, *OF_THE_CPU) or values.get("backend") == "reference":
        return True
    return name == "test_the_ids_of_the_cpu" and values["rows"] * values["vocabulary"] > MOST_SCORES


class CudaIsHere(TorchFunctionMode):
    """Tensors requested on "cuda" are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return args[0].clone()
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def _cuda_is_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setattr("ccu_fast.ops.machine.host_sees", lambda device: False)
    with CudaIsHere() if request.node.get_closest_marker("gpu") else nullcontext():
        yield
