"""Rows as a GPU would give them: every provider of every shape, each three times as slow as ours."""

from __future__ import annotations

from benchmarks.ops import OPS
from benchmarks.results import Row

DEVICE = "cuda-nvidia-made-up"
WHERE = {
    "device": "NVIDIA made up",
    "cpu": "a CPU",
    "threads": 16,
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "ccu_fast": "0",
    "cuda": "13.0",
    "driver": "580",
    "capability": "9.0",
    "measured": "2026-01-01T00:00:00+00:00",
    "git_sha": "c0ffee",
    "dirty": False,
}


def rows(slower: float = 3.0) -> list[Row]:
    """What ``python -m benchmarks --device cuda`` would store."""
    return [row for op in OPS.values() for shape in op.shapes["cuda"] for row in _case(op.name, dict(shape), slower)]


def _case(name: str, shape: dict[str, int], slower: float) -> list[Row]:
    providers = [p for p in OPS[name].providers if p.serves(shape, "cuda")]
    ms = {p.name: {"ours": 0.01, "yardstick": 0.01, "ceiling": 0.009}.get(p.role, 0.01 * slower) for p in providers}
    made = []
    for p in providers:
        row = Row(name, shape, "bfloat16", "cuda", p.name, p.role, p.arithmetic, environment=WHERE, rounds=100)
        row.p20_ms = row.p50_ms = row.p80_ms = row.graph_ms = ms[p.name]
        row.host_ms, row.peak_extra_bytes, row.gate_errors = 0.01, 1_000_000, {"loss": 1e-3}
        row.gate_limits, row.reference = {"loss": 1e-2}, "fp64"
        row.backend = "triton" if p.role in ("ours", "yardstick") else None
        row.speedup_over = {
            q.name: round(ms[q.name] / ms[p.name], 3)
            for q in providers
            if q.role in ("peer", "yardstick") and q.name != p.name
        }
        row.share_of_floor = 0.9 if p.role != "ceiling" else 1.0
        made.append(row)
    return made
