"""Train two towers with DistributedDataParallel and the loss of the whole batch, and check it against one process.

For      whoever trains on several GPUs or machines: every pair is to be a negative of every other one, not only of
         those on its own GPU.
Install  pip install '.[apps]' in a checkout of ccu_fast
Run      torchrun --nproc-per-node 2 train_on_two_processes.py     (about 15 CPU seconds; gloo on CPUs, NCCL with GPUs)
Prints   the loss over the processes and that of one process, which takes each step from the same weights on the whole
         batch; at the end how far apart a step ever left them. In fp32 that is rounding. NCCL has not been tried yet.
"""

from __future__ import annotations

import argparse
import math
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ccu_fast
import ccu_fast.distributed as over
from ccu_fast.data.halves import load_halves


class TwoTowers(nn.Module):
    """The left and the right half of a handwritten digit, into one space."""

    def __init__(self, width: int = 128, dim: int = 64) -> None:
        super().__init__()
        self.left, self.right = (
            nn.Sequential(nn.Linear(32, width), nn.GELU(), nn.Linear(width, dim)) for _ in range(2)
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The scale is returned, and not read from outside: DistributedDataParallel averages the gradients of what its
        # forward has used.
        return self.left(left), self.right(right), self.logit_scale.exp()


def train(args: argparse.Namespace) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if args.device == "cuda" else torch.device("cpu")
    pairs = load_halves().train
    left, right = pairs.visual.to(device), pairs.other.to(device)

    torch.manual_seed(args.seed)  # the same weights and batches on every process
    model, alone = TwoTowers().to(device), TwoTowers().to(device)
    alone.load_state_dict(model.state_dict())
    parallel = DistributedDataParallel(model)
    optimizer, other = (torch.optim.SGD(each.parameters(), lr=args.lr, momentum=0.9) for each in (parallel, alone))
    if rank == 0:
        print(f"{world} processes ({dist.get_backend()}), {args.batch} pairs in a batch, {args.batch // world} on each")
    apart = 0.0

    for step in range(1, args.steps + 1):
        rows = torch.randperm(len(left))[: args.batch].to(device)
        mine = rows[rank::world]  # any share: processes may have different numbers of pairs

        # Before, on this process's negatives alone:
        #     x, y, scale = parallel(left[mine], right[mine])
        #     loss = clip_loss(x, y, scale)
        # After, against the pairs of all processes; only one side is sent around:
        x, y, scale = parallel(left[mine], right[mine])
        loss = over.info_nce(x, y, scale=scale, normalize=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        if rank == 0:  # the same step on the whole batch, in one process
            x, y, scale = alone(left[rows], right[rows])
            expected = ccu_fast.info_nce(x, y, scale=scale, normalize=True)
            other.zero_grad()
            expected.backward()
            other.step()
            both = zip(model.parameters(), alone.parameters(), strict=True)
            apart = max(apart, *((p - q).abs().max().item() for p, q in both))
            alone.load_state_dict(model.state_dict())  # or rounding would grow with each step, as training makes it
            difference = abs(loss.item() - expected.item())
            if step % args.every == 0 or step == args.steps:
                print(f"step {step:3}  loss {loss.item():.6f}  of one process {expected.item():.6f}")
            if difference > 1e-4 * expected.item():
                raise SystemExit(f"step {step}: the losses differ by {difference:.1e}")

    if rank == 0:
        print(f"largest difference of a weight after any of {args.steps} steps: {apart:.1e}")


def main() -> None:
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description="Train on several processes; start it with torchrun.")
    parser.add_argument("--batch", type=int, default=512, help="pairs of all processes together")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=20, help="steps between two lines")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where each process has a GPU of its own")
    parser.add_argument("--small", action="store_true", help="a run of seconds, for tests")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("expected to be started by: torchrun --nproc-per-node 2 train_on_two_processes.py")
    if args.device is None:
        args.device = "cuda" if gpus >= int(os.environ["LOCAL_WORLD_SIZE"]) else "cpu"
    if args.small:
        args.steps, args.every = 10, 5
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    try:
        train(args)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
