"""Which parameters may change: by patterns of their names, and by how much the forget set depends on each weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ccu_fast import check
from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.model import TwoModalityModel, forget_loss

Mask = Callable[[TwoModalityModel, PairedData, PairedData], dict[str, Tensor]]
"""From the original and the two sets to a bool tensor for each parameter's name: True may change."""


def freeze_all_but(model: nn.Module, patterns: Sequence[str]) -> None:
    """Switch the gradient off for every parameter whose name matches none of the shell patterns.

    Args:
        model: changed in place. A parameter that required no gradient before still requires none.
        patterns: such as ``("visual_*", "projector.*")``, matched against the names of ``named_parameters``.

    Raises:
        TypeError: a string instead of a sequence of them.
        ValueError: a pattern that matches nothing; nothing left to train.
    """
    if isinstance(patterns, str):
        raise TypeError(f"trainable: expected a sequence of patterns, got the string {patterns!r}")
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"trainable: expected patterns of parameter names ({', '.join(names[:4])}, …), got {pattern!r}, "
                "which matches none"
            )
    for name, parameter in model.named_parameters():
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"trainable: expected patterns that leave something to train, got {list(patterns)}")


def saliency(share: float = 0.5, *, batch: int = 256) -> Mask:
    """The mask that lets only the weights change on which the forget set depends most::

        g = abs(grad of the visual and fused cross-entropy over the forget set)
        mask = g >= quantile(all of g together, 1 - share)

    Args:
        share: of all trainable weights that may change, in (0, 1]; 0.5 in the paper.
        batch: items at a time.

    Raises:
        ValueError: share out of range.

    Source: Fan et al. 2024, SalUn (arXiv 2310.12508), eq. 4; without heads the gradient is that of the paired InfoNCE.
    """
    check.number("share", share, low=1e-9, high=1)
    check.integer("batch", batch, low=1)

    def mask(original: TwoModalityModel, forget: PairedData, retain: PairedData) -> dict[str, Tensor]:
        # In evaluation mode and on a copy: neither statistics nor gradients of the original may change.
        model = copy.deepcopy(original).eval()
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for rows in torch.arange(len(forget), device=forget.ids.device).split(batch):
            part = forget.batch(rows)
            (forget_loss(model, part) * len(rows)).backward()
        size = {name: torch.zeros_like(p) if p.grad is None else p.grad.abs() for name, p in named.items()}
        together = torch.cat([g.flatten() for g in size.values()])
        count = max(1, round(share * len(together)))
        threshold = together.kthvalue(len(together) - count + 1).values
        # A weight the forget set does not touch at all is never salient, however large the share.
        return {name: (g >= threshold) & (g > 0) for name, g in size.items()}

    return mask
