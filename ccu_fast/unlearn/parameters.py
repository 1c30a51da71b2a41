"""Which parameters may change: by patterns of their names, and by how much the forget set depends on each weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import islice

import torch
from torch import Tensor, nn

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.alarms import NothingTrainable
from ccu_fast.unlearn.model import TwoModalityModel, heads, looking, loss_on

CHUNK = 256  # items whose gradient is taken at once


def freeze_all_but(model: nn.Module, patterns: Sequence[str], keep: Collection[str] = ()) -> None:
    """Switch the gradient off for every parameter whose name matches none of the shell patterns, and for those to keep.

    Args:
        model: changed in place. A parameter that required no gradient before still requires none.
        patterns: such as ``("visual_*", "projector.*")``, matched against the names of ``named_parameters``.
        keep: names of parameters that stay whatever the patterns say, and of buffers: the layers that these belong to
            go to evaluation mode, in which a normalisation layer leaves its statistics alone.

    Raises:
        NothingTrainable: a pattern that matches nothing; nothing left to train, with ``keep`` or without.
    """
    free = left_to_train(model, patterns, keep)
    for name, parameter in model.named_parameters():
        if name not in free:
            parameter.requires_grad_(False)
    for prefix, module in model.named_modules():
        if any(_joined(prefix, name) in keep for name, _ in module.named_buffers(recurse=False)):
            module.training = False  # of this layer alone: what it is made of may be of the other side


def left_to_train(model: nn.Module, patterns: Sequence[str], keep: Collection[str] = ()) -> frozenset[str]:
    """The names of the parameters that :func:`freeze_all_but` leaves, and its errors, without a change to the model."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise NothingTrainable(
                f"trainable: expected patterns of parameter names ({some(names)}), got {pattern!r}, which matches none"
            )
    free = {name for name, p in model.named_parameters() if p.requires_grad and matches(name, patterns)}
    if free - set(keep):
        return frozenset(free - set(keep))
    if keep:
        raise NothingTrainable(
            f'keep: expected keep="trained" where the other modality depends on all that may change '
            f'({", ".join(patterns)}), got "exact"{_left(name for name in names if name not in keep)}'
        )
    raise NothingTrainable(f"trainable: expected patterns that leave something to train, got {list(patterns)}")


def some(names: Iterable[str], shown: int = 4) -> str:
    """The first of these names, for an error."""
    first = list(islice(names, shown + 1))
    return ", ".join([*first[:shown], *["…"] * (len(first) > shown)])


def _left(names: Iterable[str]) -> str:
    found = some(names)
    return f", which leaves {found}" if found else ""


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter's name is one of those that the shell patterns mean."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def parameters_of_other(model: TwoModalityModel, data: PairedData) -> frozenset[str]:
    """The names of the parameters that the other modality's embeddings or head depend on.

    Args:
        model: not changed.
        data: its first item is embedded to see.
    """

    def outputs(model: TwoModalityModel, item: PairedData) -> Tensor:
        found = model.embed_other(item.other)
        return torch.cat([found.flatten(), model.classify_other(found).flatten()]) if "other" in heads(model) else found

    return _parameters_of(outputs, model, data)


def parameters_of_visual(model: TwoModalityModel, data: PairedData) -> frozenset[str]:
    """The names of the parameters that the visual embeddings depend on; arguments as above."""
    return _parameters_of(lambda model, item: model.embed_visual(item.visual), model, data)


def _parameters_of(
    outputs: Callable[[TwoModalityModel, PairedData], Tensor], model: TwoModalityModel, data: PairedData
) -> frozenset[str]:
    with looking(model) as model, torch.enable_grad():
        named = {name: p.requires_grad_(True) for name, p in model.named_parameters() if p.is_floating_point()}
        found = outputs(model, data.batch(torch.zeros(1, dtype=torch.long, device=data.ids.device)))
        if not found.requires_grad:  # embeddings that come ready, from no parameter
            return frozenset()
        gradients = torch.autograd.grad(found.sum(), list(named.values()), allow_unused=True)
    return frozenset(name for name, gradient in zip(named, gradients, strict=True) if gradient is not None)


def buffers_of_other(model: TwoModalityModel, data: PairedData) -> frozenset[str]:
    """The names of the buffers of the layers that the other modality passes: running statistics, where it has any.

    Args:
        model: not changed.
        data: its first item is embedded to see.
    """
    found: set[str] = set()
    with looking(model) as model, torch.no_grad():
        for prefix, module in model.named_modules():
            names = [_joined(prefix, name) for name, _ in module.named_buffers(recurse=False)]
            if names:
                module.register_forward_pre_hook(lambda *_, names=names: found.update(names))
        embedded = model.embed_other(data.batch(torch.zeros(1, dtype=torch.long, device=data.ids.device)).other)
        if "other" in heads(model):
            model.classify_other(embedded)
    return frozenset(found)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def salient(original: TwoModalityModel, forget: PairedData, share: float) -> dict[str, Tensor]:
    """The weights on which the forget set depends most::

        g = abs(grad of the visual and fused cross-entropy over the forget set)
        mask = g >= quantile(all of g together, 1 - share)

    Args:
        original: not changed.
        forget: the items whose gradient counts.
        share: of all trainable weights, in (0, 1]; 0.5 in the paper.

    Returns:
        A bool tensor for the name of each trainable parameter.

    Source: Fan et al. 2024, SalUn (arXiv 2310.12508), eq. 4; without heads the gradient is that of the paired InfoNCE.
    """
    # In evaluation mode and on a copy: neither statistics nor gradients of the original may change.
    model = copy.deepcopy(original).eval()
    for rows in torch.arange(len(forget), device=forget.ids.device).split(CHUNK):
        (loss_on(model, forget.batch(rows), visual_only=True) * len(rows)).backward()
    size = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.abs()
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    together = torch.cat([g.flatten() for g in size.values()])
    count = max(1, round(share * len(together)))
    threshold = together.kthvalue(len(together) - count + 1).values
    # A weight the forget set does not touch at all is never salient, however large the share.
    return {name: (g >= threshold) & (g > 0) for name, g in size.items()}
