"""Low-rank adaptation: what a run adds to a weight is a product of two thin matrices, merged in at the end.

Source: Hu et al. 2021, LoRA (arXiv 2106.09685), with α = r.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ccu_fast.unlearn.alarms import NothingTrainable
from ccu_fast.unlearn.parameters import some

# Of each kind of layer, the weights that map linearly; attention holds its three projections in one.
WEIGHTS: dict[type[nn.Module], str] = {nn.Linear: "weight", nn.MultiheadAttention: "in_proj_weight"}


class LowRank(nn.Module):
    """W ↦ W + up · down, where ``up`` is 0 at first.

    Args:
        weight: ``[out, in]``.
        rank: of the product, at least 1; capped at what the weight's shape allows.
        generator: of ``down``, whose entries have mean 0 and variance 1 / in.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rank = min(rank, *weight.shape)
        down = torch.randn(rank, weight.shape[1], generator=generator, dtype=torch.float64) / weight.shape[1] ** 0.5
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight."""
        return weight + self.up @ self.down


def attach(model: nn.Module, rank: int, leave: Collection[str] = (), seed: int = 0) -> Callable[[], None]:
    """Train the product of every linear layer's :class:`LowRank` and nothing else.

    Args:
        model: changed in place. Linear layers, and the joint projection of attention, are adapted where their weight
            requires a gradient; every other parameter then requires none.
        rank: at least 1.
        leave: names of weights that are not adapted all the same.
        seed: of the start.

    Returns:
        What merges the products into the weights, which then have their own names again.

    Raises:
        NothingTrainable: no linear layer is left to adapt.
        ValueError: a weight that several layers share, which could not be merged.
    """
    found = adaptable(model, leave)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    places = [(layer, name, list(layer._parameters)) for layer, name in found]
    for layer, name, _ in places:
        parametrize.register_parametrization(layer, name, LowRank(getattr(layer, name), rank, generator))

    def merge() -> None:
        for layer, name, order in places:
            parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
            # torch has put the weight last; whoever lists the parameters is to find it where it was.
            own = dict(layer._parameters)
            layer._parameters.clear()
            layer._parameters.update({key: own[key] for key in order})

    return merge


def adaptable(
    model: nn.Module, leave: Collection[str] = (), free: Collection[str] | None = None
) -> list[tuple[nn.Module, str]]:
    """The layers that :func:`attach` adapts and the names of their weights, and its errors; the model is not changed.

    Args:
        model, leave: of :func:`attach`.
        free: names of the parameters that may change; None: those that require a gradient.
    """
    may = {id(p) for name, p in model.named_parameters() if (p.requires_grad if free is None else name in free)}
    linear = [layer for layer in _linear(model) if layer[0] not in leave]
    found = [(layer, name) for _, layer, name in linear if id(getattr(layer, name)) in may]
    if not found:
        listed = f", such as {some(key for key, *_ in linear)}," if linear else ""
        raise NothingTrainable(
            f"lora: expected trainable to match the weight of a linear layer of the visual modality{listed} got none"
        )
    shared = Counter(id(p) for layer in model.modules() for p in layer.parameters(recurse=False))
    if any(shared[id(getattr(layer, name))] > 1 for layer, name in found):
        raise ValueError("lora: expected linear layers with weights of their own, got one that several layers share")
    return found


def linear_weights(model: nn.Module) -> frozenset[str]:
    """The names of the weights that could be adapted."""
    return frozenset(key for key, *_ in _linear(model))


def _linear(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Name of the weight, layer, its name there."""
    for prefix, layer in model.named_modules():
        for kind, name in WEIGHTS.items():
            weight = getattr(layer, name, None) if isinstance(layer, kind) else None
            if isinstance(weight, nn.Parameter):
                yield f"{prefix}.{name}" if prefix else name, layer, name
