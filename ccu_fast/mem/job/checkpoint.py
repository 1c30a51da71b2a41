"""The folder of an unfinished run: what the run is, its checkpoints, and the dataset that is being written.

run.json          what is being made; no other run may use the folder
scan-R.pt         what process R found in its pictures
checkpoint.json   the last finished round
round-00003/      R.noise and R.pt of each process R after three rounds
publish/          becomes the output when it is complete
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ccu_fast.distributed.ranks import barrier
from ccu_fast.files import read_json, write_whole
from ccu_fast.mem.protection import Protection
from ccu_fast.ops.noise_store.api import NoiseStore
from ccu_fast.ops.noise_store.file import NoiseFile, scratch
from ccu_fast.runs.checkpoint import read_state, write_state
from ccu_fast.runs.provenance import json_hash

SHARED = ("model", "optimizer")  # of the surrogate, which is everybody's: rank 0 keeps them


@contextmanager
def workplace(folder: Path, run: Mapping[str, Any], rank: int = 0) -> Iterator[Workplace]:
    """One process's view of the folder, locked against a second run.

    Args:
        folder: made if needed.
        run: JSON values that determine the output.
        rank: of this process.

    Raises:
        ValueError: the folder is another run's; names what differs.
        BlockingIOError: that run is going on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"lock-{rank}").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BlockingIOError(f"out: expected no other process at work in {folder}, got one") from None
        path, here = folder / "run.json", json.loads(json.dumps(run))
        others = [p.name for p in folder.iterdir() if not p.name.startswith(("lock-", "."))]
        if others and not path.exists():
            raise ValueError(f"out: expected the folder of an unfinished run in {folder}, got {others}")
        barrier()  # before rank 0 writes what the others look for
        if rank == 0 and not path.exists():
            write_whole(path, json.dumps(here, indent=1) + "\n")
        barrier()
        there = read_json(path)
        if there != here:
            names = [n for n in sorted({*there, *here}) if there.get(n) != here.get(n)]
            told = "; ".join(f"{n} {_short(there.get(n))} there, {_short(here.get(n))} here" for n in names)
            raise ValueError(
                f"out: expected the same run as the unfinished one in {folder}, got another ({told}). "
                "Repeat its command to finish it, choose another output, or start anew (--fresh)"
            )
        yield Workplace(folder, rank, json_hash(run))


@dataclass(frozen=True)
class Workplace:
    """The folder of a run, the number of this process, and the hash of what the run is."""

    folder: Path
    rank: int
    key: str

    @property
    def publish(self) -> Path:
        """Where the dataset is built."""
        return self.folder / "publish"

    @property
    def rounds_done(self) -> int:
        """Rounds of the last checkpoint; 0 without one."""
        path = self.folder / "checkpoint.json"
        return int(read_json(path)["round"]) if path.exists() else 0

    def store(self, rows: int, shape: tuple[int, int, int], device: torch.device, *, on_disk: bool) -> NoiseStore:
        """The noise of the last checkpoint, or zeros; in memory or, on a CPU, in a mapped file without a name.

        It is lost when the process ends; :meth:`save` is what lasts.

        Raises:
            ValueError: the checkpoint is damaged or another dataset's.
        """
        done = self.rounds_done
        saved = self._round(done) / f"{self.rank}.noise"
        expected: dict[str, Any] = {"item_shape": shape, "dtype": torch.int8, "tag": self.key}
        if not on_disk:
            return NoiseStore.load(saved, device=device, **expected) if done else NoiseStore(rows, shape, device=device)
        store = NoiseStore(0, shape)
        if done:
            with closing(NoiseFile.open(saved)) as file:  # the next checkpoint removes it
                file.expect(**expected)
                store.data = file.copy()
        else:
            store.data = scratch(self.folder, (rows, *shape), torch.int8)
        return store

    def save(self, done: int, protection: Protection) -> None:
        """Make round ``done`` the checkpoint: all of it, of all processes, or the one before."""
        folder = self._round(done)
        folder.mkdir(exist_ok=True)
        protection.store.save(folder / f"{self.rank}.noise", tag=self.key)
        state = protection.state_dict()
        if self.rank:
            state["worker"] = {name: value for name, value in state["worker"].items() if name not in SHARED}
        write_state(folder / f"{self.rank}.pt", state)
        barrier()
        if self.rank == 0:
            write_whole(self.folder / "checkpoint.json", json.dumps({"round": done}) + "\n")
            for old in self.folder.glob("round-*"):
                if old != folder:
                    shutil.rmtree(old)
        barrier()

    def load(self, protection: Protection) -> int:
        """Bring a protection, made with :meth:`store`, to the last checkpoint; how many rounds that is."""
        done = self.rounds_done
        if done:
            folder = self._round(done)
            state = read_state(folder / f"{self.rank}.pt", "out")
            if self.rank:
                first = read_state(folder / "0.pt", "out")
                state["worker"] |= {name: first["worker"][name] for name in SHARED}
            protection.load_state_dict(state)
        return done

    def _round(self, done: int) -> Path:
        return self.folder / f"round-{done:05d}"

    def finish(self, out: Path) -> None:
        """Move the dataset into place and remove the folder. Called on rank 0 alone, after all have closed."""
        os.replace(self.publish, out)
        shutil.rmtree(self.folder)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
