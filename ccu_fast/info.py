"""What this installation can do on this machine and, for what it cannot, why: ``python -m ccu_fast.info``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from typing import Any

import torch

from ccu_fast._version import __version__
from ccu_fast.extras import EXTRAS
from ccu_fast.ops import machine
from ccu_fast.ops.backend import OPERATIONS, has_kernel, pick, unavailable

# The backends as a report calls them.
NAMES = {"triton": "Triton", "native": "C++", "reference": "plain torch"}


def collect() -> dict[str, Any]:
    """Everything :func:`render` prints, as plain data."""
    devices = _devices()
    gpus = [f"cuda:{index}" for index in range(len(devices))]
    return {
        "ccu_fast": {"version": __version__, "folder": str(machine.PACKAGE)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "build": machine.build_info(),
        "cpu": {"isa": _cpu_isa(), "threads": torch.get_num_threads(), "why_not": machine.why_not_native()},
        "cuda": {
            "torch": torch.version.cuda,
            "driver": ".".join(map(str, machine.driver_cuda() or ())) or None,
            "devices": devices,
            "why_no_devices": machine.why_no_devices(),
            "why_no_kernels": machine.why_no_cuda_kernels(),
        },
        "operations": {op: {where: _choice(op, where) for where in ("cpu", *gpus)} for op in OPERATIONS},
        "extras": {
            extra: {distribution: _version(distribution) for distribution in modules.values()}
            for extra, modules in EXTRAS.items()
        },
    }


def render(report: dict[str, Any]) -> str:
    """The report for people, ``key  value`` a line."""
    build = report["build"] or {"git_sha": None, "native": None, "cuda": None, "skipped": {}}
    native, cuda, cpu = build["native"], build["cuda"], report["cpu"]
    rows = [
        ("ccu_fast", f"{report['ccu_fast']['version']}, commit {build['git_sha'] or 'unknown'}"),
        ("", report["ccu_fast"]["folder"]),
        ("python", f"{report['python']} on {report['platform']}"),
        ("torch", report["torch"]),
        ("triton", report["triton"] or "not installed"),
        ("", ""),
        ("cpu kernels", cpu["isa"] or f"none, torch is used instead: {cpu['why_not']}"),
    ]
    if native:
        rows.append(("  built", f"{', '.join(native['isas'])} with {native['compiler']}"))
    rows += [(f"  no {name}", why) for name, why in build["skipped"].items() if name not in ("native", "cuda")]
    rows.append(("threads", str(cpu["threads"])))
    if cuda:
        rows.append(("cuda kernels", f"CUDA {cuda['version']} for {', '.join('sm_' + arch for arch in cuda['archs'])}"))
    if report["cuda"]["why_no_kernels"]:
        rows.append(("  unusable" if cuda else "cuda kernels", report["cuda"]["why_no_kernels"]))
    for number, device in enumerate(report["cuda"]["devices"]):
        rows.append((f"cuda:{number}", f"{device['name']}, sm_{device['capability']}, {device['memory_gib']} GiB"))
    if report["cuda"]["why_no_devices"]:
        rows.append(("gpu", f"none: {report['cuda']['why_no_devices']}"))
    rows.append(("", ""))
    for device in next(iter(report["operations"].values())):
        rows += _serving(device, {op: choices[device] for op, choices in report["operations"].items()})
    rows.append(("", ""))
    for extra, packages in report["extras"].items():
        listed = (f"{name} {version or '(not installed)'}" for name, version in packages.items())
        rows.append((f"extra [{extra}]", ", ".join(listed)))
        if not all(packages.values()):
            rows.append(("", f"pip install 'ccu-fast[{extra}]'"))
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"{key:<{width}}  {value}".rstrip() for key, value in rows)


def _cpu_isa() -> str | None:
    if unavailable("native") is not None:
        return None
    return str(importlib.import_module("ccu_fast._C").cpu_isa())


def _devices() -> list[dict[str, Any]]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [
        {"name": p.name, "capability": f"{p.major}{p.minor}", "memory_gib": round(p.total_memory / 2**30)}
        for p in map(torch.cuda.get_device_properties, range(count))
    ]


def _choice(op: str, device: str) -> dict[str, Any]:
    """The backend that ``auto`` picks for fp32 tensors, and why each backend it tried before that cannot serve."""
    where = torch.device(device)
    chosen, reasons = pick(op, where, torch.float32)
    why_not = {name: reason for name, reason in reasons.items() if has_kernel(name, op, where.type)}
    return {"backend": chosen, "why_not": why_not}


def _serving(device: str, choices: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """What serves a device, a row for all operations that share a backend and the reasons against others."""
    names = {**NAMES, "native": "CUDA C++"} if device.startswith("cuda") else NAMES
    shared: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = {}
    for op, choice in choices.items():
        shared.setdefault((choice["backend"], tuple(choice["why_not"].items())), []).append(op)
    rows: list[tuple[str, str]] = []
    for (backend, why_not), ops in shared.items():
        rows.append((device if not rows else "", f"{names[backend]}: {', '.join(ops)}"))
        rows += [(f"  not {names[name]}", why) for name, why in why_not]
    return rows


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


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
