"""The folder of an unfinished run: what the run is, its checkpoints, and the dataset that is being written.

run.json          what is being made; once something is, no other run may use the folder
scanning-R.pt     what process R has found so far in its pictures
scan-R.pt         what it found in all of them
checkpoint.json   how many batches were done at the last checkpoint
batch-000000300/  R.noise and R.pt of each process R after 300 of them
publish/          becomes the output when it is complete
published-R.jsonl what process R has written there
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ccu_fast.distributed.ranks import barrier
from ccu_fast.files import after_the_work, locked, read_json, write_whole
from ccu_fast.mem.protection import Protection
from ccu_fast.ops.noise_store.api import NoiseStore
from ccu_fast.ops.noise_store.file import NoiseFile, scratch
from ccu_fast.runs.checkpoint import read_state, write_state
from ccu_fast.runs.provenance import json_hash

FORMAT = 2  # of the folder; 1 had a checkpoint after each round
SHARED = ("model", "optimizer")  # of the surrogate, which is everybody's: rank 0 keeps them
# What a run makes besides run.json; nothing else in its folder is ever removed.
OURS = (
    "scanning-*.pt",
    "scan-*.pt",
    "checkpoint.json",
    "batch-*",
    "round-*",
    "publish",
    "published-*.jsonl",
    "unfinished-*",
    "trial-*",
)
TEMPORARY = (".scanning-*", ".scan-*", ".checkpoint.json.*", ".run.json.*")


@contextmanager
def workplace(folder: Path, run: Mapping[str, Any], rank: int = 0, *, fresh: bool = False) -> Iterator[Workplace]:
    """One process's view of the folder, locked against a second run.

    Where the run before has made nothing that cost more than a look at its input, this one takes its place.

    Args:
        folder: made if needed; gone afterwards if empty.
        run: JSON values that determine the output.
        rank: of this process.
        fresh: throw away what another run, or this one, has made.

    Raises:
        ValueError: the folder is another run's; names what differs.
        BlockingIOError: that run is going on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    here = {"format": FORMAT, **json.loads(json.dumps(run))}
    try:
        with locked(folder / f"lock-{rank}"):
            barrier()  # all processes are here, and none of another run
            if rank == 0:
                _take(folder, here, fresh)
            barrier()
            yield Workplace(folder, rank, json_hash(run))
    finally:
        with suppress(OSError):
            folder.rmdir()


def _take(folder: Path, here: Mapping[str, Any], fresh: bool) -> None:
    path = folder / "run.json"
    others = [p.name for p in folder.iterdir() if not p.name.startswith(("lock-", "."))]
    if others and not path.exists():
        raise ValueError(f"out: expected the folder of an unfinished run in {folder}, got {others}")
    there = None if fresh or not path.exists() else read_json(path)
    if there == here:
        return
    if there is not None and ((folder / "checkpoint.json").exists() or any(folder.glob("published-*.jsonl"))):
        if isinstance(there, dict) and there.get("format", 1) != FORMAT:
            raise ValueError(
                f"out: expected checkpoints of this version in {folder}, got those of another, which only it can go on "
                "with. Finish the run with that version, choose another output, or start anew (--fresh)"
            )
        names = [n for n in sorted({*there, *here}) if there.get(n) != here.get(n)]
        told = "; ".join(f"{n} {_short(there.get(n))} there, {_short(here.get(n))} here" for n in names)
        raise ValueError(
            f"out: expected the same run as the unfinished one in {folder}, got another ({told}). "
            "Repeat its command to finish it, choose another output, or start anew (--fresh)"
        )
    remove_run(folder)
    write_whole(path, json.dumps(here, indent=1) + "\n")


def remove_run(folder: Path) -> None:
    """Remove what a run has made, and nothing else."""
    # run.json last: it tells whose folder this is.
    for path in [path for pattern in (*OURS, *TEMPORARY, "run.json") for path in folder.glob(pattern)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


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
    def done(self) -> int:
        """Batches of the last checkpoint; 0 without one."""
        path = self.folder / "checkpoint.json"
        return int(read_json(path)["batches"]) if path.exists() else 0

    def store(self, rows: int, shape: tuple[int, int, int], device: torch.device, *, on_disk: bool) -> NoiseStore:
        """The noise of the last checkpoint, or zeros; in memory or, on a CPU, in a mapped file without a name.

        It is lost when the process ends; :meth:`save` is what lasts.

        Raises:
            ValueError: the checkpoint is damaged or another dataset's.
        """
        done = self.done
        saved = self._batch(done) / f"{self.rank}.noise"
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

    def save(self, done: int, protection: Protection, *, noise: bool = True) -> None:
        """Make ``done`` batches the checkpoint: all of it, of all processes, or the one before.

        Args:
            done: more than those of the checkpoint before.
            protection: what has come so far.
            noise: whether its noise has changed since; else that of the checkpoint before is used again.
        """
        before, folder = self._batch(self.done), self._batch(done)
        folder.mkdir(exist_ok=True)
        name = f"{self.rank}.noise"
        if noise or not _linked(before / name, folder / name):
            protection.store.save(folder / name, tag=self.key)
        state = protection.state()
        if self.rank:
            state["worker"] = {name: value for name, value in state["worker"].items() if name not in SHARED}
        write_state(folder / f"{self.rank}.pt", state)
        barrier()
        if self.rank == 0:
            write_whole(self.folder / "checkpoint.json", json.dumps({"batches": done}) + "\n")
            for old in self.folder.glob("batch-*"):
                if old != folder:
                    shutil.rmtree(old)
        barrier()

    def load(self, protection: Protection) -> int:
        """Bring a protection, made with :meth:`store`, to the last checkpoint; how many batches that is."""
        done = self.done
        if done:
            folder = self._batch(done)
            state = read_state(folder / f"{self.rank}.pt", "out")
            if self.rank:
                first = read_state(folder / "0.pt", "out")
                state["worker"] |= {name: first["worker"][name] for name in SHARED}
            protection.load_state_dict(state)
        return done

    def _batch(self, done: int) -> Path:
        return self.folder / f"batch-{done:09d}"

    def finish(self, out: Path) -> None:
        """Move the dataset into place and remove the rest. Called on rank 0 alone, when all have written."""
        with after_the_work(f"the protected dataset is whole in {self.publish}; the same command moves it to {out}"):
            os.replace(self.publish, out)
        with after_the_work(f"the protected dataset is whole in {out}; what is left in {self.folder} is of no use"):
            remove_run(self.folder)


def _linked(old: Path, new: Path) -> bool:
    """Give a file a second name, if it is there and the file system can."""
    new.unlink(missing_ok=True)
    try:
        os.link(old, new)
    except OSError:
        return False
    return True


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
