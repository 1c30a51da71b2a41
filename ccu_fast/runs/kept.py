"""What a run computes before its first step, kept in files until the run is over: a killed one reads it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ccu_fast.data.paired import PairedData
from ccu_fast.runs.checkpoint import fingerprint, read_state, write_state
from ccu_fast.runs.provenance import Hashes, Weights

Tensors = tuple[Tensor, ...]


class Kept:
    """Tensors by name, such as the embeddings of a set under the original model.

    Args:
        beside: a checkpoint such as ``checkpoint.pt``; ``forget`` is kept beside it in ``checkpoint.forget.pt``, whole
            or not at all. None: nothing is kept.
        model: the original; none where nothing is kept.
        parts: the sets that the tensors are made from.
        settings: what else decides them; JSON. What was kept of another model, other data or settings is not used.
        writes: whether this process writes; where processes share a run, one does.
        device: where what is read goes.
        hashes: those of the model and the sets that are known.
    """

    def __init__(
        self,
        beside: Path | None = None,
        model: Weights | None = None,
        parts: Iterable[PairedData] = (),
        settings: Any = None,
        *,
        writes: bool = True,
        device: torch.device | str = "cpu",
        hashes: Hashes | None = None,
    ) -> None:
        self.beside, self.writes, self.device = beside, writes, device
        self.key = "" if beside is None or model is None else fingerprint(model, parts, settings, hashes)

    def of(self, name: str, make: Callable[[], Tensors], about: Any = None) -> Tensors:
        """The tensors of this name: those that are kept, or what ``make`` returns, which is kept from now on.

        Args:
            name: one of those that :func:`remove` gets.
            make: without arguments.
            about: what else decides them, beside what decides all.

        Raises:
            ValueError: the file is none that a run wrote.
        """
        if self.beside is None:
            return make()
        path = _file(self.beside, name)
        key = [self.key, about]
        if path.exists():
            stored = read_state(path, "checkpoint", self.device)
            if "kept" not in stored:
                raise ValueError(f"checkpoint: expected what a run has kept as {path}, or no such file, got another")
            if stored["key"] == key:
                return tuple(stored["kept"])
        made = make()
        if self.writes:
            write_state(path, {"key": key, "kept": list(made)})
        return made


def remove(beside: Path, names: Iterable[str]) -> None:
    """Remove what was kept under these names beside a checkpoint."""
    for name in names:
        _file(beside, name).unlink(missing_ok=True)


def _file(beside: Path, name: str) -> Path:
    return beside.with_suffix(f".{name}.pt")
