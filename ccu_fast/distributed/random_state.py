"""Where all generators of random numbers stand that a computation may draw from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

Restore = Callable[[], object]

# What holds nothing and is never changed: of these a nest may have millions, the tokens of a batch.
ATOMS = frozenset({int, float, bool, str, bytes, type(None)})


def random_state(devices: Iterable[torch.device], own: Iterable[Any] = ()) -> Restore:
    """What puts torch's generators of the CPU and these devices, numpy's, Python's and ``own`` back to where they are.

    Args:
        devices: those of inputs; the current GPU is one where any is in use.
        own: further generators, as :func:`generators_in` finds them.
    """
    places = {device for device in devices if device.type not in ("cpu", "meta")}
    if torch.cuda.is_initialized():  # where a tower may send strings, or tensors of a CPU
        places.add(torch.device("cuda", torch.cuda.current_device()))
    states: list[tuple[Callable[[Any], object], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (np.random.set_state, np.random.get_state()),
        (random.setstate, random.getstate()),
    ]
    for device in places:
        module = torch.get_device_module(device)
        states.append((partial(_set_on, module, device), module.get_rng_state(device)))
    for generator in own:
        states.append(_own_state(generator))

    def restore() -> None:
        for put, state in states:
            put(state)

    return restore


def _set_on(module: Any, device: torch.device, state: Any) -> None:
    module.set_rng_state(state, device)


def generators_in(nest: Any) -> list[Any]:
    """The generators of torch, numpy and Python in a nest of lists, tuples and mappings."""
    if isinstance(nest, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
        return [nest]
    items = nest.values() if isinstance(nest, Mapping) else nest if isinstance(nest, (list, tuple)) else ()
    return [generator for item in items if type(item) not in ATOMS for generator in generators_in(item)]


def _own_state(generator: Any) -> tuple[Callable[[Any], object], Any]:
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return lambda state: setattr(bits, "state", state), bits.state
    if isinstance(generator, random.Random):
        return generator.setstate, generator.getstate()
    return generator.set_state, generator.get_state()
