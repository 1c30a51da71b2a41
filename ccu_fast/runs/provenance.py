"""What made a result: versions, SHA-256 of files, tensors and settings; models that carry it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ccu_fast import extras
from ccu_fast._version import __version__
from ccu_fast.data.disk_rows import DiskRows
from ccu_fast.data.paired import PairedData
from ccu_fast.files import new_file, readable
from ccu_fast.runs.progress import Progress, silent

Made = TypeVar("Made")
READ = 1 << 23  # bytes of inputs on a disk that are hashed at a time


def file_hash(path: Path) -> str:
    """Of what the file holds, read piece by piece.

    Raises:
        FileNotFoundError: it is not there.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor | DiskRows], told: Callable[[int], object] | None = None) -> str:
    """Of names, dtypes, shapes and bytes, whatever the order, the device and whether they are in memory.

    Args:
        tensors: of those on a disk at most :data:`READ` bytes are in memory at a time; each is read once.
        told: called with the number of rows that each piece read from a disk has.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name}{value.dtype}{list(value.shape)}".encode())
        for part in _pieces(value):
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if told is not None and isinstance(value, DiskRows):
                told(len(part))
    return digest.hexdigest()


def _pieces(value: Tensor | DiskRows) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return value.split(max(1, READ * len(value) // max(1, value.nbytes)))


def items_hash(data: PairedData, progress: Progress = silent) -> str:
    """:func:`tensors_hash` of all that items are. What is on a disk is read once, however often this is asked for."""
    tensors = {"visual": data.visual, "other": data.other, "labels": data.labels, "ids": data.ids}
    if not data.on_disk:
        return tensors_hash(tensors)
    known: str | None = data.__dict__.get("hash")  # inputs on a disk that change are refused
    if known is None:
        total = sum(len(value) for value in tensors.values() if isinstance(value, DiskRows))
        done = 0

        def told(rows: int) -> None:
            nonlocal done
            done += rows
            progress("reading the data", done, total, "")

        known = data.__dict__["hash"] = tensors_hash(tensors, told)
    return known


class Hashes:
    """SHA-256 of models' weights and of sets, each taken when it is first asked for.

    For as long as nothing changes them: they are known by who they are, and held.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[object, str]] = {}

    def of(self, thing: Weights | PairedData) -> str:
        """:func:`items_hash` of a set, :func:`tensors_hash` of a model's ``state_dict``.

        Raises:
            ValueError: the weights are not tensors alone.
        """
        known = self._known.get(id(thing))
        if known is None:
            if isinstance(thing, PairedData):
                digest = items_hash(thing)
            else:
                digest = tensors_hash(only_tensors(thing.state_dict()))
            known = self._known[id(thing)] = thing, digest
        return known[1]


def json_hash(value: Any) -> str:
    """Of JSON values, whatever the order of the keys of a dict."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def versions(*names: str) -> dict[str, Any]:
    """What made a figure or a model, by name: by default the package, torch, Python and the machine.

    Args:
        names: of "ccu_fast", "torch", "python", "machine", "pillow", "threads"; the result is in their order.
    """
    return {name: _VERSIONS[name]() for name in names or ("ccu_fast", "torch", "python", "machine")}


_VERSIONS: dict[str, Callable[[], Any]] = {
    "ccu_fast": lambda: __version__,
    "torch": lambda: str(torch.__version__),
    "python": platform.python_version,
    "machine": platform.machine,
    "pillow": lambda: importlib.metadata.version("pillow"),
    "threads": torch.get_num_threads,
}


class Weights(Protocol):
    """What has weights: any ``nn.Module``."""

    def state_dict(self) -> dict[str, Tensor]:
        """As of ``nn.Module``."""


def only_tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The ``state_dict`` of a model, if it holds tensors alone.

    Raises:
        ValueError: it holds something else, such as what a ``get_extra_state`` returns; names it.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"model: expected a state_dict of tensors, which can be written, got {type(value).__name__} as {name!r}"
            )
    return dict(state)


def saved_state(model: Weights) -> dict[str, Tensor]:
    """The ``state_dict`` of a model, if :func:`save_model` can write it; nothing is copied.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: it holds something else than plain tensors; names it.
    """
    extras.require("safetensors")
    from safetensors.torch import save

    state = only_tensors(model.state_dict())
    for name, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
            kind = "without values" if value.device.type == "meta" else f"{value.layout} {value.dtype}"
            raise ValueError(f"model: expected plain tensors in its state_dict, got one {kind} as {name!r}")
        try:
            save({name: torch.empty(0, dtype=value.dtype)})
        except (KeyError, ValueError) as error:
            raise ValueError(f"model: expected dtypes of safetensors, got {value.dtype} as {name!r}") from error
    return state


def save_model(model: Weights, path: str | Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Write the weights and, in the file's metadata, what made them; all of it or nothing.

    Args:
        model: its ``state_dict`` is written.
        path: ends in ``.safetensors``; its folder must exist.
        provenance: JSON: seed, settings, hashes of what went in. Versions and the hash of the weights are added.

    Returns:
        The provenance as written: with "versions" and "weights_sha256".

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the state_dict holds what the file cannot, see :func:`saved_state`.
    """
    state = saved_state(model)
    from safetensors.torch import save

    places = set()
    for name, value in state.items():
        state[name] = value = value.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        if place in places:  # a file has no tensors that are one: tied ones are written under each of their names
            state[name] = value.clone()
        places.add(place)
    written = {**provenance, "versions": versions(), "weights_sha256": tensors_hash(state)}
    with new_file(Path(path)) as file:
        file.write(save(state, metadata={"ccu_fast": json.dumps(written)}))
    return written


def load_model(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The ``state_dict`` and the provenance that :func:`save_model` wrote.

    Raises:
        ValueError: not a file of ours, or its weights are not those it was written with.
    """
    from safetensors import safe_open

    with readable(Path(path), "path"), safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "ccu_fast" not in metadata:
        raise ValueError(f"path: expected a model that ccu_fast saved, got {path} without its metadata")
    provenance = dict(json.loads(metadata["ccu_fast"]))
    if tensors_hash(state) != provenance["weights_sha256"]:
        raise ValueError(f"path: expected the weights that were written, got changed ones in {path}")
    return state, provenance


def made_before(
    path: Path, made_of: Mapping[str, Any], build: Callable[[dict[str, Tensor], dict[str, Any]], Made]
) -> Made | None:
    """What ``build`` makes of a kept model's ``state_dict`` and provenance, if the model was made of the same.

    Args:
        path: of a model that :func:`save_model` may have written, with "made_of" in its provenance.
        made_of: JSON values that decide the model.
        build: takes both.

    Returns:
        None if there is no such file, or a damaged one, or one that was made of something else.
    """
    if not path.exists():
        return None
    try:
        state, provenance = load_model(path)
        return build(state, provenance) if provenance["made_of"] == json.loads(json.dumps(made_of)) else None
    except (KeyError, RuntimeError, TypeError, ValueError):
        return None
