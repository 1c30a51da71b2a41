"""SHA-256 of what decides a result: files, tensors, settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes, whatever the order and the device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{value.dtype}{list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def json_hash(value: Any) -> str:
    """Of JSON values, whatever the order of the keys of a dict."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
