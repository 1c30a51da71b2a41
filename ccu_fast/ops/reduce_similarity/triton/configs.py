"""Tile shapes for each class of GPU, chosen so that nothing spills (tests/ops/triton/test_ahead_of_time.py).

No autotuning: the same inputs take the same tiles, hence the same bits, in every process.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
from torch import Tensor

from ccu_fast.ops.backend import fp32_precision
from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem, decode

# A plan takes a few kilobytes. Where every batch has a different size none is worth keeping, so all go at once.
MOST_PLANS = 256
_NOTHING = nullcontext()
# Two accumulators are in a tile then.
WITH_TEACHER = 32
# From LONG columns on, a row of E or G is padded to whole tiles of any width: at most an eighth more.
LONG, WIDEST = 2048, 256
# Triton decides this when a kernel is defined.
_IN_INTERPRETER = triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Tile:
    """What one program holds: rows × columns of S, and the step along D.

    With labels, ids or limits every pair holds its relation in a register, and a full tile would spill: it is then
    ``keyed_n`` columns wide and has ``keyed_stages``; with labels alone and nothing but log-sum-exps it is ``labels_n``
    columns wide, or ``keyed_n`` if that is 0. Where short rows of S end inside a full tile, it is just as narrow. In
    all other cases where S ends inside a tile it is ``ragged_n`` columns wide, or full if that is 0.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    keyed_n: int
    keyed_stages: int = 3
    labels_n: int = 0
    ragged_n: int = 0

    def options(self) -> dict[str, Any]:
        """As arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class Device:
    """A device as the launchers see it.

    Attributes:
        processors: multiprocessors; the forward grid aims at several rectangles for each.
        max_groups: most groups of row tiles, that is most partial results per column.
        bounds: programs that look for the largest norms, a power of two.
        bound_tile: rows × columns of one step.
        tma: x and y are read through tensor descriptors.
        forward, gradient, online: tiles by arithmetic: "half" (fp16 and bf16), "tf32", "ieee" (fp32 without tensor
            cores).
        index: its number for CUDA.
        plans: the launches made so far, by what they depend on.
    """

    processors: int
    max_groups: int
    bounds: int
    bound_tile: tuple[int, int]
    tma: bool
    forward: dict[str, Tile]
    gradient: dict[str, Tile]
    online: dict[str, Tile]
    index: int = 0
    plans: dict[Hashable, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def keep(self, signature: Hashable, plan: Any) -> Any:
        """The plan, which ``plans`` has from now on."""
        if len(self.plans) >= MOST_PLANS:
            self.plans.clear()
        self.plans[signature] = plan
        return plan

    @property
    def largest_step(self) -> int:
        """A multiple of every tile's step along D."""
        return max(tile.block_k for tiles in (self.forward, self.gradient) for tile in tiles.values())

    def tile(self, kernel: str, arithmetic: str, p: SimilarityProblem) -> Tile:
        """The tile of "forward", "gradient" or "online" for p; narrower where pairs have to be looked at one by one."""
        full: Tile = getattr(self, kernel)[arithmetic]
        beside = p.limited or p.teacher_scale is not None
        keyed = p.row_labels is not None or p.row_ids is not None or beside
        if keyed or row_stride(p.m) % full.block_n:
            plain = p.row_ids is None and not beside and all(decode(code)[0] == "lse" for code in (*p.rows, *p.cols))
            columns = full.labels_n if plain and full.labels_n else full.keyed_n
            if p.teacher_scale is not None:
                columns = min(columns, WITH_TEACHER)
            return replace(full, block_n=columns, num_stages=min(full.num_stages, full.keyed_stages))
        if full.ragged_n and (p.n % full.block_m or p.m % full.block_n):
            return replace(full, block_n=full.ragged_n)
        return full


# Among the compilers of Triton 3.4 to 3.9 only that of 3.7 masks edges in a forward tile of 128 × 256 without spills.
_RAGGED = 0 if triton.__version__.startswith("3.7.") else 128
_IEEE = Tile(64, 64, 16, 4, 3, 32)
_TILES: dict[str, tuple[dict[str, Tile], dict[str, Tile]]] = {
    # A100: 163 KB of shared memory, mma.
    "sm_80": (
        {"half": Tile(128, 128, 64, 8, 3, 64), "tf32": Tile(128, 128, 32, 8, 3, 64), "ieee": _IEEE},
        {"half": Tile(64, 64, 64, 4, 3, 32), "tf32": Tile(64, 64, 32, 4, 3, 32), "ieee": _IEEE},
    ),
    # GeForce and workstation parts, 8.6 to 12.x: 99 KB.
    "small": (
        {"half": Tile(128, 64, 64, 8, 2, 32), "tf32": Tile(128, 64, 32, 8, 2, 32), "ieee": _IEEE},
        {"half": Tile(128, 64, 64, 8, 2, 64), "tf32": Tile(128, 64, 32, 8, 2, 64), "ieee": _IEEE},
    ),
    # H100, H200: 227 KB, wgmma. 128 × 256 asks L2 for a quarter less than 128 × 128 at the same work.
    "sm_90": (
        {
            "half": Tile(128, 256, 64, 8, 3, 64, labels_n=128, ragged_n=_RAGGED),
            "tf32": Tile(128, 256, 32, 8, 3, 64, ragged_n=_RAGGED),
            "ieee": _IEEE,
        },
        {"half": Tile(128, 128, 64, 8, 3, 64), "tf32": Tile(128, 64, 32, 8, 3, 32), "ieee": _IEEE},
    ),
    # B200: 227 KB, tcgen05. Its accumulators leave tensor memory through registers, so the tile is narrower.
    "sm_100": (
        {
            "half": Tile(128, 128, 64, 8, 3, 32, ragged_n=64),
            "tf32": Tile(128, 128, 32, 8, 3, 32, ragged_n=64),
            "ieee": _IEEE,
        },
        {"half": Tile(128, 64, 64, 8, 3, 32), "tf32": Tile(128, 64, 32, 8, 3, 32), "ieee": _IEEE},
    ),
}
# One for every GPU: it rarely runs, so it is a tile that spills nowhere. BLOCK_N divides BLOCK_M, because rows and
# columns change places and the masks are decided by multiples of BLOCK_M.
_ONLINE = {name: Tile(64, 32, 32, 8, 2, 32) for name in ("half", "tf32", "ieee")}
# Rows of E and G end inside a tile, or with one.
_INTERPRETED = {name: Tile(16, 32, 16, 1, 1, 32) for name in ("half", "tf32", "ieee")}
_INTERPRETED_ONLINE = {name: Tile(16, 16, 16, 1, 1, 16) for name in ("half", "tf32", "ieee")}


def architecture(capability: int) -> str:
    """The class of a compute capability from 80 on, written as 80, 89, 90, 100, …"""
    if capability in (80, 90):
        return f"sm_{capability}"
    return "sm_100" if 100 <= capability < 120 else "small"


def device() -> Device:
    """The current device."""
    if _IN_INTERPRETER:
        # Small limits, so that small tests walk every path.
        return Device(2, 2, 2, (32, 16), False, _INTERPRETED, _INTERPRETED, _INTERPRETED_ONLINE)
    return _device(triton.runtime.driver.active.get_current_device())


@functools.cache
def _device(index: int) -> Device:
    driver = triton.runtime.driver.active
    processors = driver.utils.get_device_properties(index)["multiprocessor_count"]
    return of(architecture(int(driver.get_current_target().arch)), processors, index)


def of(kind: str, processors: int, index: int = 0) -> Device:
    """A device of a class of the table."""
    forward, gradient = _TILES[kind]
    return Device(processors, 256, 256, (16, 128), kind in ("sm_90", "sm_100"), forward, gradient, _ONLINE, index)


def arithmetic(dtype: torch.dtype) -> str:
    """Which column of the tables serves ``dtype``; for fp32 torch's own setting for matmul decides."""
    if dtype != torch.float32:
        return "half"
    return "ieee" if fp32_precision("cuda") == "highest" else "tf32"


def row_stride(columns: int) -> int:
    """Elements from one row of E or G to the next: whole tiles of long rows, a multiple of 16 for short ones.

    Rows then start on 16 bytes, so that the GEMMs take their fast path and Triton loads and stores whole packs; where a
    row holds whole tiles no element needs a test. What lies past the last column is never used. The columns may be a
    symbol of a compiled graph, so there is no branch on them.
    """
    multiple = 16 + (WIDEST - 16) * torch.sym_min(1, columns // LONG)
    return (columns + multiple - 1) // multiple * multiple


def on_device(t: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device; make that the device of the data."""
    return torch.cuda.device(t.device) if t.is_cuda and t.device.index != torch.cuda.current_device() else _NOTHING
