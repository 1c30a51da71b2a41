"""What the host does in a GPU call, tested without a GPU: counts of operators and kernels, and reused launches.

benchmarks/host_time_worker.py runs a user's call on CPU tensors with a driver that launches nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.no_launch import TargetOnly
from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem, encode
from ccu_fast.ops.reduce_similarity.relations import ALL, SELF
from tests.support.paths import ROOT
from tests.support.presence import absent

WORKER = ROOT / "benchmarks" / "host_time_worker.py"
CAPABILITY = 90
CLIP = (encode("lse", int(ALL)), encode("sum", int(SELF)))
LARGE = ["own_kernel", "bound_kernel", "forward_kernel", "merge_kernel", "online_kernel"]
LARGE_BACKWARD = ["gradient_kernel", "gradient_kernel", "scale_kernel", "finish_kernel", "finish_kernel"]


@pytest.fixture(autouse=True)
def _needs_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        absent("launches of Triton kernels", "the package triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        absent("launches of Triton kernels", "TRITON_INTERPRET=1 is set")


def test_what_a_call_of_info_nce_takes() -> None:
    """Most operators: those of today. A launch that was made before enters few functions of Triton."""
    requests = [json.dumps({"what": "counts", "batch": batch}) for batch in (128, 4096)]
    done = subprocess.run(
        [sys.executable, WORKER],
        input="\n".join(requests),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(WORKER.parents[1]), *sys.path])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    small, large = map(json.loads, done.stdout.splitlines())
    limits = [
        (small["forward"], ["small_forward_kernel", "loss_kernel"], 6),
        (small["backward"], ["small_gradient_kernel"], 8),
        (large["forward"], LARGE, 25),
        (large["backward"], LARGE_BACKWARD, 34),
    ]
    for found, kernels, operators in limits:
        # What autograd does for any graph: the first gradient, and one tensor for each leaf.
        mine = {
            name: n for name, n in found["torch_operators"].items() if name.split(".")[1] not in ("ones_like", "detach")
        }
        assert found["kernels"] == kernels
        assert sum(mine.values()) <= operators, mine
        # Of Triton: the driver and, in some releases, settings that are read from the environment.
        assert found["python_functions"].get("triton", 0) <= 2 * len(kernels) + 6, found["python_functions"]


class Recorder(TargetOnly):
    """Remembers which code was launched with which arguments, the tensors by where they start."""

    def __init__(self) -> None:
        super().__init__(CAPABILITY)
        self.calls: list[tuple[Any, ...]] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(*args: Any) -> None:
            grid, told, hooks, rest = args[:3], args[6], args[7:9], args[9:]
            self.calls.append((source.fn.__name__, metadata.hash, grid, told, hooks, tuple(map(describe, rest))))

        return launch


def describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.dtype), value.data_ptr() % 16
    if hasattr(value, "block_shape"):
        return tuple(value.shape), tuple(value.strides), tuple(value.block_shape), value.base.data_ptr() % 16
    return value


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    import triton

    from ccu_fast.ops.reduce_similarity.triton import backward_pass, configs, forward_pass
    from ccu_fast.ops.reduce_similarity.triton import small as small_batch

    homes = (forward_pass, backward_pass, small_batch)
    kernels = [value for home in homes for name, value in vars(home).items() if name.endswith("_kernel")]

    def forget() -> None:
        configs._device.cache_clear()
        for kernel in kernels:
            kernel.device_caches.pop(CAPABILITY, None)

    forget()
    recorder = Recorder()
    # Triton 3.4 has no property over it.
    name = "_active" if hasattr(triton.runtime.driver, "_active") else "active"
    monkeypatch.setattr(triton.runtime.driver, name, recorder)
    yield recorder
    forget()


def problem(
    n: int, m: int, offset: int = 0, bias: bool = False, dtype: torch.dtype = torch.float16
) -> SimilarityProblem:
    """``offset`` moves scale and bias away from a multiple of 16 bytes."""
    scalars = torch.ones(8)
    x, y = (torch.zeros(1, rows, 64, dtype=dtype) for rows in (n, m))
    keys = [None] * 4
    return SimilarityProblem(x, y, scalars[offset], scalars[4 + offset] if bias else None, *keys, n == m, CLIP, CLIP)


def both(p: SimilarityProblem, backend: Any) -> None:
    row_out, col_out, stash = backend.forward(p, 1 << 20, True)
    needs = [True, True, True, p.bias is not None]
    backend.backward(p, (row_out, col_out, row_out, col_out), stash, needs, 1 << 20)


# Sizes that are 1, multiples of 16 and neither; scalars that are aligned and are not; one after another and back again.
PROBLEMS = [(32, 32, 0, False), (32, 32, 1, False), (17, 1, 0, False), (32, 32, 0, False), (33, 32, 2, True)]


@pytest.mark.parametrize("name", ["triton", "triton.small"])
def test_a_reused_launch_is_the_launch_that_triton_would_make(name: str, recorder: Recorder, monkeypatch: Any) -> None:
    from ccu_fast.ops.reduce_similarity.triton import configs
    from ccu_fast.ops.triton import launch

    backend = importlib.import_module(f"ccu_fast.ops.reduce_similarity.{name}")

    def calls() -> list[tuple[Any, ...]]:
        recorder.calls = []
        for _ in range(2):
            for n, m, offset, bias in PROBLEMS:
                both(problem(n, m, offset, bias), backend)
        return recorder.calls

    reused = calls()
    assert any(isinstance(made, launch.Launch) and made._compiled for made in launches(configs.device().plans))
    monkeypatch.setattr(launch.Launch, "_bind", lambda *args: None)
    configs.device().plans.clear()
    plain = calls()
    without_hooks = [[(*call[:3], call[5]) for call in made] for made in (reused, plain)]
    assert without_hooks[0] == without_hooks[1]
    assert len({call[1] for call in plain}) > len({call[0] for call in plain})  # the variants differ


def launches(value: Any) -> Iterator[Any]:
    """Everything that a plan holds, at any depth."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from launches(item)
    elif type(value).__module__.startswith("ccu_fast.ops.") and hasattr(value, "__dict__"):
        yield from launches(vars(value))
    else:
        yield value


def test_a_plan_keeps_no_tensor(recorder: Recorder) -> None:
    """Otherwise nobody would free that memory, and a CUDA graph or another stream could read it too early."""
    from ccu_fast.ops.reduce_similarity import triton as similarity
    from ccu_fast.ops.reduce_similarity.triton import configs
    from ccu_fast.ops.reduce_similarity.triton import small as small_batch
    from ccu_fast.ops.small_info_nce import triton as small_info_nce
    from ccu_fast.ops.triton import launch

    p = problem(32, 32)
    both(p, similarity)
    both(p, small_batch)
    x, scale = torch.zeros(32, 64, dtype=torch.float16), torch.ones(())
    _, *saved = small_info_nce.forward(x, x, scale, True, 0.5, True)
    small_info_nce.backward((x, x, scale), saved, torch.ones(()), (True, True, True), True, 0.5)
    plans = configs.device().plans
    assert len(plans) == 6
    held = list(launches(plans))
    for made in [item for item in held if isinstance(item, (launch.Launch, launch.Descriptor))]:
        held += [getattr(made, name) for name in made.__slots__]
    assert not [item for item in held if isinstance(item, Tensor)]
    assert not any(isinstance(part, Tensor) for signature in plans for part in signature)


def test_hooks_hear_of_every_launch(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As profilers expect: set after the first call, told the kernel's name."""
    from triton import knobs

    from ccu_fast.ops.reduce_similarity.triton import small as small_batch

    p = problem(32, 32)
    both(p, small_batch)

    def hook(metadata: Any) -> None:
        raise AssertionError("the driver calls hooks, and this one launches nothing")

    chain = knobs.runtime.launch_enter_hook
    if chain is None:
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hook)
    else:
        monkeypatch.setattr(chain, "calls", [hook])
    recorder.calls = []
    both(p, small_batch)
    assert [call[3].get()["name"] for call in recorder.calls] == ["small_forward_kernel", "small_gradient_kernel"]
    assert all(call[4][0] is knobs.runtime.launch_enter_hook for call in recorder.calls)


def test_what_compiled_otherwise_is_asked_anew(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    from ccu_fast.ops.reduce_similarity.triton import configs
    from ccu_fast.ops.reduce_similarity.triton import small as small_batch

    p = problem(32, 32)
    both(p, small_batch)
    before = len(configs.device().plans)
    both(p, small_batch)
    assert len(configs.device().plans) == before
    monkeypatch.setattr(knobs.runtime, "debug", True)
    recorder.calls = []
    both(p, small_batch)
    assert len(configs.device().plans) == 2 * before


def test_a_compiled_kernel_that_is_no_longer_what_it_was_is_launched_plainly() -> None:
    from ccu_fast.ops.triton.launch import OPTIONS, Launch

    class Kernel:
        arg_names = ("x", "n", "BLOCK")
        pre_run_hooks: tuple[()] = ()
        seen: list[tuple[Any, ...]] = []  # noqa: RUF012

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **constants: self.seen.append((grid, args, constants)) or object()

    kernel = Kernel()
    launch = Launch(kernel, 3, (5,), index=0, BLOCK=16)
    for _ in range(2):
        launch("x")
    assert kernel.seen == [((3,), ("x", 5), {"BLOCK": 16, **OPTIONS})] * 2


def test_plans_do_not_pile_up() -> None:
    from ccu_fast.ops.reduce_similarity.triton import configs

    device = configs.of("sm_90", 132)
    for number in range(3 * configs.MOST_PLANS):
        device.keep(number, object())
        assert len(device.plans) <= configs.MOST_PLANS
