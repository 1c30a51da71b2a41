"""Writes the losses as a package of Hugging Face's Kernel Hub, from the sources of ``ccu_fast``.

    python -m build_support.hub [--out dist/hub]

The hub loads a folder under a name of its own, several versions in one process, with ccu_fast beside it or without. So
the files are copied with ``from ccu_fast.… import`` turned into relative imports, and with the operators in a namespace
that no other build has. Every other line stays as it is: what is not copied verbatim is in this file.
"""

from __future__ import annotations

import argparse
import ast
import base64
import functools
import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ccu_fast"

NAME = "ccu-fast-losses"
MODULE = NAME.replace("-", "_")
# The hub's name for an interface that may still change. From 1 on, what has been published under a number stays.
VERSION = 0
# A variant for each of torch's builds that the losses are for; they differ in their names alone.
BACKENDS = ("cpu", "cuda")
LICENSE = "MIT"

# Public names of ccu_fast that are neither losses nor made for them.
ELSEWHERE = (
    "Flips",
    "NoiseStore",
    "TokenTable",
    "candidate_losses",
    "check_pgd_steps",
    "patch",
    "pgd_step_",
    "topk_flips",
)
# In place of the operators' namespace until a build has its own.
NAMESPACE = "_NAMESPACE_OF_THIS_BUILD"
# Implementations of an operation that this package has no compiled module for.
COMPILED = ("native", "cuda")
# What ``machine.build_info`` reads: the reason that is given where somebody asks for backend="native".
SKIPPED = f"{NAME} has the Triton kernels and plain torch; the compiled CPU kernels are in the wheel of ccu-fast"

# Sentences that name the package or its command, by file: what they say here.
SENTENCES = {
    "check.py": ((" for ccu_fast.distributed, or", " for ClipLoss and SigLipLoss, or"),),
    "distributed/blocks.py": (
        ('"ccu_fast.distributed: second derivatives', '"ClipLoss, SigLipLoss: second derivatives'),
        ("the loss of the same name in ccu_fast", "info_nce or sigmoid_loss"),
    ),
    "ops/backend.py": (
        ("not in a kernel of ccu_fast: ", f"not in a kernel of {MODULE}: "),
        ("{why}. `ccu-fast info` lists what serves each device; this is said once.", "{why}. This is said once."),
    ),
}
# The logger, which both have, and the reasons of a build from source, before which build_info answers.
MAY_STAY = {"ops/backend.py": 1, "ops/machine.py": 1}


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name below it; a package is named after its folder."""
    named = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imports(tree: ast.Module, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "ccu_fast" for alias in node.names):
            raise ValueError(f"line {node.lineno}: expected from ccu_fast.… import …, got import {node.names[0].name}")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ccu_fast":
            below = (node.module or "").split(".")[1:]
            for alias in node.names:
                name = ".".join([*below, alias.name])
                yield name if name in known else ".".join(below)


@functools.cache
def public() -> dict[str, list[str]]:
    """The names of ``ccu_fast.__all__`` that the package has, by the module that they are in."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    home = {
        alias.asname or alias.name: (node.module or "").partition(".")[2]
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    [everything] = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    unknown = set(ELSEWHERE) - set(everything)
    if unknown:
        raise ValueError(f"ELSEWHERE: expected names of ccu_fast.__all__, got {sorted(unknown)}")
    face: dict[str, list[str]] = {}
    for name in sorted(set(everything) - set(ELSEWHERE)):
        face.setdefault(home[name], []).append(name)
    return dict(sorted(face.items()))


@functools.cache
def needed() -> dict[str, Path]:
    """The modules that the public names need, by name: what is imported, and an operation's backends."""
    known = modules()
    found: dict[str, Path] = {}
    waiting = [*public(), *imports(ast.parse((ROOT / "build_support" / "hub_layers.py").read_text()), known)]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        if name not in known or not name:
            raise ValueError(f"the losses import {name or 'the package itself'!r}, which the hub's package cannot hold")
        found[name] = known[name]
        waiting += imports(ast.parse(known[name].read_text(encoding="utf-8")), known)
        parts = name.split(".")
        if parts[0] == "ops" and len(parts) > 2:  # a file of an operation, whose backends are loaded by their names
            folder = ".".join(parts[:2])
            waiting += [
                other
                for other in known
                if other.startswith(f"{folder}.") and other.split(".")[2] not in COMPILED and other not in found
            ]
    return dict(sorted(found.items()))


def localised(text: str, file: str, package: list[str]) -> str:
    """A file of ccu_fast as one of the hub's package: relative imports, its own operators, its own name.

    Args:
        text: the source.
        file: its path below the package, for :data:`SENTENCES`.
        package: the package that it lies in, as a list of names below the root.

    The namespace of the operators is :data:`NAMESPACE`, whose place a build's own takes.
    """
    for old, new in SENTENCES.get(file, ()):
        if text.count(old) != 1:
            raise ValueError(f"{file}: expected {old!r} once, got it {text.count(old)} times")
        text = text.replace(old, new)
    tree = ast.parse(text)
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    documented = list(_docstrings(tree))
    # From the end, so that what is still to come keeps its place. ast counts bytes.
    for line, start, end, new in sorted(_edits(tree, package), reverse=True):
        lines[line - 1] = lines[line - 1][:start] + new.encode() + lines[line - 1][end:]
    for node in documented:
        for line in range(node.lineno - 1, node.end_lineno or node.lineno):
            lines[line] = re.sub(rb"(?<!torch\.ops\.)\bccu_fast\b(?!::)", MODULE.encode(), lines[line])
    text = b"".join(lines).decode()
    _check(text, file)
    return text


def _docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                yield first.value


def _edits(tree: ast.Module, package: list[str]) -> Iterator[tuple[int, int, int, str]]:
    """Line, first and last byte, and what takes their place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ccu_fast":
            module = str(node.module)
            start = node.col_offset + len("from ")
            below = module.removeprefix("ccu_fast").removeprefix(".")
            yield node.lineno, start, start + len(module), "." * (len(package) + 1) + below
        elif isinstance(node, ast.Attribute) and node.attr == "ccu_fast" and ast.unparse(node.value) == "torch.ops":
            end = node.end_col_offset or 0
            yield node.end_lineno or node.lineno, end - len("ccu_fast"), end, NAMESPACE
        elif isinstance(node, ast.Assign) and ast.unparse(node) == "NAMESPACE = 'ccu_fast'":
            value = node.value
            yield value.lineno, value.col_offset, value.end_col_offset or 0, f'"{NAMESPACE}"'


def _check(text: str, file: str) -> None:
    """Nothing names ccu_fast but what may: a missed import or sentence ends the build."""
    tree = ast.parse(text)
    kept = set(map(id, _docstrings(tree)))
    left = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in kept:
            left += re.search(r"\bccu_fast\b", node.value) is not None
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("ccu_fast"):
            raise ValueError(f"{file}: line {node.lineno} imports from ccu_fast")
        if isinstance(node, ast.Name) and node.id == "ccu_fast":
            raise ValueError(f"{file}: line {node.lineno} uses ccu_fast")
    if left != MAY_STAY.get(file, 0):
        raise ValueError(f"{file}: expected {MAY_STAY.get(file, 0)} texts that name ccu_fast, got {left}")


def _init() -> str:
    """The package's ``__init__.py``."""
    face = public()
    names = sorted(name for found in face.values() for name in found)
    return "\n".join(
        [
            '"""Contrastive losses whose logits are never stored: Triton kernels on a GPU, plain torch on a CPU."""',
            "",
            "from typing import Any",
            "",
            "from . import layers",
            *(f"from .{module} import {', '.join(found)}" for module, found in face.items()),
            "",
            f"__all__ = {json.dumps(['layers', *names], indent=4)}",
            "",
            f"_ELSEWHERE = {json.dumps(ELSEWHERE)}",
            "",
            "",
            "def __getattr__(name: str) -> Any:",
            "    if name in _ELSEWHERE:",
            f'        raise AttributeError(f"{MODULE} has the losses alone; {{name}} is in the package ccu-fast")',
            f"    raise AttributeError(f\"module '{MODULE}' has no attribute {{name!r}}\")",
            "",
        ]
    )


def _for_older_versions() -> str:
    """The folder named after the package, in which older versions of ``kernels`` look for it."""
    return f'''"""The package in the folder above, for versions of kernels that look for it here."""

import importlib.util
import json
import sys
from pathlib import Path

_folder = Path(__file__).resolve().parents[1]
_id = json.loads((_folder / "metadata.json").read_text())["id"]
if _id not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_id, _folder / "__init__.py")
    if _spec is None or _spec.loader is None:
        raise ImportError(f"{MODULE}: expected a package in {{_folder}}")
    sys.modules[_id] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_id])
__all__ = sys.modules[_id].__all__
globals().update({{name: getattr(sys.modules[_id], name) for name in __all__}})
'''


def files() -> dict[str, str]:
    """The files of every build by their paths, all but ``metadata.json``."""
    written = {
        "__init__.py": _init(),
        f"{MODULE}/__init__.py": _for_older_versions(),
        "_build_info.json": json.dumps({"native": None, "cuda": None, "skipped": {"native": SKIPPED}}) + "\n",
    }
    layers = (ROOT / "build_support" / "hub_layers.py").read_text(encoding="utf-8")
    written["layers.py"] = localised(layers, "layers.py", [])
    for name, path in needed().items():
        file = path.relative_to(PACKAGE)
        text = path.read_text(encoding="utf-8")
        written[file.as_posix()] = localised(text, file.as_posix(), list(file.parts[:-1]))
        # A package that nothing needs more of than its modules may import what is not here.
        for end in range(1, name.count(".") + 1):
            written.setdefault("/".join(name.split(".")[:end]) + "/__init__.py", "")
    return dict(sorted(written.items()))


def _metadata(backend: str, version: int, namespace: str, written: dict[str, str]) -> str:
    digests = {
        path: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for path, text in written.items()
    }
    fields = {
        "name": NAME,
        "id": namespace,
        "version": version,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return json.dumps(fields, indent=2) + "\n"


def _build_toml(version: int) -> str:
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    return f"""[general]
name = "{NAME}"
version = {version}
edition = 5
license = "{LICENSE}"
backends = [{backends}]

[torch-noarch]
pyext = ["py", "json"]
"""


def _card(version: int) -> str:
    names = sorted(name for found in public().values() for name in found)
    listed = "\n".join(f"- `{name}`" for name in names)
    return f"""---
library_name: kernels
license: {LICENSE.lower()}
tags:
- contrastive-learning
- clip
- triton
---

# {NAME}

The losses of CLIP, SigLIP and supervised contrastive learning, with their gradients, without the matrix of logits in
memory. On a GPU they are Triton kernels, elsewhere plain torch, which stores the logits.

```python
import torch
from kernels import get_kernel

# YOU is the account that published it; an account that the hub does not list as trusted needs trust_remote_code=True.
losses = get_kernel("YOU/{NAME}", version={version}, trust_remote_code=True)

device = "cuda" if torch.cuda.is_available() else "cpu"
images, texts = (torch.nn.functional.normalize(torch.randn(1024, 512, device=device), dim=-1) for _ in range(2))
images.requires_grad_()
losses.info_nce(images, texts, scale=100.0).backward()
```

It needs Python 3.10, torch 2.8 and Triton 3.4 or later, and for its kernels an NVIDIA GPU of compute capability 8.0 or
later. Nothing else: no compiled code is in it, which also means that a CPU gets plain torch. The C++ kernels for CPUs,
the operations that are no losses, and the patches of other libraries are in the package ccu-fast, of whose sources this
is a part.

The kernels are compiled for GPUs and checked in Triton's interpreter. They have not been run on a GPU yet, so there are
no figures of their speed.

## Functions and modules

{listed}

`layers` has `ClipLoss` and `SigLipLoss` for `kernels.kernelize`, which puts them in the place of open_clip's.
"""


def write(out: Path, version: int = VERSION) -> Path:
    """Write the package, a build for each backend, and return its folder.

    Args:
        out: a folder, made if need be; the package gets one in it, of which an older build is removed.
        version: the number that the hub knows the interface by.
    """
    folder = out / NAME
    shutil.rmtree(folder / "build", ignore_errors=True)
    sources = files()
    # In sys.modules and torch.ops a build is named after its sources, which no other build has.
    digest = hashlib.sha256(json.dumps([version, sources]).encode()).hexdigest()[:10]
    for backend in BACKENDS:
        namespace = f"_{MODULE}_{backend}_{digest}"
        written = {path: text.replace(NAMESPACE, namespace) for path, text in sources.items()}
        for path, text in {**written, "metadata.json": _metadata(backend, version, namespace, written)}.items():
            target = folder / "build" / f"torch-{backend}" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    (folder / "build.toml").write_text(_build_toml(version), encoding="utf-8")
    # The card under the two names that the hub's web page and kernel-builder know it by.
    for card in ("README.md", "build/CARD.md"):
        (folder / card).write_text(_card(version), encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    return folder


def main() -> None:
    """Write the package where the command line says, and say where that is."""
    parser = argparse.ArgumentParser(prog="python -m build_support.hub", description="the losses for the Kernel Hub")
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "hub", help="default: dist/hub")
    folder = write(parser.parse_args().out)
    builds = ", ".join(f"torch-{backend}" for backend in BACKENDS)
    print(f"{folder}: {builds}, {len(needed())} modules of ccu_fast in each")


if __name__ == "__main__":
    main()
