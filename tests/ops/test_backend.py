"""Which backend serves what, on simulated machines: ``auto`` never raises, a named backend says why it cannot run."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ccu_fast
from ccu_fast import info
from ccu_fast.ops import backend as registry
from ccu_fast.ops import machine
from tests.support.presence import absent

T4, V100 = ("Tesla T4", (7, 5)), ("Tesla V100", (7, 0))
A100, H100 = ("NVIDIA A100", (8, 0)), ("NVIDIA H100", (9, 0))
ADA, B200, B300 = ("NVIDIA RTX 4090", (8, 9)), ("NVIDIA B200", (10, 0)), ("NVIDIA B300", (10, 3))
THOR, RTX = ("NVIDIA Thor", (11, 0)), ("NVIDIA RTX 5090", (12, 0))
MI300 = ("AMD Instinct MI300X", (9, 4))

# Which backend runs Triton's operations, and which those of CUDA C++.
KERNELS = ("triton", "native")
TORCH = ("reference", "reference")
CUDA = ("reference", "native")


@dataclass(frozen=True)
class Machine:
    """What there is. Without ``archs`` nothing was built for GPUs; an exception is what importing Triton raises."""

    gpus: tuple[tuple[str, tuple[int, int]], ...] = (H100,)
    torch_cuda: str | None = "13.0"
    torch_hip: str | None = None
    driver: tuple[int, int] | None = (13, 0)
    built: str = "13.0"
    archs: tuple[str, ...] = ("80", "86", "89", "90", "100", "120")
    triton: str | Exception | None = "3.7.1"
    no_driver: str | None = None  # what keeps Triton from starting its own
    no_code: str | None = None  # what its compiler says of every device

    @property
    def devices(self) -> list[torch.device]:
        return [torch.device("cuda", index) for index in range(len(self.gpus))]


# Each device's backends, and why the better ones are not available: Triton, then CUDA C++.
MACHINES: dict[str, tuple[Machine, list[tuple[str, str]], tuple[str, str]]] = {
    "H100": (Machine(), [KERNELS], ("", "")),
    "T4": (Machine((T4,)), [TORCH], ("8.0 or later, GPU 0 has 7.5", "built for sm_80, .*, GPU 0 is sm_75")),
    "V100": (Machine((V100,)), [TORCH], ("8.0 or later, GPU 0 has 7.0", "built for sm_80, .*, GPU 0 is sm_70")),
    "A100, T4": (Machine((A100, T4)), [KERNELS, TORCH], ("GPU 1 has 7.5", "GPU 1 is sm_75")),
    "V100, A100": (Machine((V100, A100)), [TORCH, KERNELS], ("GPU 0 has 7.0", "GPU 0 is sm_70")),
    "RTX 4090": (Machine((ADA,)), [KERNELS], ("", "")),
    "B200, B300": (Machine((B200, B300)), [KERNELS, KERNELS], ("", "")),
    "RTX 5090": (Machine((RTX,)), [KERNELS], ("", "")),
    "Thor": (Machine((THOR,)), [("triton", "reference")], ("", "built for sm_80, .*, GPU 0 is sm_110")),
    "Thor, PTX": (Machine((THOR,), archs=("80", "100")), [KERNELS], ("", "")),
    "Thor, Triton 3.4": (
        Machine((THOR,), triton="3.4.0", no_code="cannot compile for sm_110"),
        [TORCH],
        ("cannot compile for sm_110", "GPU 0 is sm_110"),
    ),
    "ROCm": (Machine((MI300,), None, "6.4", None), [TORCH], ("torch is built for ROCm 6.4",) * 2),
    "old driver": (
        Machine(torch_cuda="12.8", driver=(12, 8)),
        [("triton", "reference")],
        ("", "the driver serves CUDA 12.8, the kernels are built with 13.0"),
    ),
    "PTX newer than the driver": (
        Machine(built="13.1", archs=("80",)),
        [("triton", "reference")],
        ("", "PTX of CUDA 13.1; .* that of 13.0 at most"),
    ),
    "no machine code": (
        Machine((A100,), archs=("90",)),
        [("triton", "reference")],
        ("", "built for sm_90, GPU 0 is sm_80"),
    ),
    "machine code of one kind only": (
        Machine((ADA,), archs=("80a", "90")),
        [("triton", "reference")],
        ("", "built for sm_80a, sm_90, GPU 0 is sm_89"),
    ),
    "no CUDA kernels": (Machine(archs=()), [("triton", "reference")], ("", "not built: no nvcc")),
    "Triton 3.3": (Machine(triton="3.3.1"), [CUDA], ("needs Triton 3.4 or later, 3.3.1 is installed", "")),
    "Triton of a nightly": (Machine(triton="3.6.0+git9844da95"), [KERNELS], ("", "")),
    "Triton 4": (Machine(triton="4.0.0"), [KERNELS], ("", "")),
    "broken Triton": (
        Machine(triton=OSError("libtriton.so: undefined symbol")),
        [CUDA],
        ("triton cannot be imported: OSError: libtriton.so: undefined symbol", ""),
    ),
    "Triton without a C compiler": (
        Machine(no_driver="cannot start its CUDA driver"),
        [CUDA],
        ("cannot start its CUDA driver", ""),
    ),
    "no Triton": (Machine(triton=None), [CUDA], ("triton is not installed", "")),
    "T4, H100 without Triton": (Machine((T4, H100), triton=None), [TORCH, CUDA], ("is not installed", "is sm_75")),
}


class Absent:
    """An import hook: Triton is not installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[Machine], None]]:
    """Makes torch, the build's record and the installed packages those of another machine."""

    def start(machine_: Machine) -> None:
        gpus = machine_.gpus

        def gpu(device: torch.device | int) -> tuple[str, tuple[int, int]]:
            return gpus[device if isinstance(device, int) else device.index]

        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: gpus.index(gpus[0]))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu(device)[0])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: gpu(device)[1])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties(gpu(device)))
        monkeypatch.setattr(torch.version, "cuda", machine_.torch_cuda)
        monkeypatch.setattr(torch.version, "hip", machine_.torch_hip)
        monkeypatch.setattr(machine, "driver_cuda", lambda: machine_.driver)
        monkeypatch.setattr(machine, "why_not_native", lambda: None)
        record = {"version": machine_.built, "archs": list(machine_.archs)} if machine_.archs else None
        native = {"isas": ["base"], "compiler": "c++"}
        built = {"git_sha": None, "native": native, "cuda": record, "skipped": {} if record else {"cuda": "no nvcc"}}
        monkeypatch.setattr(machine, "build_info", lambda: built)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        install(machine_.triton)
        probe = SimpleNamespace(why_no_driver=lambda: machine_.no_driver, why_no_code=lambda _: machine_.no_code)
        monkeypatch.setitem(sys.modules, "ccu_fast.ops.triton.probe", probe)
        registry.forget()

    def properties(of: tuple[str, tuple[int, int]]) -> SimpleNamespace:
        return SimpleNamespace(
            name=of[0], major=of[1][0], minor=of[1][1], total_memory=80 << 30, multi_processor_count=108
        )

    def install(triton: str | Exception | None) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
            monkeypatch.delitem(sys.modules, name)
        if triton is None:
            monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
            return
        package = tmp_path / "triton"
        package.mkdir(exist_ok=True)
        text = f"__version__ = {triton!r}" if isinstance(triton, str) else f"raise {triton!r}"
        (package / "__init__.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    yield start
    sys.modules.pop("triton", None)
    monkeypatch.undo()
    registry.forget()


@pytest.mark.parametrize("name", MACHINES)
def test_automatic_choice_serves_and_a_named_one_says_why_it_cannot(
    name: str, pretend: Callable[[Machine], None]
) -> None:
    machine_, expected, reasons = MACHINES[name]
    pretend(machine_)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for device, backends in zip(machine_.devices, expected, strict=True):
            for op in registry.OPERATIONS:
                which = 0 if op in registry.TRITON else 1
                kernel, chosen, reason = KERNELS[which], backends[which], reasons[which]
                for dtype in (torch.float32, torch.float16, torch.bfloat16):
                    assert registry.choose("auto", op, device, dtype) == chosen
                    if chosen == kernel:
                        assert registry.choose(kernel, op, device, dtype) == kernel
                        continue
                    with pytest.raises(ValueError, match=f"^backend: '{kernel}' cannot run {op} here: .*{reason}"):
                        registry.choose(kernel, op, device, dtype)
                assert registry.choose("auto", op, device, torch.float64) == "reference"
                assert registry.choose("reference", op, device, dtype) == "reference"
                assert registry.choose("auto", op, torch.device("cpu"), torch.float32) == "native"


@pytest.mark.parametrize(
    ("triton", "numpy", "fails"), [("3.6.0", "2.4.0", True), ("3.6.0", "2.3.5", False), ("3.7.1", "2.5.5", False)]
)
def test_an_interpreter_that_numpy_is_too_new_for_is_not_used(
    triton: str, numpy: str, fails: bool, pretend: Callable[[Machine], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton makes an int of an array with one element, up to 3.6; NumPy refuses from 2.4 on."""
    pretend(Machine((), triton=triton))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.metadata, "version", {"numpy": numpy}.__getitem__)
    reason = f"the interpreter of Triton {triton} fails with NumPy {numpy}: pip install 'numpy<2.4'"
    assert registry.unavailable("triton") == (reason if fails else None)
    assert registry.choose("auto", "l2_normalize", torch.device("cpu"), torch.float32) == "native"


@pytest.mark.parametrize("device", ["xpu:0", "mps", "meta", "cuda:3", "cuda"])
@pytest.mark.parametrize("torch_cuda", [None, "13.0"])
def test_every_other_device_falls_to_the_reference(
    device: str, torch_cuda: str | None, pretend: Callable[[Machine], None], recwarn: pytest.WarningsRecorder
) -> None:
    """Also a device that is not there, which a compiler may trace for."""
    pretend(Machine((), torch_cuda, driver=None))
    for op in registry.OPERATIONS:
        assert registry.choose("auto", op, torch.device(device), torch.float32) == "reference"
    pretend(Machine())
    if device == "cuda:3":
        with pytest.raises(ValueError, match="torch sees no GPU 3: there are 1"):
            registry.choose("triton", "l2_normalize", torch.device(device), torch.float32)
    assert not recwarn.list


def test_cuda_without_an_index_is_the_current_device(
    pretend: Callable[[Machine], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(Machine((A100, T4)))
    anywhere = torch.device("cuda")
    assert registry.choose("auto", "topk_flips", anywhere, torch.float32) == "native"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with pytest.warns(RuntimeWarning, match="Tesla"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
        assert registry.choose("auto", "topk_flips", anywhere, torch.float32) == "reference"


def test_second_choice_is_a_look_into_a_table(
    pretend: Callable[[Machine], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(Machine())
    calls = [(backend, "topk_flips", torch.device("cuda", 0), torch.float16) for backend in ("auto", "native")]
    first = [registry.choose(*call) for call in calls]
    monkeypatch.delattr(registry, "_choose")
    assert [registry.choose(*call) for call in calls] == first == ["native", "native"]


def test_plain_torch_on_a_gpu_is_told_once(pretend: Callable[[Machine], None]) -> None:
    pretend(Machine((A100, T4)))
    first, second = Machine((A100, T4)).devices
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for device in (torch.device("cpu"), first, second):
            registry.choose("auto", "reduce_similarity", device, torch.float64)
        registry.choose("auto", "reduce_similarity", first, torch.float32)
        registry.choose("reference", "reduce_similarity", second, torch.float32)
        assert not told
        for op in registry.OPERATIONS:
            for dtype in (torch.float32, torch.bfloat16):
                registry.choose("auto", op, second, dtype)
    [warning] = told
    assert warning.category is RuntimeWarning
    assert re.match(
        r"reduce_similarity on cuda:1 \(Tesla T4\) runs in plain torch, not in a kernel of ccu_fast: "
        r"triton: its kernels need compute capability 8\.0 or later, GPU 1 has 7\.5\. `ccu-fast info`",
        str(warning.message),
    )


def test_choice_is_a_constant_of_a_graph(pretend: Callable[[Machine], None], monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    torch.compile(torch.neg, backend="eager")(torch.zeros(()))  # the compiler's own imports, on this machine
    pretend(Machine((T4,)))
    # Where torch sees a GPU, the compiler restores the random number state, and asks the driver for streams.
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)

    def step(x: torch.Tensor) -> torch.Tensor:
        name = registry.choose("auto", "reduce_similarity", device, torch.float32)
        return x + (1 if name == "reference" else 2)

    with pytest.warns(RuntimeWarning, match="runs in plain torch"):
        compiled = torch.compile(step, backend="eager", fullgraph=True)(torch.zeros(()))
    assert compiled.item() == 1


def test_report_tells_each_device_apart(
    pretend: Callable[[Machine], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    pretend(Machine((A100, T4, THOR)))
    monkeypatch.setattr(info, "_cpu_isa", lambda: "base")
    assert info.main(["--json"]) == 0
    operations = json.loads(capsys.readouterr().out)["operations"]
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert set(operations) == set(registry.OPERATIONS)
    flips, similarity = operations["topk_flips"], operations["reduce_similarity"]
    assert list(flips) == ["cpu", "cuda:0", "cuda:1", "cuda:2"]
    assert [choice["backend"] for choice in flips.values()] == ["native", "native", "reference", "reference"]
    assert [choice["backend"] for choice in similarity.values()] == ["native", "triton", "reference", "triton"]
    assert flips["cuda:0"]["why_not"] == {}
    assert list(flips["cuda:2"]["why_not"]) == ["native"]
    assert list(similarity["cuda:1"]["why_not"]) == ["triton"]
    lines = [" ".join(line.split()) for line in text.splitlines()]
    at = lines.index("cuda:0 tensors Triton: reduce_similarity, l2_normalize")
    assert lines[at + 1] == "CUDA C++: candidate_losses, noise_store, pgd_step_, topk_flips"
    assert lines[at + 2] == "cuda:1 tensors plain torch: reduce_similarity, l2_normalize"
    assert lines[at + 3] == "not Triton its kernels need compute capability 8.0 or later, GPU 1 has 7.5"
    assert lines[at + 4] == "plain torch: candidate_losses, noise_store, pgd_step_, topk_flips"
    assert lines[at + 5].startswith("not CUDA C++ the kernels are built for sm_80, ")
    assert lines.index("cuda:2 tensors Triton: reduce_similarity, l2_normalize") > at + 5
    assert not recwarn.list


def test_triton_is_asked_with_a_kernel_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("triton") is None:
        absent("Triton's compiler", "the package triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        absent("Triton's compiler", "TRITON_INTERPRET=1 is set")
    from ccu_fast.ops.triton import probe

    assert probe.why_no_code(90) is None
    reason = probe.why_no_code(130)
    assert re.match(r"Triton \S+ cannot compile for sm_130: \S.*$", str(reason))
    assert capsys.readouterr().out == ""
    driver = probe.why_no_driver()
    assert driver is None if torch.cuda.is_available() else "cannot start its CUDA driver: " in str(driver)


def test_submodules_are_there_when_they_are_asked_for() -> None:
    assert ccu_fast.info is info
    assert ccu_fast.distributed is importlib.import_module("ccu_fast.distributed")
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = ccu_fast.nothing
