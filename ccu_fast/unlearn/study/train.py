"""Training a two-modality model from scratch: the original, and the gold standard of forgetting; each is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.runs.progress import Clock, Progress, silent
from ccu_fast.runs.provenance import made_before, save_model, tensors_hash, versions
from ccu_fast.unlearn.loop import Run, epochs_of_rows
from ccu_fast.unlearn.model import TwoModalityModel, task_loss
from ccu_fast.unlearn.study.tasks import Scenario, Task, TrainConfig

KINDS = ("original", "gold_mask", "gold_drop", "gold_again")
ANOTHER_SEED = 1000  # is added to the seed for "gold_again"
# Of the kept models. Raise it whenever the same settings and versions train another model: other data, another
# architecture, another course of the training.
FORMAT = 2


def trained(
    task: Task, split: Scenario, kind: str, seed: int, *, folder: Path | None = None, progress: Progress = silent
) -> Run:
    """The model with the cost of its training, from ``folder`` if the same settings, versions and FORMAT left it there.

    Args:
        task: what to train, and how.
        split: what all but "original" must not see.
        kind: "original", "gold_mask" (the visual half of the forget set hidden, which a method that keeps the other
            modality should equal), "gold_drop" (both halves) or "gold_again" (as "gold_mask", from other initial
            weights and with other batches: no method can be expected to come nearer than one retraining to another).
        seed: of the initial weights and the batches.
        folder: where models are kept; None keeps none.
        progress: see :func:`train`.
    """
    config = replace(task.training, seed=seed + ANOTHER_SEED * (kind == "gold_again"))
    which = f"{task.name}-seed{seed}" + ("" if kind == "original" else f"-{split.name}") + f"-{kind}"
    path = None if folder is None else folder / f"{which}.safetensors"
    made_of = {
        "task": task.name,
        "kind": kind,
        "training": asdict(config),
        "forgotten": None if kind == "original" else tensors_hash({"ids": split.forget.ids}),
        "versions": versions("ccu_fast", "torch", "python", "machine", "threads"),
        "format": FORMAT,
    }
    found = None if path is None else made_before(path, made_of, partial(_restored, task))
    if found is not None:
        return found
    data = split.retain if kind == "gold_drop" else split.train
    known = ~torch.isin(data.ids, split.forget.ids) if kind in ("gold_mask", "gold_again") else None
    done = train(task.make_model, data, config, visual_known=known, progress=progress, stage=kind)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cost = {name: value for name, value in vars(done).items() if name != "model"}
        save_model(done.model, path, {"made_of": made_of, "cost": cost})
    return done


def _restored(task: Task, state: dict[str, Tensor], provenance: dict[str, Any]) -> Run:
    model: Any = task.make_model()
    model.load_state_dict(state)
    return Run(model=model.eval(), **provenance["cost"])


def train(
    make_model: Callable[[], TwoModalityModel],
    data: PairedData,
    config: TrainConfig,
    *,
    visual_known: Tensor | None = None,
    progress: Progress = silent,
    stage: str = "train",
) -> Run:
    """A new model, trained on the cross-entropy of its heads; without heads or labels on the InfoNCE of the pairs.

    Args:
        make_model: called once for a fresh model. Its random initial weights come from the seed; the global random
            state is as before afterwards.
        data: the training items.
        config: epochs, batch, learning rate, seed.
        visual_known: bool ``[N]``; items where it is False train the other head only, as if their visual half had never
            existed. Needs labels and a model with all three heads.
        progress: called once an epoch as progress(stage, done, total, note).
        stage: the name progress hears.

    Raises:
        FloatingPointError: the loss is NaN or infinite; the message says in which epoch.
    """
    clock = Clock()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = make_model().to(data.labels.device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    rows = epochs_of_rows(len(data), config.batch, torch.Generator().manual_seed(config.seed))
    steps = max(1, len(data) // config.batch)
    # Without the decay two runs differ by their last steps more than by their data.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps * config.epochs)
    losses: list[float] = []
    for epoch in range(1, config.epochs + 1):
        total = torch.zeros((), device=data.labels.device)
        for _ in range(steps):
            index = next(rows).to(data.labels.device)
            loss = _loss(model, data.batch(index), None if visual_known is None else visual_known[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        losses.append(total.item() / steps)
        if not abs(losses[-1]) < float("inf"):
            raise FloatingPointError(f"{stage}: the loss is {losses[-1]} in epoch {epoch} of {config.epochs}")
        progress(stage, epoch, config.epochs, f"loss {losses[-1]:.3f}")
    taken = steps * config.epochs
    items = taken * min(config.batch, len(data))
    return Run(model.eval(), taken, items, *clock.read(), losses)


def _loss(model: TwoModalityModel, batch: PairedData, known: Tensor | None) -> Tensor:
    """The task's loss of the items whose visual half is known; of the others that of the other head."""
    other = model.embed_other(batch.other)
    if known is None or bool(known.all()):
        return task_loss(model, model.embed_visual(batch.visual), other, batch.labels)
    # The mean over the whole batch, once for known and unknown items together.
    loss = F.cross_entropy(model.classify_other(other), batch.labels)
    if known.any():
        whole = batch.batch(known)
        visual = model.embed_visual(whole.visual)
        loss = loss + task_loss(model, visual, other[known], whole.labels, visual_only=True)
    return loss
