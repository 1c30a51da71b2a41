"""Which backend serves which device, on machines that are not here: ``auto`` always finds one and says why."""

from __future__ import annotations

import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from ccu_fast import info
from ccu_fast.backends import machine, registry

BUILT = {"git_sha": None, "native": {}, "cuda": {"version": "13.0", "archs": ["80", "90", "100"]}, "skipped": {}}
TRITON_37 = "3.7.1"

Machine = Callable[..., None]


class Refuses:
    """An import hook: one package raises."""

    def __init__(self, package: str, error: Exception) -> None:
        self.package, self.error = package, error

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == self.package:
            raise self.error


@pytest.fixture
def a_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Pretends to GPUs of these capabilities and what is installed for them."""

    def forget() -> None:
        registry._automatic.cache_clear()
        registry.unavailable.cache_clear()
        machine._why_no_triton_package.cache_clear()
        registry._warned = False

    def pretend(
        *gpus: int,
        triton: str | Exception | None = TRITON_37,
        driver: tuple[int, int] = (13, 0),
        cuda: str | None = "13.0",
        hip: str | None = None,
        built: dict[str, object] = BUILT,
    ) -> None:
        forget()
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus) and (cuda or hip) is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: divmod(gpus[index], 10))
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda i: types.SimpleNamespace(
                name=f"GPU {i}", major=gpus[i] // 10, minor=gpus[i] % 10, total_memory=80 << 30
            ),
        )
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(machine, "driver_cuda", lambda: driver)
        monkeypatch.setattr(machine, "why_not_native", lambda: None)
        monkeypatch.setattr(machine, "build_info", lambda: built)
        module = types.ModuleType("triton")
        if isinstance(triton, str):
            module.__version__ = triton  # type: ignore[attr-defined]
            module.__spec__ = importlib.machinery.ModuleSpec("triton", None)
            monkeypatch.setitem(sys.modules, "triton", module)
            return
        error = triton or ModuleNotFoundError("No module named 'triton'", name="triton")
        monkeypatch.delitem(sys.modules, "triton", raising=False)
        monkeypatch.setattr(sys, "meta_path", [Refuses("triton", error), *sys.meta_path])

    yield pretend
    forget()


def chosen(op: str, gpu: int, dtype: torch.dtype = torch.float32) -> str:
    """What ``auto`` takes, with the warning it may give ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return registry.choose("auto", op, torch.device("cuda", gpu), dtype)


TRITON, CUDA, TORCH = "triton", "native", "reference"
# GPUs, what else is special, and by GPU the backend of the Triton operations and of the CUDA C++ ones, and the reason.
MACHINES = {
    "T4": ((75,), {}, [(TORCH, TORCH)], "compute capability 8.0 or later, GPU 0 has 7.5"),
    "V100": ((70,), {}, [(TORCH, TORCH)], "built for sm_80, sm_90, sm_100, GPU 0 is sm_70"),
    "A100 beside a T4": ((80, 75), {}, [(TRITON, CUDA), (TORCH, TORCH)], "GPU 1 has 7.5"),
    "T4 beside an A100": ((75, 80), {}, [(TORCH, TORCH), (TRITON, CUDA)], "GPU 0 has 7.5"),
    "RTX 4090": ((89,), {}, [(TRITON, CUDA)], None),
    "H100": ((90,), {}, [(TRITON, CUDA)], None),
    "B200, B300": ((100, 103), {}, [(TRITON, CUDA)] * 2, None),
    "Thor, by PTX": ((110,), {}, [(TRITON, CUDA)], None),
    "Thor, PTX too new": (
        (110,), {"built": {**BUILT, "cuda": {"version": "13.0", "archs": ["90", "120"]}}}, [(TRITON, TORCH)],
        "built for sm_90, sm_120, GPU 0 is sm_110",
    ),
    "machine code of one kind only": (
        (86,), {"built": {**BUILT, "cuda": {"version": "13.0", "archs": ["80a", "90"]}}}, [(TRITON, TORCH)],
        "built for sm_80a, sm_90, GPU 0 is sm_86",
    ),
    "RTX 5090": ((120,), {}, [(TRITON, CUDA)], None),
    "ROCm": ((94,), {"cuda": None, "hip": "7.1"}, [(TORCH, TORCH)], "torch is built for ROCm 7.1"),
    "old driver": ((90,), {"driver": (12, 8)}, [(TRITON, TORCH)], "the driver serves CUDA 12.8"),
    "no CUDA kernels": ((90,), {"built": {**BUILT, "cuda": None}}, [(TRITON, TORCH)], "not built"),
    "Triton 3.3": ((90,), {"triton": "3.3.1"}, [(TORCH, CUDA)], "it needs Triton 3.4 or later, 3.3.1 is installed"),
    "Triton 4": ((90,), {"triton": "4.0.0+git1"}, [(TRITON, CUDA)], None),
    "no Triton": ((90,), {"triton": None}, [(TORCH, CUDA)], "the package triton is not installed"),
    "broken Triton": (
        (90,), {"triton": OSError("libtriton.so: undefined symbol")}, [(TORCH, CUDA)],
        "cannot be imported: OSError: libtriton.so",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MACHINES)
def test_auto_serves_every_gpu_with_the_best_it_can(name: str, a_machine: Machine) -> None:
    gpus, special, expected, reason = MACHINES[name]
    a_machine(*gpus, **special)
    report = info.collect()
    reasons = []
    for gpu, (by_triton, by_cuda) in enumerate(expected):
        for op in registry.OPERATIONS:
            backend = by_triton if op in registry.TRITON else by_cuda
            assert chosen(op, gpu) == backend, (op, gpu)
            assert chosen(op, gpu, torch.float64) == TORCH
            line = report["operations"][op][f"cuda:{gpu}"]
            assert line["backend"] == backend
            reasons += line["why_not"].values()
            if backend == TORCH:
                preferred = TRITON if op in registry.TRITON else CUDA
                with pytest.raises(ValueError, match=f"^backend: '{preferred}' cannot run {op} here: "):
                    registry.choose(preferred, op, torch.device("cuda", gpu), torch.float32)
    # What an operation has no kernel for is no fault of the machine.
    reasons = [why for why in reasons if not why.startswith(("it has no", "its "))] + [
        why for why in reasons if why.startswith("its kernels")
    ]
    assert bool(reasons) == (reason is not None), reasons
    assert reason is None or any(reason in why for why in reasons), reasons
    assert reason is None or reason in info.render(report)


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_devices_of_other_makers_take_plain_torch(device: str, a_machine: Machine) -> None:
    a_machine()
    for op in registry.OPERATIONS:
        assert registry.choose("auto", op, torch.device(device, 0), torch.float32) == TORCH


def test_a_slow_gpu_is_said_once_a_process(a_machine: Machine) -> None:
    a_machine(75, 90)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        info.collect()  # asks, and spends no warning
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for op in registry.OPERATIONS:
                registry.choose("auto", op, torch.device("cuda", 1), dtype)
        assert not caught  # kernels, and doubles, which have none by design
        for op in registry.OPERATIONS:
            registry.choose("auto", op, torch.device("cuda", 0), torch.float32)
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert "candidate_losses on cuda:0 runs in plain torch" in str(warning.message)
    assert "GPU 0 is sm_75" in str(warning.message)
