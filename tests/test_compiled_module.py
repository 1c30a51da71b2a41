"""ccu_fast/_C.pyi matches the compiled module, and calls into the module name their arguments."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.presence import require_backend

ROOT = Path(__file__).resolve().parents[1]
STUB = ROOT / "ccu_fast" / "_C.pyi"
MOST_POSITIONAL = 6
# Of a batch of eight items the names of thirteen arguments would take a tenth of the time.
BY_PLACE = {"small_info_nce": 13, "small_info_nce_backward": 13}
Signature = tuple[list[str], list[str]]  # arguments that may be positional, and those that may not


def signature(function: ast.FunctionDef) -> Signature:
    arguments = function.args
    assert arguments.vararg is None and arguments.kwarg is None, function.name
    positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    return positional, [a.arg for a in arguments.kwonlyargs]


def in_stub() -> dict[str, Signature | None]:
    """Every name of the stub, with the signature of the function or of the class's constructor."""
    found: dict[str, Signature | None] = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = None
        elif isinstance(node, ast.FunctionDef):
            found[node.name] = signature(node)
        elif isinstance(node, ast.ClassDef):
            [constructor] = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            assert constructor.name == "__init__", node.name
            found[node.name] = signature(constructor)
    return found


def is_of_cuda(name: str, known: Signature | None) -> bool:
    """Whether only builds with CUDA have it."""
    return known is not None and name.startswith(("cuda_", "Cuda"))


def documented(function: Any) -> tuple[Signature, str]:
    """The signature in the first line of a docstring by pybind11, and the text that follows."""
    assert "Overloaded function" not in function.__doc__
    first, _, text = function.__doc__.partition("\n")
    [parsed] = ast.parse(f"def {first}: ...").body
    assert isinstance(parsed, ast.FunctionDef)
    return signature(parsed), text.strip()


@pytest.fixture(scope="module")
def module() -> Any:
    require_backend("native")
    return importlib.import_module("ccu_fast._C")


def test_the_stub_has_the_names_of_the_module(module: Any) -> None:
    stub = {name for name, known in in_stub().items() if module.CUDA or not is_of_cuda(name, known)}
    assert stub == {name for name in vars(module) if not name.startswith("_")}


def test_the_stub_has_the_signatures_of_the_module(module: Any) -> None:
    for name, known in in_stub().items():
        if not module.CUDA and is_of_cuda(name, known):
            continue
        value = getattr(module, name)
        if known is None:
            assert type(value) in (int, bool), name
            continue
        function = value.__init__ if inspect.isclass(value) else value
        found, text = documented(function)
        assert found == known, name
        assert text, f"{name} has no docstring"
        assert len([a for a in found[0] if a != "self"]) <= BY_PLACE.get(name, MOST_POSITIONAL), name


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "_C":
                yield node


def test_no_call_has_many_positional_arguments() -> None:
    seen = 0
    for folder in ("ccu_fast", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for call in calls(ast.parse(path.read_text())):
                seen += 1
                where = f"{path.relative_to(ROOT)}:{call.lineno}"
                most = BY_PLACE.get(getattr(call.func, "attr", ""), MOST_POSITIONAL)
                assert not any(isinstance(a, ast.Starred) for a in call.args), where
                assert len(call.args) <= most, where
    assert seen >= 15
