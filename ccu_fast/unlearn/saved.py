"""Models on disk: safetensors with where they came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ccu_fast import extras
from ccu_fast.files import new_file, readable
from ccu_fast.runs.cache import versions
from ccu_fast.runs.provenance import tensors_hash
from ccu_fast.unlearn.model import TwoTowerModel


def save_model(model: TwoTowerModel, path: str | Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Write the weights and, in the file's metadata, what made them; all of it or nothing.

    Args:
        model: its ``state_dict`` is written.
        path: ends in ``.safetensors``; its folder must exist.
        provenance: JSON: seed, settings, hashes of what went in. Versions and the hash of the weights are added.

    Returns:
        The provenance as written: with "versions" and "weights_sha256".

    Raises:
        ImportError: safetensors is not installed.
    """
    extras.require("safetensors")
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
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
