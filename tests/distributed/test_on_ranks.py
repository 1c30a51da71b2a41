"""The losses over several ranks: every case on 2 and 4 processes, and what happens when a rank fails."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ccu_fast
import ccu_fast.distributed as over
from ccu_fast.files import write_whole
from tests.support.distributed_cases import cases_on, run_cases
from tests.support.forked import fork, on_ranks
from tests.support.open_clip_loss import open_clip_loss
from tests.support.torchrun import torchrun

WORLDS = (2, 4)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, str]]]:
    """What each case raised on each rank, by the number of ranks."""
    # What takes long to import is imported here, or every rank does it for itself.
    importlib.import_module("torch.distributed.fsdp")
    torch.compile(torch.neg, backend="aot_eager")(torch.ones(1))
    open_clip_loss()
    return {
        world: on_ranks(world, tmp_path_factory.mktemp("ranks"), lambda rank, world=world: run_cases(cases_on(world)))
        for world in WORLDS
    }


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in WORLDS for name in cases_on(world)])
def test_case(world: int, name: str, results: dict[int, list[dict[str, str]]]) -> None:
    failed = {rank: of_rank[name] for rank, of_rank in enumerate(results[world]) if of_rank[name]}
    assert not failed, "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())


@pytest.mark.gpu
def test_on_as_many_gpus_as_there_are(tmp_path: Path) -> None:
    world = torch.cuda.device_count()
    torchrun(world, "-m", "tests.support.distributed_cases", str(tmp_path))
    for rank in range(world):
        for name, text in json.loads((tmp_path / f"rank{rank}.json").read_text()).items():
            assert not text, f"{name}, rank {rank}: {text}"


def test_one_of_several_processes_needs_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "group: expected an initialised torch.distributed process group for 2 processes (WORLD_SIZE), got none"
    for call in (lambda: over.info_nce(x, x, scale=1.0), lambda: over.average_gradients([x.requires_grad_()])):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            call()


@pytest.mark.parametrize("mode", ["auto", "gather", "ring"])
@pytest.mark.parametrize("name", ["info_nce", "inverse_info_nce", "sup_con", "sigmoid_loss"])
def test_a_process_alone_needs_no_group(name: str, mode: str) -> None:
    assert not dist.is_initialized()
    keys = {"row_labels": torch.tensor([0, 0, 1, 1, 2])} if name == "sup_con" else {}

    def step(module: Any, **options: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        x, y, scale = (t.requires_grad_() for t in (torch.randn(5, 3), torch.randn(5, 3), torch.tensor(2.0)))
        loss = getattr(module, name)(x, y, scale=scale, **keys, **options)
        return [loss, *torch.autograd.grad(loss, (x, y, scale))]

    for ours, plain in zip(step(over, mode=mode), step(ccu_fast), strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_process_alone_averages_with_nobody() -> None:
    scale = torch.nn.Parameter(torch.tensor(2.0))
    scale.square().backward()
    over.average_gradients([scale])
    assert scale.grad == 4


# ---- a rank that dies, a rank that stalls

TIMEOUT = 3.0


def fail(rank: int, folder: Path) -> None:
    """Odd ranks fail their partners, who write what they saw and after how long: 1 and 5 die, 3 and 7 stall."""
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
    write_whole(folder / f"{rank}.json", json.dumps([seen, time.monotonic() - start]))
    os._exit(0)  # what is left of the group is not worth a farewell


def test_a_rank_that_dies_or_stalls_is_an_error_within_the_timeout(tmp_path: Path) -> None:
    children = [fork(lambda rank=rank: fail(rank, tmp_path)) for rank in range(8)]
    answers = [tmp_path / f"{rank}.json" for rank in (0, 2, 4, 6)]
    try:
        until = time.monotonic() + 60
        while not all(path.exists() for path in answers):
            assert time.monotonic() < until, "neither an answer nor an error within a minute"
            time.sleep(0.02)
        for path in answers:
            seen, seconds = json.loads(path.read_text())
            assert seen != "no error"
            assert seconds < 2 * TIMEOUT + 2
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        status = [os.waitpid(child, 0)[1] for child in children]
    assert [status[rank] for rank in (0, 2, 4, 6)] == [0] * 4
    assert os.WIFSIGNALED(status[1]) and os.WTERMSIG(status[1]) == signal.SIGKILL


@pytest.mark.parametrize(("device", "current"), [("cuda", []), ("cuda:1", ["cuda:1"]), ("cpu", [])])
def test_each_of_several_processes_makes_its_gpu_the_current_one(
    device: str, current: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ccu_fast.distributed.ranks import own_device, processes

    made: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda where: made.append(str(where)))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: made.append(f"{backend}, {timeout}"))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with processes(torch.device(device)) as alone:
        assert alone == (0, 1) and made == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with processes(torch.device(device), timeout=timedelta(hours=1)) as here:
        assert here == (1, 2)
    assert made == [*current, f"{'gloo' if device == 'cpu' else 'nccl'}, 1:00:00"]
    assert own_device(device) == ("cuda:1" if device == "cuda" else device)
