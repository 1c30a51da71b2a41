"""What a model must offer to be unlearned, and the checks at the door."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData

if TYPE_CHECKING:
    from typing_extensions import Self


class TwoModalityModel(Protocol):
    """An ``nn.Module`` with two towers into one space and three heads; ``ccu_fast.models.fusion.FusionModel`` is one.

    "Visual" is the modality to forget, "other" the one to keep, whatever they are.
    """

    training: bool

    def train(self, mode: bool = True) -> Self:
        """As of ``nn.Module``."""

    def eval(self) -> Self:
        """As of ``nn.Module``."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """As of ``nn.Module``."""

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As of ``nn.Module``."""

    def to(self, device: torch.device) -> Self:
        """As of ``nn.Module``."""

    def embed_visual(self, visual: Tensor) -> Tensor:
        """Inputs → unit vectors ``[N, D]``."""

    def embed_other(self, other: Tensor) -> Tensor:
        """Inputs → unit vectors ``[N, D]``."""

    def classify_visual(self, visual: Tensor) -> Tensor:
        """Visual embeddings → logits ``[N, classes]``."""

    def classify_other(self, other: Tensor) -> Tensor:
        """Other embeddings → logits ``[N, classes]``."""

    def classify_fused(self, visual: Tensor, other: Tensor) -> Tensor:
        """Embeddings of both → logits ``[N, classes]``."""


Model = TypeVar("Model", bound=TwoModalityModel)

METHODS = ("embed_visual", "embed_other", "classify_visual", "classify_other", "classify_fused")


def check_problem(model: Any, forget: PairedData, retain: PairedData, roles: str) -> None:
    """Raise what is wrong with a model and its forget and retain sets, by name, before anything runs."""
    _check_module(model)
    missing = [name for name in METHODS if not callable(getattr(model, name, None))]
    if missing:
        raise TypeError(f"model: expected the methods of TwoModalityModel, got a {type(model).__name__} without "
                        f"{', '.join(missing)}")  # fmt: skip
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: expected at least one parameter that requires a gradient, got none")
    for name, data in (("forget", forget), ("retain", retain)):
        if not isinstance(data, PairedData):
            raise TypeError(f"{name}: expected a PairedData, got {type(data).__name__}")
        if len(data) == 0:
            raise ValueError(f"{name}: expected at least one item, got none")
    device = next(model.parameters()).device
    for name, data in (("forget", forget), ("retain", retain)):
        if data.labels.device != device:
            raise ValueError(f"{name}: expected device {device} (that of model), got {data.labels.device}")
    overlap = forget.ids[torch.isin(forget.ids, retain.ids)]
    if len(overlap):
        raise ValueError(
            f"retain: expected no item of the forget set, got {len(overlap)} of them (first id {int(overlap[0])})"
        )
    shared = forget.labels[torch.isin(forget.labels, retain.labels)]
    if roles == "class" and len(shared):
        raise ValueError(
            f"retain: expected no item of a class to forget, got class {int(shared[0])}; "
            "to forget some items of a class use forget='instances'"
        )
    if roles == "instances" and len(shared) < len(forget):
        absent = forget.labels[~torch.isin(forget.labels, retain.labels)]
        raise ValueError(
            f"retain: expected items of every class in the forget set, got none of class {int(absent[0])}; "
            "to forget a whole class use forget='class'"
        )
    _check_outputs(model, forget, retain)


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _check_outputs(model: TwoModalityModel, forget: PairedData, retain: PairedData) -> None:
    sample = torch.zeros(1, dtype=torch.long, device=forget.labels.device)
    item = forget.batch(sample)
    # On a copy: switching modes back and forth would lose those of single layers.
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        visual, other = model.embed_visual(item.visual), model.embed_other(item.other)
        if visual.ndim != 2 or visual.shape != other.shape:
            raise ValueError(
                "model: expected embed_visual and embed_other to share one space [N, D], got shapes "
                f"{list(visual.shape)} and {list(other.shape)}"
            )
        for name, z in (("embed_visual", visual), ("embed_other", other)):
            length = float(z.float().norm())
            if not abs(length - 1) < 1e-2:
                raise ValueError(f"model: expected unit vectors from {name}, got one of length {length:.4g}")
        classes = 1 + int(max(forget.labels.max(), retain.labels.max()))
        for name, logits in (
            ("classify_visual", model.classify_visual(visual)),
            ("classify_other", model.classify_other(other)),
            ("classify_fused", model.classify_fused(visual, other)),
        ):
            if logits.ndim != 2 or logits.shape[1] < classes:
                raise ValueError(f"model: expected [N, {classes} or more] logits from {name}, got {list(logits.shape)}")


def task_loss(model: TwoModalityModel, visual: Tensor, other: Tensor, labels: Tensor) -> Tensor:
    """The sum of the three heads' cross-entropies, from the embeddings ``[N, D]`` of both modalities."""
    return (
        F.cross_entropy(model.classify_visual(visual), labels)
        + F.cross_entropy(model.classify_other(other), labels)
        + F.cross_entropy(model.classify_fused(visual, other), labels)
    )
