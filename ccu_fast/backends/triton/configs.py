"""Tile shapes for each class of GPU, chosen so that nothing spills (tests/test_triton_aot.py holds them to it).

No autotuning: the same inputs take the same tiles, hence the same bits, in every process.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton

from ccu_fast.backends.precision import fp32_precision
from ccu_fast.backends.problem import SimilarityProblem


@dataclass(frozen=True)
class Tile:
    """What one program holds: rows × columns of S, and the step along D."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Device:
    """A device as the launchers see it.

    Attributes:
        processors: multiprocessors; the forward grid aims at several rectangles for each.
        max_groups: most groups of row tiles, that is most partial results per column.
        forward, gradient: tiles by arithmetic: "half" (fp16 and bf16), "tf32", "ieee" (fp32 without tensor cores).
    """

    processors: int
    max_groups: int
    forward: dict[str, Tile]
    gradient: dict[str, Tile]

    def tile(self, kernel: str, arithmetic: str, p: SimilarityProblem) -> Tile:
        """The tile of "forward" or "gradient" for p; half as wide where pairs have to be looked at one by one.

        With labels, with ids or with edges that cut through a tile every pair has a relation in a register, which a
        full tile would spill.
        """
        full: Tile = getattr(self, kernel)[arithmetic]
        keyed = p.row_labels is not None or p.row_ids is not None
        if keyed or p.n % full.block_m or p.m % full.block_n:
            return replace(full, block_n=max(full.block_n // 2, 16))
        return full


_IEEE = Tile(64, 64, 16, 4, 3)
_TILES: dict[str, tuple[dict[str, Tile], dict[str, Tile]]] = {
    # A100: 163 KB of shared memory, mma.
    "sm_80": (
        {"half": Tile(128, 128, 64, 8, 3), "tf32": Tile(128, 128, 32, 8, 3), "ieee": _IEEE},
        {"half": Tile(128, 64, 64, 8, 3), "tf32": Tile(128, 64, 32, 8, 3), "ieee": _IEEE},
    ),
    # GeForce and workstation parts, 8.6 to 12.x: 99 KB.
    "small": (
        {"half": Tile(128, 64, 64, 8, 2), "tf32": Tile(128, 64, 32, 8, 2), "ieee": _IEEE},
        {"half": Tile(128, 64, 64, 8, 2), "tf32": Tile(128, 64, 32, 8, 2), "ieee": _IEEE},
    ),
    # H100, H200: 227 KB, wgmma.
    "sm_90": (
        {"half": Tile(128, 128, 64, 8, 3), "tf32": Tile(128, 128, 32, 8, 3), "ieee": _IEEE},
        {"half": Tile(128, 128, 64, 8, 3), "tf32": Tile(128, 128, 32, 8, 3), "ieee": _IEEE},
    ),
    # B200: 227 KB, tcgen05. Its accumulators leave tensor memory through registers, so the tile is narrower.
    "sm_100": (
        {"half": Tile(128, 64, 32, 8, 3), "tf32": Tile(128, 64, 16, 8, 3), "ieee": _IEEE},
        {"half": Tile(128, 64, 64, 8, 3), "tf32": Tile(128, 64, 32, 8, 3), "ieee": _IEEE},
    ),
}
_INTERPRETED = {name: Tile(16, 16, 16, 1, 1) for name in ("half", "tf32", "ieee")}


def architecture(capability: int) -> str:
    """The class of a compute capability written as 80, 89, 90, 100, …"""
    if capability < 80:
        raise RuntimeError(f"the Triton kernels need compute capability 8.0 or later, the device has {capability / 10}")
    if capability in (80, 90):
        return f"sm_{capability}"
    return "sm_100" if 100 <= capability < 120 else "small"


def device() -> Device:
    """The current device."""
    if triton.knobs.runtime.interpret:
        # Small limits, so that small tests walk every path.
        return Device(processors=2, max_groups=2, forward=_INTERPRETED, gradient=_INTERPRETED)
    return _device(triton.runtime.driver.active.get_current_device())


@functools.cache
def _device(index: int) -> Device:
    driver = triton.runtime.driver.active
    forward, gradient = _TILES[architecture(int(driver.get_current_target().arch))]
    processors = driver.utils.get_device_properties(index)["multiprocessor_count"]
    return Device(processors=processors, max_groups=256, forward=forward, gradient=gradient)


def arithmetic(dtype: torch.dtype) -> str:
    """Which column of the tables serves ``dtype``; for fp32 torch's own setting for matmul decides."""
    if dtype != torch.float32:
        return "half"
    return "ieee" if fp32_precision("cuda") == "highest" else "tf32"
