"""What is measured: an operation, its shapes, and the providers that compete on them.

To add an operation write ``benchmarks/ops/<op>.py`` with one :class:`Op` and name it in ``benchmarks/ops/__init__.py``;
its bars go into ``bars.json``. The tables of results have it then; what docs/performance.md says beside them is in
``performance.py``. To add a competitor append a :class:`Provider` to the Op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Shape = Mapping[str, int]
Call = Callable[[], Tensors]


class Unavailable(Exception):
    """A provider that cannot run here; the message is the reason and goes into the table."""


def everywhere(shape: Shape, device: str) -> bool:
    """The default of :attr:`Provider.serves`."""
    return True


def on_cuda(shape: Shape, device: str) -> bool:
    """Those for GPUs alone."""
    return device == "cuda"


def on_cpu(shape: Shape, device: str) -> bool:
    """Those for CPUs alone."""
    return device == "cpu"


@dataclass(frozen=True)
class Provider:
    """One way to compute an operation.

    Every callable here is a module-level function or a ``functools.partial`` of one: a provider travels to the
    process that measures its memory.

    Attributes:
        name: stable; bars and stored rows refer to it.
        build: prepares everything that is done once (tables, compilation, buffers) and returns the call that is timed.
        role: "peer"; "ours"; "ceiling" (the same bytes or FLOPs with nothing else; no answer to check); or
            "yardstick" (another operation of ours with the same FLOPs, checked against its own ``expect``).
        arithmetic: "working" (the case's dtype) or "bf16" (the user allows GEMM operands to be rounded to bf16).
        compiled: the first call at a shape compiles.
        serves: which shapes it runs on.
        note: what exactly ran, when the name alone does not say.
        backend: which backend of ours was asked for.
        expect: the right answer of a yardstick; None where it is the operation's.
    """

    name: str
    build: Callable[[Tensors, Shape], Call]
    role: str = "peer"
    arithmetic: str = "working"
    compiled: bool = False
    serves: Callable[[Shape, str], bool] = everywhere
    note: Callable[[], str] | None = None
    backend: str = "auto"
    expect: Callable[[Tensors, Shape], Expected] | None = None


@dataclass(frozen=True)
class Expected:
    """The right answer.

    Attributes:
        values: in fp64.
        terms: size of the terms that an output sums, where they cancel; errors are relative to it.
        rows: the rows of matrix outputs that ``values`` holds (None: all).
        said: what was compared, for the table.
    """

    values: Tensors
    terms: Mapping[str, float] = field(default_factory=dict)
    rows: Tensor | None = None
    said: str = "fp64"


@dataclass(frozen=True)
class Op:
    """An operation: inputs, the right answer, the work it needs at least, and who computes it.

    Attributes:
        kernel: what ccu_fast's choice of backend calls the operation.
        make: inputs of a shape, the same on every call (fixed seed).
        expect: the right answer in fp64.
        errors: one non-negative number for each output, 0 is exact; NaN counts as wrong.
        shapes: what is measured, by device type.
        quick: small shapes with the same code path, for machines and tests that only check the machinery.
        work: (FLOPs, bytes) that any implementation must do; 0 where the figure says nothing.
        baseline: the peer the table's ratios refer to, and whose own error sets the gate of "working" arithmetic.
        bf16_baseline: the same for "bf16" arithmetic.
    """

    name: str
    kernel: str
    title: str
    make: Callable[[Shape, torch.dtype, torch.device], Tensors]
    expect: Callable[[Tensors, Shape], Expected]
    errors: Callable[[Tensors, Expected, Tensors], dict[str, float]]
    providers: Sequence[Provider]
    shapes: Mapping[str, Sequence[Shape]]
    quick: Sequence[Shape]
    work: Callable[[Shape, torch.dtype], tuple[float, float]]
    baseline: str
    bf16_baseline: str | None = None


@dataclass(frozen=True)
class Case:
    """One operation at one shape on one device: what is measured in one interleaved run."""

    op: Op
    shape: Shape
    dtype: torch.dtype
    device: torch.device

    def inputs(self) -> Tensors:
        """Fresh inputs."""
        return self.op.make(self.shape, self.dtype, self.device)

    def providers(self) -> list[Provider]:
        """Those that run at this shape."""
        return [p for p in self.op.providers if p.serves(self.shape, self.device.type)]

    def ceiling(self, provider: Provider) -> Provider | None:
        """The ceiling of the provider's arithmetic, if this case has one."""
        fits = (c for c in self.providers() if c.role == "ceiling" and c.arithmetic == provider.arithmetic)
        return next(fits, None)


def label(shape: Shape) -> str:
    """``B=8192,D=512``: how a shape is named on the command line and in files."""
    return ",".join(f"{k}={v}" for k, v in shape.items())


def parse(text: str) -> dict[str, int]:
    """The inverse of :func:`label`; some of the sizes are enough."""
    try:
        return {k.strip(): int(v) for k, v in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ValueError(f"shapes: expected something like B=8192,D=512, got {text!r}") from None


def select(op: Op, patterns: Sequence[str], device: str, quick: bool) -> list[Shape]:
    """The op's shapes that match any pattern; a pattern that matches none but names the op's sizes is a new shape."""
    listed = list(op.quick if quick else op.shapes.get(device, ()))
    if not patterns:
        return listed
    chosen: list[Shape] = []
    for wanted in map(parse, patterns):
        template = (listed or list(op.quick))[0]
        if not wanted.keys() <= template.keys():
            continue
        hits = [s for s in listed if all(s[k] == v for k, v in wanted.items())]
        chosen += [s for s in hits or [{**template, **wanted}] if s not in chosen]
    return chosen
