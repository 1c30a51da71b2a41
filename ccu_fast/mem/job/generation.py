"""The generator's rounds, batch by batch, with checkpoints between them that bound what a kill costs.

Of several processes each has batches of its own; one that has fewer than another in a phase does as many as keep it in
step, so that all of them are at the same count wherever a checkpoint is made.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from ccu_fast.distributed.ranks import gather_objects
from ccu_fast.mem.job.checkpoint import Workplace
from ccu_fast.mem.protection import Protection
from ccu_fast.runs.progress import Progress

LOSS = 0.02  # share of all work that a kill may cost
SHARE = 0.02  # of the time, that checkpoints may take
SOON = 60.0  # seconds that may be lost where checkpoints would take more than their share
LATE = 600.0  # seconds after which there is one though less than LOSS was done, where they take no more than it
LOOKS = 8  # how often the clock is asked before LOSS is done
TOLD = 1.0  # seconds after which the loss is told anew, for which a GPU is waited for


@dataclass(frozen=True)
class Leg:
    """One phase of one round.

    Attributes:
        round: its number.
        phase: its name.
        mine: batches of this process.
        batches: of the process that has most.
        cost: of a batch.
        noise: whether it changes the noise.
    """

    round: int
    phase: str
    mine: int
    batches: int
    cost: float
    noise: bool


def legs(protection: Protection) -> list[Leg]:
    """All phases of all rounds, the same in all processes but for ``mine``."""
    worker = protection.worker
    mine = [(i, phase, n) for i in range(protection.rounds) for phase, n in protection.phases(i).items()]
    most = [max(counts) for counts in zip(*gather_objects([n for _, _, n in mine]), strict=True)]
    return [
        Leg(i, phase, n, batches, worker.cost(phase), worker.changes_noise(phase))
        for (i, phase, n), batches in zip(mine, most, strict=True)
    ]


def generate(protection: Protection, place: Workplace, progress: Progress) -> None:
    """Do all rounds, from the last checkpoint on; the last one is of all of them.

    Args:
        protection: made with the store of ``place``.
        place: where checkpoints are.
        progress: called before every batch and after the last, with counts of batches.
    """
    plan = legs(protection)
    total, stage = sum(leg.batches for leg in plan), f"protecting, {protection.method.name}"
    start = place.load(protection)
    keeper = _Keeper(place, protection, sum(leg.batches * leg.cost for leg in plan))
    note, told = "", -TOLD
    for done, leg, batches in _ticks(plan, start):
        if time.monotonic() - told >= TOLD:
            loss, told = protection.worker.recent_loss(), time.monotonic()
            note = f"round {leg.round + 1} of {protection.rounds}, {leg.phase}"
            note += "" if loss is None else f", loss {loss:.3f}"
            if done == start and protection.worker.execution.compile is not None:
                note += ", compiling the surrogate"
        progress(stage, done, total, note)
        for _ in range(batches):
            protection.advance()
        keeper.after(done + 1, leg, last=done + 1 == total)
    if total:
        progress(stage, total, total, f"surrogate loss {protection.losses['noise'][-1]:.3f}")


def _ticks(plan: list[Leg], start: int) -> Iterator[tuple[int, Leg, int]]:
    """Batches done before, the leg, and how many batches this process does next; from ``start`` on."""
    before = 0
    for leg in plan:
        for i in range(max(start - before, 0), leg.batches):
            yield before + i, leg, leg.mine * (i + 1) // leg.batches - leg.mine * i // leg.batches
        before += leg.batches


class _Keeper:
    """Makes checkpoints.

    When one is due is decided by the work since the last, which is the same for all processes, and by the clock of the
    first of them.
    """

    def __init__(self, place: Workplace, protection: Protection, total: float) -> None:
        self.place, self.protection, self.total = place, protection, total
        self.took = 0.0  # seconds, the last one
        self._begin()

    def _begin(self) -> None:
        self.work, self.looks, self.noise, self.since = 0.0, 0, False, time.monotonic()

    def after(self, done: int, leg: Leg, *, last: bool) -> None:
        """After a batch: make a checkpoint, if one is due."""
        self.work += leg.cost
        self.noise |= leg.noise
        if not last and not self._due(leg):
            return
        start = time.monotonic()
        self.place.save(done, self.protection, noise=self.noise)
        self.took = time.monotonic() - start
        self._begin()

    def _due(self, leg: Leg) -> bool:
        full = (self.work + leg.cost) / self.total > LOSS  # with another batch it would be more
        looks = int(self.work * LOOKS / (self.total * LOSS))
        if not full and looks == self.looks:
            return False
        self.looks = looks
        passed = time.monotonic() - self.since
        cheap = self.took <= SHARE * passed
        due = (cheap or passed >= SOON) if full else (cheap and passed >= LATE)
        return bool(gather_objects(due)[0])
