"""A two-modality problem that trains in a second, and a model without heads for it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.data.paired import PairedData
from ccu_fast.models.fusion import FusionModel
from ccu_fast.runs.provenance import save_model
from ccu_fast.unlearn.loop import Batch, answers, right_shares
from ccu_fast.unlearn.model import TwoModalityModel
from ccu_fast.unlearn.study.tasks import TrainConfig
from ccu_fast.unlearn.study.train import train

CLASSES, INPUTS, DIM = 4, 5, 6
GONE = 1


def accuracies(model: TwoModalityModel, data: PairedData) -> dict[str, float]:
    """The share of items that each head names right, or that find their partner first, among themselves."""
    return right_shares(answers(model, data))[0]


def toy(items: int = 60, seed: int = 0) -> PairedData:
    """Gaussian blobs in both modalities."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(items) % CLASSES
    centre = 2 * torch.randn(2, CLASSES, INPUTS, generator=torch.Generator().manual_seed(99))
    visual, other = centre[:, labels] + 0.5 * torch.randn(2, items, INPUTS, generator=generator)
    return PairedData(visual, other, labels)


def make_model() -> FusionModel:
    return FusionModel(INPUTS, INPUTS, CLASSES, hidden=16, embedding=DIM)


@cache
def trained() -> FusionModel:
    """Knows the toy; not to be changed."""
    model = train(make_model, toy(), TrainConfig(epochs=60, batch=20, learning_rate=1e-2)).model
    assert isinstance(model, FusionModel) and min(accuracies(model, toy()).values()) > 0.95
    return model


# The tables of settings that say what :func:`saved` has written, as far as all have them in common.
SETTINGS = """
[model]
make = "tests.support.toy_unlearn:make_model"
weights = "weights.safetensors"
[data]
path = "pairs.npz"
"""


def saved(folder: Path, names: Sequence[str] | None = None, **sets: PairedData) -> Path:
    """The trained model and each set as a file of its name, with numbers as labels or the names of the classes."""
    for name, data in sets.items():
        labels = data.labels if names is None else np.array(names)[data.labels]
        np.savez(folder / f"{name}.npz", visual=data.visual, other=data.other, labels=labels)
    save_model(trained(), folder / "weights.safetensors", {})
    return folder


def pairs(items: int = 80, seed: int = 0, *, first: int = 0) -> PairedData:
    """The same without labels: nothing but the identity of a pair tells its other view from those of its blob."""
    data = toy(items, seed)
    return PairedData(data.visual, data.other, ids=data.ids + first)


@cache
def trained_on_pairs() -> TwoTowers:
    """Knows the pairs by heart; not to be changed."""

    def make() -> TwoTowers:
        model = TwoTowers()
        model.visual, model.other = (
            nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, 16)) for _ in range(2)
        )
        return model

    model = train(make, pairs(), TrainConfig(epochs=300, batch=40, learning_rate=1e-2)).model
    assert isinstance(model, TwoTowers) and accuracies(model, pairs())["visual"] > 0.85
    return model


def split(kind: str = "class") -> tuple[PairedData, PairedData]:
    """Forget and retain set."""
    data = toy()
    gone = data.labels == GONE if kind == "class" else torch.arange(len(data)) < 12
    return data[gone], data[~gone]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def double(data: PairedData) -> PairedData:
    return PairedData(data.visual.double(), data.other.double(), data.labels, data.ids)


def one_batch(forget: PairedData, retain: PairedData, *, step: int = 0, steps: int = 60, n: int = 10) -> Batch:
    """The first items of both sets."""
    u, r = torch.arange(min(n, len(forget))), torch.arange(min(n + 3, len(retain)))
    return Batch(forget[u], retain[r], u, r, step, steps)


class TwoTowers(nn.Module):
    """Like CLIP: two towers, no heads."""

    def __init__(self) -> None:
        super().__init__()
        self.visual: nn.Module = nn.Linear(INPUTS, DIM)
        self.other: nn.Module = nn.Linear(INPUTS, DIM)
        self.scale = 10.0

    def embed_visual(self, visual: Tensor) -> Tensor:
        return F.normalize(self.visual(visual), dim=-1)

    def embed_other(self, other: Tensor) -> Tensor:
        return F.normalize(self.other(other), dim=-1)


class TiedTowers(TwoTowers):
    """Both towers are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.other.weight = self.visual.weight


class Counting(TwoTowers):
    """Its state is more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"calls": 1}


def retrain(model: FusionModel, pairs: PairedData, forget: PairedData | None = None) -> nn.Module:
    """As a user would write it: a model trained from scratch, with the other halves of the forget set or without."""
    known = torch.ones(len(pairs), dtype=torch.bool)
    if forget is not None:
        known = torch.cat([known, torch.zeros(len(forget), dtype=torch.bool)])
        both = ((getattr(pairs, name), getattr(forget, name)) for name in ("visual", "other", "labels", "ids"))
        pairs = PairedData(*map(torch.cat, both))
    config = TrainConfig(epochs=20, batch=20, learning_rate=1e-2)
    return train(lambda: model, pairs, config, visual_known=known).model  # type: ignore[return-value]
