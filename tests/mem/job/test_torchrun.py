"""Processes that torchrun starts, really killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ccu_fast.cli import main as cli
from ccu_fast.ops import machine
from tests.support import mem_datasets as made
from tests.support.forked import on_ranks
from tests.support.mem_jobs import tree

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ccu_fast"]
ROUNDS, STEPS = 8, 2
OPTIONS = ["--method", "mem-1", "--size", "16x16", "--model", "small:32", "--rounds", str(ROUNDS), "--batch", "4"]
OPTIONS += ["--pgd-steps", "1", "--surrogate-steps", str(STEPS), "--trigger-rounds", "1", "--candidates", "2"]
LIMIT = 240  # seconds


def command(source: Path, out: Path) -> list[str]:
    return ["protect", str(source), "--out", str(out), *OPTIONS, "--threads", "1", "--quiet"]


def begin(source: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *TORCHRUN, *command(source, out)],
        env={**os.environ, "PYTHONPATH": str(machine.PACKAGE.parent), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.usefixtures("one_thread")
def test_all_processes_are_killed_and_the_same_command_ends_with_the_same_bits(tmp_path: Path) -> None:
    source = made.write_csv(tmp_path / "in", n=24)
    whole, out = tmp_path / "whole", tmp_path / "out"
    # The uninterrupted run is of two forked processes, which need not import torch again.
    assert on_ranks(2, tmp_path, lambda _: cli.main(command(source, whole))) == [0, 0]

    checkpoint = tmp_path / "out.partial" / "checkpoint.json"
    deadline = time.monotonic() + LIMIT
    with begin(source, out) as child:
        while not checkpoint.exists():
            assert child.poll() is None, child.communicate()[0]
            assert time.monotonic() < deadline, f"no checkpoint within {LIMIT} s"
            time.sleep(0.005)
        # torchrun gives each process a session of its own, so that a signal to its group would not come to them. It
        # goes first: it would end the others in its own way.
        workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        killed = [child.pid, *map(int, workers)]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        child.communicate(timeout=LIMIT)
    assert len(killed) == 3 and child.returncode == -signal.SIGKILL
    while any(map(alive, killed)):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    done = json.loads(checkpoint.read_text())["batches"]
    assert 0 < done < ROUNDS * (STEPS + 3) and not out.exists()  # 12 pictures of each process in batches of 4

    with begin(source, out) as child:
        told = child.communicate(timeout=LIMIT)[0]
    assert child.returncode == 0, told
    assert tree(out) == tree(whole)
    assert json.loads((out / "manifest.json").read_text())["processes"] == 2
    assert not checkpoint.parent.exists()
