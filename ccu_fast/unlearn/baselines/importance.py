"""How much a loss depends on each weight, and where what is to go depends on one more than what is to stay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.model import TwoModalityModel

BATCH = 128  # items whose mean gradient is squared
EPSILON = 1e-15  # added to both measures, as in the released code of SFR-on


@torch.enable_grad()
def sum_of_squares(
    model: TwoModalityModel, loss: Callable[[TwoModalityModel, PairedData], Tensor], batches: Iterable[PairedData]
) -> dict[str, Tensor]:
    """The squared gradient of the loss of each batch, added up, by parameter.

    Parameters that require no gradient are left out, and so are those on which the loss does not depend at all.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total: dict[str, Tensor] = {}
    for batch in batches:
        gradients: Any = torch.autograd.grad(loss(model, batch), list(named.values()), allow_unused=True)
        for name, gradient in zip(named, gradients, strict=True):
            if gradient is not None:
                total[name] = gradient.square() + total.get(name, 0)
    return total


def shuffled(data: PairedData, seed: int) -> list[PairedData]:
    """All items in batches of nearly one size, at most :data:`BATCH`."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).to(data.labels.device)
    return [data.batch(rows) for rows in order.tensor_split(-(-len(data) // BATCH))]


def trainable_copy(frozen: TwoModalityModel) -> TwoModalityModel:
    """A copy all of whose parameters have gradients."""
    return copy.deepcopy(frozen).requires_grad_(True)


def exceeds(forget: Mapping[str, Tensor], keep: Mapping[str, Tensor], model: TwoModalityModel) -> dict[str, Tensor]:
    """Where a weight matters to what goes at least as much as to what stays::

        mask = (forget + 1e-15) / (keep + 1e-15) >= 1

    Args:
        forget, keep: importances by parameter; one that is missing is 0.
        model: its parameters' names and shapes.

    Returns:
        A bool tensor for the name of each parameter.
    """
    masks = {}
    for name, parameter in model.named_parameters():
        none = torch.zeros_like(parameter, requires_grad=False)
        masks[name] = (forget.get(name, none) + EPSILON) / (keep.get(name, none) + EPSILON) >= 1
    return masks
