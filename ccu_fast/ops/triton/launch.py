"""Kernel launches of which only the tensors change from one call to the next.

``kernel[grid](*arguments)`` binds its arguments by name, asks of each what the compiled code depends on (its dtype,
whether an address or a size is a multiple of 16, whether a size is 1) and looks the answers up: that is most of what
the host does in a call. A :class:`Launch` does it once. Whoever keeps one has to see to it that none of this changes:
sizes and types by keeping one launch for each, the rest through :func:`specialised_on`.

All that relies on Triton beyond ``kernel[grid]`` is here: a launch returns the compiled kernel, which has ``run``,
``function``, ``packed_metadata`` and ``launch_metadata``. Where it does not (the interpreter, a later Triton) every
launch is a plain one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

# For every launch: a multiplication and the addition after it round once. Left to itself, Triton 3.9 warns that a later
# release will round twice, which would give other bits and a quarter more instructions in a tile.
OPTIONS = {"enable_fp_fusion": True}


def specialised_on(*tensors: Tensor | None) -> tuple[Hashable, ...]:
    """What code compiled for these tensors depends on beside their shapes, and what Triton's settings ask for.

    Memory that torch allocates starts on a multiple of 16, so this concerns tensors that come from elsewhere.
    """
    runtime = knobs.runtime
    return (
        runtime.debug,
        getattr(runtime, "add_stages_inspection_hook", None),
        getattr(knobs.compilation, "instrumentation_mode", None),
        *[None if t is None else (t.dtype, t.data_ptr() & 15) for t in tensors],
    )


class Launch:
    """``kernel[(programs,)](*tensors, *numbers, **constants, **OPTIONS)`` on the device ``index``, again and again."""

    __slots__ = ("_compiled", "_tail", "constants", "grid", "index", "kernel", "numbers")

    def __init__(
        self, kernel: Any, programs: int, numbers: Sequence[float | None], *, index: int, **constants: Any
    ) -> None:
        self.kernel, self.index, self.grid = kernel, index, (programs, 1, 1)
        self.numbers, self.constants = tuple(numbers), constants | OPTIONS
        self._compiled: tuple[Any, Any, Any, Any] | None = None
        self._tail: tuple[Any, ...] = ()

    def __call__(self, *tensors: Any) -> None:
        """Launch on the current stream; ``tensors`` are the kernel's first arguments, in order."""
        if self._compiled is None or self.kernel.pre_run_hooks:
            self._bind(self.kernel[self.grid[:1]](*tensors, *self.numbers, **self.constants), len(tensors))
            return
        run, function, packed, metadata = self._compiled
        stream = triton.runtime.driver.active.get_current_stream(self.index)
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        # Triton 3.4 has a function or None, later releases a chain. The driver would call an empty one.
        if not getattr(enter, "calls", enter):
            enter = None
        if not getattr(leave, "calls", leave):
            leave = None
        told = None if enter is None else metadata(self.grid, stream, *tensors, *self._tail)
        run(*self.grid, stream, function, packed, told, enter, leave, *tensors, *self._tail)

    def _bind(self, compiled: Any, tensors: int) -> None:
        """Keep what the first launch compiled, and the arguments after the tensors in the order of the kernel."""
        try:
            names = self.kernel.arg_names[tensors + len(self.numbers) :]
            self._tail = (*self.numbers, *[self.constants[name] for name in names])
            run = compiled.run  # first: it loads the function
            self._compiled = run, compiled.function, compiled.packed_metadata, compiled.launch_metadata
        except (AttributeError, KeyError):
            self._compiled = None


class Descriptor:
    """Tensor descriptors, one after another, of one shape and one block; only the first is checked."""

    __slots__ = ("_fields", "block")

    def __init__(self, block: Sequence[int]) -> None:
        self.block = list(block)
        self._fields: dict[str, Any] | None = None

    def __call__(self, matrices: Tensor) -> TensorDescriptor:
        """The descriptor of contiguous ``[B, N, D]``, as ``[B·N, D]``."""
        if self._fields is None:
            made = TensorDescriptor.from_tensor(matrices.view(-1, matrices.shape[2]), self.block)
            self._fields = {name: value for name, value in vars(made).items() if name != "base"}
            return made
        made = object.__new__(TensorDescriptor)
        vars(made).update(self._fields, base=matrices)
        return made
