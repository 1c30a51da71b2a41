"""The saved state of a run, from which a killed run continues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.files import new_file, readable
from ccu_fast.runs.provenance import json_hash, tensors_hash


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


def fingerprint(state: Mapping[str, Tensor], forget: PairedData, retain: PairedData, settings: Any) -> str:
    """SHA-256 of a model's weights, both sets and the settings: equal ones give equal runs."""
    sets = [{"visual": d.visual, "other": d.other, "labels": d.labels, "ids": d.ids} for d in (forget, retain)]
    return json_hash([settings, tensors_hash(state), *map(tensors_hash, sets)])


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
        with new_file(self.checkpoint.path) as file:
            torch.save({"key": self.key, **state}, file)

    def load(self) -> dict[str, Any] | None:
        """The state, or None where no file is.

        Raises:
            ValueError: the file is of another run, or not a checkpoint.
        """
        path = self.checkpoint.path
        if not path.exists():
            return None
        with readable(path, "checkpoint"):
            state = torch.load(path, map_location=self.device, weights_only=True)
            stored = state["key"]
        if stored != self.key:
            raise ValueError(
                f"checkpoint: expected the state of this run in {path}, got that of one with another model, "
                "other data or other settings; remove the file to start anew"
            )
        return dict(state)
