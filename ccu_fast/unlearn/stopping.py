"""When a run on a user's own data stops before its budget is spent: unseen items tell how far to go."""

from __future__ import annotations

import torch

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.config import HeldOut
from ccu_fast.unlearn.loop import answers, right_shares
from ccu_fast.unlearn.model import TwoModalityModel, heads
from ccu_fast.unlearn.settings import Stop


def held_out_of(model: TwoModalityModel, forget: PairedData, unseen: PairedData, kind: str, stop: Stop) -> HeldOut:
    """What :func:`ccu_fast.unlearn.unlearn` stops by.

    A class is to be named right never, instances and pairs as often as unseen ones are before the run.

    Args:
        model: before the run.
        forget: the items to forget.
        unseen: items that were never trained on.
        kind: "class", "instances" or "pairs".
        stop: slack and interval.

    Raises:
        ValueError: no unseen item of a class that stays; a model with heads, but none for the visual modality.
    """
    if forget.labelled and heads(model) and "visual" not in heads(model):
        raise ValueError("early_stop: expected False for a model with heads but none for the visual modality, got True")
    if kind != "class":
        level = right_shares(answers(model, forget), answers(model, unseen))[1]["visual"]
        return HeldOut(unseen, level, stop.slack, stop.every)
    stays = ~torch.isin(unseen.labels, forget.labels)
    if not bool(stays.any()):
        raise ValueError("early_stop: expected unseen items of classes that stay, got none")
    return HeldOut(unseen[stays], 0.0, stop.slack, stop.every)
