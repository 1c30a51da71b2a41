"""Gold standard: train again from scratch without what is to be forgotten.

Two kinds: without the items ("drop"), and without their visual half only ("mask"), which is what a method that keeps
the other modality should equal. Same initial weights, epochs and learning rate as the original's training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.runs.progress import Progress
from ccu_fast.unlearn.loop import Run
from ccu_fast.unlearn.model import TwoModalityModel
from ccu_fast.unlearn.study.train import TrainConfig, train


def retrain(
    make_model: Callable[[], TwoModalityModel],
    data: PairedData,
    forget_ids: torch.Tensor,
    config: TrainConfig,
    *,
    kind: str = "mask",
    progress: Progress | None = None,
    stage: str = "retrain",
) -> Run:
    """Train as the original was, without some items.

    Args:
        make_model: called once for a fresh model.
        data: the original training set.
        forget_ids: int64 ids of the items to leave out.
        config: that of the original.
        kind: "mask" hides the visual half of the items, "drop" both halves.
        progress, stage: see :func:`ccu_fast.unlearn.study.train.train`.
    """
    check.one_of("kind", kind, ("mask", "drop"))
    known = ~torch.isin(data.ids, forget_ids)
    if kind == "drop":
        return train(make_model, data[known], config, progress=progress, stage=stage)
    return train(make_model, data, config, visual_known=known, progress=progress, stage=stage)
