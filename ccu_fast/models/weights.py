"""Weights of a checkpoint file for a model that the caller makes."""

from __future__ import annotations

import pickle
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ccu_fast import extras
from ccu_fast.files import read_json, readable

M = TypeVar("M", bound=nn.Module)

WITHIN = ("state_dict", "model_state_dict", "model")  # where training code puts a model's state dict
WRAPPERS = ("module", "_orig_mod")  # what DistributedDataParallel and torch.compile put into names
LFS = b"version https://git-lfs.github.com/spec/"


def from_checkpoint(make: Callable[[], M], checkpoint: Path | str, name: str = "checkpoint") -> Callable[[], M]:
    """A factory of the model with a checkpoint's weights.

    Names with and without the ``module.`` and ``_orig_mod.`` of wrappers are the same; where the model's tensors are
    tied, the file may hold one of them.

    Args:
        make: makes the model with any weights.
        checkpoint: see :func:`read_weights`.
        name: what the caller calls the file, for errors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of tensors; (by the factory) the weights of another model: says which.
    """
    path = Path(checkpoint)
    if not path.is_file():
        what = "the folder" if path.is_dir() else "none at"
        raise FileNotFoundError(f"{name}: expected a file, got {what} {path}")
    read_weights(path, name)  # what is no checkpoint is named now, and not when the work has begun

    def made() -> M:
        model = make()
        fitted = _fitted(read_weights(path, name), model.state_dict(), f"in {path}", name)
        try:
            model.load_state_dict(fitted)
        except RuntimeError as error:
            what = type(model).__name__
            why = textwrap.shorten(str(error), 300, placeholder=" …")  # torch lists a mismatch for every tensor
            raise ValueError(f"{name}: expected weights of {what}, got others in {path}: {why}") from error
        return model

    return made


def read_weights(path: Path, name: str = "checkpoint") -> dict[str, Tensor]:
    """The tensors of a file, under the names that it gives them.

    Args:
        path: a ``.safetensors`` file; a torch file with a state dict, alone or under "state_dict", "model_state_dict"
            or "model", which is never unpickled beyond tensors and plain values; or an ``.index.json`` beside the
            shards that it names.
        name: what the caller calls the file, for errors.

    Raises:
        ValueError: not a file of tensors; names the argument.
    """
    if path.suffix == ".json":
        return _sharded(path, name)
    check_no_pointer(path, name)
    if path.suffix == ".safetensors":
        extras.require("safetensors")
        from safetensors.torch import load_file

        with readable(path, name):
            return load_file(path)
    state: Any = None
    code = None
    with readable(path, name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # torch names what it did not call, and goes on for a page about how to have it called.
            code = re.search(r"GLOBAL ([\w.]+)", str(error))
            if code is None:
                raise
    if code is not None:
        raise ValueError(
            f"{name}: expected tensors as torch.save(model.state_dict(), …) writes them, got a pickle that calls "
            f"{code[1]} in {path}"
        )
    while isinstance(state, dict) and (key := next((k for k in WITHIN if isinstance(state.get(k), dict)), None)):
        state = state[key]
    if not isinstance(state, dict):
        raise ValueError(f"{name}: expected a state_dict, got {type(state).__name__} in {path}")
    other = next((key for key, value in state.items() if not isinstance(value, Tensor)), None)
    if other is not None or not state:
        what = f"{type(state[other]).__name__} as {other!r}" if state else "an empty one"
        raise ValueError(f"{name}: expected a state_dict of tensors, got {what} in {path}")
    return state


def check_no_pointer(path: Path, name: str) -> None:
    """Raise a ValueError where Git LFS has left a pointer in place of the file."""
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise ValueError(
                f"{name}: expected weights, got a Git LFS pointer in {path}; git lfs pull fetches the file"
            )


def _sharded(path: Path, name: str) -> dict[str, Tensor]:
    index = read_json(path, name)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{name}: expected an index of shards with a weight_map, got {path}")
    state: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        shard = path.parent / file
        if Path(file).name != file or not shard.is_file() or shard.suffix == ".json":
            raise ValueError(f"{name}: expected the shards of {path} beside it, got none called {file!r}")
        state |= read_weights(shard, name)
    lost = sorted(files.keys() - state.keys())
    if lost:
        raise ValueError(f"{name}: expected {lost[0]} in the shards of {path}, got none")
    return state


def _fitted(state: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str, name: str) -> dict[str, Tensor]:
    """The weights under the names that a model has for them, with all names of its tied tensors.

    Args:
        state: of the file.
        own: of the model.
        where: the file, for errors; and ``name``, the argument it came as.
    """
    by_plain = {_plain(key): key for key in own}
    fitted: dict[str, Tensor] = {}
    for key, value in state.items():
        target = key if key in own else by_plain.get(_plain(key), key)
        if target in fitted:
            raise ValueError(f"{name}: expected one tensor for {target}, got several {where}")
        fitted[target] = value
    tied: dict[Any, list[str]] = {}
    for key, value in own.items():
        if isinstance(value, Tensor) and value.numel():
            tied.setdefault((value.data_ptr(), value.shape, value.stride()), []).append(key)
    for names in tied.values():
        there = [key for key in names if key in fitted]
        if any(not torch.equal(fitted[key], fitted[there[0]]) for key in there):
            raise ValueError(
                f"{name}: expected equal tensors for {', '.join(there)}, which are one, got others {where}"
            )
        fitted.update({key: fitted[there[0]] for key in names if there})
    return fitted


def _plain(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)
