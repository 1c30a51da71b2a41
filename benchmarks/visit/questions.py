"""The questions of tuning: cases whose providers are variants of ours, the current one first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.ops import OPS, clip_loss, split_gemm
from benchmarks.registry import Call, Case, Op, Provider, Shape, Tensors, label
from ccu_fast.ops.reduce_similarity import operator

AS_IT_IS = "as it is"
Build = Callable[..., Call]


@dataclass(frozen=True)
class Question:
    """One thing to decide.

    Attributes:
        about: the constant that the answer sets.
        case: its providers are the op's baseline and the variants.
    """

    about: str
    case: Case


@dataclass(frozen=True)
class Change:
    """What a variant does otherwise.

    Attributes:
        forward, gradient: fields of the tile that half-precision problems take, by name.
        small: whether small batches' kernels are taken: always, never, or None for as it is.
    """

    forward: dict[str, int] = field(default_factory=dict)
    gradient: dict[str, int] = field(default_factory=dict)
    small: bool | None = None


def device_of(change: Change, asked: set[str]) -> Any:
    """The current device with the tiles changed and no launches planned; None where the tiles stay as they are.

    The kinds of changed tile that a launcher asks for are added to ``asked``.
    """
    if not change.forward and not change.gradient:
        return None
    from ccu_fast.ops.reduce_similarity.triton import configs

    device = configs.device()
    tiles: dict[str, Any] = {}
    for kind, fields in (("forward", change.forward), ("gradient", change.gradient)):
        if fields:
            of_kind = getattr(device, kind)
            tiles[kind] = _Told({k: replace(t, **fields) for k, t in of_kind.items()}, kind, asked)
    return replace(device, **tiles)


@contextmanager
def made(change: Change, device: Any) -> Iterator[None]:
    """Within, launches are as changed, and planned once for all calls on this ``device``, the change's own."""
    with ExitStack() as stack:
        if change.small is not None:
            stack.enter_context(patch.object(operator, "SMALL_PAIRS", 1 << 40 if change.small else 0))
            stack.enter_context(patch.object(operator, "SMALL_SIDE", 1 << 20))
        if device is not None:
            from ccu_fast.ops.reduce_similarity.triton import configs

            stack.enter_context(patch.object(configs, "device", lambda: device))
        yield


class _Told(dict[str, Any]):
    """Tiles by arithmetic that tell when one is asked for."""

    def __init__(self, tiles: dict[str, Any], kind: str, asked: set[str]) -> None:
        super().__init__(tiles)
        self.kind, self.asked = kind, asked

    def __getitem__(self, key: str) -> Any:
        self.asked.add(self.kind)
        return super().__getitem__(key)


def build_changed(inputs: Tensors, shape: Shape, *, build: Build, change: Change) -> Call:
    """A call of ours with a change.

    Raises:
        RuntimeError: the launchers never asked for the changed tile, so that it would be the old one's time.
    """
    asked: set[str] = set()
    device = device_of(change, asked)
    with made(change, device):
        call = build(inputs, shape)

    def changed() -> Tensors:
        with made(change, device):
            return call()

    changed()
    missing = {kind for kind in ("forward", "gradient") if getattr(change, kind)} - asked
    if missing:
        raise RuntimeError(f"the launchers did not ask for the {' and '.join(sorted(missing))} tile")
    return changed


# --- the questions ---------------------------------------------------------------------------------------------------

# Full tiles. Registers and shared memory allow them on a Hopper; register spills would show in the time.
FORWARD = {
    "128x256 s4": {"num_stages": 4},
    "128x128 w8": {"block_n": 128},
    "128x128 w4": {"block_n": 128, "num_warps": 4},
    "128x128 w4 s4": {"block_n": 128, "num_warps": 4, "num_stages": 4},
    "256x128": {"block_m": 256, "block_n": 128},
    "64x256 w4": {"block_m": 64, "num_warps": 4},
}
GRADIENT = {
    "128x128 w8 s4": {"num_stages": 4},
    "128x128 w4": {"num_warps": 4},
    "128x256": {"block_n": 256},
    "64x128 w4": {"block_m": 64, "num_warps": 4},
    "128x64 w4": {"block_n": 64, "num_warps": 4},
}
# Tiles of problems with labels or ids, and with edges.
KEYED = tuple(
    {f"keyed {n}": {"keyed_n": n, "labels_n": n} for n in columns} for columns in ((32, 64, 128, 256), (32, 64, 128))
)
RAGGED = tuple({f"ragged {n}": {"ragged_n": n} for n in columns} for columns in ((64, 128, 256), (32, 64)))
PLAIN = FORWARD, GRADIENT
SMALL_SIDES = (128, 256, 512, 768, 1024, 1536, 2048)
WORKSPACES = {"256 MiB": 256 << 20, "1 GiB": 1 << 30, "2 GiB": 2 << 30, "4 GiB": 4 << 30, "8 GiB": 8 << 30}


_SIZES: dict[bool, dict[str, Shape]] = {
    False: {
        "large": {"B": 32768, "D": 512},
        "wide": {"B": 131072, "D": 512},
        "ragged": {"B": 10000, "D": 512},
        "labels": {"N": 4096, "M": 32768, "D": 512},
        "chunk": {"N": 4096, "M": 32768, "D": 512},
        "few rows": {"N": 512, "M": 262144, "D": 512},
    },
    True: {
        "large": {"B": 16, "D": 16},
        "wide": {"B": 16, "D": 16},
        "ragged": {"B": 17, "D": 16},
        "labels": {"N": 16, "M": 32, "D": 16},
        "chunk": {"N": 16, "M": 64, "D": 16},
        "few rows": {"N": 8, "M": 64, "D": 16},
    },
}
# Also measured, with our current code only: what has no alternatives yet, at the shapes with these prefixes.
_PROFILED = {"topk_flips": ("N=5,", "N=2560,"), "candidate_losses": ("",), "pgd_step": ("",), "noise_add": ("",)}


def questions(device: str, *, tiny: bool = False) -> list[Question]:
    """Every open choice of a constant; ``tiny``: the same for Triton's interpreter."""
    clip, bounded = OPS["clip_loss"], OPS["bounded_inverse"]
    tiles, keyed, ragged = (_of_tiles(*fields) for fields in (PLAIN, KEYED, RAGGED))
    kernels = {"small kernels": Change(small=True), "large kernels": Change(small=False)}
    if tiny:
        few = {"block_m": 32}
        tiles, keyed = {"forward 32x32": Change(forward=few)}, {"gradient keyed 16": Change(gradient={"keyed_n": 16})}
        ragged = {"forward ragged 16": Change(forward={"ragged_n": 16})}
    sizes = _SIZES[tiny]
    # The sizes are small there, but the question is about the kernels of large batches.
    alike = Change(small=False) if tiny else Change()
    spaces = {"64 KiB": 64 << 10} if tiny else WORKSPACES
    found = [
        Question("the default workspace", _case(device, clip, sizes["large"], _workspaces(spaces, alike))),
        Question("tiles without labels", _case(device, clip, sizes["large"], _changes(clip, tiles, alike))),
        Question("tiles with labels", _case(device, bounded, sizes["labels"], _changes(bounded, keyed, alike))),
        Question("tiles of ragged shapes", _case(device, clip, sizes["ragged"], _changes(clip, ragged, alike))),
        Question("parts of dX's sum", _case(device, split_gemm.SPLIT_GEMM, sizes["chunk"], ())),
        Question("parts of dX's sum", _case(device, split_gemm.SPLIT_GEMM, sizes["few rows"], ())),
        Question("the default workspace", _case(device, clip, sizes["wide"], _workspaces(spaces, alike))),
    ]
    sides = (16,) if tiny else SMALL_SIDES
    profiled = [] if tiny else [Question("where the time goes", case) for case in _as_they_are(device)]
    border = [_case(device, clip, {"B": b, "D": sizes["large"]["D"]}, _changes(clip, kernels, Change())) for b in sides]
    return [*found, *profiled, *(Question("the border of small batches", case) for case in border)]


def _of_tiles(forward: dict[str, dict[str, int]], gradient: dict[str, dict[str, int]]) -> dict[str, Change]:
    return {
        **{f"forward {name}": Change(forward=fields) for name, fields in forward.items()},
        **{f"gradient {name}": Change(gradient=fields) for name, fields in gradient.items()},
    }


def _as_they_are(device: str) -> Iterator[Case]:
    for op, starts in _PROFILED.items():
        for shape in OPS[op].shapes[device]:
            if label(shape).startswith(starts):
                ours = next(p for p in OPS[op].providers if p.role == "ours")
                yield _case(device, OPS[op], shape, [replace(ours, name=AS_IT_IS)])


def _case(device: str, op: Op, shape: Shape, variants: Sequence[Provider]) -> Case:
    if variants:
        baseline = next(p for p in op.providers if p.name == op.baseline)
        serves = baseline.serves(shape, device)
        op = replace(op, providers=(*([baseline] if serves else []), *variants))
    # Triton's interpreter has no bf16 product.
    return Case(op, shape, torch.bfloat16 if device == "cuda" else torch.float16, torch.device(device))


def _ours(op: Op) -> Build:
    """Our call of the op with GPU kernels, which run in the interpreter on a CPU."""
    build: Build = next(p for p in op.providers if p.name == "ccu_fast").build
    return partial(build, backend="triton")


def _changes(op: Op, changes: dict[str, Change], alike: Change) -> list[Provider]:
    """The op's own way, and the same with each change; ``alike``: what all have in common."""
    build = _ours(op)
    return [
        Provider(name, partial(build_changed, build=build, change=change), role="ours", backend="triton")
        for name, change in {AS_IT_IS: alike, **{n: _both(alike, c) for n, c in changes.items()}}.items()
    ]


def _both(alike: Change, change: Change) -> Change:
    return replace(change, small=alike.small if change.small is None else change.small)


def _workspaces(sizes: dict[str, int], alike: Change) -> list[Provider]:
    ways = {
        name: partial(clip_loss.build_ours, backend="triton", workspace=size)
        for name, size in {AS_IT_IS: None, **sizes}.items()
    }
    return [
        Provider(name, partial(build_changed, build=way, change=alike), role="ours", backend="triton")
        for name, way in ways.items()
    ]


def one_by_one(case: Case) -> list[Case]:
    """A case for each of its variants."""
    return [replace(case, op=replace(case.op, providers=[provider])) for provider in case.op.providers]
