"""One loop for every method that starts from the trained model: same batches, same budget, same bookkeeping."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ccu_fast.data.disk_rows import DiskRows, row_digests
from ccu_fast.data.paired import PairedData
from ccu_fast.runs.checkpoint import Checkpoint, Keeper, fingerprint
from ccu_fast.runs.progress import Clock, Progress
from ccu_fast.runs.provenance import Hashes
from ccu_fast.runs.retrieval import retrieval_ranks, shared_groups
from ccu_fast.unlearn.alarms import NotFinite
from ccu_fast.unlearn.config import Budget, HeldOut
from ccu_fast.unlearn.model import TwoModalityModel, evaluating, heads, logits_of
from ccu_fast.unlearn.parallel import Alone, Shared
from ccu_fast.unlearn.parameters import freeze_all_but, salient

TOLD_EVERY = 5  # steps between two reports of progress
CHUNK = 1024  # items embedded at once where no gradient is needed


@dataclass(frozen=True)
class Batch:
    """What one step sees: items of both sets, the rows they have there, which step it is (from 0) and of how many."""

    forget: PairedData
    retain: PairedData
    forget_rows: Tensor
    retain_rows: Tensor
    step: int
    steps: int

    def embed(self, model: TwoModalityModel) -> tuple[Tensor, Tensor]:
        """The visual and the other embeddings ``[N_u + N_r, D]`` of both parts, the forget batch first."""
        visual = model.embed_visual(torch.cat([self.forget.visual, self.retain.visual]))
        return visual, model.embed_other(torch.cat([self.forget.other, self.retain.other]))


Step = Callable[[TwoModalityModel, Batch], Tensor]
"""The loss of one step."""

Prepare = Callable[[TwoModalityModel, PairedData, PairedData, int], Step]
"""A method: from the frozen original, the two whole sets and the seed of the run to its step."""

Move = Callable[[], object]
"""Lets the optimiser take its step."""

Update = Callable[[TwoModalityModel, Batch, Move, dict[str, Tensor]], None]
"""What happens once a step has its gradients: it may change them, lets the optimiser move, and may change the weights.
What it has to remember from one step to the next goes in the dictionary, which is empty at first and part of a
checkpoint."""

PrepareUpdate = Callable[[TwoModalityModel, PairedData, PairedData, int], Update]
"""The same from the same four to a method's :data:`Update`."""


@dataclass(frozen=True)
class Run:
    """A finished run: the new model and what it cost.

    Attributes:
        model: the unlearned copy; the original is as it was.
        steps: optimiser steps taken.
        items: items of the batches, both sets together.
        seconds: wall time of preparation, steps and checks.
        cpu_seconds: CPU time of the same, of all threads together.
        losses: the loss of every step.
    """

    model: TwoModalityModel
    steps: int
    items: int
    seconds: float
    cpu_seconds: float
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
    trainable: Sequence[str] = ("*",),
    keep: Collection[str] = (),
    saliency: float = 1.0,
    update: PrepareUpdate | None = None,
    start: Callable[[TwoModalityModel], None] | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
    stage: str = "unlearn",
    more: Any = None,
    unseen: PairedData | None = None,
    group: dist.ProcessGroup | None = None,
    scaled: bool = False,
    adapt: Callable[[TwoModalityModel], Callable[[], None]] | None = None,
    hashes: Hashes | None = None,
) -> Run:
    """Unlearn a copy of ``original`` with Adam.

    Args:
        original: the trained model; it is not changed.
        forget, retain: the two sets, on the device of the model.
        prepare: the method.
        budget: steps, learning rate, batch.
        seed: of the batches and of what the method draws.
        held_out: stop early when this is reached.
        trainable: shell patterns of the names of parameters that may change.
        keep: names of parameters that may not, whatever ``trainable`` says, and of buffers (:func:`.freeze_all_but`).
        saliency: in (0, 1], the share of weights that may change, of those that ``trainable`` and ``keep`` leave: those
            the forget set depends on most.
        update: what the method does in a step besides its loss: a mask of the gradients, a projection of the weights.
        start: changes the copy in place before the first step; not called by a resumed run.
        checkpoint: where the state is written; a run that finds one there goes on from it and ends as it would have.
        progress: called every few steps as progress(stage, done, total, note).
        stage: what progress is told first.
        more, unseen: what else decides the result, of JSON and as items: a checkpoint or a process with another is not
            of this run.
        group: processes that share the run, each called with the same arguments and embedding its part of every batch
            (:mod:`ccu_fast.unlearn.parallel`); the result is that of one process but for rounding, on all of them. The
            first reports progress, reads and writes the checkpoint and decides when to stop. None: this one alone.
        scaled: whether the loss is scaled before its backward pass, and steps with an infinite gradient are left out,
            as fp16 needs it (``torch.amp.GradScaler``).
        adapt: changes what of the copy is trained; what it returns undoes that in the end.
        hashes: those of the original and the sets that are known, for the checkpoint's.

    Raises:
        FloatingPointError: the loss is NaN or infinite; the message says at which step and, with a checkpoint, where
            the last good state is.
        ValueError: another run on another process of the group, or more processes than a batch has rows.
    """
    ready()
    clock = Clock()
    frozen = copy.deepcopy(original).eval().requires_grad_(False)
    model = copy.deepcopy(original).train()
    freeze_all_but(model, trainable, keep)  # type: ignore[arg-type]
    undo = None if adapt is None else adapt(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(parameters.values(), lr=budget.learning_rate, fused=True)
    scaler = torch.amp.GradScaler(forget.labels.device.type, enabled=scaled)
    move = partial(scaler.step, optimizer)
    settings = {
        "budget": asdict(budget),
        "seed": seed,
        "stage": stage,
        "more": [checkpoint and checkpoint.settings, more],
    }
    parts = [part for part in (forget, retain, unseen) if part is not None]
    if held_out is not None:
        settings["stop"] = [held_out.level, held_out.slack, held_out.every]
        parts.append(held_out.retain)
    key = fingerprint(original, parts, settings, hashes) if checkpoint or group else ""
    device = forget.labels.device
    rows = min(budget.batch, len(forget), len(retain))
    together = Alone() if group is None else Shared(group, key, rows, device)
    open_weights = {} if saliency == 1 else together.of_first(partial(salient, model, forget, saliency))
    keeper = None if checkpoint is None else Keeper(checkpoint, key, device)
    stored = None if keeper is None else together.of_first(keeper.load)
    done = stored is not None and stored["done"]
    step_loss = None if done else prepare(frozen, forget, retain, seed)
    change = _only_move if update is None else update(frozen, forget, retain, seed)
    memory: dict[str, Tensor] = {}
    floor: dict[str, float] = {}
    if held_out is not None:
        _, intact = _both_shares(frozen, forget, held_out)
        floor = {name: value - held_out.slack for name, value in intact.items()}
    losses: list[float] = []
    if keeper is not None and stored is not None:
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        losses, memory = stored["losses"], stored.get("memory", memory)
        keeper.written = len(losses)
        scaler.load_state_dict(stored.get("scaler", {}))
        clock.add(stored["seconds"])
    elif start is not None:
        start(model)
        with torch.no_grad():
            for name, before in original.named_parameters():
                if name in open_weights:
                    parameters[name].copy_(torch.where(open_weights[name].to(device), parameters[name], before))
        together.agree(model)
    towers = together.towers(model)

    for step, batch in enumerate(_batches(forget, retain, budget, seed, len(losses)), start=len(losses) + 1):
        if done or step_loss is None:
            break
        loss = step_loss(towers, batch)
        value = loss.item()
        if not math.isfinite(value):
            raise _not_finite(f"the loss is {value}", stage, step, budget, keeper)
        for parameter in parameters.values():  # as zero_grad, whose bookkeeping shows in a short step
            parameter.grad = None
        scaler.scale(loss).backward()
        together.average_gradients(model)
        scaler.unscale_(optimizer)
        for name, parameter in parameters.items():
            if name in open_weights and parameter.grad is not None:
                parameter.grad.mul_(open_weights[name].to(device))
        change(model, batch, move, memory)
        scaler.update()
        losses.append(value)
        last = step == budget.steps
        if (step % TOLD_EVERY == 0 or last) and progress is not None and together.is_first:
            progress(stage, step, budget.steps, f"loss {value:.3f}")
        done = last
        if not last and held_out is not None and step % held_out.every == 0:
            done = together.of_first(partial(_reached, model, forget, held_out, floor))
        if keeper is not None and (done or step % keeper.checkpoint.every == 0):
            if not all(bool(torch.isfinite(p).all()) for p in parameters.values()):
                raise _not_finite("a weight is not finite", stage, step, budget, keeper)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
                "losses": losses,
                "memory": memory,
                "seconds": list(clock.read()),
                "done": done,
            }
            together.of_first(partial(keeper.save, state))
            keeper.written = len(losses)
    if undo is not None:
        undo()
    model.train(original.training)
    for parameter, as_was in zip(model.parameters(), original.parameters(), strict=True):
        parameter.requires_grad_(as_was.requires_grad)
    items = len(losses) * sum(min(budget.batch, len(part)) for part in (forget, retain))
    return Run(model, len(losses), items, *clock.read(), losses)


@cache
def ready() -> None:
    """Have torch import what its first optimiser wants: that takes seconds, which are no method's time."""
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])


def _only_move(model: TwoModalityModel, batch: Batch, move: Move, memory: dict[str, Tensor]) -> None:
    move()


def _not_finite(what: str, stage: str, step: int, budget: Budget, keeper: Keeper | None) -> FloatingPointError:
    message = f"{stage}: {what} at step {step} of {budget.steps}"
    if keeper is not None and keeper.written:
        message += f"; the state after step {keeper.written} is in {keeper.checkpoint.path}"
    # Of the first loss the steps are not to blame, but the weights or the data.
    return (FloatingPointError if step == 1 and what.startswith("the loss") else NotFinite)(message)


@dataclass(frozen=True)
class Answers:
    """What a model makes of items, in evaluation mode.

    Attributes:
        data: the items.
        visual, other: embeddings ``[N, D]``.
        logits: ``[N, classes]`` of each of its heads; none for items without labels.
    """

    data: PairedData
    visual: Tensor
    other: Tensor
    logits: dict[str, Tensor]


def answers(model: TwoModalityModel, data: PairedData, embedded: tuple[Tensor, ...] | None = None) -> Answers:
    """Embed all items, unless they are, and classify them."""
    visual, other = embed(model, data) if embedded is None else embedded
    with evaluating(model):
        named = heads(model) if data.labelled else ()
        logits = {head: logits_of(model, head, visual, other) for head in named}
    return Answers(data, visual, other, logits)


def right_shares(*parts: Answers, thing: Tensor | None = None) -> list[dict[str, float]]:
    """The share of items that each head names right, ``{"visual": …, "other": …, "fused": …}`` in [0, 1] for each part.

    Without heads or labels the share of items that find their partner first, see :func:`partner_ranks`.
    """
    if all(part.logits for part in parts):
        right = [
            {head: logits.argmax(-1) == part.data.labels for head, logits in part.logits.items()} for part in parts
        ]
    else:
        ranks_of = partner_ranks(*parts, thing=thing)
        right = [{side: ranks == 1 for side, ranks in of_part.items()} for of_part in ranks_of]
    return [{name: hits.double().mean().item() for name, hits in of_part.items()} for of_part in right]


def partner_ranks(*parts: Answers, thing: Tensor | None = None) -> list[dict[str, Tensor]]:
    """The rank of each item's partner among the items of all parts together, int64 ``[N]`` for each part.

    From the visual to the other modality ("visual") and back ("other"). What ties count says
    :func:`~ccu_fast.runs.retrieval.retrieval_ranks`; of items with the same visual or other input (``thing``, by
    default of :func:`same_thing`) each is the other's partner.
    """
    visual, other = (torch.cat([getattr(part, side) for part in parts]) for side in ("visual", "other"))
    thing = (same_thing(*(part.data for part in parts)) if thing is None else thing).to(visual.device)
    sizes = [len(part.data) for part in parts]
    ranks = {
        side: retrieval_ranks(query, gallery, thing, thing).split(sizes)
        for side, query, gallery in (("visual", visual, other), ("other", other, visual))
    }
    return [{side: of_side[number] for side, of_side in ranks.items()} for number in range(len(parts))]


def same_thing(*parts: PairedData) -> Tensor:
    """The same number for all items of these sets that share a visual or an other input: int64 ``[items]``, on the CPU.

    A caption of several pictures is right for each, and so is a picture for each of its captions.
    """

    def digests(inputs: Tensor) -> list[bytes]:
        found = inputs.digests() if isinstance(inputs, DiskRows) else row_digests(inputs)
        return [row.tobytes() for row in found.numpy()]

    views = [[digest for part in parts for digest in digests(getattr(part, side))] for side in ("visual", "other")]
    return shared_groups(*views)


def chances(*parts: PairedData, thing: Tensor | None = None) -> list[float]:
    """What :func:`right_shares` expects of a model that has learned nothing, for each part, without heads or labels."""
    thing = same_thing(*parts) if thing is None else thing
    _, number, count = thing.unique(return_inverse=True, return_counts=True)
    by_item = (count[number] / len(thing)).split([len(part) for part in parts])
    return [float(chance.double().mean()) for chance in by_item]


def embed(model: TwoModalityModel, data: PairedData) -> tuple[Tensor, Tensor]:
    """Visual and other embeddings ``[N, D]`` of all items, in evaluation mode."""
    other = embed_other(model, data.other)
    return embed_visual(model, data.visual), other


def embed_other(model: TwoModalityModel, other: Tensor) -> Tensor:
    """Other embeddings ``[N, D]`` of all inputs, in evaluation mode."""
    with evaluating(model):
        return torch.cat([model.embed_other(part) for part in other.split(CHUNK)])


def embed_visual(model: TwoModalityModel, visual: Tensor) -> Tensor:
    """Visual embeddings ``[N, D]`` of all inputs, in evaluation mode."""
    with evaluating(model):
        return torch.cat([model.embed_visual(part) for part in visual.split(CHUNK)])


def epochs_of_rows(items: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Positions in batches, a fresh permutation for every pass; a last partial batch is left out."""
    size = min(batch, items)
    while True:
        order = torch.randperm(items, generator=generator)
        yield from order[: items // size * size].split(size)


def _batches(forget: PairedData, retain: PairedData, budget: Budget, seed: int, taken: int) -> Iterator[Batch]:
    """The batches of the steps after those that were taken, whose items are drawn but not read."""
    device = forget.labels.device
    # Two streams, so that the retain batches of a method do not depend on how often its forget batch changes.
    forget_rows = epochs_of_rows(len(forget), budget.batch, torch.Generator().manual_seed(2 * seed))
    retain_rows = epochs_of_rows(len(retain), budget.batch, torch.Generator().manual_seed(2 * seed + 1))
    forget_batch = None
    for step in range(budget.steps):
        if step % budget.retain_per_forget == 0:
            u, forget_batch = next(forget_rows).to(device), None
        r = next(retain_rows).to(device)
        if step >= taken:
            forget_batch = forget.batch(u) if forget_batch is None else forget_batch
            yield Batch(forget_batch, retain.batch(r), u, r, step, budget.steps)


def _both_shares(model: TwoModalityModel, forget: PairedData, held_out: HeldOut) -> list[dict[str, float]]:
    return right_shares(answers(model, forget), answers(model, held_out.retain))


def _reached(model: TwoModalityModel, forget: PairedData, held_out: HeldOut, floor: dict[str, float]) -> bool:
    gone, kept = _both_shares(model, forget, held_out)
    return gone["visual"] <= held_out.level and all(value >= floor[name] for name, value in kept.items())
