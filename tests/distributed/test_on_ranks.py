"""The losses over several ranks: cases run by torchrun on 2 and 4 processes, and what happens when a rank fails."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ccu_fast.distributed as over
from tests.support.distributed_cases import cases_on
from tests.support.paths import ROOT

WORLDS = (2, 4)


@functools.cache
def results(world: int) -> list[dict[str, str]]:
    """What each case raised on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        return torchrun(world, Path(folder))


def torchrun(world: int, folder: Path, backend: str = "gloo") -> list[dict[str, str]]:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={world}",
            "-m",
            "tests.support.distributed_cases",
            str(folder),
            backend,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in WORLDS for name in cases_on(world)])
def test_case(world: int, name: str) -> None:
    failed = {rank: of_rank[name] for rank, of_rank in enumerate(results(world)) if of_rank[name]}
    assert not failed, "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())


@pytest.mark.gpu
def test_on_as_many_gpus_as_there_are(tmp_path: Path) -> None:
    for rank, of_rank in enumerate(torchrun(torch.cuda.device_count(), tmp_path, "nccl")):
        for name, text in of_rank.items():
            assert not text, f"{name}, rank {rank}: {text}"


def test_without_a_group() -> None:
    x = torch.randn(3, 2)
    with pytest.raises(RuntimeError, match="group: expected an initialised torch"):
        over.info_nce(x, x, scale=1.0)


# ---- a rank that dies, a rank that stalls

TIMEOUT = 3.0


def fail(rank: int, folder: str, send: Any) -> None:
    """Odd ranks fail their partners, who say what they saw and after how long: 1 and 5 die, 3 and 7 stall."""
    torch.set_num_threads(1)
    mode = "gather" if rank < 4 else "ring"
    limit = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=8)
    group = [dist.new_group([r, r + 1], timeout=limit) for r in (0, 2, 4, 6)][rank // 2]
    x = torch.randn(4, 3)
    over.info_nce(x, x, scale=1.0, mode=mode, group=group)  # everyone is there
    dist.barrier()
    if rank in (1, 5):
        os.kill(os.getpid(), signal.SIGKILL)
    if rank in (3, 7):
        time.sleep(600)
    start = time.monotonic()
    try:
        over.info_nce(x, x, scale=1.0, mode=mode, group=group, equal=True)
        seen = "no error"
    except RuntimeError as error:
        seen = str(error)
    send.send((rank, seen, time.monotonic() - start))
    send.close()
    os._exit(0)  # what is left of the group is not worth a farewell


def test_a_rank_that_dies_or_stalls_is_an_error_within_the_timeout(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ccu_fast.distributed", "pytest"])  # torch is imported once
    receive, send = context.Pipe(duplex=False)
    processes = [context.Process(target=fail, args=(rank, str(tmp_path), send)) for rank in range(8)]
    for process in processes:
        process.start()
    try:
        answers = {}
        for _ in range(4):
            assert receive.poll(60), f"neither an answer nor an error within a minute: only {answers}"
            rank, seen, seconds = receive.recv()
            answers[rank] = seen
            assert seen != "no error"
            assert seconds < 2 * TIMEOUT + 2
        assert answers.keys() == {0, 2, 4, 6}
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert processes[1].exitcode == -signal.SIGKILL
