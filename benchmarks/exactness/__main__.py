"""How exact InfoNCE and its gradients are in fp32, beside torch's cross-entropy over stored logits.

    python -m benchmarks.exactness                                        # the CPU's backends
    TRITON_INTERPRET=1 python -m benchmarks.exactness --backends triton --items 2 16 128    # without a GPU
    python -m benchmarks.exactness --device cuda --backends triton

A grid of scales, batch sizes and losses of unit vectors of 512 dimensions: the cosine of the pairs is the one, between
-1 and 1, that gives this loss, and all other pairs are unrelated. Everything is compared with float64 from the same
inputs: the loss and the gradient of scale by their relative error, the gradients of x and y by the norm of their error
over their norm. Each run replaces the results of its backends in results.json; docs/numerics.md has them as a table.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import ccu_fast
from benchmarks.results import store
from build_support.docs.generated import table_lines

RESULTS = Path(__file__).with_name("results.json")
SCALES = (1, 10, 100, 1000)
ITEMS = (2, 16, 128, 1024, 4096)
DIM = 512
LOSSES = (10.0, 3.0, 0.3, 1e-2, 1e-4, 1e-6, 1e-9, 1e-12)
WHAT = ("loss", "dx", "dy", "dscale")
EAGER = "torch"

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def batches(items: int, scale: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Unit vectors x and y ``[items, DIM]`` in fp32, for each of LOSSES that some cosine of the pairs gives."""
    generator = torch.Generator().manual_seed(items)
    x, other = (F.normalize(torch.randn(items, DIM, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    other = F.normalize(other - (other * x).sum(1, keepdim=True) * x, dim=1)

    def partner(cosine: float) -> Tensor:
        return cosine * x + math.sqrt(1 - cosine**2) * other

    along, across = (x.float() @ side.float().T for side in (x, other))

    def loss(cosine: float) -> float:
        return float(info_nce_of(scale * (cosine * along + math.sqrt(1 - cosine**2) * across)))

    for wanted in LOSSES if items <= 1024 else LOSSES[1::3]:
        low, high = -1.0, 1.0
        if not loss(high) <= wanted <= loss(low):
            continue
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if loss(middle) > wanted else (low, middle)
        yield x.float(), partner(high).float()


def eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The loss as it is usually written."""
    logits, target = scale * (x @ y.T), torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def info_nce_of(logits: Tensor) -> Tensor:
    """The loss of stored logits, with all of its digits."""
    own = logits.diagonal()
    rest = logits.masked_fill(torch.eye(len(logits), dtype=torch.bool, device=logits.device), -torch.inf)
    sides = [F.softplus(rest.logsumexp(dim) - own, threshold=100).mean() for dim in (0, 1)]
    return (sides[0] + sides[1]) / 2


def exact(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The loss of float64 inputs."""
    return info_nce_of(scale * (x @ y.T))


def values(loss: Loss, x: Tensor, y: Tensor, scale: float, dtype: torch.dtype) -> list[Tensor]:
    """The loss and its gradients of x, y and scale, in float64."""
    leaves = [t.to(dtype).requires_grad_() for t in (x, y)]
    leaves.append(torch.tensor(float(scale), dtype=dtype, device=x.device, requires_grad=True))
    value = loss(*leaves)
    return [t.detach().double() for t in (value, *torch.autograd.grad(value, leaves))]


def errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    """Relative errors, of WHAT."""
    return [float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]


def measure(backends: Sequence[str], items: Sequence[int], device: torch.device) -> dict[str, dict[str, list[float]]]:
    """By provider and scale the worst error of each of WHAT."""

    def ours(backend: str, *, general: bool = False) -> Loss:
        # paired=True goes the way of large batches however small this one is.
        paired = True if general else None
        return lambda x, y, scale: ccu_fast.info_nce(x, y, scale=scale, backend=backend, paired=paired)

    providers: dict[str, Loss] = {EAGER: eager}
    for backend in backends:
        providers[backend] = ours(backend)
        if backend == "native":
            providers["native, large batches"] = ours(backend, general=True)
    worst = {name: {str(scale): [0.0] * len(WHAT) for scale in SCALES} for name in providers}
    for scale in SCALES:
        for n in items:
            for batch in batches(n, scale):
                x, y = (t.to(device) for t in batch)
                want = values(exact, x, y, scale, torch.float64)
                for name, loss in providers.items():
                    found = worst[name][str(scale)]
                    found[:] = map(max, found, errors(values(loss, x, y, scale, torch.float32), want))
            print(scale, n, {name: [f"{e:.1e}" for e in worst[name][str(scale)]] for name in providers}, flush=True)
    return worst


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """The table of docs/numerics.md: the worst of all backends beside torch."""
    rows = []
    for scale in map(str, SCALES):
        ours = [max(errors) for errors in zip(*(v[scale] for k, v in results.items() if k != EAGER), strict=True)]
        torchs = results[EAGER][scale]
        cells = (torchs[0], max(torchs[1:]), ours[0], max(ours[1:3]), ours[3])
        rows.append([scale, *(f"{cell:.0e}".replace("e-0", "e-") for cell in cells)])
    head = ("scale", "torch: loss", "its gradients", "`info_nce`: loss", "its gradients of x and y", "of scale")
    return "\n".join(table_lines(head, rows))


def main() -> None:
    """Measure, keep the results and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exactness", description=str(__doc__).splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["native", "reference"])
    parser.add_argument("--items", nargs="+", type=int, default=list(ITEMS))
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = measure(asked.backends, asked.items, torch.device(asked.device))
    if EAGER in results and tuple(asked.items) != ITEMS:
        del found[EAGER]  # of fewer batches
    results |= found
    store(RESULTS, results, depth=2)
    print(table(results))


if __name__ == "__main__":
    main()
