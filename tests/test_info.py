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
from ccu_fast import extras, info, patch
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


def one_line_a_row(text: str) -> str:
    """With what was wrapped in one line again; a second row of the same key is joined too."""
    return re.sub(r"\n {6,}", " ", text)


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
    text = one_line_a_row(capsys.readouterr().out)
    for fact in (ccu_fast.__version__, torch.__version__, report["python"]):
        assert fact in text
    for has, products in ((True, "products in bf16"), (False, "products in fp32")):
        shown = info.render({**report, "cpu": {**report["cpu"], "bf16": has}})
        assert products in shown and (shown == info.render(report)) == (has == backend.has_bf16())
    for op, choices in report["operations"].items():
        chosen = backend.choose("auto", op, torch.device("cpu"), torch.float32)
        assert choices["cpu"]["backend"] == chosen
        assert any(
            re.match(rf"(cpu tensors)? +{re.escape(info.NAMES[chosen])}: .*{op}", line) for line in text.splitlines()
        )
        assert len(choices) == 1 + torch.cuda.device_count()
    if not torch.cuda.is_available():
        assert f"none: {report['cuda']['why_no_devices']}" in text


def test_nothing_is_wider_than_a_tracker_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    report = info.collect()
    report["cuda"]["why_no_kernels"] = "a long reason, " * 20
    report["environment"] = {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": "~/triton"}
    lines = info.render(report).splitlines()
    assert max(map(len, lines)) <= info.WIDTH
    assert "environment" in info.render(report) and "TRITON_CACHE_DIR=~/triton" in info.render(report)


def test_what_nobody_wants_to_publish_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setattr("platform.node", lambda: "somebodys-machine")
    monkeypatch.setenv("TORCH_HOME", "/home/somebody/cache")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/home/somebodyelse/cache")
    monkeypatch.setenv("NCCL_HOSTID", "somebodys-machine")
    monkeypatch.setenv("TORCH_HUB_TOKEN", "hidden")
    monkeypatch.setenv("CCU_FAST_PASSPHRASE", "hidden")
    monkeypatch.setenv("TORCH_PROXY", "http://me:hidden@proxy:3128/a@b")
    monkeypatch.setenv("UNRELATED", "hidden")
    monkeypatch.setenv("CCU_FAST_CUDA", "0")
    failed = "not built: nvcc of /home/somebody/cuda failed on somebodys-machine"
    monkeypatch.setattr(machine, "why_not_native", lambda: failed)
    monkeypatch.setattr(machine, "PACKAGE", Path("/home/somebody/ccu_fast"))
    report = info.collect()
    assert (
        report["environment"].items()
        >= {
            "TORCH_HOME": "~/cache",
            "TORCH_EXTENSIONS_DIR": "/home/somebodyelse/cache",
            "NCCL_HOSTID": "<host>",
            "TORCH_PROXY": "http://proxy:3128/a@b",
            "CCU_FAST_CUDA": "0",
        }.items()
    )
    assert report["ccu_fast"]["folder"] == "~/ccu_fast"
    for text in (json.dumps(report), info.render(report)):
        assert "/home/somebody/" not in text and "somebodys-machine" not in text and "hidden" not in text
    assert "~/cuda failed on <host>" in report["cpu"]["why_not"]


@pytest.mark.parametrize(
    ("version", "is_inside"),
    [
        ("2.7.9", False),
        ("2.8.0", True),
        ("2.13.0+cpu", True),
        ("2.15.0a0+git", True),
        ("2.16.0", False),
        ("3.0", False),
    ],
)
def test_tested_range(version: str, is_inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    report = info.collect()
    assert report["tested"]["torch"]["inside"] is is_inside
    told = " ".join(info.render(report).split())  # a torch for CUDA has a line that is wrapped
    row = told[told.index(f" torch {version} ") : told.index(" triton ")]
    assert ("NOT TESTED WITH THIS ONE" in row) is not is_inside


def test_tested_range_is_the_one_of_the_package_and_of_make() -> None:
    root = machine.PACKAGE.parent
    project = (root / "pyproject.toml").read_text()
    low = {name: at_least for name, (at_least, _) in info.TESTED.items()}
    assert f'requires-python = ">={low["python"]}"' in project
    assert f'"torch>={low["torch"]}"' in project and f'"triton>={low["triton"]};' in project
    classified = re.findall(r"Python :: (3\.\d+)", project)
    assert classified[0] == low["python"] and all(info.inside(v, *info.TESTED["python"]) for v in classified)
    newest = re.search(r"^NEWEST_TRITON \?= triton==(3\.\d+)\.\*$", (root / "Makefile").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == info.TESTED["triton"][1]
    pinned = re.search(r"^TORCH \?= torch==(\S+) triton==(\S+)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert pinned is not None
    assert info.inside(pinned[1], *info.TESTED["torch"]) and info.inside(pinned[2], *info.TESTED["triton"])


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
    told = one_line_a_row(done.stdout)
    assert "none, torch is used instead: not built: no C++ compiler: tried them all" in told
    every = ", ".join(backend.OPERATIONS)
    assert re.search(
        rf"^cpu tensors +plain torch: {every}\n  not C\+\+ +not built: no C\+\+ compiler", told, re.MULTILINE
    )


def test_without_any_build_the_way_to_one_is_named(bare: Path, python: Python) -> None:
    done = python(bare, INFO)
    assert done.returncode == 0, done.stderr
    assert "not built: run `pip install .`" in one_line_a_row(done.stdout)


def test_module_of_another_python_is_recognised(bare: Path, python: Python) -> None:
    (bare / "ccu_fast" / "_C.cpython-27-x86_64-linux-gnu.so").touch()
    done = python(bare, INFO)
    assert done.returncode == 0, done.stderr
    assert "_C.cpython-27-x86_64-linux-gnu.so is there, this is Python 3." in one_line_a_row(done.stdout)


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
    report["extras"]["speech"]["espeakng-loader"] = None
    text = info.render(report)
    assert "rich (not installed)" in text
    assert re.search(r"^ +pip install (?!.*jinja2).*\brich\b", text, re.MULTILINE)
    assert re.search(r"^ +pip install espeakng-loader==0\.2\.4$", text, re.MULTILINE)
    assert extras.extra_of("matplotlib.pyplot") == "apps"
    assert extras.extra_of("json") is None


WORDS = r"pip install (?:'([^'\n]+)'|((?:[-\w.=*/\[\]]+(?: (?=[-\w]))?)+))"
# What a page or a message may tell to install without being one of the extras' packages.
ALSO_ON_PYPI = {"ninja", "numpy", "pybind11", "pre-commit", "triton"} | {
    target.distribution for target in patch.TARGETS.values() if target.distribution
}


def test_every_command_of_pip_that_is_told_works() -> None:
    """No index has this package: it comes from a checkout or a file, everything else under its own name."""
    root = machine.PACKAGE.parent
    known = {extras.distribution(p) for modules in extras.EXTRAS.values() for p in modules.values()} | ALSO_ON_PYPI
    files = [path for folder in ("ccu_fast", "benchmarks", "docs") for path in (root / folder).rglob("*")]
    files = [p for p in [*files, root / "README.md", root / "CONTRIBUTING.md"] if p.suffix in (".py", ".md", ".html")]
    told = 0
    for path in files:
        for quoted, plain in re.findall(WORDS, path.read_text()):
            for word in [quoted] if quoted else plain.split():
                told += 1
                extra = re.fullmatch(r"\.\[([\w,]+)\]", word)
                if extra is not None:
                    assert set(extra[1].split(",")) <= {*extras.EXTRAS, "bench", "test"}, (path, word)
                    continue
                name = re.split(r"[=<>.\[]", word)[0].lower()
                from_here = word in (".", "-e", "-r") or word.endswith((".whl", ".tar.gz")) or word.startswith("dist/")
                assert from_here or word.startswith("-") or name in {k.lower() for k in known}, (path, word)
    assert told > 8


@pytest.mark.parametrize("extra", extras.EXTRAS)
def test_the_command_for_an_extra_names_what_is_absent(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = [*extras.EXTRAS[extra].values()]
    monkeypatch.setattr(extras, "installed", lambda name: None if name == extras.distribution(packages[-1]) else "1.0")
    assert extras.command(extra) == f"pip install {packages[-1]}"
    assert extras.command(extra, packages[0]) == "pip install " + " ".join(dict.fromkeys([packages[0], packages[-1]]))
    monkeypatch.setattr(extras, "installed", lambda name: "1.0")
    assert extras.command(extra) == f"pip install {' '.join(packages)}"
