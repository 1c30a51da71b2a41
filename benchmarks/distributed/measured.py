"""Runs gloo processes on this machine: do they equal one process, and what do they send, multiply and hold?"""

from __future__ import annotations

import importlib.util
import multiprocessing
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import ccu_fast
import ccu_fast.distributed as over
from benchmarks.distributed.counting import CountFlops, count_traffic
from benchmarks.memory import peak_of

WORLDS = (2, 4)
DIM = 512


def _open_clip() -> Any:
    """open_clip's own loss.py, by file: importing the package needs torchvision."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise RuntimeError("open_clip_torch is not installed (pip install --no-deps open_clip_torch)")
    spec = importlib.util.spec_from_file_location(
        "open_clip_loss", Path(package.submodule_search_locations[0], "loss.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _batch(items: int, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    x, y = (torch.nn.functional.normalize(torch.randn(items, DIM), dim=-1) for _ in "xy")
    return x.requires_grad_(), y.requires_grad_()


def equality(mode: str) -> dict[str, Any]:
    """Largest difference between the ranks' results and one process on the whole batch, fp32, unequal shards."""
    rank, world = dist.get_rank(), dist.get_world_size()
    sizes = [96 + 32 * (r % 2) for r in range(world)]
    x, y = _batch(sum(sizes), 0)
    scale = torch.tensor(14.0, requires_grad=True)
    whole = ccu_fast.info_nce(x, y, scale=scale)
    whole.backward()
    cut = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    mine = [t.detach()[cut].clone().requires_grad_() for t in (x, y)]
    own_scale = torch.tensor(14.0, requires_grad=True)
    loss = over.info_nce(*mine, scale=own_scale, mode=mode, gradients="sum")
    loss.backward()
    dist.all_reduce(own_scale.grad)
    pairs: dict[str, tuple[Any, Any]] = {
        "loss": (loss, whole),
        "dscale": (own_scale.grad, scale.grad),
        "dx": (mine[0].grad, x.grad),
        "dy": (mine[1].grad, y.grad),
    }
    for side in ("dx", "dy"):
        pairs[side] = (pairs[side][0], pairs[side][1][cut])
    return {name: float((a - b).abs().max().detach()) for name, (a, b) in pairs.items()}


def _losses(mode: str, workspace: int | None) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    theirs = _open_clip().ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    scale = torch.tensor(14.0, requires_grad=True)
    return {
        "open_clip": lambda x, y: theirs(x, y, scale),
        "ccu_fast": lambda x, y: over.info_nce(x, y, scale=scale, mode=mode, workspace=workspace),
    }


def volume(mode: str) -> dict[str, Any]:
    """Bytes one rank sends in forward and backward of 256 pairs."""
    sent = {}
    for name, loss in _losses(mode, None).items():
        with count_traffic() as traffic:
            loss(*_batch(256, dist.get_rank())).backward()
        sent[name] = traffic.total
    return sent | {"ratio": sent["ccu_fast"] / sent["open_clip"]}


def flops(mode: str, workspace: int | None = None) -> dict[str, Any]:
    """FLOPs of one rank's GEMMs in forward and backward of 256 pairs."""
    done = {}
    for name, loss in _losses(mode, workspace).items():
        with CountFlops() as count:
            loss(*_batch(256, dist.get_rank())).backward()
        done[name] = count.total
    return done | {"ratio": done["ccu_fast"] / done["open_clip"]}


def memory(items: int) -> dict[str, Any]:
    """Peak growth of one rank's resident memory in forward and backward, workspace 8 MiB."""
    found = {}
    for name, loss in _losses("gather", 8 << 20).items():
        loss(*_batch(64, 0)).backward()
        x, y = _batch(items, dist.get_rank())
        found[name] = peak_of(partial(_step, loss, x, y))
    return found


def _step(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    loss(x, y).backward()


def _rank(rank: int, world: int, folder: str, task: Callable[..., Any], arguments: tuple[Any, ...], send: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    answers: list[Any] = [None] * world
    dist.all_gather_object(answers, task(*arguments))
    if rank == 0:
        send.send(answers)
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(world: int, task: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``task(*arguments)`` on every rank of a fresh gloo group; what each returned.

    Raises:
        RuntimeError: a rank failed; its traceback is on stderr.
    """
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ccu_fast.distributed"])
    receive, send = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, world, folder, task, arguments, send)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        send.close()
        try:
            answers: list[Any] = receive.recv()
        except EOFError:
            raise RuntimeError(f"{task.__name__} failed on {world} ranks") from None
        for process in processes:
            process.join()
    return answers
