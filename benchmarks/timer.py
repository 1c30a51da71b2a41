"""Time several calls against each other: round robin, so that drift of the machine affects all of them equally."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.registry import Call, Tensors

MAX_ROUNDS = 300
LEAST_ROUNDS = 3
LONG_ROUND = 25.0  # seconds; two rounds of these must do


@dataclass
class Samples:
    """Milliseconds of each round: ``ms`` until the result is there, ``host_ms`` until the call came back."""

    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        """The q-th quantile of ``ms``, linearly interpolated."""
        return float(np.quantile(self.ms, q))


def interleave(calls: Mapping[str, Call], device: torch.device, *, seconds: float) -> dict[str, Samples]:
    """Run all calls in turn, round after round, for about ``seconds``, at least three rounds (two if they are long).

    Every round starts with a different call, so none always follows the same neighbour. All calls have run once before
    (the gate). A round below a second is preceded by one that is discarded; for longer rounds that warm-up would cost
    more than it removes.

    On a GPU the time is that between two events on the current stream. A buffer of twice the L2 cache is overwritten
    before each call, so every call starts cold; the launches of the call itself are inside its time.
    """
    names = list(calls)
    samples = {name: Samples() for name in names}
    once = _gpu(device) if device.type == "cuda" else _cpu

    def run_round(r: int) -> None:
        first = r % len(names)
        for name in names[first:] + names[:first]:
            ms, host_ms = once(calls[name])
            samples[name].ms.append(ms)
            samples[name].host_ms.append(host_ms)

    if not names:
        return samples
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        run_round(0)
        took = time.perf_counter() - start
        if took < 1.0:
            samples.update({name: Samples() for name in names})
        least = LEAST_ROUNDS if took < LONG_ROUND else 2
        rounds = min(MAX_ROUNDS, max(least, int(seconds / max(took, 1e-9))))
        for r in range(len(samples[names[0]].ms), rounds):
            run_round(r)
    finally:
        if was_enabled:
            gc.enable()
    return samples


def captured(call: Call, device: torch.device) -> Call:
    """The call as a CUDA graph: what it launched once, launched again at one stroke. Its outputs are always the same
    tensors, overwritten.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):  # what is set up once must not be captured
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensors:
        graph.replay()
        return out

    return replay


def ratio(peer: Samples, ours: Samples) -> float:
    """How many times faster ``ours`` is: the median over rounds, each ratio taken within its round."""
    return float(np.median(np.asarray(peer.ms) / np.asarray(ours.ms)))


def _cpu(call: Call) -> tuple[float, float]:
    start = time.perf_counter()
    out = call()
    ms = (time.perf_counter() - start) * 1e3
    del out  # freeing the result is not part of the call
    return ms, ms


def _gpu(device: torch.device) -> Callable[[Call], tuple[float, float]]:
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def once(call: Call) -> tuple[float, float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        host = time.perf_counter()
        out = call()
        host_ms = (time.perf_counter() - host) * 1e3
        end.record()
        end.synchronize()
        del out
        return start.elapsed_time(end), host_ms

    return once
