"""The build: under isolation, without a compiler, with a broken nvcc, with a real one; and what the wheel holds."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from ccu_fast import extras
from ccu_fast.ops import machine
from tests.csrc.emulation import build as emulation
from tests.support.paths import ROOT
from tests.support.presence import absent

OFFLINE = os.environ.get("CCU_FAST_TEST_OFFLINE") == "1"
sys.path.append(str(ROOT))

from build_support import cuda, graph, probe  # noqa: E402


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("CCU_FAST_")}
    # Nothing built here has to be fast, and half of a compiler's time is spent on that.
    flags = f"{os.environ.get('CXXFLAGS', '')} -O0"
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**inherited, "CXXFLAGS": flags, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        absent(name, "it is not on PATH")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, with nothing built; the tests of this file share its build folder."""
    copy = tmp_path_factory.mktemp("packaging") / "checkout"
    copy.mkdir()
    for name in ("ccu_fast", "csrc", "build_support"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
        )
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def old_compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler that knows no AVX: there are CPU kernels of one kind, not of three.

    Those that the module in use was linked of are copied, where it was compiled here: the build has shown that they
    compile, and they take half of the time.
    """
    script = tmp_path_factory.mktemp("compiler") / "c++"
    compiled = [path.parent for path in emulation.linked() if path.name.endswith(".base.o")]
    script.write_text(f"""#!/bin/sh
case "$*" in *-mavx*) echo "c++: unrecognized option '-mavx'" >&2; exit 1;; esac
out=
for word in "$@"; do [ "$last" = -o ] && out=$word; last=$word; done
have={shlex.quote(str(compiled[0] if compiled else "/nonexistent"))}/${{out##*/}}
case "$out" in *.base.o) [ -e "$have" ] && echo "$out:" > "$out.d" && exec cp "$have" "$out";; esac
exec {shlex.join(probe.find_cxx())} "$@"
""")
    script.chmod(0o755)
    return str(script)


@pytest.fixture(scope="module")
def broken_nvcc(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The home of an nvcc that knows its version and its architectures and compiles nothing."""
    script = tmp_path_factory.mktemp("cuda") / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "  --version) echo 'Cuda compilation tools, release 12.4, V12.4.131' ;;\n"
        "  *) echo 'nvcc: a part of me is missing' >&2; exit 1 ;;\n"
        "esac\n"
    )
    script.chmod(0o755)
    return str(script.parent.parent)


@pytest.fixture(scope="module")
def wheel(checkout: Path, old_compiler: str, broken_nvcc: str) -> Path:
    """The unpacked wheel that ``pip wheel .`` makes, under build isolation where there is a network."""
    out = checkout.parent / "wheel"
    offline = ["--no-index", "--no-build-isolation"] if OFFLINE else []
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--wheel-dir", out, *offline]
    done = run(*command, cwd=checkout, CCU_FAST_NATIVE="1", CXX=old_compiler, CUDA_HOME=broken_nvcc)
    assert done.returncode == 0, done.stdout
    [archive] = out.glob("*.whl")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(out / "unpacked")
    return out / "unpacked"


def module_of(folder: Path) -> Path:
    [found] = (folder / "ccu_fast").glob("_C.*.so")
    return found


def build(checkout: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    record = checkout / "ccu_fast" / "_build_info.json"
    record.unlink(missing_ok=True)
    done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=checkout, **environment)
    return done, json.loads(record.read_text()) if record.exists() else {}


def build_of_the_module() -> tuple[dict, list[Path]]:
    """What is recorded of the module in use, and the objects it was linked of."""
    record, objects = machine.build_info(), emulation.linked()
    if not objects or record is None or record["native"] is None:
        absent("object files of the module", "it was not built in this folder by `pip install -e`")
    assert record is not None
    return record, objects


def test_wheel_holds_the_package_and_nothing_else(wheel: Path, checkout: Path) -> None:
    held = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    sources = {str(path.relative_to(checkout)) for path in (checkout / "ccu_fast").rglob("*.py*")}
    sources = {path for path in sources if path.endswith((".py", ".pyi"))}
    data = {"ccu_fast/py.typed", "ccu_fast/cli/report/page.html"}
    built = {"ccu_fast/_build_info.json", f"ccu_fast/{module_of(wheel).name}"}
    assert {path for path in held if ".dist-info/" not in path} == sources | data | built


def test_wheel_says_what_it_needs(wheel: Path) -> None:
    [metadata] = wheel.glob("*.dist-info/METADATA")
    text = metadata.read_text()
    # What an older Python needs beside the others (tomli) is nothing to report.
    requires = [r for r in re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE) if "python_version" not in r]
    core = [line for line in requires if "extra ==" not in line]
    assert [re.match(r"[\w-]+", line)[0] for line in core] == ["torch", "numpy", "triton"]  # type: ignore[index]
    assert "torch>=2.8" in core
    assert "License-Expression: MIT" in text
    assert "ccu-fast = ccu_fast.cli.main:main" in (metadata.parent / "entry_points.txt").read_text()
    for extra, modules in extras.EXTRAS.items():
        listed = {re.match(r"[\w-]+", line)[0] for line in requires if re.search(rf"extra == .{extra}.", line)}  # type: ignore[index]
        assert listed == set(map(extras.distribution, modules.values()))


def test_module_links_the_system_alone(wheel: Path) -> None:
    dynamic = run(tool("readelf"), "-d", module_of(wheel), cwd=wheel).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+?)\.so", dynamic))
    system = {"libstdc++", "libm", "libgcc_s", "libc", "libpthread", "libdl", "librt"}
    assert needed, dynamic
    assert {name for name in needed if not name.startswith("ld-linux")} <= system


def test_module_loads_without_torch(wheel: Path) -> None:
    program = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("ccu_fast._C", {str(module_of(wheel))!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
print(module.cpu_isa())
"""
    done = run(sys.executable, "-I", "-c", program, cwd=wheel)
    assert done.returncode == 0, done.stdout
    record = json.loads((wheel / "ccu_fast" / "_build_info.json").read_text())
    assert done.stdout.strip() in record["native"]["isas"]
    if platform.machine() == "x86_64":
        assert record["native"]["isas"] == ["base"]
        assert "unrecognized option '-mavx'" in record["skipped"]["avx2"] and "avx512" in record["skipped"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the instructions looked for are those of x86-64")
def test_no_cpu_is_given_the_code_of_a_wider_one() -> None:
    """Templates of the standard library are in many object files: the copy linked must be the narrowest.

    Of the module that is used here, compiled with the flags that users get.
    """
    record, linked = build_of_the_module()
    width = {"base": 0, "avx2": 1, "avx512": 2}
    narrowest: dict[str, int] = {}
    for path in linked:
        isa = path.suffixes[0].lstrip(".")
        for line in run(tool("nm"), "--defined-only", path, cwd=ROOT).stdout.splitlines():
            _, kind, name = line.split(maxsplit=2)
            if kind in "WV":
                narrowest[name] = min(width.get(isa, 0), narrowest.get(name, 2))
    used: dict[str, int] = {}
    name = ""
    for line in run(tool("objdump"), "-d", "--no-show-raw-insn", module_of(ROOT), cwd=ROOT).stdout.splitlines():
        if line.endswith(">:"):
            name = line[line.index("<") + 1 : -2]
        elif ":\t" in line:  # a million of them
            # VEX and EVEX mnemonics, and only they, begin with v.
            wide = 2 if "%zmm" in line else int(":\tv" in line)
            if wide >= used.get(name, 0):
                used[name] = wide
    assert max(used.values()) == max(width[isa] for isa in record["native"]["isas"])
    shared = narrowest.keys() & used.keys()
    assert shared
    assert {name for name in shared if used[name] > narrowest[name]} == set()


def test_sdist_holds_what_the_build_reads(checkout: Path) -> None:
    done = run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", checkout.parent, cwd=checkout)
    assert done.returncode == 0, done.stdout
    [archive] = checkout.parent.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    folders = [path for name in ("csrc", "build_support", "ccu_fast") for path in (checkout / name).rglob("*")]
    wanted = {
        str(path.relative_to(checkout)) for path in folders if path.suffix in (".h", ".cpp", ".cu", ".py", ".html")
    }
    assert wanted | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= held
    assert not [name for name in held if name.endswith((".so", "_build_info.json"))]


def test_no_compiler_leaves_python_and_the_reason(checkout: Path) -> None:
    missing = "/nonexistent/c++"
    done, record = build(checkout, CXX=missing)
    assert done.returncode == 0, done.stdout
    assert record["native"] is None
    assert missing in record["skipped"]["native"]
    assert not list((checkout / "ccu_fast").glob("_C.*.so"))


@pytest.mark.parametrize("package", ["pybind11", "ninja"])
def test_without_the_build_tools_python_and_the_reason_are_left(checkout: Path, package: str, tmp_path: Path) -> None:
    """Like a build without isolation in an environment that lacks them."""
    (tmp_path / f"{package}.py").write_text(f"raise ImportError('no {package} here')\n")
    hidden = {"PYTHONPATH": str(tmp_path)} | ({"PATH": str(tmp_path)} if package == "ninja" else {})
    done, record = build(checkout, **hidden)
    assert done.returncode == 0, done.stdout
    assert record["native"] is None
    assert f"pip install {package}" in record["skipped"]["native"]
    done, _ = build(checkout, CCU_FAST_NATIVE="1", **hidden)
    assert done.returncode != 0
    assert "CCU_FAST_NATIVE=1, but " in done.stdout


def test_no_compiler_fails_when_asked_to_be_strict(checkout: Path) -> None:
    done, _ = build(checkout, CXX="/nonexistent/c++", CCU_FAST_NATIVE="1")
    assert done.returncode != 0
    assert "CCU_FAST_NATIVE=1, but `/nonexistent/c++" in done.stdout


def test_unknown_switch_is_refused(checkout: Path) -> None:
    done, _ = build(checkout, CCU_FAST_CUDA="yes")
    assert done.returncode != 0
    assert "CCU_FAST_CUDA: expected auto, 1 or 0, got 'yes'" in done.stdout


def test_broken_nvcc_is_survived_and_recorded(wheel: Path) -> None:
    record = json.loads((wheel / "ccu_fast" / "_build_info.json").read_text())
    assert record["cuda"] is None
    assert "a part of me is missing" in record["skipped"]["cuda"]
    assert record["native"]["isas"]
    assert module_of(wheel).exists()


def test_broken_nvcc_fails_when_asked_to_be_strict(checkout: Path, broken_nvcc: str) -> None:
    done, _ = build(checkout, CCU_FAST_CUDA="1", CUDA_HOME=broken_nvcc)
    assert done.returncode != 0
    assert "CCU_FAST_CUDA=1, but" in done.stdout
    assert "a part of me is missing" in done.stdout


def test_cuda_is_switched_off(checkout: Path, tmp_path: Path) -> None:
    """With a compiler that only touches its output: what is built is not looked at."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\necho c++ 1.0\n')
    compiler.chmod(0o755)
    done, record = build(checkout, CXX=str(compiler), CCU_FAST_CUDA="0")
    assert done.returncode == 0, done.stdout
    assert record["skipped"]["cuda"] == "switched off by CCU_FAST_CUDA=0"
    module_of(checkout).unlink()


def test_what_a_real_nvcc_built_loads_without_a_driver() -> None:
    """Of the module in use: to compile the kernels again for this test alone would take a minute."""
    try:
        cuda.find_toolkit(probe.find_cxx())
    except probe.Unavailable as reason:
        pytest.skip(f"no working CUDA toolkit: {reason}")
    record, linked = build_of_the_module()
    assert record["cuda"] is not None, record["skipped"]
    kernels = {path.stem for path in graph.cuda_kernels(ROOT / "csrc")}
    assert kernels == {path.stem for path in linked if path.parent.name == "cuda"}
    module = module_of(ROOT)
    sections = run(tool("readelf"), "-SW", module, cwd=ROOT).stdout
    assert ".nv_fatbin" in sections
    assert "libcuda" not in run(tool("readelf"), "-d", module, cwd=ROOT).stdout
    load = f"""
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
loader = ExtensionFileLoader("ccu_fast._C", {str(module)!r})
loader.exec_module(module_from_spec(spec_from_loader("ccu_fast._C", loader)))
"""
    loaded = run(sys.executable, "-I", "-c", load, cwd=ROOT)
    assert loaded.returncode == 0, loaded.stdout


def test_missing_nvcc_names_the_places_looked_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(probe.Unavailable, match="CUDA_HOME, CUDA_PATH, PATH"):
        cuda.find_toolkit(["c++"])


@pytest.mark.parametrize(
    ("asked", "expected"), [("90;80", ("80", "90")), ("8.0 9.0a,9.0", ("80", "90", "90a")), ("100f", ("100f",))]
)
def test_architectures_that_are_asked_for(
    asked: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CCU_FAST_CUDA_ARCHS", asked)
    assert cuda._choose_archs({75, 80, 90, 100}) == expected


@pytest.mark.parametrize("asked", ["70", "sm_90", "90;native"])
def test_architectures_that_cannot_be(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCU_FAST_CUDA_ARCHS", asked)
    with pytest.raises(probe.Unavailable, match="CCU_FAST_CUDA_ARCHS names"):
        cuda._choose_archs({75, 80, 90})


def test_architectures_follow_the_visible_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CCU_FAST_CUDA_ARCHS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n8.0\\n9.0\\n'\n")
    smi.chmod(0o755)
    assert cuda._choose_archs({80, 86, 90, 100}) == ("80", "90")
    with pytest.raises(probe.Unavailable, match=r"the visible GPUs are \['80', '90'\]"):
        cuda._choose_archs({100, 120})
    smi.write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n")
    assert cuda._choose_archs({75, 80, 90, 103}) == ("80", "90")


def test_ptx_is_that_of_the_highest_architecture() -> None:
    toolkit = cuda.Toolkit("nvcc", "/", "13.0", "/", ("80", "90a"))
    assert toolkit.gencode == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
