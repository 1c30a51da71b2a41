"""Time and bytes of one loss, forward and backward, on 8 to 1024 GPUs. On paper: nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from build_support.docs.generated import table_lines

# Assumptions: an H100-like GPU and cluster.
GEMM = 600e12  # FLOP/s of a large bf16 GEMM
NODE = 8  # GPUs that NVLink joins
INSIDE, OUTSIDE = 300e9, 40e9  # bytes/s each GPU sends, within a node and between nodes
LATENCY = 8e-6  # s for each step of a collective's algorithm
BF16, FP32 = 2, 4
DIM = 512
WORKSPACE = 1 << 30
SHAPES = [(8, 1 << 15), (8, 1 << 18), (64, 1 << 16), (64, 1 << 19), (256, 1 << 20), (1024, 1 << 20), (1024, 1 << 22)]

ASSUMPTIONS = f"""\
bf16 features, D = {DIM}, equal batches; GEMMs at {GEMM / 1e12:.0f} TFLOP/s whatever their shape.
A GPU sends {INSIDE / 1e9:.0f} GB/s within a node of {NODE} and {OUTSIDE / 1e9:.0f} GB/s between nodes;
{LATENCY * 1e6:.0f} µs for each step of a collective, with log2 steps for a tree and one for each block of a ring.
Collectives and GEMMs follow each other; only a ring overlaps its transfers. Work other than GEMMs is free here, which
flatters open_clip most, since it writes and reads n·B logits several times. `ccu_fast` recomputes the share of S that
does not fit in {WORKSPACE >> 30} GiB. Inf-CL: a ring in each direction that recomputes S for each gradient,
20·n·B·D FLOPs, and sends features and fp32 gradients of both sides.
"""


@dataclass(frozen=True)
class Cost:
    """One rank's FLOPs, bytes sent, bytes held beyond its own features, and seconds."""

    flops: float
    sent: float
    held: float
    seconds: float


def _bandwidth(gpus: int) -> float:
    return INSIDE if gpus <= NODE else OUTSIDE


def _collectives(gpus: int, sent: float, calls: int) -> float:
    return sent / _bandwidth(gpus) + calls * LATENCY * max(1, ceil(gpus - 1).bit_length())


def open_clip(gpus: int, batch: int) -> Cost:
    """Both sides gathered, two logits matrices and their gradients in fp32: 12·n·B·D FLOPs."""
    n = batch // gpus
    sent = 4 * (batch - n) * DIM * BF16
    flops = 12.0 * n * batch * DIM
    held = 2 * 2 * n * batch * FP32 + 4 * batch * DIM * BF16
    return Cost(flops, sent, held, flops / GEMM + _collectives(gpus, sent, 4))


def gathered(gpus: int, batch: int) -> Cost:
    """One side gathered; (8 − 2f)·n·B·D FLOPs; two exchanges of a number for each column."""
    n = batch // gpus
    kept = min(1.0, WORKSPACE / (n * batch * BF16))
    sent = 2 * (batch - n) * DIM * BF16 + 2 * (batch - n) * 2 * FP32
    flops = (8 - 2 * kept) * n * batch * DIM
    held = WORKSPACE * min(1.0, n * batch * BF16 / WORKSPACE) + batch * DIM * (BF16 + FP32)
    return Cost(flops, sent, held, flops / GEMM + _collectives(gpus, sent, 4))


def ring(gpus: int, batch: int) -> Cost:
    """Blocks of one side pass by twice, their fp32 gradient once; 8·n·B·D FLOPs, transfers behind them."""
    n = batch // gpus
    block = n * DIM
    sent = (gpus - 1) * block * (2 * BF16 + FP32) + 2 * (batch - n) * 2 * FP32
    flops = 8.0 * n * batch * DIM
    step = [(2 * n * n * DIM / GEMM, block * BF16), (6 * n * n * DIM / GEMM, block * (BF16 + FP32))]
    seconds = sum(gpus * max(compute, size / _bandwidth(gpus) + LATENCY) for compute, size in step)
    held = WORKSPACE * min(1.0, n * n * BF16 / WORKSPACE) + block * (3 * BF16 + 4 * FP32)
    return Cost(flops, sent, held, seconds)


def inf_cl(gpus: int, batch: int) -> Cost:
    """Inf-CL's ring, as its code does it for a symmetric loss."""
    n = batch // gpus
    block = n * DIM
    sent = (gpus - 1) * block * 2 * (2 * BF16 + FP32)
    flops = 20.0 * n * batch * DIM
    seconds = gpus * max(20 * n * n * DIM / GEMM, 2 * block * (2 * BF16 + FP32) / _bandwidth(gpus) + LATENCY)
    return Cost(flops, sent, block * (6 * BF16 + 8 * FP32), seconds)


PROVIDERS = {
    "open_clip local_loss": open_clip,
    "ccu_fast gather": gathered,
    "ccu_fast ring": ring,
    "Inf-CL ring": inf_cl,
}


def markdown() -> str:
    """The table, with its assumptions."""
    lines = ["# The losses over many GPUs, on paper", "", f"{__doc__}", "", ASSUMPTIONS, ""]
    rows = []
    for gpus, batch in SHAPES:
        for name, cost in PROVIDERS.items():
            c = cost(gpus, batch)
            figures = (f"{c.flops / 1e12:.2f}", f"{c.sent / 1e6:.0f}", f"{c.held / 1e9:.2f}", f"{c.seconds * 1e3:.1f}")
            rows.append((gpus, batch, name, *figures))
    lines += table_lines(("GPUs", "B", "", "TFLOP per GPU", "MB sent per GPU", "GB held per GPU", "ms"), rows)
    return "\n".join(lines) + "\n"
