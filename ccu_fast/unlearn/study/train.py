"""Training a two-modality model from scratch: the original, and the gold standard of forgetting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.runs.progress import Clock, Progress
from ccu_fast.unlearn.loop import Run, epochs_of_rows
from ccu_fast.unlearn.model import TwoModalityModel, heads, logits_of, task_loss


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        epochs, batch: at least 1.
        learning_rate: of Adam at the start, > 0; it falls to 0 along a cosine.
        seed: of the initial weights and the batches, at least 0.
    """

    epochs: int = 60
    batch: int = 128
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check.integer("epochs", self.epochs, low=1)
        check.integer("batch", self.batch, low=1)
        check.integer("seed", self.seed, low=0)
        check.number("learning_rate", self.learning_rate, low=1e-12)


def train(
    make_model: Callable[[], TwoModalityModel],
    data: PairedData,
    config: TrainConfig,
    *,
    visual_known: Tensor | None = None,
    progress: Progress | None = None,
    stage: str = "train",
) -> Run:
    """A new model, trained on the cross-entropy of its heads; without heads or labels on the InfoNCE of the pairs.

    Args:
        make_model: called once for a fresh model. Its random initial weights come from the seed; the global random
            state is as before afterwards.
        data: the training items.
        config: epochs, batch, learning rate, seed.
        visual_known: bool ``[N]``; items where it is False train the other head only (in a model without: nothing), as
            if their visual half had never existed.
        progress: called once an epoch as progress(stage, done, total, note).
        stage: the name progress hears.

    Raises:
        FloatingPointError: the loss is NaN or infinite; the message says in which epoch.
    """
    if visual_known is not None:
        check.tensor("visual_known", visual_known, dtypes=(torch.bool,))
        check.shape("visual_known", visual_known, [len(data)])
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
        if progress is not None:
            progress(stage, epoch, config.epochs, f"loss {losses[-1]:.3f}")
    taken = steps * config.epochs
    items = taken * min(config.batch, len(data))
    return Run(model.eval(), taken, items, *clock.read(), losses)


def _loss(model: TwoModalityModel, batch: PairedData, known: Tensor | None) -> Tensor:
    """The task's loss of the items whose visual half is known; of the others that of the other head, if any."""
    everything = known is None or bool(known.all())
    other = model.embed_other(batch.other)
    if everything:
        return task_loss(model, model.embed_visual(batch.visual), other, batch.labels)
    assert known is not None
    whole = batch.batch(known)
    loss = other.sum() * 0
    if "other" in heads(model) and batch.labelled:
        # The mean over the whole batch, once for known and unknown items together.
        loss = F.cross_entropy(model.classify_other(other), batch.labels)
        seen = [head for head in heads(model) if head != "other"]
        if not len(whole):
            return loss
        visual, other = model.embed_visual(whole.visual), other[known]
        return loss + sum(F.cross_entropy(logits_of(model, head, visual, other), whole.labels) for head in seen)
    if len(whole):
        loss = loss + task_loss(model, model.embed_visual(whole.visual), other[known], whole.labels)
    return loss
