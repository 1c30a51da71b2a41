"""Several processes: whose images are whose, and that they train one surrogate."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ccu_fast.data.captions import list_pairs
from ccu_fast.mem.job.processes import Average, share
from tests.support import mem_datasets as made

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_are_disjoint_and_complete(tmp_path: Path, world: int) -> None:
    for number, source in enumerate((made.write_csv, made.write_shards)):
        listing = list_pairs(source(tmp_path / str(number), n=13))
        shares = [share(listing, rank, world) for rank in range(world)]
        assert sorted(image for part in shares for image in part) == list(range(13))
        if listing.spans is not None:
            shards = [set(listing.spans[part, 0].tolist()) for part in shares]
            assert sum(map(len, shards)) == 5 == len(set.union(*shards)), "no shard has two writers"


def test_too_many_processes(tmp_path: Path) -> None:
    listing = list_pairs(made.write_shards(tmp_path / "in", n=6))
    with pytest.raises(ValueError, match="at least two images in whole shards for each of 3"):
        share(listing, 0, 3)


def model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()


def step(net: nn.Module, rank: int, at: int, average: Average | None) -> list[torch.Tensor]:
    """One optimiser step on data that depend on the process; the gradients that it used."""
    rng = torch.Generator().manual_seed(100 * at + rank)
    net.zero_grad()
    net(torch.randn(6, 4, generator=rng, dtype=torch.float64)).square().sum().backward()
    if average is not None:
        average(net.parameters())
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    torch.optim.SGD(net.parameters(), lr=0.01).step()
    return gradients


def child(rank: int, folder: Path) -> None:
    limit = timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=limit)
    net, average = model(), Average()
    average.buffers = net.buffers
    first: Any = None
    for at in range(3):
        used = step(net, rank, at, average)
        first = used if first is None else first
    torch.save({"state": net.state_dict(), "first": first}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_hold_the_same_bits_and_use_the_mean_gradient(tmp_path: Path) -> None:
    children = []
    for rank in range(2):
        forked = os.fork()
        if forked == 0:
            try:
                child(rank, tmp_path)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(forked)
    assert [os.waitpid(forked, 0)[1] for forked in children] == [0, 0]
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(a["state"][name], b["state"][name]) for name in a["state"])
    alone = [step(model(), rank, 0, None) for rank in range(2)]
    for got, x, y in zip(a["first"], *alone, strict=True):
        assert torch.equal(got, (x + y) / 2)
    assert not torch.equal(alone[0][0], alone[1][0])
