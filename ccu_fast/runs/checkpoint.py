"""The state of a run on disk, from which a killed run continues."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.files import new_file, readable
from ccu_fast.runs.provenance import Hashes, Weights, json_hash


@dataclass(frozen=True)
class Checkpoint:
    """A file that a run writes its state to and starts from.

    Attributes:
        path: the file, written whole or not at all; its folder must exist.
        every: steps between two writes, at least 1.
        settings: what else decides the outcome, besides the model, the data, the budget and the seed; JSON. A file of
            other settings is an error.

    Raises:
        TypeError, ValueError: every is below 1, the folder of path is missing.

    >>> ccu_fast.unlearn.Checkpoint("run.pt", every=50).every
    50
    """

    path: Path
    every: int = 20
    settings: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check.integer("every", self.every, low=1)
        object.__setattr__(self, "path", Path(self.path))
        if not self.path.parent.is_dir():
            raise ValueError(f"checkpoint: expected a path in an existing folder, got {self.path}")


def fingerprint(model: Weights, parts: Iterable[PairedData], settings: Any, hashes: Hashes | None = None) -> str:
    """SHA-256 of a model's weights, all sets and the settings: equal ones give equal runs.

    Args:
        model, parts, settings: the three.
        hashes: those of the model and the sets that are known.

    Raises:
        ValueError: the weights are not tensors alone.
    """
    hashes = Hashes() if hashes is None else hashes
    return json_hash([settings, hashes.of(model), *map(hashes.of, parts)])


class Keeper:
    """Writes and reads the checkpoint of one run.

    Attributes:
        written: steps after which the file's state was taken; 0 without a file.
    """

    def __init__(self, checkpoint: Checkpoint, key: str, device: torch.device) -> None:
        self.checkpoint, self.key, self.device = checkpoint, key, device
        self.written = 0

    def save(self, state: dict[str, Any]) -> None:
        """Write the state, all of it or nothing."""
        write_state(self.checkpoint.path, {"key": self.key, **state})

    def load(self) -> dict[str, Any] | None:
        """The state, or None where no file is.

        Raises:
            ValueError: the file is another run's, or damaged.
        """
        path = self.checkpoint.path
        if not path.exists():
            return None
        state = read_state(path, "checkpoint", self.device)
        if state.get("key") != self.key:
            raise ValueError(
                f"checkpoint: expected the state of this run in {path}, got that of one with another model, "
                "other data or other settings; remove the file to start anew (--fresh does)"
            )
        return state


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values to a file: all of it or nothing, also when the process is killed."""
    with new_file(path) as file:
        torch.save(dict(state), file)


def read_state(path: Path, name: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What :func:`write_state` wrote.

    Args:
        path: of the file.
        name: the argument it belongs to, for the error.
        device: where its tensors go.

    Raises:
        ValueError: the file is damaged.
    """
    with readable(path, name):
        return dict(torch.load(path, map_location=device, weights_only=True))
