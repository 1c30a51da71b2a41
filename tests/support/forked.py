"""Processes forked from this one: real ones, to be killed or joined into a group, that need not import torch again."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Seconds after which a child that hangs is killed, so that whoever waits for it goes on.
LIMIT = 300


def fork(work: Callable[[], object]) -> int:
    """Start ``work`` in a child, on one thread: those of a pool do not survive a fork.

    Returns:
        The child's process id. Its status is 0 when ``work`` returned and 1 when it raised.
    """
    child = os.fork()
    if child:
        return child
    try:
        signal.alarm(LIMIT)
        torch.set_num_threads(1)
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def in_child(work: Callable[[], object]) -> int:
    """The wait status of a child that does ``work``."""
    return os.waitpid(fork(work), 0)[1]


def kill_when(child: int, ready: Callable[[], bool], seconds: float) -> None:
    """Kill a child by SIGKILL as soon as ``ready()``, which must come before it ends and within some seconds."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it could be killed"
        assert time.monotonic() < deadline, f"it was not ready within {seconds} s"
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def on_ranks(world: int, folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """What ``work(rank)`` returns on each of ``world`` children that gloo joins; it is pickled in ``folder``."""

    def of_rank(rank: int) -> None:
        limit = timedelta(seconds=120)
        meet = f"file://{folder}/meet"
        dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=limit)
        torch.save(work(rank), folder / f"{rank}.result")
        dist.barrier()
        dist.destroy_process_group()

    children = [fork(lambda rank=rank: of_rank(rank)) for rank in range(world)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * world
    return [torch.load(folder / f"{rank}.result", weights_only=False) for rank in range(world)]
