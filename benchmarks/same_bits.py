"""Whether a change kept every bit: fingerprints of a few hundred results, taken before and after it.

    PYTHONPATH=OLD python benchmarks/same_bits.py old.json      # OLD: a checkout before the change, with its module
    PYTHONPATH=NEW python benchmarks/same_bits.py new.json --against old.json

Only public names are called, so that one script serves both. Each case is seeded by its own name.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ccu_fast
from ccu_fast import ALL, OTHER, SAME, SELF

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LOSSES = ("info_nce", "inverse_info_nce", "sup_con", "sigmoid_loss")
Case = tuple[str, Callable[[torch.Generator], Any]]


def unit(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Random unit rows that require grad."""
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1).to(dtype).requires_grad_()


def with_gradients(result: Tensor, *inputs: Tensor) -> list[Any]:
    """The result, and the gradient of its weighted sum by every input."""
    weights = torch.linspace(0.5, 1.5, result.numel()).view(result.shape)
    return [result, *torch.autograd.grad((result * weights).sum(), inputs, allow_unused=True)]


def a_loss(name: str, n: int, m: int, dtype: torch.dtype, backend: str, kind: str, g: torch.Generator) -> list[Any]:
    """One loss with all its gradients."""
    x, y = unit(g, n, 48, dtype=dtype), unit(g, m, 48, dtype=dtype)
    scale = torch.tensor(14.0, requires_grad=True)
    options: dict[str, Any] = {"backend": backend, "scale": scale, "reduction": "none"}
    if name == "sup_con" or kind == "contrastive":
        options |= {"row_labels": torch.arange(n) % 5 - 1, "col_labels": torch.arange(m) % 5 - 1}
    elif n != m:
        options |= {"row_ids": torch.arange(n) % m, "col_ids": torch.arange(m)}
    if name == "inverse_info_nce":
        options["kind"] = kind
    if name == "info_nce":
        options["reduction"] = "mean"
    return with_gradients(getattr(ccu_fast, name)(x, y, **options), x, y, scale)


def reductions(backend: str, dtype: torch.dtype, workspace: int | None, banks: int, g: torch.Generator) -> list[Any]:
    """Rows and columns of every kind over several banks, with labels and ids."""
    x, y = unit(g, banks, 70, 33, dtype=dtype), unit(g, 90, 33, dtype=dtype)
    bias = torch.tensor(-0.3, requires_grad=True)
    rows = [("lse", ALL), ("sum", SAME), ("softplus", OTHER), ("count", SELF | SAME)]
    out = ccu_fast.reduce_similarity(
        x, y, scale=7.0, bias=bias, rows=rows, cols=rows[:2], backend=backend, workspace=workspace,
        row_labels=torch.arange(70) % 6 - 1, col_labels=torch.arange(90) % 6 - 1,
        row_ids=torch.arange(70) % 50, col_ids=torch.arange(90) % 50,
    )  # fmt: skip
    parts = [t for side in out for t in side]
    total = torch.cat([t.clamp(-50, 50).reshape(-1) for t in parts if t.is_floating_point()])
    return [*parts, *with_gradients(total, x, y, bias)]


def frozen_keys(m: int, g: torch.Generator) -> list[Any]:
    """Many keys without a gradient."""
    x, y = unit(g, 40, 24, dtype=torch.float32), unit(g, m, 24, dtype=torch.float32).detach()
    (rows, _) = ccu_fast.reduce_similarity(x, y, scale=9.0, rows=[("lse", ALL)], paired=False)
    return with_gradients(rows[0], x)


def normalized(dtype: torch.dtype, dim: int, backend: str, g: torch.Generator) -> list[Any]:
    """Unit rows of any length."""
    x = torch.randn(37, dim, generator=g).to(dtype).requires_grad_()
    return with_gradients(ccu_fast.l2_normalize(x, backend=backend), x)


def flips(n: int, k: int, scope: str, maximize: bool, backend: str, g: torch.Generator) -> list[Any]:
    """Replacements under a penalty and a mask."""
    table = ccu_fast.TokenTable(torch.randn(700, 20, generator=g), backend=backend)
    found = ccu_fast.topk_flips(
        torch.randn(n, 20, generator=g), table, k, maximize=maximize, scope=scope,
        current_ids=torch.arange(n), exclude_current=True, penalty=torch.rand(700, generator=g),
        allowed=torch.rand(700, generator=g) > 0.3,
    )  # fmt: skip
    return list(found)


def candidates(b: int, k: int, dtype: torch.dtype, backend: str, g: torch.Generator) -> list[Any]:
    """Losses of a batch with one caption replaced."""
    texts, image = unit(g, b, k, 32, dtype=dtype).detach(), unit(g, b, 32, dtype=dtype).detach()
    return [ccu_fast.candidate_losses(texts, image, unit(g, b, 32, dtype=dtype).detach(), scale=20.0, backend=backend)]


def noise_steps(norm: str, dtype: torch.dtype, channels: bool, backend: str, g: torch.Generator) -> list[Any]:
    """Three projected steps."""
    image, delta = torch.rand(5, 3, 9, 7, generator=g).to(dtype), torch.zeros(5, 3, 9, 7, dtype=dtype)
    upper = torch.tensor([0.8, 0.9, 1.0]).view(3, 1, 1) if channels else 1.0
    out = torch.empty_like(image)
    for _ in range(3):
        grad = torch.randn(5, 3, 9, 7, generator=g)
        ccu_fast.pgd_step_(delta, grad, image, step=0.02, eps=0.05, upper=upper, norm=norm, out=out, backend=backend)
    return [delta, out]


def a_store(dtype: torch.dtype, g: torch.Generator) -> list[Any]:
    """Rows written, added to with repetitions, and put on pictures."""
    store = ccu_fast.NoiseStore(30, (3, 5, 5), dtype=dtype)
    index = torch.randint(0, 30, (12,), generator=g)
    store.scatter_(index, torch.randint(-8, 9, (12, 3, 5, 5), generator=g) / 255)
    store.scatter_add_clamp_(index, torch.randint(-8, 9, (12, 3, 5, 5), generator=g) / 255, 9 / 255)
    pictures = torch.rand(12, 3, 5, 5, generator=g)
    return [
        store.data,
        store.gather(index),
        store.add_to(pictures, index),
        store.add_to((pictures * 255).byte(), index),
    ]


def modules(name: str, g: torch.Generator) -> list[Any]:
    """A module with a scale of its own."""
    x, y = unit(g, 65, 40, dtype=torch.float32), unit(g, 65, 40, dtype=torch.float32)
    labels = {"row_labels": torch.arange(65) % 7} if name == "SupCon" else {}
    made = getattr(ccu_fast, name)(scale=10.0, **({} if name == "InverseInfoNCE" else {"learnable": True}))
    return with_gradients(made(x, y, **labels), x, y, *made.parameters())


def open_clip_losses(name: str, g: torch.Generator) -> list[Any]:
    """open_clip's signatures."""
    x, y = unit(g, 50, 40, dtype=torch.float32), unit(g, 50, 40, dtype=torch.float32)
    made = getattr(ccu_fast, name)()
    return with_gradients(made(x, y, torch.tensor(8.0), torch.tensor(-2.0)), x, y)


def unlearned(forget: str, g: torch.Generator) -> list[Any]:
    """The weights after thirty steps of unlearning."""
    from ccu_fast.unlearn import Budget, PairedData, UnlearnConfig, unlearn

    labels, visual, other = torch.arange(120) % 6, torch.randn(120, 10, generator=g), torch.randn(120, 8, generator=g)
    fields = {"visual": visual, "other": other, "labels": labels, "ids": torch.arange(120)}
    data = PairedData(**fields)
    torch.manual_seed(0)
    model = _Towers()
    chosen = labels == 2 if forget == "class" else torch.arange(120) % 11 == 3
    budget = Budget(steps=30, batch=24)
    config = UnlearnConfig(forget=forget, budget=budget)
    done = unlearn(model, data[chosen], data[~chosen], config)
    return list(done.state_dict().values())


class _Towers(torch.nn.Module):
    """Two linear towers with heads."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.other = torch.nn.Linear(10, 12), torch.nn.Linear(8, 12)
        self.head = torch.nn.Linear(12, 6)
        self.scale = 10.0

    def embed_visual(self, x: Tensor) -> Tensor:
        return F.normalize(self.visual(x), dim=-1)

    def embed_other(self, x: Tensor) -> Tensor:
        return F.normalize(self.other(x), dim=-1)

    def classify_visual(self, visual: Tensor) -> Tensor:
        return self.head(visual)

    def classify_other(self, other: Tensor) -> Tensor:
        return self.head(other)

    def classify_fused(self, visual: Tensor, other: Tensor) -> Tensor:
        return self.classify_visual(visual) + self.classify_other(other)


def published(method: str, g: torch.Generator) -> list[Any]:
    """Every file that ``ccu-fast protect`` writes for a folder of pictures, but for its manifest."""
    from PIL import Image

    from ccu_fast.__main__ import main

    words = ("zero", "one", "two", "three", "four", "five")
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "in"), Path(folder, "out")
        source.mkdir()
        for i in range(12):
            picture = torch.randint(0, 256, (16, 16, 3), generator=g, dtype=torch.uint8)
            Image.fromarray(picture.numpy()).save(source / f"{i:02d}.png")
            (source / f"{i:02d}.txt").write_text(f"the digits {words[i % 6]} {words[i * 5 % 6]}\n")
        options = f"--method {method} --batch 6 --rounds 2 --size 32x32 --model small:32 --surrogate-steps 3 --quiet"
        assert main(["protect", str(source), "--out", str(out), *options.split()]) == 0
        files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != "manifest.json")
        return [(str(path.relative_to(out)), path.read_bytes()) for path in files]


def cases() -> Iterator[Case]:
    """Every case by its name."""
    here = ("native", "reference")
    for name, dtype, backend in itertools.product(LOSSES, FLOATS, here):
        for n, m in ((64, 64), (2, 2), (130, 130), (1100, 1100), (40, 90)):
            kinds = ("bounded", "ascent", "contrastive") if name == "inverse_info_nce" else ("",)
            for kind in kinds:
                yield f"{name} {n}x{m} {dtype} {backend} {kind}", partial(a_loss, name, n, m, dtype, backend, kind)
    for backend, dtype, workspace, banks in itertools.product(here, FLOATS, (None, 0, 20_000), (1, 3)):
        title = f"reduce_similarity {backend} {dtype} workspace {workspace} banks {banks}"
        yield title, partial(reductions, backend, dtype, workspace, banks)
    for m in (100, 5000):
        yield f"frozen keys {m}", partial(frozen_keys, m)
    for dtype, dim, backend in itertools.product(FLOATS, (1, 5, 512), here):
        yield f"l2_normalize {dtype} {dim} {backend}", partial(normalized, dtype, dim, backend)
    for n, k, scope, maximize, backend in itertools.product((1, 9), (1, 30), ("row", "global"), (False, True), here):
        title = f"topk_flips {n} {k} {scope} {maximize} {backend}"
        yield title, partial(flips, n, k, scope, maximize, backend)
    for (b, k), dtype, backend in itertools.product(((4, 3), (33, 8)), FLOATS, here):
        yield f"candidate_losses {b} {k} {dtype} {backend}", partial(candidates, b, k, dtype, backend)
    for norm, dtype, channels, backend in itertools.product(("linf", "l2"), FLOATS, (False, True), here):
        title = f"pgd_step_ {norm} {dtype} {channels} {backend}"
        yield title, partial(noise_steps, norm, dtype, channels, backend)
    for dtype in (torch.int8, torch.float16, torch.float32):
        yield f"NoiseStore {dtype}", partial(a_store, dtype)
    for name in ("InfoNCE", "InverseInfoNCE", "SupCon", "SigmoidLoss"):
        yield f"module {name}", partial(modules, name)
    for name in ("ClipLoss", "SigLipLoss"):
        yield f"module {name}", partial(open_clip_losses, name)
    for forget in ("class", "instances"):
        yield f"unlearn {forget}", partial(unlearned, forget)
    for method in ("mem-2", "em", "random-2"):
        yield f"protect {method}", partial(published, method)


def fingerprint(results: Any) -> str:
    """SHA-256 over dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for value in results:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()


def main() -> int:
    """Take the fingerprints and, with --against, say which differ."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    options = parser.parse_args()
    taken = {}
    for name, case in cases():
        try:
            taken[name] = fingerprint(case(torch.Generator().manual_seed(zlib.crc32(name.encode()))))
        except Exception as error:  # what is refused has to be refused again, in the same words
            taken[name] = f"{type(error).__name__}: {error}"
    refused = {name: value for name, value in taken.items() if ":" in value}
    options.out.write_text(json.dumps(taken, indent=1) + "\n")
    print(f"{len(taken)} results of {ccu_fast.__file__}, {len(refused)} of them refusals", *refused.items(), sep="\n")
    if options.against is None:
        return 0
    before = json.loads(options.against.read_text())
    changed = sorted(name for name in taken.keys() | before.keys() if taken.get(name) != before.get(name))
    print(f"{len(changed)} differ from {options.against}", *changed, sep="\n")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
