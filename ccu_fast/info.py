"""What this installation can do on this machine and, for what it cannot, why: ``python -m ccu_fast.info``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ccu_fast import patch
from ccu_fast._version import __version__
from ccu_fast.extras import EXTRAS, command, distribution, installed
from ccu_fast.ops import machine
from ccu_fast.ops.backend import OPERATIONS, has_bf16, has_kernel, pick, unavailable

SCHEMA = 1  # of collect's data: raised when a key goes or changes its meaning, not when one is added
WIDTH = 100
# The oldest and the newest minor version that tests have run with, without a failure: docs/support.json.
TESTED = {"python": ("3.10", "3.14"), "torch": ("2.8", "2.15"), "triton": ("3.4", "3.9")}
# The backends as a report calls them.
NAMES = {"triton": "Triton", "native": "C++", "reference": "plain torch"}
# Beginnings of the environment variables that change what runs, or how fast.
VARIABLES = (
    "CCU_FAST_",
    "CUBLAS_",
    "CUDA_",
    "GOMP_",
    "KMP_",
    "LD_PRELOAD",
    "MALLOC_",
    "MKL_",
    "NCCL_",
    "NVIDIA_TF32",
    "OMP_",
    "OPENBLAS_",
    "PYTORCH_",
    "TORCH",
    "TRITON_",
)
SECRET = re.compile("TOKEN|SECRET|PASS|PWD|AUTH|CREDENTIAL|_KEY")


def collect() -> dict[str, Any]:
    """Everything that :func:`render` prints, as plain data.

    Returns:
        A dictionary that can be written as JSON. Paths below the home folder begin with ``~``, and the machine's name
        is left out, so that it can be published. "schema" is :data:`SCHEMA`.

    >>> ccu_fast.info.collect()["operations"]["topk_flips"]["cpu"]["backend"]
    'native'
    """
    devices = _devices()
    gpus = [f"cuda:{index}" for index in range(len(devices))]
    return {
        "schema": SCHEMA,
        "ccu_fast": {"version": __version__, "folder": _public(str(machine.PACKAGE))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "system": {"distribution": _distribution(), "libc": " ".join(platform.libc_ver()).strip() or None},
        "torch": torch.__version__,
        "triton": installed("triton"),
        "numpy": installed("numpy"),
        "tested": _tested(),
        "build": _published(machine.build_info()),
        "cpu": {
            **_cpu(),
            "isa": _cpu_isa(),
            "bf16": torch.backends.mkldnn.is_available() and has_bf16(),
            "threads": torch.get_num_threads(),
            "why_not": _why_not_native(),
        },
        "cuda": {
            "torch": torch.version.cuda,
            "cudnn": _cudnn(),
            "hip": torch.version.hip,
            "driver": ".".join(map(str, machine.driver_cuda() or ())) or None,
            "driver_version": _driver_version(),
            "devices": devices,
            "why_no_devices": machine.why_no_devices(),
            "why_no_kernels": _public(machine.why_no_cuda_kernels()),
        },
        "operations": {op: {where: _choice(op, where) for where in ("cpu", *gpus)} for op in OPERATIONS},
        "libraries": {
            target.distribution: installed(target.distribution)
            for target in patch.TARGETS.values()
            if target.distribution is not None
        },
        "extras": {
            extra: {distribution(package): installed(distribution(package)) for package in modules.values()}
            for extra, modules in EXTRAS.items()
        },
        "environment": {
            name: _public(value)
            for name, value in sorted(os.environ.items())
            if name.startswith(VARIABLES) and not SECRET.search(name)
        },
    }


def render(report: dict[str, Any]) -> str:
    """The report for people: ``key  value`` a line, at most :data:`WIDTH` characters wide.

    Args:
        report: what :func:`collect` returns.
    """
    parts = (_versions(report), _machine(report), _kernels(report), _packages(report))
    width = max(len(key) for rows in parts for key, _ in rows)
    return "\n\n".join("\n".join(line for row in rows for line in _lines(*row, width)) for rows in parts)


def _lines(key: str, value: str, width: int) -> list[str]:
    first, more = f"{key:<{width}}  ", " " * (width + 2)
    wrap = textwrap.TextWrapper(WIDTH, first, more, break_long_words=False, break_on_hyphens=False)
    return wrap.wrap(value)


def _versions(report: dict[str, Any]) -> list[tuple[str, str]]:
    build, cuda, system = report["build"] or {}, report["cuda"], report["system"]
    for_what = f"CUDA {cuda['torch']}" if cuda["torch"] else f"ROCm {cuda['hip']}" if cuda["hip"] else "CPUs"
    for_what += f", cuDNN {cuda['cudnn']}" if cuda["cudnn"] else ""
    about = {"torch": f" for {for_what}", "python": f" on {report['platform']}"}
    rows = [
        ("ccu_fast", f"{report['ccu_fast']['version']}, built from commit {build.get('git_sha') or 'unknown'}"),
        ("", report["ccu_fast"]["folder"]),
    ]
    for name, tested in report["tested"].items():
        found = f"{tested['installed']}{about.get(name, '')}" if tested["installed"] else "not installed"
        outside = " -- NOT TESTED WITH THIS ONE" if tested["inside"] is False else ""
        rows.append((name, f"{found}; tested with {tested['from']} to {tested['to']}{outside}"))
    rows.append(("numpy", report["numpy"] or "not installed"))
    return [*rows, ("system", ", ".join(filter(None, system.values())) or "unknown")]


def _machine(report: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, cuda = report["cpu"], report["cuda"]
    cores = f"{cpu['cores']} cores" + (f" of {cpu['cores_of_machine']}" * (cpu["cores"] != cpu["cores_of_machine"]))
    rows = [
        ("cpu", ", ".join([cpu["model"] or report["platform"], cores, f"{cpu['memory_gib']} GiB of memory"])),
        ("threads", f"{cpu['threads']} of torch"),
    ]
    for number, device in enumerate(cuda["devices"]):
        facts = f"sm_{device['capability']}, {device['memory_gib']} GiB, {device['multiprocessors']} multiprocessors"
        rows.append((f"cuda:{number}", f"{device['name']}, {facts}"))
    if cuda["driver"]:
        rows.append(("driver", f"{cuda['driver_version'] or 'of NVIDIA'}, serves CUDA {cuda['driver']}"))
    if cuda["why_no_devices"]:
        rows.append(("gpu", f"none: {cuda['why_no_devices']}"))
    variables = [f"{name}={value}" for name, value in report["environment"].items()]
    return rows + ([("environment", variable) if not i else ("", variable) for i, variable in enumerate(variables)])


def _kernels(report: dict[str, Any]) -> list[tuple[str, str]]:
    build = report["build"] or {"native": None, "cuda": None, "skipped": {}}
    native, cuda, cpu = build["native"], build["cuda"], report["cpu"]
    rows = [("cpu kernels", cpu["isa"] or f"none, torch is used instead: {cpu['why_not']}")]
    if native:
        rows.append(("  built", f"{', '.join(native['isas'])} with {native['compiler']}"))
    rows += [(f"  no {name}", why) for name, why in build["skipped"].items() if name not in ("native", "cuda")]
    if cuda:
        rows.append(("cuda kernels", f"CUDA {cuda['version']} for {', '.join('sm_' + arch for arch in cuda['archs'])}"))
    if report["cuda"]["why_no_kernels"]:
        rows.append(("  unusable" if cuda else "cuda kernels", report["cuda"]["why_no_kernels"]))
    rows.append(("bf16 on a CPU", "products in bf16" if cpu["bf16"] else "products in fp32: this CPU has none in bf16"))
    rows.append(("what runs", "for fp32, fp16 and bf16; fp64 runs in plain torch everywhere"))
    for device in next(iter(report["operations"].values())):
        rows += _serving(device, {op: choices[device] for op, choices in report["operations"].items()})
    return rows


def _serving(device: str, choices: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """What serves a device, a row for all operations that share a backend and the reasons against others."""
    names = {**NAMES, "native": "CUDA C++"} if device.startswith("cuda") else NAMES
    shared: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = {}
    for op, choice in choices.items():
        shared.setdefault((choice["backend"], tuple(choice["why_not"].items())), []).append(op)
    rows: list[tuple[str, str]] = []
    for (backend, why_not), ops in shared.items():
        rows.append((f"{device} tensors" if not rows else "", f"{names[backend]}: {', '.join(ops)}"))
        rows += [(f"  not {names[name]}", why) for name, why in why_not]
    return rows


def _packages(report: dict[str, Any]) -> list[tuple[str, str]]:
    libraries = [f"{name} {version}" for name, version in report["libraries"].items() if version]
    rows = [("patches for", ", ".join(libraries) or "none of the libraries is installed")]
    for extra, packages in report["extras"].items():
        listed = (f"{name} {version or '(not installed)'}" for name, version in packages.items())
        rows.append((f"extra [{extra}]", ", ".join(listed)))
        if not all(packages.values()):
            absent = [p for p in EXTRAS[extra].values() if not packages[distribution(p)]]
            rows.append(("", command(extra, *absent)))
    return rows


def _tested() -> dict[str, dict[str, Any]]:
    """By name what is installed, and whether it lies between the oldest and the newest version of the tests."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": installed("triton")}
    ends = ((name, versions[name], *TESTED[name]) for name in TESTED)
    return {
        name: {"from": low, "to": high, "installed": version, "inside": version and inside(version, low, high)}
        for name, version, low, high in ends
    }


def inside(version: str, low: str, high: str) -> bool:
    """Whether a version is one of the minor versions from ``low`` to ``high``.

    >>> inside("3.9.1", "3.10", "3.14"), inside("3.14.0rc1", "3.10", "3.14")
    (False, True)
    """
    first, minor, last = (tuple(map(int, re.findall(r"\d+", text)[:2])) for text in (low, version, high))
    return first <= minor <= last


def _public(text: Any) -> Any:
    """A text without the home folder, the machine's name, and who logs in where an address says it."""
    if not isinstance(text, str):
        return text
    text = re.sub(r"(?<=://)[^/@\s]+@", "", text)
    home, node = str(Path.home()), platform.node()
    if len(home) > 1:
        text = re.sub(rf"{re.escape(home)}(?=/|$|[\s:;,'\")])", "~", text)
    return re.sub(rf"\b{re.escape(node)}\b", "<host>", text) if len(node) > 2 else text


def _published(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _published(inner) for key, inner in value.items()}
    return [_published(inner) for inner in value] if isinstance(value, list) else _public(value)


def _distribution() -> str | None:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        return None


def _why_not_native() -> str | None:
    why: str | None = _public(machine.why_not_native())
    return why


def _cpu() -> dict[str, Any]:
    """The model, the cores that this process may use, those of the machine and its memory."""
    try:
        told = Path("/proc/cpuinfo").read_text()
    except OSError:
        told = ""
    model = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", told, re.MULTILINE)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model[1].strip() if model else platform.processor() or platform.machine() or None,
        "cores": usable,
        "cores_of_machine": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
    }


def _cpu_isa() -> str | None:
    if unavailable("native") is not None:
        return None
    return str(importlib.import_module("ccu_fast._C").cpu_isa())


def _cudnn() -> str | None:
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return None if version is None else str(version)


def _driver_version() -> str | None:
    """The NVIDIA driver's own, such as 570.86.15."""
    try:
        told = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", told)
    return found[0] if found else None


def _devices() -> list[dict[str, Any]]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [
        {
            "name": p.name,
            "capability": f"{p.major}{p.minor}",
            "memory_gib": round(p.total_memory / 2**30),
            "multiprocessors": p.multi_processor_count,
        }
        for p in map(torch.cuda.get_device_properties, range(count))
    ]


def _choice(op: str, device: str) -> dict[str, Any]:
    """The backend that ``auto`` picks for fp32 tensors, and why each backend it tried before that cannot serve."""
    where = torch.device(device)
    chosen, reasons = pick(op, where, torch.float32)
    why_not = {name: _public(reason) for name, reason in reasons.items() if has_kernel(name, op, where.type)}
    return {"backend": chosen, "why_not": why_not}


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ccu_fast.info") -> int:
    """Print the report; with ``--json`` as JSON."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="What this installation can do on this machine and, for what it cannot, why.",
        epilog=f"Example: {prog} --json > ccu_fast_info.json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, to attach to a report of a problem")
    options = parser.parse_args(arguments)
    report = collect()
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
