"""InfoNCE of all prefixes (Matryoshka): the weighted sum of the losses of each, with whatever else varies them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ccu_fast
from ccu_fast import info_nce
from ccu_fast.ops.backend import gemm_dtype
from tests.support.losses import compare, features
from tests.support.oracle import unit

pytestmark = pytest.mark.usefixtures("one_thread")

N, D, PREFIXES = 9, 12, (2, 5, 12)
IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 3, 1])
GUIDE = tuple(F.normalize(torch.randn(N, 4, generator=torch.Generator().manual_seed(s)), dim=-1) for s in (0, 1))
FEATURES = ("negatives", "hard_negatives")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one way": {"symmetric": False},
    "weights": {"prefix_weights": (0.5, 1.0, 2.0)},
    "ids": {"ids": IDS},
    "own of ids": {"ids": IDS, "positives": "own"},
    "lse of ids": {"ids": IDS, "positives": "lse"},
    "ignored": {"row_labels": torch.arange(N) - 1},
    "smoothing": {"smoothing": 0.1},
    "decoupled": {"decoupled": True},
    "debias": {"debias": torch.linspace(0, 0.1, N)},
    "hardness": {"hardness": 0.5},
    "focal": {"focal": 2.0},
    "joint": {"joint": ("x_to_y", "x_to_x", "y_to_y")},
    "margin": {"margin": -0.05},
    "margin and ids": {"margin": -0.05, "ids": IDS},
    "relative threshold": {"margin": 0.1, "relative": True, "threshold": 0.3},
    "guide": {"margin": 0.0, "guide": GUIDE},
    "decoupled of few": {"margin": -0.4, "decoupled": True},
    "negatives": {"negatives": (5, D)},
    "negatives with a margin": {"negatives": (5, D), "margin": 0.0, "symmetric": False},
    "hard negatives": {"hard_negatives": (N, 3, D)},
    "hard negatives with a margin": {"hard_negatives": (N, 3, D), "margin": 0.1, "smoothing": 0.1},
    "these alone": {"negatives": (5, D), "hard_negatives": (N, 3, D), "in_batch": False},
    "none": {"reduction": "none", "prefix_weights": (3.0, 2.0, 1.0)},
    "sum": {"reduction": "sum"},
}


def loop(x: Tensor, y: Tensor, *, scale: Any, normalize: bool, backend: str = "reference", **options: Any) -> Tensor:
    """The definition: each prefix by itself."""
    weights = options.pop("prefix_weights", [1.0] * len(PREFIXES))
    total = None
    for d, weight in zip(PREFIXES, weights, strict=True):
        made = {
            name: F.normalize(t[..., :d], dim=-1) if normalize else t[..., :d]
            for name, t in {"x": x, "y": y, **{n: options[n] for n in FEATURES if n in options}}.items()
        }
        loss = info_nce(scale=scale, backend=backend, **{**options, **made})
        total = weight * loss if total is None else total + weight * loss
    assert total is not None
    return total


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name: str, normalize: bool, backend: str) -> None:
    options = {key: value for key, value in OPTIONS[name].items() if key not in FEATURES}
    data = features(N, D, scale=5.0) | {key: unit(*OPTIONS[name][key]) for key in FEATURES if key in OPTIONS[name]}
    # Not unit vectors, so that normalize says something; as wholes they are close to them.
    data = {key: t * torch.linspace(0.8, 1.2, D).double() if t.ndim else t for key, t in data.items()}

    def ours(**leaves: Tensor) -> Tensor:
        return info_nce(prefixes=PREFIXES, normalize=normalize, backend=backend, **leaves, **options)

    def torchs(**leaves: Tensor) -> Tensor:
        return loop(normalize=normalize, **leaves, **options)

    compare(ours, torchs, data, torch.float32)


def test_banks(backend: str) -> None:
    data = features(3, 7, D, scale=5.0)

    def ours(**leaves: Tensor) -> Tensor:
        return info_nce(prefixes=PREFIXES, normalize=True, backend=backend, margin=0.1, **leaves)

    compare(ours, lambda **leaves: loop(normalize=True, margin=0.1, **leaves), data, torch.float32)


LEADS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), (3,)), ((3,), ()), ((3,), (2, 3)), ((2, 1), (3,))]


@pytest.mark.parametrize(
    "options",
    [
        {"negatives": (5, D)},
        {"hard_negatives": (N, 2, D)},
        {"negatives": (5, D), "in_batch": False},
        {"joint": ("x_to_y", "x_to_x", "y_to_y")},
        {"margin": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize(("of_x", "of_y"), LEADS, ids=str)
def test_sides_that_lack_leading_dimensions(
    of_x: tuple[int, ...], of_y: tuple[int, ...], options: dict[str, Any], backend: str
) -> None:
    """As many prefixes as the missing dimension has entries, and not."""
    made = {name: unit(*options[name]) for name in FEATURES if name in options}
    if "hard_negatives" in made:
        lead = torch.broadcast_shapes(of_x, of_y)
        made["hard_negatives"] = made["hard_negatives"].expand(*lead, N, 2, D)
    data = {"x": unit(*of_x, N, D), "y": unit(*of_y, N, D), "scale": torch.tensor(5.0), **made}
    rest = {name: value for name, value in options.items() if name not in FEATURES}
    compare(
        lambda **leaves: info_nce(prefixes=PREFIXES, normalize=True, backend=backend, **leaves, **rest),
        lambda **leaves: loop(normalize=True, **leaves, **rest),
        data,
        torch.float32,
    )


def test_the_module_has_them_fixed() -> None:
    x, y = torch.randn(N, D), torch.randn(N, D)
    fixed: dict[str, Any] = {"prefixes": PREFIXES, "prefix_weights": (1.0, 2.0, 3.0), "normalize": True}
    assert torch.equal(ccu_fast.InfoNCE(scale=3.0, **fixed)(x, y), info_nce(x, y, scale=3.0, **fixed))


def test_autocast_multiplies_as_for_the_whole() -> None:
    x, y = (F.normalize(torch.randn(40, D), dim=-1) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(x, y, scale=5.0, prefixes=PREFIXES)
    torch.testing.assert_close(loss, info_nce(x.bfloat16(), y.bfloat16(), scale=5.0, prefixes=PREFIXES))
    exact = info_nce(x.bfloat16().float(), y.bfloat16().float(), scale=5.0, prefixes=PREFIXES)
    # A CPU that multiplies bf16 rounds the products too.
    rounded = {"rtol": 1e-3, "atol": 0.0} if gemm_dtype(torch.bfloat16) == torch.bfloat16 else {}
    torch.testing.assert_close(loss, exact, **rounded)


def test_one_whole_prefix_is_the_loss_itself() -> None:
    x, y = torch.randn(N, D), torch.randn(N, D)
    for normalize in (False, True):
        torch.testing.assert_close(
            info_nce(x, y, scale=3.0, prefixes=(D,), normalize=normalize),
            info_nce(x, y, scale=3.0, normalize=normalize),
        )


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"prefix_weights": (1.0,)},
        ValueError,
        "prefixes: expected numbers of dimensions because prefix_weights is given",
    ),
    ({"prefixes": (2, 4), "prefix_weights": (1.0,)}, TypeError, "prefix_weights: expected a number for each of the 2"),
    ({"prefixes": (2, 4), "prefix_weights": (1.0, "a")}, TypeError, "prefix_weights: expected a number, got str"),
    ({"prefixes": (2, 4), "prefix_weights": (1.0, torch.nan)}, ValueError, "prefix_weights: expected a finite number"),
    ({"prefixes": 4}, TypeError, "prefixes: expected ascending numbers of dimensions"),
]


@pytest.mark.parametrize(("options", "error", "says"), WRONG, ids=[str(w[0]) for w in WRONG])
def test_bad_options(options: dict[str, Any], error: type[Exception], says: str) -> None:
    x = torch.randn(3, 8)
    with pytest.raises(error, match=says):
        info_nce(x, x, scale=1.0, **options)
    with pytest.raises(error, match=says):
        ccu_fast.InfoNCE(scale=1.0, **options)
