"""The structure of the package: which way imports point, and how many files a call passes through."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ccu_fast

PACKAGE = Path(ccu_fast.__file__).parent
# An import points further up this list, or stays in its package; packages on one line do not import each other.
ORDER = (
    ("_C", "_version", "check", "extras", "files"),
    ("ops",),
    ("losses",),
    ("distributed",),
    ("patch", "models", "data"),
    ("runs",),
    ("unlearn", "mem"),
    ("info",),
    ("cli",),
    ("__init__", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
# Imports that point the other way, and why they may.
UPWARD: dict[tuple[str, str], str] = {}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below it; the package's own is ``__init__``."""
    named = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        named[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return named


def imports(path: Path, known: set[str]) -> Iterator[str]:
    """The modules of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            parts = name.split(".")
            if parts[0] == "ccu_fast":
                below = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
                yield next((name for name in below if name in known), "__init__")


def test_imports_point_down() -> None:
    named = modules()
    known = {*named, "_C"}
    wrong = []
    for module, path in named.items():
        for target in imports(path, known):
            here, there = module.split(".")[0], target.split(".")[0]
            if here != there and RANK[there] >= RANK[here] and (module, target) not in UPWARD:
                wrong.append(f"{module} imports {target}")
    assert not wrong, "\n".join(wrong)
    assert len(UPWARD) <= 3


def test_no_module_imports_itself_through_others() -> None:
    named = modules()
    graph = {module: set(imports(path, set(named))) - {module} for module, path in named.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join((*way[way.index(module) :], module))
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*way, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_every_file_has_a_place_in_the_order() -> None:
    assert {module.split(".")[0] for module in modules()} == RANK.keys() - {"_C"}


def test_no_file_is_longer_than_400_lines() -> None:
    long = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {path: lines for path, lines in long.items() if lines > 400}


def test_operators_are_registered_and_backends_loaded_in_one_file_each() -> None:
    texts = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
    assert [name for name, text in texts.items() if "torch.library." in text] == ["ops/operator.py"]
    # An f-string imports a chosen file; a module's own name is a plain string.
    loads = [name for name, text in texts.items() if name.startswith("ops/") and 'import_module(f"' in text]
    assert loads == ["ops/backend.py"]


def test_the_formatter_is_kept_from_few_lines() -> None:
    root = PACKAGE.parent
    mark = "# fmt: " + "skip"
    folders = ("ccu_fast", "tests", "benchmarks", "build_support")
    found = [
        path for folder in folders for path in (root / folder).rglob("*.py") for line in path.open() if mark in line
    ]
    assert len(found) <= 40


def traced(call: Callable[[], Any]) -> tuple[list[str], int]:
    """Our files that a call enters, in order, and how often one calls another."""
    files: list[str] = []
    moves = 0

    def ours(frame: FrameType | None) -> str | None:
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(str(PACKAGE)):
                return name
            frame = frame.f_back
        return None

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal moves
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(str(PACKAGE)):
            if name not in files:
                files.append(name)
            moves += ours(frame.f_back) not in (None, name)

    call()  # what is loaded, chosen and kept at the first call
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [str(Path(name).relative_to(PACKAGE)) for name in files], moves


@pytest.mark.parametrize(("batch", "files", "moves"), [(100, 5, 11), (256, 5, 14), (1100, 7, 28)])
def test_info_nce_goes_through_few_files(batch: int, files: int, moves: int) -> None:
    x, y = (F.normalize(torch.randn(batch, 64), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(10.0, requires_grad=True)
    entered, moved = traced(lambda: ccu_fast.info_nce(x, y, scale=scale).backward())
    assert len(entered) <= files, entered
    assert moved <= moves


def test_topk_flips_goes_through_few_files() -> None:
    table = ccu_fast.TokenTable(torch.randn(500, 16))
    entered, _ = traced(lambda: ccu_fast.topk_flips(torch.randn(3, 16), table, 4))
    assert len(entered) <= 5, entered
