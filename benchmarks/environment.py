"""Where and with what a measurement was made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import ccu_fast

REPOSITORY = Path(__file__).resolve().parent.parent
COMMIT = "CCU_FAST_COMMIT"  # variable: the commit of a copy without .git, with +changes if files differ from it
_PACKAGES = ("triton", "open_clip_torch", "inf_cl", "siglip-kernel", "memeff", "numpy")


def describe(device: torch.device) -> dict[str, Any]:
    """Device, versions and the state of the source, as every stored row carries them."""
    sha, dirty = source()
    facts: dict[str, Any] = {
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ccu_fast": ccu_fast.__version__,
        **{name: _version(name) for name in _PACKAGES},
        "git_sha": sha,
        "dirty": dirty,
    }
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda, "driver": _driver(), "capability": _capability(device)}
    return facts


def source() -> tuple[str | None, bool | None]:
    """The commit that is measured, and whether files differ from it; None where nothing says so.

    For a copy without .git the variable CCU_FAST_COMMIT names the commit, or a file COMMIT at its root.
    """
    file = REPOSITORY / "COMMIT"
    told = os.environ.get(COMMIT) or (file.read_text() if file.is_file() else "")
    if told.strip():
        sha, _, changes = told.strip().partition("+")
        return sha, bool(changes)
    head = _git("rev-parse", "HEAD")
    # Stored results are outputs: writing them does not change the measured source.
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results") if head else None
    return head, None if changed is None else bool(changed)


def commit(checkout: Path) -> str | None:
    """The commit of another checkout."""
    return _run("git", "-C", str(checkout), "rev-parse", "HEAD")


def choose_device(name: str | None) -> torch.device:
    """The device that was named, by default a GPU where there is one.

    Raises:
        ValueError: "cuda" was named and torch sees none.
    """
    found = torch.cuda.is_available()
    if name == "cuda" and not found:
        raise ValueError("device: expected cpu, because torch sees no CUDA device; got 'cuda'")
    return torch.device("cuda", torch.cuda.current_device()) if found and name != "cpu" else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """The processor's own name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def slug(device: torch.device) -> str:
    """The name of the device's folder under results/: what it is, and for a CPU with how many threads."""
    text = device_name(device) + (f" {torch.get_num_threads()} threads" if device.type == "cpu" else "")
    return f"{device.type}-" + re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cpu_name() -> str:
    """The model name the kernel reports, with the widest vector extension it lists."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    name = match.group(1).strip() if match else platform.machine()
    widest = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if re.search(rf"\b{f}\b", info)), None)
    return f"{name} ({widest})" if widest else name


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    return _run("git", "-C", str(REPOSITORY), *arguments)


def _driver() -> str | None:
    return _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _capability(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
