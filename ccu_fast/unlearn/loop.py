"""One loop for every method that starts from the trained model: same batches, same budget, same bookkeeping."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.config import Budget, Progress
from ccu_fast.unlearn.protocol import TwoModalityModel

CHECK_EVERY = 5


@dataclass(frozen=True)
class Batch:
    """What one step sees: items of both sets, the rows they have there, which step it is (from 0) and of how many."""

    forget: PairedData
    retain: PairedData
    forget_rows: Tensor
    retain_rows: Tensor
    step: int
    steps: int


Step = Callable[[TwoModalityModel, Batch], Tensor]
"""The loss of one step."""

Prepare = Callable[[TwoModalityModel, PairedData, PairedData], Step]
"""From the frozen original and the two whole sets to the step of a method."""


@dataclass(frozen=True)
class HeldOut:
    """When to stop: at the first check (every 5 steps) where the visual accuracy on the forget set is at most
    ``level`` and each of the visual, other and fused accuracies on ``retain`` is at most ``slack`` below the
    original's.

    Attributes:
        retain: held-out items of the classes that stay.
        level: 0 for a class; for instances the original's visual accuracy on held-out items, which is how it treats
            what it has not seen.
        slack: ≥ 0.
    """

    retain: PairedData
    level: float
    slack: float = 0.01


@dataclass(frozen=True)
class Run:
    """A finished run: the new model and what it cost.

    Attributes:
        model: the unlearned copy; the original is as it was.
        steps: optimiser steps taken.
        items: items of the batches, both sets together.
        seconds: wall time of preparation, steps and checks.
        losses: the loss of every step.
    """

    model: TwoModalityModel
    steps: int
    items: int
    seconds: float
    losses: list[float]


def run(
    original: TwoModalityModel,
    forget: PairedData,
    retain: PairedData,
    prepare: Prepare,
    budget: Budget,
    *,
    seed: int = 0,
    held_out: HeldOut | None = None,
    progress: Progress | None = None,
    stage: str = "unlearn",
) -> Run:
    """Unlearn a copy of ``original`` with Adam.

    Args:
        original: the trained model; it is not changed.
        forget, retain: the two sets, on the device of the model.
        prepare: the method.
        budget: steps, learning rate, batch.
        seed: of the batches.
        held_out: stop early when this is reached.
        progress: called every few steps as progress(stage, done, total, note).
        stage: the name progress hears.

    Raises:
        FloatingPointError: the loss is NaN or infinite; the message says at which step.
    """
    start = time.perf_counter()
    frozen = copy.deepcopy(original).eval().requires_grad_(False)
    model = copy.deepcopy(original).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=budget.learning_rate)
    step_loss = prepare(frozen, forget, retain)
    floor = {} if held_out is None else {k: v - held_out.slack for k, v in accuracies(frozen, held_out.retain).items()}

    losses: list[float] = []
    items = 0
    for step, batch in enumerate(_batches(forget, retain, budget, seed), start=1):
        loss = step_loss(model, batch)
        value = loss.item()
        if not abs(value) < float("inf"):
            raise FloatingPointError(f"{stage}: the loss is {value} at step {step} of {budget.steps}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(value)
        items += len(batch.forget) + len(batch.retain)
        if step % CHECK_EVERY == 0 or step == budget.steps:
            if progress is not None:
                progress(stage, step, budget.steps, f"loss {value:.3f}")
            if held_out is not None and _reached(model, forget, held_out, floor):
                break
    model.train(original.training)
    return Run(model, len(losses), items, time.perf_counter() - start, losses)


@torch.no_grad()
def accuracies(model: TwoModalityModel, data: PairedData) -> dict[str, float]:
    """The share of items each head names right: ``{"visual": …, "other": …, "fused": …}`` in [0, 1]."""
    was_training = model.training
    model.eval()
    visual, other = model.embed_visual(data.visual), model.embed_other(data.other)
    logits = {
        "visual": model.classify_visual(visual),
        "other": model.classify_other(other),
        "fused": model.classify_fused(visual, other),
    }
    model.train(was_training)
    return {name: (value.argmax(-1) == data.labels).double().mean().item() for name, value in logits.items()}


@torch.no_grad()
def embed(model: TwoModalityModel, data: PairedData) -> tuple[Tensor, Tensor]:
    """Visual and other embeddings ``[N, D]`` of all items, in evaluation mode."""
    was_training = model.training
    model.eval()
    result = model.embed_visual(data.visual), model.embed_other(data.other)
    model.train(was_training)
    return result


def epochs_of_rows(items: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions in batches, a fresh permutation for every pass; a last partial batch is left out."""
    size = min(batch, items)
    while True:
        order = torch.randperm(items, generator=generator)
        yield from order[: items // size * size].split(size)


def _batches(forget: PairedData, retain: PairedData, budget: Budget, seed: int) -> Iterator[Batch]:
    device = forget.labels.device
    # Two streams, so that the retain batches of a method do not depend on how often its forget batch changes.
    forget_rows = epochs_of_rows(len(forget), budget.batch, torch.Generator().manual_seed(2 * seed))
    retain_rows = epochs_of_rows(len(retain), budget.batch, torch.Generator().manual_seed(2 * seed + 1))
    for step in range(budget.steps):
        if step % budget.retain_per_forget == 0:
            u = next(forget_rows).to(device)
            forget_batch = forget.batch(u)
        r = next(retain_rows).to(device)
        yield Batch(forget_batch, retain.batch(r), u, r, step, budget.steps)


def _reached(model: TwoModalityModel, forget: PairedData, held_out: HeldOut, floor: dict[str, float]) -> bool:
    if accuracies(model, forget)["visual"] > held_out.level:
        return False
    return all(value >= floor[name] for name, value in accuracies(model, held_out.retain).items())
