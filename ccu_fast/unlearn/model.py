"""What a model must offer to be unlearned, and the checks before a run."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.losses.functional import info_nce

if TYPE_CHECKING:
    from typing_extensions import Self


class TwoTowerModel(Protocol):
    """An ``nn.Module`` with two towers into one space, such as CLIP.

    "Visual" is the modality to forget, "other" the one to keep, whatever they are.

    >>> from ccu_fast.models.fusion import FusionModel
    >>> FusionModel(visual_dim=8, other_dim=6, classes=3).embed_visual(torch.ones(2, 8)).shape
    torch.Size([2, 64])
    """

    training: bool

    # As of nn.Module.
    def train(self, mode: bool = True) -> Self: ...
    def eval(self) -> Self: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...
    def buffers(self) -> Iterator[Tensor]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> Any: ...
    def requires_grad_(self, requires_grad: bool = True) -> Self: ...
    def to(self, device: torch.device) -> Self: ...

    def embed_visual(self, visual: Tensor) -> Tensor:
        """Inputs → unit vectors ``[N, D]``."""

    def embed_other(self, other: Tensor) -> Tensor:
        """Inputs → unit vectors ``[N, D]``."""


class TwoModalityModel(TwoTowerModel, Protocol):
    """Two towers with heads on their embeddings; ``ccu_fast.models.fusion.FusionModel`` is one.

    A model may leave out heads it has no use for: :func:`heads` tells which it has.

    >>> from ccu_fast.models.fusion import FusionModel
    >>> FusionModel(visual_dim=8, other_dim=6, classes=3).classify_visual(torch.ones(2, 64)).shape
    torch.Size([2, 3])
    """

    def classify_visual(self, visual: Tensor) -> Tensor:
        """Visual embeddings → logits ``[N, classes]``."""

    def classify_other(self, other: Tensor) -> Tensor:
        """Other embeddings → logits ``[N, classes]``."""

    def classify_fused(self, visual: Tensor, other: Tensor) -> Tensor:
        """Embeddings of both → logits ``[N, classes]``."""


Model = TypeVar("Model", bound=TwoTowerModel)

HEADS = ("visual", "other", "fused")
READ = 1024  # items on a disk that are looked at at once
CLIP_SCALE = 1 / 0.07  # CLIP's initial inverse temperature, for models that bring none of their own


def heads(model: TwoTowerModel, *, visual_only: bool = False) -> tuple[str, ...]:
    """The heads the model has, of "visual", "other" and "fused"; with ``visual_only`` those that see that modality."""
    names = [name for name in HEADS if not (visual_only and name == "other")]
    return tuple(name for name in names if callable(getattr(model, f"classify_{name}", None)))


@contextmanager
def evaluating(model: TwoModalityModel) -> Iterator[None]:
    """The model in evaluation mode and no gradients."""
    # Each layer's own mode: some are kept in evaluation mode while the rest trains.
    training, modes = model.training, [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        for module, mode in modes:
            module.training = mode


@contextmanager
def looking(model: TwoModalityModel) -> Iterator[TwoModalityModel]:
    """A copy in evaluation mode to be looked into, that has the model's own parameters, which are the most of it.

    A forward pass may change buffers, in evaluation mode too, and leave embeddings with their graph in a layer (hooks
    do, and spectral_norm), of which torch makes no copy later. Whether a parameter requires a gradient is set back.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield copy.deepcopy(model, {id(parameter): parameter for parameter, _ in flags}).eval()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def embed_both(model: TwoModalityModel, data: PairedData) -> tuple[Tensor, Tensor]:
    """The visual and the other embeddings ``[N, D]``, with their gradients."""
    return model.embed_visual(data.visual), model.embed_other(data.other)


def logits_of(model: TwoModalityModel, head: str, visual: Tensor, other: Tensor) -> Tensor:
    """The logits ``[N, classes]`` of one of the heads from the embeddings ``[N, D]`` of both modalities."""
    if head == "fused":
        return model.classify_fused(visual, other)
    return model.classify_visual(visual) if head == "visual" else model.classify_other(other)


def task_loss(
    model: TwoModalityModel, visual: Tensor, other: Tensor, labels: Tensor, *, visual_only: bool = False
) -> Tensor:
    """What the model is trained on, from the embeddings ``[N, D]`` of both modalities.

    The sum of its heads' cross-entropies; for a model without heads, and for items without labels, the symmetric
    InfoNCE of the pairs at the model's ``scale`` (CLIP's initial one without).

    Args:
        model: with or without heads.
        visual, other: the embeddings of the same N items.
        labels: int64 ``[N]``; negative = none.
        visual_only: leave out the head that does not see the visual modality, which is to keep what it knows.
    """
    own = heads(model, visual_only=visual_only)
    if not own or not len(labels) or int(labels[0]) < 0:
        return info_nce(visual, other, scale=getattr(model, "scale", CLIP_SCALE))
    first, *rest = (F.cross_entropy(logits_of(model, head, visual, other), labels) for head in own)
    return first + sum(rest) if rest else first


def loss_on(model: TwoModalityModel, data: PairedData, *, visual_only: bool = False) -> Tensor:
    """:func:`task_loss` of items that are not embedded yet; with ``visual_only`` what is lost by forgetting them."""
    return task_loss(model, *embed_both(model, data), data.labels, visual_only=visual_only)


def check_problem(
    model: Any,
    forget: PairedData,
    retain: PairedData,
    roles: str,
    classes: Mapping[str, int] | None = None,
    *,
    unseen: PairedData | None = None,
    test: PairedData | None = None,
    group: int = 1,
) -> None:
    """Raise an error that names what is wrong with a model or its forget and retain sets, before anything runs.

    Args:
        model, forget, retain: of :func:`ccu_fast.unlearn.unlearn`.
        roles: ``forget`` of the settings.
        classes: what they are called → label, for the errors.
        unseen, test: items that were never trained on.
        group: items with equal ``ids // group`` are views of one thing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    missing = [name for name in ("embed_visual", "embed_other") if not callable(getattr(model, name, None))]
    if missing:
        raise TypeError(
            f"model: expected the methods embed_visual and embed_other, got a {type(model).__name__} "
            f"without {', '.join(missing)}"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model: expected at least one parameter that requires a gradient, got none")
    device = next(model.parameters()).device
    new = {name: data for name, data in (("unseen", unseen), ("test", test)) if data is not None}
    given = {"forget": forget, "retain": retain} | new
    for name, data in given.items():
        check_items(name, data, device, forget)
    overlap = forget.ids[torch.isin(forget.ids, retain.ids)]
    if len(overlap):
        raise ValueError(
            f"retain: expected no item of the forget set, got {len(overlap)} of them (first id {int(overlap[0])})"
        )
    seen = {"forget": forget, "retain": retain}
    for name, data in new.items():
        _check_new(name, data, seen, group)
        if roles != "pairs":
            strange = data.labels[~torch.isin(data.labels, torch.cat([forget.labels, retain.labels]))]
            if len(strange):
                raise ValueError(f"{name}: expected classes of forget and retain, got class {int(strange[0])}")
        seen[name] = data
    if roles == "pairs":
        _check_labelled("retain", retain, forget)
    else:
        _check_labels(forget, retain, roles, {label: name for name, label in (classes or {}).items()})
    _check_outputs(cast(TwoModalityModel, model), forget, [data.labels for data in given.values()])


def check_items(name: str, data: Any, device: torch.device, forget: PairedData) -> None:
    """Raise an error unless data has items on the device, with inputs like those of the forget set."""
    if not isinstance(data, PairedData):
        raise TypeError(f"{name}: expected a PairedData, got {type(data).__name__}")
    if len(data) == 0:
        raise ValueError(f"{name}: expected at least one item, got none")
    if data.labels.device != device:
        raise ValueError(f"{name}: expected device {device} (that of model), got {data.labels.device}")
    for side in ("visual", "other"):
        first, own = getattr(forget, side), getattr(data, side)
        if own.shape[1:] != first.shape[1:] or own.dtype != first.dtype:
            raise ValueError(f"{name}: expected {side} inputs like those of forget, {_form(first)}, got {_form(own)}")


def _check_new(name: str, data: PairedData, seen: Mapping[str, PairedData], group: int) -> None:
    """Raise an error unless items are of things that none of the others shows, with finite inputs."""
    of_a_thing = "" if group == 1 else "of a thing "
    for other, known in seen.items():
        again = data.ids[torch.isin(data.ids // group, known.ids // group)]
        if len(again):
            raise ValueError(
                f"{name}: expected no item {of_a_thing}of {other}, got {len(again)} of them (first id {int(again[0])})"
            )
    _check_labelled(name, data, seen["forget"])
    for side in ("visual", "other"):
        inputs = getattr(data, side)
        if not inputs.is_floating_point():
            continue
        # Of items that decide a level or are judged one is enough to spoil all, and no loss would name it.
        bad = torch.cat([~part.flatten(1).isfinite().all(1) for part in inputs.split(READ)]).nonzero().flatten()
        if len(bad):
            raise ValueError(
                f"{name}: expected finite numbers as {side}, got NaN or infinity in {len(bad)} items (first id "
                f"{int(data.ids[bad[0]])})"
            )


def check_held_out(model: TwoTowerModel, forget: PairedData, retain: Any) -> None:
    """Raise an error unless a run can be stopped by these items and the forget set."""
    check_items("held_out", retain, next(model.parameters()).device, forget)
    _check_labelled("held_out", retain, forget)
    if forget.labelled and heads(model) and "visual" not in heads(model):
        raise ValueError(
            "held_out: expected None for a model with heads but none for the visual modality, whose accuracy says when "
            "to stop, got one"
        )


def _check_labelled(name: str, data: PairedData, forget: PairedData) -> None:
    if data.labelled != forget.labelled:
        what = "labels" if forget.labelled else "no labels"
        raise ValueError(f"{name}: expected {what} as in forget, got {'none' if forget.labelled else 'some'}")


def _form(inputs: Tensor) -> str:
    return f"{str(inputs.dtype).removeprefix('torch.')} {['N', *inputs.shape[1:]]}".replace("'", "")


def _check_labels(forget: PairedData, retain: PairedData, roles: str, called: Mapping[int, str]) -> None:
    def name_of(label: Tensor) -> str:
        return called.get(int(label), str(int(label)))

    for name, data in (("forget", forget), ("retain", retain)):
        if not data.labelled:
            raise ValueError(
                f"{name}: expected labels for forget={roles!r}, got items without; to forget pairs without labels use "
                "forget='pairs'"
            )
    shared = forget.labels[torch.isin(forget.labels, retain.labels)]
    if roles == "class" and len(shared):
        raise ValueError(
            f"retain: expected no item of a class to forget, got class {name_of(shared[0])}; "
            "to forget some items of a class use forget='instances'"
        )
    if roles == "instances" and len(shared) < len(forget):
        absent = forget.labels[~torch.isin(forget.labels, retain.labels)]
        raise ValueError(
            f"retain: expected items of every class in the forget set, got none of class {name_of(absent[0])}; "
            "to forget a whole class use forget='class'"
        )


def _check_outputs(model: TwoModalityModel, forget: PairedData, labels: list[Tensor]) -> None:
    item = forget.batch(torch.zeros(1, dtype=torch.long, device=forget.labels.device))
    with looking(model) as model, torch.no_grad():
        visual, other = embed_both(model, item)
        if visual.ndim != 2 or visual.shape != other.shape:
            raise ValueError(
                "model: expected embed_visual and embed_other to share one space [N, D], got shapes "
                f"{list(visual.shape)} and {list(other.shape)}"
            )
        for name, z in (("embed_visual", visual), ("embed_other", other)):
            length = float(z.float().norm())
            if not abs(length - 1) < 1e-2:
                raise ValueError(f"model: expected unit vectors from {name}, got one of length {length:.4g}")
        highest = max(int(part.max()) for part in labels)
        if highest < 0:
            return
        classes = max(2, 1 + highest)  # a head of one class says nothing
        for head in heads(model):
            logits = logits_of(model, head, visual, other)
            if logits.ndim != 2 or logits.shape[1] < classes:
                raise ValueError(
                    f"model: expected [N, {classes} or more] logits from classify_{head}, got {list(logits.shape)}"
                )
