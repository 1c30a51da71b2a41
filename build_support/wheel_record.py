"""What ``make wheels ARGS=--record`` built, in docs/wheels.json, and the same as tables in docs/install.md.

One build of each kind is kept: the newest without CUDA kernels and the newest with them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from build_support.docs.generated import splice, table_lines

DOCS = Path(__file__).resolve().parent.parent / "docs"
RECORD = DOCS / "wheels.json"
PAGE = DOCS / "install.md"
BEGIN = "<!-- wheels: written by `make wheels ARGS=--record`; do not edit -->"
END = "<!-- end of wheels -->"


def read() -> list[dict[str, Any]]:
    """The builds on record, without CUDA kernels first."""
    return list(json.loads(RECORD.read_text(encoding="utf-8"))["builds"])


def keep(build: dict[str, Any]) -> None:
    """Put a build in the place of the one of its kind, and write both files."""
    others = [old for old in read() if bool(old["cuda"]) != bool(build["cuda"])]
    builds = sorted([*others, build], key=lambda one: bool(one["cuda"]))
    RECORD.write_text(json.dumps({"builds": builds}, indent=1) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(splice(text, tables(builds), BEGIN, END), encoding="utf-8")


def tables(builds: list[dict[str, Any]]) -> str:
    """What docs/install.md says of these builds."""
    return "\n\n".join(text for build in builds for text in _section(build))


def _section(build: dict[str, Any]) -> list[str]:
    compilers = build["compiler"]
    kernels = "Without CUDA kernels"
    if build["cuda"]:
        kernels = "With CUDA kernels for " + ", ".join(f"sm_{arch}" for arch in build["cuda"])
        compilers += f" and nvcc {build['nvcc']}"
    head = ("Python", "wheel", "compiled module in it", "newest glibc symbol", "tried with")
    rows = []
    for wheel in build["wheels"]:
        sizes = [f"{wheel[key] / 1e6:.1f} MB" for key in ("bytes", "module_bytes")]
        rows.append([wheel["python"], *sizes, wheel["glibc"], _tried(wheel.get("tried"))])
    return [
        f"{kernels}, by {compilers}. The source distribution has {build['sdist']['bytes'] / 1e6:.1f} MB.",
        f"```bash\n{build['command']}\n```",
        "\n".join(table_lines(head, rows)),
    ]


def _tried(trial: dict[str, Any] | None) -> str:
    if trial is None:
        return "not tried"
    return f"torch {trial['torch']}" if trial["torch"] else "no torch: loaded alone, no loss"
