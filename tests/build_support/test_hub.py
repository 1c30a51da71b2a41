"""The package for Hugging Face's Kernel Hub: the same numbers from the same source, beside ccu_fast and without it."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import ccu_fast
from build_support import hub
from tests.support.losses import compare, features, logits
from tests.support.open_clip_loss import open_clip_loss
from tests.support.oracle import unit
from tests.support.paths import ROOT
from tests.support.presence import absent, require_interpreter


def library() -> ModuleType:
    """Hugging Face's ``kernels``."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if importlib.util.find_spec("kernels") is None:
        absent("kernels", "not installed (pip install --no-deps kernels)")
    return importlib.import_module("kernels")


def load(folder: Path) -> ModuleType:
    """The package as a user gets it; nothing may ask the network."""

    def refuse(*_: Any) -> None:
        raise AssertionError("loading a local kernel asked the network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        kernel: ModuleType = library().get_local_kernel(folder)
    return kernel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.write(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def kernel(folder: Path) -> ModuleType:
    return load(folder)


def variants(folder: Path) -> list[Path]:
    return [folder / "build" / f"torch-{backend}" for backend in hub.BACKENDS]


LABELS = torch.tensor([0, 0, 1, 2, 1, 3])
Losses = dict[str, Callable[..., Any]]
# Of ccu_fast or of the hub's package, with the same backend.
CALLS: Losses = {
    "info_nce": lambda m, x, y, **how: m.info_nce(x, y, scale=9.0, **how),
    "info_nce of ids": lambda m, x, y, **how: m.info_nce(x, y, scale=9.0, ids=LABELS, hard_negatives=y[:, None], **how),
    "inverse_info_nce": lambda m, x, y, **how: m.inverse_info_nce(x, y, scale=9.0, **how),
    "sup_con": lambda m, x, y, **how: m.sup_con(x, y, scale=9.0, row_labels=LABELS, **how),
    "sigmoid_loss": lambda m, x, y, **how: m.sigmoid_loss(x, y, scale=9.0, bias=-3.0, **how),
    "distill": lambda m, x, y, **how: m.distill(x, y, scale=9.0, teacher=(y, x), teacher_scale=5.0, **how),
    "l2_normalize": lambda m, x, y, **how: m.l2_normalize(x + y, **how).sum(0),
    "reduce_similarity": lambda m, x, y, **how: torch.cat(
        m.reduce_similarity(x, y, scale=9.0, rows=[("lse", m.OTHER), ("sum", m.SELF)], **how)[0]
    ),
    "reduce_prefixes": lambda m, x, y, **how: m.reduce_prefixes(x, y, prefixes=(2, 4), rows=[("lse", m.ALL)], **how)[0][
        0
    ],
    "InfoNCE": lambda m, x, y, **how: m.InfoNCE(scale=9.0, **how)(x, y),
    "InverseInfoNCE": lambda m, x, y, **how: m.InverseInfoNCE(scale=9.0, **how)(x, y),
    "SupCon": lambda m, x, y, **how: m.SupCon(scale=9.0, **how)(x, y, LABELS),
    "SigmoidLoss": lambda m, x, y, **how: m.SigmoidLoss(scale=9.0, bias=-3.0, **how)(x, y),
    "DistillLoss": lambda m, x, y, **how: m.DistillLoss(scale=9.0, teacher_scale=5.0, **how)(x, y, teacher=(y, x)),
    "ClipLoss": lambda m, x, y, **how: m.ClipLoss(**how)(x, y, 9.0, output_dict=True)["contrastive_loss"],
    "SigLipLoss": lambda m, x, y, **how: m.SigLipLoss(**how)(x, y, 9.0, -3.0),
    "DistillClipLoss": lambda m, x, y, **how: sum(m.DistillClipLoss(**how)(x, y, 9.0, y, x, 5.0)),
}


def value_and_gradients(loss: Callable[..., Tensor], module: ModuleType, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    value = loss(module, x, y, backend="reference")
    return (value.detach(), *torch.autograd.grad(value.sum(), (x, y)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_as_the_reference_of_ccu_fast(kernel: ModuleType, name: str, dtype: torch.dtype) -> None:
    x, y = unit(6, 4).to(dtype), unit(6, 4).to(dtype)
    pairs = zip(
        value_and_gradients(CALLS[name], kernel, x, y),
        value_and_gradients(CALLS[name], ccu_fast, x, y),
        strict=True,
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_within_rounding_of_float64(kernel: ModuleType, dtype: torch.dtype) -> None:
    def clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        s, target = logits(x, y, scale), torch.arange(len(x))
        return (torch.nn.functional.cross_entropy(s, target) + torch.nn.functional.cross_entropy(s.mT, target)) / 2

    def siglip(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        s = logits(x, y, scale, bias)
        return -torch.nn.functional.logsigmoid((2 * torch.eye(len(s)) - 1) * s).sum() / len(s)

    compare(kernel.info_nce, clip, features(24, 16), dtype)
    compare(kernel.sigmoid_loss, siglip, features(24, 16, bias=-10.0), dtype)


def test_every_public_name_is_here_or_said_to_be_elsewhere(kernel: ModuleType) -> None:
    assert {*kernel.__all__} == {*ccu_fast.__all__, "layers"} - {*hub.ELSEWHERE}
    assert all(getattr(kernel, name) is not getattr(ccu_fast, name) for name in kernel.__all__ if name != "layers")
    for name in hub.ELSEWHERE:
        with pytest.raises(AttributeError, match=f"has the losses alone; {name} is in the package ccu-fast"):
            getattr(kernel, name)
    with pytest.raises(AttributeError, match="module 'ccu_fast_losses' has no attribute 'clip'"):
        getattr(kernel, "clip")  # noqa: B009


def test_examples_of_docstrings_run(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = 0
    for name in kernel.__all__:
        value = getattr(kernel, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            names = {"torch": torch, hub.MODULE: kernel}
            [test] = [t for t in doctest.DocTestFinder(recurse=False).find(value, name, globs=names) if t.name == name]
            said: list[str] = []
            result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
            assert not result.failed, "".join(said)
            tried += result.attempted > 0
    assert tried >= 17


def test_a_backend_that_is_not_in_it_is_refused_with_the_reason(kernel: ModuleType) -> None:
    with pytest.raises(ValueError, match="compiled CPU kernels are in the wheel of ccu-fast") as told:
        kernel.info_nce(torch.eye(3), torch.eye(3), scale=1.0, backend="native")
    assert "ccu_fast" not in str(told.value)


def test_builds_and_versions_live_in_one_process(folder: Path, kernel: ModuleType, tmp_path: Path) -> None:
    others = [load(variants(folder)[1]), load(hub.write(tmp_path, version=7))]
    x, y = unit(5, 4), unit(5, 4)
    expected = kernel.info_nce(x, y, scale=3.0)
    names = {module.__name__ for module in (kernel, *others)}
    assert len(names) == 3
    for module in others:
        assert torch.equal(module.info_nce(x, y, scale=3.0), expected)
    for name in (*names, "ccu_fast"):
        operator = getattr(torch.ops, name).reduce_similarity.default
        assert str(operator) == f"{name}.reduce_similarity.default"


def test_the_checks_of_kernels_pass(folder: Path) -> None:
    rust = importlib.import_module(f"{library().__name__}._rust")
    build = rust.Build.open(folder)
    assert [str(backend).lower() for backend in build.general.backends] == list(hub.BACKENDS)
    for path, backend in zip(variants(folder), hub.BACKENDS, strict=True):
        metadata = rust.Metadata.read_from_file(path / "metadata.json")
        assert (str(metadata.name), metadata.name.python_name) == (hub.NAME, hub.MODULE)
        assert (metadata.version, metadata.license, metadata.python_depends) == (hub.VERSION, "MIT", [])
        assert metadata.id.isidentifier() and str(metadata.backend.backend_type).lower() == backend
        metadata.digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, path))
    [older] = [path for path in variants(folder)[0].iterdir() if (path / "__init__.py").exists() and "ccu" in path.name]
    assert older.name == hub.MODULE


def test_the_snippet_of_the_card_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card == (folder / "build" / "CARD.md").read_text(encoding="utf-8")
    [snippet] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.setenv("LOCAL_KERNELS", f"YOU/{hub.NAME}={folder}")
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert names["images"].grad.isfinite().all()
    assert all(f"- `{name}`\n" in card for name in names["losses"].__all__ if name != "layers")


def test_where_older_versions_of_kernels_look_is_the_same_package(folder: Path, kernel: ModuleType) -> None:
    path = variants(folder)[0] / hub.MODULE / "__init__.py"
    spec = importlib.util.spec_from_file_location("ccu_fast_losses_0123", path)
    assert spec is not None and spec.loader is not None
    older = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older)
    assert older.__all__ == kernel.__all__
    assert older.info_nce is kernel.info_nce


def test_it_is_the_source_of_ccu_fast_but_for_names(folder: Path) -> None:
    generated = {"__init__.py", "layers.py", f"{hub.MODULE}/__init__.py"}
    copied = 0
    for variant in variants(folder):
        for path in variant.rglob("*.py"):
            name = path.relative_to(variant).as_posix()
            text = path.read_text(encoding="utf-8")
            if name in generated or not text:
                continue
            source = (ROOT / "ccu_fast" / name).read_text(encoding="utf-8")
            for ours, theirs in zip(text.splitlines(), source.splitlines(), strict=True):
                assert ours == theirs or re.search("ccu.fast", theirs), f"{name}: {ours}"
            copied += 1
    assert copied == len(hub.BACKENDS) * len([path for path in hub.needed().values() if path.stat().st_size])
    # A kernel of every pass, and of each the reference and no compiled twin.
    assert {"ops.reduce_similarity.triton.small_kernels", "ops.l2_normalize.triton"} <= set(hub.needed())
    assert not [name for name in hub.needed() if "native" in name or "topk" in name or "noise" in name]


def test_it_imports_torch_triton_and_the_standard_library_alone(folder: Path) -> None:
    for path in variants(folder)[0].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for name in names:
                assert name.split(".")[0] in {"torch", "triton", *sys.stdlib_module_names}, f"{path}: {name}"


def test_a_build_that_would_name_ccu_fast_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(text: str, why: str) -> None:
        with pytest.raises(ValueError, match=why):
            hub.localised(text, "losses/new.py", ["losses"])

    refused('raise ValueError("see ccu_fast.topk_flips")\n', "expected 0 texts that name ccu_fast, got 1")
    refused("x = ccu_fast.info_nce\n", "line 1 uses ccu_fast")
    monkeypatch.setitem(hub.SENTENCES, "losses/new.py", (("gone", "here"),))
    refused("x = 1\n", "expected 'gone' once, got it 0 times")
    with pytest.raises(ValueError, match=r"expected from ccu_fast\.… import …, got import ccu_fast"):
        list(hub.imports(ast.parse("import ccu_fast.losses\n"), hub.modules()))


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_kernelize_puts_a_layer_in_the_place_of_open_clips(folder: Path, kernel: ModuleType, name: str) -> None:
    kernels, theirs = library(), getattr(open_clip_loss(), name)

    class Theirs(theirs):  # type: ignore[misc, valid-type]
        pass  # replace_kernel_forward_from_hub marks the class for good

    kernels.replace_kernel_forward_from_hub(Theirs, name)
    mapping = {name: {"cpu": kernels.LocalLayerRepository(repo_path=folder, layer_name=name)}}
    x, y, scale, bias = unit(6, 4), unit(6, 4), torch.tensor(9.0), torch.tensor(-1.0)
    loss = Theirs()
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        kernels.kernelize(loss, mode=mode, device="cpu", use_fallback=False)
    assert loss.forward.__func__ is getattr(kernel.layers, name).forward
    found = []
    for forward in (loss, theirs()):
        leaves = [t.clone().requires_grad_() for t in (x, y, scale, bias)]
        value = forward(*leaves, output_dict=True)["contrastive_loss"]
        found.append([value, *torch.autograd.grad(value, leaves)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


ALONE = """
import json, sys
sys.modules["ccu_fast"] = None  # an import of it fails
from pathlib import Path

import torch
from kernels import get_local_kernel
from torch.utils._python_dispatch import TorchDispatchMode

kernel = get_local_kernel(Path(sys.argv[1]))
x, y = (torch.nn.functional.normalize(torch.randn(12, 16), dim=-1).requires_grad_() for _ in range(2))


def step(x, y, backend):
    loss = kernel.info_nce(x, y, scale=7.0, normalize=True, backend=backend)
    return loss + kernel.sigmoid_loss(x, y, scale=7.0, bias=-2.0, backend=backend)


class Seen(TorchDispatchMode):
    names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


def gradients(value):
    return [value, *torch.autograd.grad(value, (x, y))]


expected = gradients(step(x, y, "reference"))
for name, got in {
    "triton": gradients(step(x, y, "triton")),
    "compiled": gradients(torch.compile(step, fullgraph=True, backend="eager")(x, y, "triton")),
}.items():
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, msg=lambda text: name + ": " + text)
with Seen():
    step(x, y, "triton")
print(json.dumps([kernel.__name__, sorted({n for n in Seen.names if "ccu" in n}), sorted(sys.modules)]))
"""


def test_without_ccu_fast_the_triton_kernels_run_interpreted_and_in_one_graph(folder: Path, tmp_path: Path) -> None:
    library()
    require_interpreter()
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder)],
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    name, operators, imported = json.loads(done.stdout.splitlines()[-1])
    assert operators == [f"{name}.l2_normalize.default", f"{name}.reduce_similarity.default"]
    assert not [module for module in imported if module.startswith("ccu_fast.")]
    assert f"{name}.ops.reduce_similarity.triton.forward_kernels" in imported
