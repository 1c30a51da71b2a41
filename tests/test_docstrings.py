"""Docstrings of the public names: a plain first sentence, the sections that their kind has, examples that run."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import re
from typing import Any

import pytest
import torch

import ccu_fast
from tests.support.presence import absent

MODULES = ("ccu_fast", "ccu_fast.distributed", "ccu_fast.unlearn", "ccu_fast.mem", "ccu_fast.patch")

# What no paper says how to do.
WITHOUT_SOURCE = {"choose_model", "average_gradients", "check_pgd_steps", "export", "reading", "retrieval", "verify"}
# They list what there is.
WITHOUT_ERRORS = {f"ccu_fast.patch.{name}" for name in ("active", "calls", "targets")}
# Packages that an example imports.
NEEDS = {f"ccu_fast.patch.{name}": "pytorch_metric_learning" for name in ("apply", "applied", "calls")}
# One reads all 10,000 captions, which takes seconds; the others datasets of the user's.
NOT_RUN = {f"ccu_fast.mem.{name}" for name in ("run_digit_strips", "protect_dataset", "evaluate_datasets")}


def public() -> dict[str, Any]:
    """Functions and classes by their full public name."""
    names = {
        f"{m}.{n}": getattr(importlib.import_module(m), n) for m in MODULES for n in importlib.import_module(m).__all__
    }
    return {name: value for name, value in names.items() if inspect.isfunction(value) or inspect.isclass(value)}


PUBLIC = public()


def sections(name: str, value: Any) -> set[str]:
    """The sections that a name of this kind has."""
    if inspect.isclass(value):
        if getattr(value, "_is_protocol", False):
            return set()
        data = issubclass(value, tuple) or hasattr(value, "__dataclass_fields__")
        if not data and (issubclass(value, torch.nn.Module) or "__init__" in vars(value)):
            return {"Args", "Raises"}
        return {"Attributes"}  # which give the ranges
    wanted: set[str] = set()
    signature = inspect.signature(value)
    if signature.parameters:
        wanted.add("Args")
    if signature.return_annotation not in (None, "None"):
        wanted.add("Returns")
    if name not in WITHOUT_ERRORS:
        wanted.add("Raises")
    if not name.startswith("ccu_fast.patch.") and value.__name__ not in WITHOUT_SOURCE:
        wanted.add("Source")
    return wanted


@pytest.mark.parametrize("name", PUBLIC)
def test_sections(name: str) -> None:
    text = inspect.cleandoc(PUBLIC[name].__doc__ or "")
    found = set(re.findall(r"^(Args|Attributes|Returns|Raises|Source)\b[^\n]*:", text, re.MULTILINE))
    assert sections(name, PUBLIC[name]) <= found


@pytest.mark.parametrize("name", PUBLIC)
def test_first_sentence(name: str) -> None:
    first = inspect.cleandoc(PUBLIC[name].__doc__ or "").split("\n\n")[0]
    assert first[0].isupper()
    assert first.endswith((".", "::"))


@pytest.mark.parametrize("name", PUBLIC)
def test_examples(name: str) -> None:
    package = NEEDS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        absent(package, "not installed")
    [test] = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs={"torch": torch, "ccu_fast": ccu_fast})
    assert test.examples
    skipped = [example for example in test.examples if example.options.get(doctest.SKIP)]
    assert bool(skipped) == (name in NOT_RUN)
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert result.failed == 0, "".join(said)
