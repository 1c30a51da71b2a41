"""The noise store's arithmetic in plain torch, any device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ccu_fast.ops.noise_store.problem import STEPS, NoiseAddition, NoiseUpdate, steps_of


def add(p: NoiseAddition) -> None:
    """Write the noisy images to ``p.out``."""
    rows = p.noise if p.index is None else p.noise.index_select(0, p.index)
    if p.images.dtype == torch.uint8:
        steps = rows if rows.dtype == torch.int8 else steps_of(rows).clamp(-STEPS, STEPS)
        p.out.copy_((p.images.to(torch.int32) + steps.to(torch.int32)).clamp(p.lower, p.upper))
        return
    compute = torch.float64 if p.images.dtype == torch.float64 else torch.float32
    noise = rows.to(compute) / STEPS if rows.dtype == torch.int8 else rows.to(compute)
    total = p.images.to(compute) + noise
    if p.limits is None:
        p.out.copy_(total.clamp(p.lower, p.upper))
    else:
        p.out.copy_(total.clamp(*p.limits.to(compute)[:, :, None]))


def update(p: NoiseUpdate) -> None:
    """Add to the rows of ``p.noise`` in place."""
    if not p.rows.numel():
        return
    ids, place, counts = p.rows.unique_consecutive(return_inverse=True, return_counts=True)
    integer = p.noise.dtype == torch.int8
    compute = torch.int32 if integer else torch.float32
    total = p.noise[ids].to(compute)
    turn = torch.arange(len(place), device=place.device) - (counts.cumsum(0) - counts)[place]
    delta = p.delta
    if integer and delta.dtype != torch.int8:
        delta = steps_of(delta)
    elif not integer and delta.dtype == torch.int8:
        delta = delta.float() / STEPS
    # One addition a turn: the order of what meets in a row is then the order of the index.
    for i in range(int(counts.max())):
        now = turn == i
        total[place[now]] += delta[p.order[now]].to(compute)
    p.noise[ids] = total.clamp(-p.eps, p.eps).to(p.noise.dtype)


def first_wrong(values: Tensor, slack: float | None) -> int | None:
    """The position in memory of the first value that a store cannot hold; None if there is none.

    ``slack`` is how far, in steps, a value may be from a whole one within −128..127; None: any finite number will do.
    """
    if slack is None:
        wrong = ~torch.isfinite(values)
    else:
        exact = values if values.dtype == torch.float64 else values.float()
        steps = steps_of(values)
        wrong = ~((exact * STEPS - steps).abs() <= slack) | (steps < -128) | (steps > 127)
    return int(wrong.view(-1).nonzero()[0, 0]) if bool(wrong.any()) else None
