"""What a change does to the time and memory of losses on a CPU: this checkout and another one, in turn.

    python -m benchmarks.in_turn --against CHECKOUT        # one that has its compiled module in it
    python -m benchmarks.in_turn --against CHECKOUT --large

Loss and all gradients. Each checkout has a process of its own; they take turns, and a row is the median over the rounds
of the ratio of their processor times, which other work on the machine disturbs less than the clock. One thread. Memory
is the peak of a first call. Writes in_turn.json beside this file.

The large cases take all threads and go by the clock, and the loss's three products by torch take turns with them: what
share of a step those are. They are in in_turn_large.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
RESULTS, LARGE_RESULTS = HERE.with_suffix(".json"), HERE.with_name("in_turn_large.json")
# Loss, N, D, scale, cosine of the pairs.
CASES = (
    ("info_nce", 64, 256, 10.0, 0.2),
    ("info_nce", 128, 512, 10.0, 0.2),
    ("info_nce", 128, 512, 100.0, 0.5),
    ("info_nce", 1024, 512, 10.0, 0.2),
    ("info_nce", 1024, 512, 100.0, 0.5),
    ("info_nce", 2048, 512, 10.0, 0.2),
    ("info_nce", 2048, 512, 100.0, 0.5),
    ("info_nce bf16", 2048, 512, 20.0, 0.3),
    ("info_nce ids", 1024, 512, 10.0, 0.2),
    ("info_nce ids", 1024, 512, 100.0, 0.5),
    ("inverse_info_nce", 2048, 512, 10.0, 0.2),
    ("inverse_info_nce labels", 2048, 512, 10.0, 0.2),
    ("sup_con labels", 2048, 512, 10.0, 0.2),
)
LARGE = (("info_nce", 4096, 512, 20.0, 0.3), ("info_nce", 8192, 512, 20.0, 0.3))


def products(items: int, dim: int) -> Callable[[], None]:
    """The three products of a loss and its gradients, by torch."""
    import torch

    x, y = torch.randn(2, items, dim)
    pairs, grads = torch.empty(items, items), torch.empty(2, items, dim)

    def run() -> None:
        torch.mm(x, y.T, out=pairs)
        torch.mm(pairs, y, out=grads[0])
        torch.mm(pairs.T, x, out=grads[1])

    return run


def step(what: str, items: int, dim: int, scale: float, cosine: float) -> Callable[[], None]:
    """One call of a loss and its gradients."""
    import torch
    import torch.nn.functional as F

    import ccu_fast

    name, *options = what.split()
    torch.manual_seed(0)
    x, other = (F.normalize(torch.randn(items, dim), dim=1) for _ in range(2))
    y = F.normalize(cosine * x + (1 - cosine**2) ** 0.5 * other, dim=1)
    if "bf16" in options:
        x, y = x.bfloat16(), y.bfloat16()
    keys: dict[str, Any] = {}
    if "ids" in options:
        keys = dict.fromkeys(("row_ids", "col_ids"), torch.arange(items))
    if "labels" in options:
        keys = {"row_labels": torch.arange(items) // 8}
    leaves = [x.requires_grad_(), y.requires_grad_(), torch.tensor(scale, requires_grad=True)]
    loss = getattr(ccu_fast, name)

    def run() -> None:
        torch.autograd.grad(loss(*leaves[:2], scale=leaves[2], **keys), leaves)

    return run


def serve() -> None:
    """A worker: each line asks for a case and a number of calls, and gets their mean processor time."""
    import torch

    from benchmarks import memory

    known: dict[str, Callable[[], None]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        case, calls, threads = request["case"], request["calls"], request["threads"]
        torch.set_num_threads(threads)
        clock = time.process_time if threads == 1 else time.perf_counter
        peak, name = None, str(case)
        if name not in known:
            known[name] = products(*case[1:]) if case[0] == "products" else step(*case)
            peak = memory.peak_of(known[name])
        start = clock()
        for _ in range(calls):
            known[name]()
        print(json.dumps([(clock() - start) / max(calls, 1), peak]), flush=True)


def main() -> None:
    """Measure, keep the results and print them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.in_turn", description=str(__doc__).splitlines()[0])
    parser.add_argument("--against", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--large", action="store_true", help="the large cases")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        return serve()
    if asked.against is None:
        parser.error("--against: expected a checkout, got none")

    from benchmarks.environment import REPOSITORY
    from benchmarks.host_time import Worker
    from benchmarks.results import store

    threads = len(os.sched_getaffinity(0)) if asked.large else 1

    before, after = (Worker(checkout, HERE, "--serve") for checkout in (asked.against.resolve(), REPOSITORY))
    rows = []
    for case in LARGE if asked.large else CASES:
        ask = partial(Worker.ask, case=case, threads=threads)
        peaks = [ask(worker, calls=1)[1] for worker in (before, after)]
        calls = max(1, int(0.1 / ask(before, calls=1)[0]))
        times = []
        for turn in range(asked.rounds):
            order = (before, after) if turn % 2 else (after, before)
            seconds = {worker: ask(worker, calls=calls)[0] for worker in order}
            alone = ask(before, case=("products", *case[1:3]), calls=1)[0] if asked.large else 0.0
            times.append((seconds[before], seconds[after], alone))
        rows.append(
            {
                **dict(zip(("loss", "N", "D", "scale", "cosine"), case, strict=True)),
                "before ms": round(1e3 * statistics.median(t for t, _, _ in times), 3),
                "after ms": round(1e3 * statistics.median(t for _, t, _ in times), 3),
                "ratio": round(statistics.median(b / a for a, b, _ in times), 3),
                "before peak": peaks[0],
                "after peak": peaks[1],
            }
        )
        if asked.large:
            rows[-1] |= {
                "products ms": round(1e3 * statistics.median(t for _, _, t in times), 3),
                "products of before": round(statistics.median(t / a for a, _, t in times), 3),
                "products of after": round(statistics.median(t / b for _, b, t in times), 3),
            }
        print(rows[-1], flush=True)
    for worker in (before, after):
        worker.close()
    store(LARGE_RESULTS if asked.large else RESULTS, rows, depth=1)
    return None


if __name__ == "__main__":
    main()
