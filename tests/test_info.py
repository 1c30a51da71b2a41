"""``python -m ccu_fast.info``: here, and where the module, Triton, a driver or a device is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import ccu_fast
from ccu_fast import extras, info
from ccu_fast.ops import backend, machine

NOT_BUILT = {"git_sha": None, "native": None, "cuda": None, "skipped": {"native": "no C++ compiler: tried them all"}}
CUDA_13 = {"git_sha": None, "native": {}, "cuda": {"version": "13.0", "archs": ["90"]}, "skipped": {}}


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The package without its compiled module."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    shutil.copytree(machine.PACKAGE, tmp_path / "ccu_fast", ignore=ignore)
    return tmp_path


# Imports torch, which takes longer than all the rest, and runs each program in a fork, in a folder of its own.
FORKS = """
import json, os, sys, torch
for line in sys.stdin:
    folder, program = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.path.insert(0, folder)
        for handle, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), handle)
        sys.stdin.close()
        exec(program, {"__name__": "__main__"})
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
INFO = "import runpy; runpy.run_module('ccu_fast.info', run_name='__main__')"
Python = Callable[[Path, str], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def python() -> Iterator[Python]:
    """Runs a program in a process that knows nothing of ccu_fast but what is in a folder."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as forks:
        assert forks.stdin is not None and forks.stdout is not None

        def run(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
            print(json.dumps([str(folder), program]), file=forks.stdin, flush=True)
            status = int(forks.stdout.readline())
            said = [(folder / name).read_text() for name in ("stdout", "stderr")]
            return subprocess.CompletedProcess(program, status, *said)

        yield run
        forks.stdin.close()


def test_report_is_json_and_text_with_the_same_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert info.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == info.collect()
    assert info.main([]) == 0
    text = capsys.readouterr().out
    for fact in (ccu_fast.__version__, torch.__version__, report["python"]):
        assert fact in text
    for op, choices in report["operations"].items():
        chosen = backend.choose("auto", op, torch.device("cpu"), torch.float32)
        assert choices["cpu"]["backend"] == chosen
        assert any(re.match(rf"(cpu)? +{re.escape(info.NAMES[chosen])}: .*{op}", line) for line in text.splitlines())
        assert len(choices) == 1 + torch.cuda.device_count()
    if not torch.cuda.is_available():
        assert f"none: {report['cuda']['why_no_devices']}" in text


def test_compiled_module_of_this_checkout_is_described() -> None:
    if backend.unavailable("native"):
        pytest.skip(f"nothing is compiled: {machine.why_not_native()}")
    report = info.collect()
    assert report["cpu"]["isa"] in report["build"]["native"]["isas"]
    assert report["cpu"]["why_not"] is None


def test_without_the_module_the_reason_is_the_builds(bare: Path, python: Python) -> None:
    (bare / "ccu_fast" / "_build_info.json").write_text(json.dumps(NOT_BUILT))
    done = python(bare, INFO)
    assert done.returncode == 0, done.stderr
    assert "none, torch is used instead: not built: no C++ compiler: tried them all" in done.stdout
    every = ", ".join(backend.OPERATIONS)
    assert re.search(
        rf"^cpu +plain torch: {every}\n  not C\+\+ +not built: no C\+\+ compiler", done.stdout, re.MULTILINE
    )


def test_without_any_build_the_way_to_one_is_named(bare: Path, python: Python) -> None:
    done = python(bare, INFO)
    assert done.returncode == 0, done.stderr
    assert "not built: run `pip install .`" in done.stdout


def test_module_of_another_python_is_recognised(bare: Path, python: Python) -> None:
    (bare / "ccu_fast" / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    done = python(bare, INFO)
    assert done.returncode == 0, done.stderr
    assert "_C.cpython-27-x86_64-linux-gnu.so is there, this is Python 3." in done.stdout


def test_without_module_and_triton_the_losses_work(bare: Path, python: Python) -> None:
    program = """
import sys
for hidden in ("triton", "typer", "rich", "PIL", "matplotlib", "sklearn"):
    sys.modules[hidden] = None
import torch, ccu_fast, ccu_fast.info
x = torch.eye(4, requires_grad=True)
loss = ccu_fast.info_nce(x, torch.eye(4), scale=1.0)
loss.backward()
expected = torch.nn.functional.cross_entropy(torch.eye(4), torch.arange(4))
assert torch.allclose(loss, expected), (loss, expected)
assert ccu_fast.info.main([]) == 0
"""
    done = python(bare, program)
    assert done.returncode == 0, done.stderr


def test_native_named_by_the_user_raises_without_the_module(bare: Path, python: Python) -> None:
    program = "import torch, ccu_fast; ccu_fast.info_nce(torch.eye(2), torch.eye(2), scale=1.0, backend='native')"
    done = python(bare, program)
    assert done.returncode == 1
    assert "ValueError: backend: 'native' cannot run reduce_similarity here" in done.stderr


@pytest.mark.parametrize(
    ("torch_cuda", "driver", "reason"),
    [
        (None, None, "torch is built without CUDA"),
        ("13.0", None, "no NVIDIA driver is loaded (libcuda.so.1)"),
        ("13.0", (12, 8), "the driver serves CUDA 12.8, torch is built with 13.0"),
        ("12.4", (12, 8), "the driver shows no device (CUDA_VISIBLE_DEVICES?)"),
    ],
)
def test_why_there_is_no_device(
    torch_cuda: str | None, driver: tuple[int, int] | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    monkeypatch.setattr(machine, "driver_cuda", lambda: driver)
    assert machine.why_no_devices() == reason


def test_driver_too_old_for_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "why_not_native", lambda: None)
    monkeypatch.setattr(machine, "build_info", lambda: CUDA_13)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "driver_cuda", lambda: (12, 8))
    assert machine.why_no_cuda_kernels() == "the driver serves CUDA 12.8, the kernels are built with 13.0"
    monkeypatch.setattr(machine, "driver_cuda", lambda: (13, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert machine.why_no_cuda_kernels() is None


@pytest.mark.parametrize(
    ("built", "device", "served"),
    [
        (["80"], (8, 0), True),
        (["80"], (8, 9), True),
        (["80"], (9, 0), True),
        (["80", "100"], (9, 0), False),
        (["90"], (8, 0), False),
        (["80", "90a"], (12, 0), True),
        (["80", "90a", "120"], (9, 0), True),
        (["100f", "120"], (10, 3), True),
        (["100a", "120"], (10, 3), False),
        (["100", "120"], (11, 0), False),
    ],
)
def test_gpus_that_the_build_serves(
    built: list[str], device: tuple[int, int], served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "why_not_native", lambda: None)
    monkeypatch.setattr(machine, "build_info", lambda: {**CUDA_13, "cuda": {"version": "13.0", "archs": built}})
    monkeypatch.setattr(machine, "driver_cuda", lambda: (13, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: device)
    reason = machine.why_no_cuda_kernels(0)
    assert (reason is None) == served
    assert served or "GPU 0 is sm_" in str(reason)
    assert machine.why_no_cuda_kernels() is None  # a second GPU may be served


def test_cuda_left_out_of_the_build_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "why_not_native", lambda: None)
    monkeypatch.setattr(machine, "build_info", lambda: {**CUDA_13, "cuda": None, "skipped": {"cuda": "no nvcc"}})
    assert machine.why_no_cuda_kernels() == "not built: no nvcc"


def test_missing_extra_comes_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    report = info.collect()
    report["extras"]["apps"]["rich"] = None
    text = info.render(report)
    assert "rich (not installed)" in text
    assert "pip install 'ccu-fast[apps]'" in text
    assert extras.extra_of("matplotlib.pyplot") == "apps"
    assert extras.extra_of("json") is None
