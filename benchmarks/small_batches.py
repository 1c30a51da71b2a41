"""The losses of CLIP for small batches on a CPU, beside one product with a cross-entropy and beside open_clip.

    python -m benchmarks.small_batches                     # writes small_batches.json beside this file
    python -m benchmarks.small_batches --batches 8 --rounds 5 --out /tmp/some.json

Loss and the gradients of both features and of scale, D = 512. ``ClipLoss`` and ``info_nce`` (one-way) are timed against
"one product": logits = scale * x @ y.T, F.cross_entropy(logits, arange), which is half of CLIP's loss; and ClipLoss
against open_clip's class. Before that all answers are compared with float64, from the inputs as they are multiplied:
ours may be off twice as far as eager torch in the same dtype, plus 8 units in the last place.

The calls take turns, in an order that changes, and a ratio is the median over the rounds of the ratios within a round:
more than 1 says that ours is faster. Each row is measured twice: by the processor time of one thread, which other work
on the machine hardly disturbs; and by the clock with two threads. On a busy machine the clock flatters whoever starts
fewer teams of threads, because a team waits for its last thread to get a core: read the rows of one thread there.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ccu_fast
from benchmarks.environment import describe
from benchmarks.ops.common import open_clip_losses, scale_terms, unit
from benchmarks.results import store

RESULTS = Path(__file__).resolve().with_suffix(".json")
BATCHES = (8, 32, 128, 512)
DIM = 512
SCALE = 100.0
# Of the features, and what autocast multiplies in.
ARITHMETICS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "autocast bf16": (torch.float32, torch.bfloat16),
}
# At most about so long for the rounds of a row, but so many of them at least.
SECONDS, FEWEST = 4.0, 5

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
WHAT = ("loss", "dx", "dy", "dscale")


def one_product(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Rows alone."""
    return F.cross_entropy(scale * x @ y.T, torch.arange(len(x)))


def both_sides(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss."""
    logits, target = scale * x @ y.T, torch.arange(len(x))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def ours_one_way(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Rows alone."""
    return ccu_fast.info_nce(x, y, scale=scale, symmetric=False)


def providers() -> dict[str, tuple[Loss, Loss]]:
    """The losses by name, each with the formula it is compared with."""
    theirs = open_clip_losses()
    return {
        "ClipLoss": (ccu_fast.ClipLoss(), both_sides),
        "info_nce one-way": (ours_one_way, one_product),
        "one product": (one_product, one_product),
        **({} if theirs is None else {"open_clip": (theirs.ClipLoss(), both_sides)}),
    }


def leaves(items: int, dtype: torch.dtype) -> list[Tensor]:
    """Unit vectors whose pairs have a cosine of about 0.15, and scale."""
    rng = torch.Generator().manual_seed(items)
    x = unit(items, DIM, generator=rng)
    y = F.normalize(0.15 * x + unit(items, DIM, generator=rng), dim=-1)
    return [*(t.to(dtype).requires_grad_() for t in (x, y)), torch.tensor(SCALE, requires_grad=True)]


def step(loss: Loss, inputs: list[Tensor], cast: torch.dtype | None) -> list[Tensor]:
    """The loss, and its gradients where an optimizer looks for them."""
    if cast is None:
        value = loss(*inputs)
    else:
        with torch.autocast("cpu", cast):
            value = loss(*inputs)
    value.backward()
    found = [value.detach(), *(t.grad for t in inputs if t.grad is not None)]
    for t in inputs:
        t.grad = None
    return found


def errors(loss: Loss, formula: Loss, inputs: list[Tensor], cast: torch.dtype | None) -> dict[str, float]:
    """The largest error of each result, over the largest element of the right one, or over the terms of a sum."""
    exact = [t.detach().to(cast or t.dtype).double().requires_grad_() for t in inputs[:2]]
    exact.append(inputs[2].detach().double().requires_grad_())
    right = step(formula, exact, None)
    sizes = [float(t.abs().max()) for t in right]
    sizes[3] = max(sizes[3], scale_terms(exact[0], right[1], exact[2]))
    found = step(loss, inputs, cast)
    return {
        name: float((got.double() - want).abs().max()) / size
        for name, got, want, size in zip(WHAT, found, right, sizes, strict=True)
    }


def checked(items: int, arithmetic: str, losses: dict[str, tuple[Loss, Loss]]) -> dict[str, dict[str, float]]:
    """The errors of each loss.

    Raises:
        AssertionError: one of ours is off by more than is allowed.
    """
    dtype, cast = ARITHMETICS[arithmetic]
    inputs = leaves(items, dtype)
    off = {name: errors(loss, formula, inputs, cast) for name, (loss, formula) in losses.items()}
    for name, eager in (("ClipLoss", both_sides), ("info_nce one-way", one_product)):
        allowed = errors(eager, eager, inputs, cast)
        for what, error in off[name].items():
            # The results of ours are in fp32 but for gradients of features in half precision.
            eps = torch.finfo(dtype if what in ("dx", "dy") else torch.float32).eps
            assert error <= 2 * allowed[what] + 8 * eps, f"{arithmetic} B={items} {name}: {what} is off by {error:.2g}"
    return off


def timed(items: int, arithmetic: str, losses: dict[str, tuple[Loss, Loss]], rounds: int) -> dict[str, list[float]]:
    """The seconds of a call in each round, by the name of the loss."""
    dtype, cast = ARITHMETICS[arithmetic]
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    inputs = leaves(items, dtype)
    once = {}
    for name, (loss, _) in losses.items():
        step(loss, inputs, cast)
        start = clock()
        step(loss, inputs, cast)
        once[name] = max(clock() - start, 1e-6)
    calls = {name: max(1, int(0.003 / seconds)) for name, seconds in once.items()}
    rounds = min(rounds, max(FEWEST, int(SECONDS / sum(once[name] * calls[name] for name in losses))))
    orders = itertools.cycle(itertools.permutations(losses))
    found: dict[str, list[float]] = {name: [] for name in losses}
    for _, order in zip(range(rounds), orders, strict=False):
        for name in order:
            start = clock()
            for _ in range(calls[name]):
                step(losses[name][0], inputs, cast)
            found[name].append((clock() - start) / calls[name])
    return found


def row(items: int, arithmetic: str, rounds: int) -> dict[str, Any]:
    """One line of the file."""
    losses = providers()
    off = checked(items, arithmetic, losses)
    seconds = timed(items, arithmetic, losses, rounds)

    def ratio(ours: str, other: str) -> float | None:
        if other not in seconds:
            return None
        return round(statistics.median(b / a for a, b in zip(seconds[ours], seconds[other], strict=True)), 2)

    return {
        "arithmetic": arithmetic,
        "B": items,
        "threads": torch.get_num_threads(),
        "ClipLoss over one product": ratio("ClipLoss", "one product"),
        "ClipLoss over open_clip": ratio("ClipLoss", "open_clip"),
        "one-way over one product": ratio("info_nce one-way", "one product"),
        "us": {name: round(1e6 * statistics.median(values), 1) for name, values in seconds.items()},
        "rounds": len(seconds["ClipLoss"]),
        "largest error": {name: float(f"{max(values.values()):.2g}") for name, values in off.items()},
    }


def main() -> None:
    """Check, measure, print and keep the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_batches", description=str(__doc__).split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--arithmetic", nargs="+", choices=ARITHMETICS, default=list(ARITHMETICS))
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    rows = []
    for threads, arithmetic, items in itertools.product(asked.threads, asked.arithmetic, asked.batches):
        torch.set_num_threads(threads)
        rows.append(row(items, arithmetic, asked.rounds))
        print(rows[-1], flush=True)
    environment = describe(torch.device("cpu"))
    store(asked.out, {"environment": environment, "D": DIM, "scale": SCALE, "rows": rows}, depth=2)


if __name__ == "__main__":
    main()
