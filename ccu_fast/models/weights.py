"""Weights of a checkpoint file for a model that the caller makes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ccu_fast import extras
from ccu_fast.files import readable

M = TypeVar("M", bound=nn.Module)


def from_checkpoint(make: Callable[[], M], checkpoint: Path | str, name: str = "checkpoint") -> Callable[[], M]:
    """A factory of the model with a checkpoint's weights.

    Args:
        make: makes the model with any weights.
        checkpoint: a ``.safetensors`` file, or a torch file with a state dict, alone or under "state_dict" or "model"
            (as open_clip writes it; "module." in front of every name is taken off). Loaded with ``weights_only``.
        name: what the caller calls the file, for errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: (by the factory) not a file of tensors, or the weights of another model: says which.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: expected a file, got {path}, which is not there")
    if path.suffix == ".safetensors":
        extras.require("safetensors")

    def made() -> M:
        model = make()
        try:
            model.load_state_dict(read_weights(path, name))
        except RuntimeError as error:
            what = type(model).__name__
            why = textwrap.shorten(str(error), 300, placeholder=" …")  # torch lists a mismatch for every tensor
            raise ValueError(f"{name}: expected weights of {what}, got others in {path}: {why}") from error
        return model

    return made


def read_weights(path: Path, name: str = "checkpoint") -> dict[str, Tensor]:
    """The tensors of a file, see :func:`from_checkpoint`.

    Raises:
        ValueError: not a file of tensors; names the argument.
    """
    state: Any
    with readable(path, name):
        if path.suffix == ".safetensors":
            extras.require("safetensors")
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{name}: expected a state_dict, got {type(state).__name__} in {path}")
    return {name.removeprefix("module."): value for name, value in state.items()}
