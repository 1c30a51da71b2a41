"""Cross-modal Contrastive Unlearning: a trained two-modality model loses the visual knowledge of a forget set.

    import ccu_fast
    from ccu_fast.unlearn import PairedData, UnlearnConfig

    forget, retain = data[to_forget], data[~to_forget]              # data: PairedData
    clean = ccu_fast.unlearn(model, forget, retain, UnlearnConfig(forget="class"))

The method follows arXiv 2509.23895 in its three parts; the paper's formulas are not public, and those used here are
this project's definition (:mod:`ccu_fast.unlearn.objective`).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from ccu_fast.data.paired import PairedData
from ccu_fast.runs.checkpoint import Checkpoint
from ccu_fast.runs.progress import Progress
from ccu_fast.unlearn.audit import audit, membership_auc
from ccu_fast.unlearn.config import Budget, HeldOut, UnlearnConfig
from ccu_fast.unlearn.described import MADE, Made, model_card
from ccu_fast.unlearn.method import run_ccu
from ccu_fast.unlearn.model import Model, TwoModalityModel, TwoTowerModel, check_held_out, check_problem
from ccu_fast.unlearn.objective import (
    KeyBank,
    anchor_loss,
    forgetting_loss,
    level_loss,
    neighbour_loss,
    retention_loss,
    separation_loss,
    unclassify_loss,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Budget",
    "Checkpoint",
    "HeldOut",
    "KeyBank",
    "PairedData",
    "TwoModalityModel",
    "TwoTowerModel",
    "UnlearnConfig",
    "anchor_loss",
    "audit",
    "forgetting_loss",
    "level_loss",
    "membership_auc",
    "model_card",
    "neighbour_loss",
    "retention_loss",
    "separation_loss",
    "unclassify_loss",
    "unlearn",
]


def unlearn(
    model: Model,
    forget: PairedData,
    retain: PairedData,
    config: UnlearnConfig | None = None,
    *,
    unseen: PairedData | None = None,
    held_out: HeldOut | None = None,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
    group: ProcessGroup | None = None,
) -> Model:
    """Make a copy of a model that lacks the visual knowledge of the forget set::

        loss = config.forgetting * (a) + config.retention * (b) + config.separation * (c) + config.task * task_loss

    (a) takes a class to nothing (:func:`forgetting_loss`, :func:`unclassify_loss`), instances and pairs to where unseen
    ones are (:func:`level_loss`); (b) leaves what the other modality depends on as it is, or trains it and holds it
    (:func:`retention_loss`); (c) is :func:`separation_loss`. ``config.anchor`` and ``config.neighbours`` weigh more.

    Args:
        model: an ``nn.Module`` with the methods of :class:`TwoTowerModel`, on the device of the data; unchanged. The
            heads of :class:`TwoModalityModel` are used where it has them. Parameters that require no gradient stay.
        forget: the items to forget. Their other modality is kept.
        retain: the items to keep, disjoint from ``forget``.
        config: defaults to forgetting a class.
        unseen: items like those to forget that were never trained on, a validation set for example. Instances and pairs
            are brought to where these are; without any, blends of retained items stand in for them.
        held_out: when to stop before the budget is spent; goes with ``config.early_stop``.
        checkpoint: where the state is written at intervals; a run that finds one there continues from it. Until the run
            is over, what ``model`` says of the sets is kept beside it (:data:`ccu_fast.unlearn.method.KEPT`).
        progress: called every few steps as progress("unlearn", done, total, note).
        group: processes that share the run, each called with the same arguments (:mod:`ccu_fast.unlearn.parallel`); the
            result is that of one process but for rounding, on all of them. None: this one alone.

    Returns:
        The new model, in the training mode ``model`` was in.

    Raises:
        TypeError, ValueError: the model lacks a method, its towers share no space or give no unit vectors, its heads
            lack a class; a set is empty; the sets overlap; a class to forget is still in ``retain`` (or, for
            instances, has left it); early_stop without held_out.
        FloatingPointError: the loss is not finite; the message names the step.

    Source: Cross-modal Contrastive Unlearning (arXiv 2509.23895); the formulas of its three parts are this project's.

    >>> from ccu_fast.models.fusion import FusionModel
    >>> data = ccu_fast.unlearn.PairedData(torch.rand(8, 3), torch.rand(8, 3), torch.arange(8) % 4)
    >>> config = ccu_fast.unlearn.UnlearnConfig(budget=ccu_fast.unlearn.Budget(steps=2))
    >>> model, parts = FusionModel(3, 3, classes=4), (data[data.labels == 0], data[data.labels > 0])
    >>> ccu_fast.unlearn(model, *parts, config).embed_visual(data.visual).shape
    torch.Size([8, 64])
    """
    config = UnlearnConfig() if config is None else config
    if not isinstance(config, UnlearnConfig):
        raise TypeError(f"config: expected an UnlearnConfig, got {type(config).__name__}")
    if config.early_stop != (held_out is not None):
        raise ValueError(
            "held_out: expected a HeldOut with early_stop=True and None without, got "
            f"{'None' if held_out is None else 'one'} with early_stop={config.early_stop}"
        )
    if held_out is not None and not isinstance(held_out, HeldOut):
        raise TypeError(f"held_out: expected a HeldOut, got {type(held_out).__name__}")
    check_problem(model, forget, retain, config.forget, unseen=unseen, group=config.group)
    if held_out is not None:
        check_held_out(model, forget, held_out.retain)
    done = run_ccu(
        cast("TwoModalityModel", model),
        forget,
        retain,
        config,
        unseen=unseen,
        held_out=held_out,
        checkpoint=checkpoint,
        progress=progress,
        group=group,
    )
    MADE[done.model] = Made(config, done.steps, 1 if group is None else group.size())
    return cast("Model", done.model)


class _Callable(ModuleType):
    """``ccu_fast.unlearn`` is this folder and, called, the function of the same name in it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return unlearn(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
