"""One case from inputs to rows: the gate, the memory, then the clock."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import memory
from benchmarks.gate import Gate
from benchmarks.registry import Call, Case, Provider, Unavailable, label
from benchmarks.results import Row
from benchmarks.timer import Samples, captured, interleave, ratio
from ccu_fast.ops.backend import choose

Say = Callable[[str], None]
GRAPH_BELOW = 1.0  # ms; launches are what is left to save only in shorter calls


def run(case: Case, environment: dict[str, Any], *, seconds: float, say: Say, with_memory: bool = True) -> list[Row]:
    """Measure all providers of a case. A provider whose answer is wrong is not timed."""
    providers = case.providers()
    rows = {p.name: _row(case, p, environment) for p in providers}
    name = f"{case.op.name} {label(case.shape)}"
    torch.compiler.reset()  # compiled code of earlier shapes counts against dynamo's limit

    say(f"{name}: checking {sum(p.role != 'ceiling' for p in providers)} providers against fp64")
    inputs = case.inputs()
    gate = Gate(case, inputs)
    calls: dict[str, Call] = {}
    for provider in gate.order(providers):
        call = _admit(provider, gate, rows[provider.name])
        if call is not None:
            calls[provider.name] = call
    gc.collect()

    timed = [p for p in providers if p.name in calls]
    say(f"{name}: peak memory")
    for provider in timed if with_memory else []:
        if provider.role != "ceiling":
            _remember(case, provider, calls[provider.name], rows[provider.name])

    say(f"{name}: timing {len(timed)} providers in turn")
    samples = interleave({p.name: calls[p.name] for p in timed}, case.device, seconds=seconds)
    for provider in timed:
        _times(case, provider, timed, samples, rows[provider.name])
    if case.device.type == "cuda":
        short = [p for p in timed if samples[p.name].quantile(0.5) < GRAPH_BELOW]
        short.sort(key=lambda p: p.role == "peer")  # last: a call that cannot be captured may spoil later captures
        _replay(case, gate, {p: calls[p.name] for p in short}, rows, seconds)
    return list(rows.values())


def _row(case: Case, provider: Provider, environment: dict[str, Any]) -> Row:
    return Row(
        op=case.op.name,
        shape=dict(case.shape),
        dtype=str(case.dtype).removeprefix("torch."),
        device=case.device.type,
        provider=provider.name,
        role=provider.role,
        arithmetic=provider.arithmetic,
        note=None if provider.note is None else provider.note(),
        environment=environment,
    )


def _admit(provider: Provider, gate: Gate, row: Row) -> Call | None:
    """The call to time, or None with the reason in the row."""
    try:
        call = provider.build(gate.inputs, gate.case.shape)
        outputs = call()
        if provider.role == "ceiling":
            return call
        verdict = gate.judge(provider, outputs)
    except Unavailable as reason:
        row.status, row.reason = "unavailable", str(reason)
        return None
    except Exception as error:  # a peer that breaks is a result, not the end of the run
        row.status, row.reason = "error", f"{type(error).__name__}: {error}".splitlines()[0]
        return None
    if provider.role in ("ours", "yardstick"):
        row.backend = choose(provider.backend, gate.case.op.kernel, gate.case.device, gate.case.dtype)
    row.reference = verdict.reference
    row.gate_errors = {k: e if math.isfinite(e) else None for k, e in verdict.errors.items()}
    row.gate_limits = verdict.limits
    if not verdict.passed:
        row.status, row.reason = "wrong", verdict.failure()
        return None
    return call


def _remember(case: Case, provider: Provider, call: Call, row: Row) -> None:
    try:
        row.peak_extra_bytes = memory.peak_extra_bytes(case, provider, call)
    except Unavailable as reason:
        row.note = "; ".join(filter(None, (row.note, f"memory not measured: {reason}")))


def _times(case: Case, provider: Provider, timed: list[Provider], samples: dict[str, Samples], row: Row) -> None:
    own = samples[provider.name]
    row.rounds = len(own.ms)
    row.p20_ms, row.p50_ms, row.p80_ms = (_figure(own.quantile(q)) for q in (0.2, 0.5, 0.8))
    row.host_ms = _figure(float(np.median(own.host_ms)))
    peers = (p for p in timed if p.role in ("peer", "yardstick") and p.name != provider.name)
    row.speedup_over = {p.name: _figure(ratio(samples[p.name], own)) for p in peers}
    ceiling = case.ceiling(provider)
    if ceiling is not None and ceiling.name in samples:
        row.share_of_floor = _figure(ratio(samples[ceiling.name], own))
    flops, moved = case.op.work(case.shape, case.dtype)
    row.tflops = _figure(flops / row.p50_ms / 1e9) if flops else None
    row.gb_per_s = _figure(moved / row.p50_ms / 1e6) if moved else None


def _replay(case: Case, gate: Gate, calls: dict[Provider, Call], rows: dict[str, Row], seconds: float) -> None:
    """Time short calls once more as CUDA graphs, whose time is the GPU's alone; the replayed answers pass the gate."""
    graphs: dict[str, Call] = {}
    for provider, call in calls.items():
        row = rows[provider.name]
        try:
            graph = captured(call, case.device)
            verdict = None if provider.role == "ceiling" else gate.judge(provider, graph())
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            if verdict is None or verdict.passed:
                graphs[provider.name] = graph
                continue
            reason = verdict.failure()
        row.note = "; ".join(filter(None, (row.note, f"no CUDA graph: {reason}")))
    for name, samples in interleave(graphs, case.device, seconds=seconds / 2).items():
        rows[name].graph_ms = _figure(samples.quantile(0.5))


def _figure(value: float) -> float:
    """Four significant digits: more would be noise in every diff."""
    return float(f"{value:.4g}")
