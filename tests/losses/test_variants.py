"""What varies InfoNCE, row by row against its definition in plain torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ccu_fast
from ccu_fast import info_nce, sigmoid_loss, sup_con
from ccu_fast.losses import functional
from ccu_fast.losses.logits import rounding
from ccu_fast.losses.variant import VARIANT, Variant
from tests.support.losses import compare, features
from tests.support.oracle import unit

pytestmark = pytest.mark.usefixtures("one_thread")

Engine = tuple[str, torch.dtype]
N, K, OWN, D = 9, 5, 3, 12
IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 3, 1])
ALL_FOUR = ("x_to_y", "y_to_x", "x_to_x", "y_to_y")


def similar(a: Tensor, b: Tensor) -> Tensor:
    """The product of two vectors; half types multiply in theirs and go on in fp32."""
    return (a * b).sum().to(torch.promote_types(a.dtype, torch.float32))


def number(a: Tensor, b: Tensor) -> float:
    return float(similar(a.detach(), b.detach()))


def definition(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    negatives: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    *,
    symmetric: bool = True,
    ids: Tensor | None = None,
    ignored: Tensor | None = None,
    negative_ids: Tensor | None = None,
    in_batch: bool = True,
    joint: tuple[str, ...] = (),
    margin: float | None = None,
    relative: bool = False,
    threshold: float | None = None,
    guide: tuple[Tensor, ...] | None = None,
    **weights: Any,
) -> Tensor:
    """The mean over rows, or that of rows and of columns: every pair is looked at by itself."""
    ids = torch.arange(len(x)) if ids is None else ids
    there = [i for i in range(len(x)) if ignored is None or not ignored[i]]

    def logit(a: Tensor, b: Tensor) -> Tensor:
        s = similar(a, b) * scale
        return s if bias is None else s + bias

    banks = {"x": x, "y": y, "n": negatives}
    if guide is not None:
        guides = dict(zip(("x", "y", "n", "h"), guide, strict=False))

    def seen(i: int, j: int, of: str, to: str) -> float:
        """What decides whether j is no negative of i."""
        if guide is None:
            return number(banks[of][i], banks[to][j])
        return number(guides[of][i], guides[to][j]) if to in guides else -math.inf

    def positives_of(i: int) -> list[int]:
        return [j for j in there if (j == i if weights["ways"] == "own" else ids[j] == ids[i])]

    def limit(i: int, of: str, to: str) -> float:
        if margin is None:
            return math.inf if threshold is None else threshold
        near = [seen(i, j, of, to) for j in positives_of(i)]
        own = sum(near) / len(near)
        most = float(own * (1 + margin) if relative else own + margin)
        return most if threshold is None else min(most, threshold)

    def row(i: int, of: str, to: str, sets: tuple[str, ...]) -> Tensor | None:
        """One row of x against y, or one of y against x."""
        positives = [logit(banks[of][i], banks[to][j]) for j in positives_of(i)]
        most = limit(i, of, to)
        rest = []
        for direction in sets:
            a, b = {"x_to_y": (of, to), "y_to_x": (to, of), "x_to_x": (of, of), "y_to_y": (to, to)}[direction]
            rest += [logit(banks[a][i], banks[b][j]) for j in there if ids[j] != ids[i] and not seen(i, j, a, b) > most]
        if of == "x" and negatives is not None:
            rest += [
                logit(x[i], negatives[j])
                for j in range(len(negatives))
                if (negative_ids is None or negative_ids[j] != ids[i]) and not seen(i, j, "x", "n") > most
            ]
        if of == "x" and hard_negatives is not None:
            for j in range(hard_negatives.shape[1]):
                near = -math.inf
                if guide is None:
                    near = number(x[i], hard_negatives[i, j])
                elif "h" in guides:
                    near = number(guides["x"][i], guides["h"][i, j])
                if not near > most:
                    rest.append(logit(x[i], hard_negatives[i, j]))
        return weighed(torch.stack(positives), torch.stack(rest) if rest else x.new_zeros(0), scale, i=i, **weights)

    def side(of: str, to: str, sets: tuple[str, ...]) -> Tensor:
        losses = [row(i, of, to, sets) for i in there]
        return torch.stack([loss for loss in losses if loss is not None]).mean()

    if joint or not in_batch:
        return side("x", "y", joint)
    of_rows = side("x", "y", ("x_to_y",))
    return (of_rows + side("y", "x", ("x_to_y",))) / 2 if symmetric else of_rows


def weighed(
    positives: Tensor,
    rest: Tensor,
    scale: Tensor,
    *,
    i: int,
    bias_of_floor: float = 0.0,
    ways: str = "mean",
    decoupled: bool = False,
    smoothing: float = 0.0,
    debias: float | Tensor = 0.0,
    hardness: float = 0.0,
    focal: float = 0.0,
) -> Tensor | None:
    """The loss of one row from the logits of its positives and negatives."""
    if decoupled and not len(rest):
        return None
    own = positives.mean()
    weights = torch.exp(hardness * rest)
    total = (torch.exp(rest) * weights / weights.mean()).sum() if len(rest) else rest.sum()
    tau = debias[i] if isinstance(debias, Tensor) else debias
    if isinstance(debias, Tensor) or debias > 0:
        total = (total - tau * len(rest) * torch.exp(own)) / (1 - tau)
        total = torch.maximum(total, len(rest) * torch.exp(-scale.detach() + bias_of_floor))
    inside = torch.exp(positives).sum()
    goal = torch.log(inside) if ways == "lse" else own
    loss = torch.log(total if decoupled else total + inside) - goal
    factor = (1 - torch.exp(-loss)) ** focal if focal else 1
    if smoothing:
        loss = loss + smoothing * (goal - torch.cat([positives, rest]).mean())
    return loss * factor


def case(**options: Any) -> dict[str, Any]:
    return options


CASES: dict[str, dict[str, Any]] = {
    "ids": case(ids=IDS),
    "ids, lse": case(ids=IDS, positives="lse"),
    "lse of one each": case(positives="lse"),
    "ids, own": case(ids=IDS, positives="own"),
    "ids, own, with all else": case(
        ids=IDS,
        positives="own",
        joint=ALL_FOUR,
        extra=("negatives", "hard_negatives"),
        negative_ids=torch.tensor([1, 7, 3, 3, 8]),
        ignored=True,
        debias=0.03,
    ),
    "negatives": case(extra=("negatives",)),
    "negatives, one side": case(extra=("negatives",), symmetric=False),
    "negatives with ids": case(extra=("negatives",), ids=IDS, negative_ids=torch.tensor([1, 7, 3, 3, 8])),
    "negatives alone": case(extra=("negatives",), in_batch=False),
    "hard negatives": case(extra=("hard_negatives",)),
    "hard negatives alone": case(extra=("hard_negatives",), in_batch=False),
    "both, with a bias": case(extra=("negatives", "hard_negatives"), bias=-1.5),
    "joint": case(joint=ALL_FOUR),
    "joint, SimCLR": case(joint=("x_to_y", "x_to_x")),
    "joint, other side alone": case(joint=("y_to_x",)),
    "joint, ids": case(joint=ALL_FOUR, ids=IDS),
    "joint, Qwen3": case(joint=("x_to_y", "x_to_x", "y_to_y"), extra=("negatives", "hard_negatives")),
    "ignored": case(joint=ALL_FOUR, extra=("negatives", "hard_negatives"), ignored=True),
    "decoupled": case(decoupled=True),
    "decoupled, ids": case(decoupled=True, ids=IDS, extra=("hard_negatives",)),
    "decoupled, lse": case(decoupled=True, ids=IDS, positives="lse"),
    "smoothing": case(smoothing=0.1),
    "smoothing, ids, lse": case(smoothing=0.2, ids=IDS, positives="lse"),
    "smoothing, ids and negatives": case(smoothing=0.3, ids=IDS, extra=("negatives", "hard_negatives")),
    "debias": case(debias=0.1),
    "debias of every row": case(debias=torch.linspace(0, 0.2, N, dtype=torch.float64), extra=("negatives",)),
    "debias at its floor": case(debias=0.9, scale=0.5),
    "debias, joint and a bias": case(debias=0.05, joint=ALL_FOUR, extra=("hard_negatives",), bias=0.7),
    "hardness": case(hardness=0.5),
    "hardness, everything": case(hardness=1.5, debias=0.02, extra=("negatives", "hard_negatives"), ids=IDS, bias=-0.3),
    "hardness, negatives alone": case(hardness=1.0, extra=("negatives",), in_batch=False, smoothing=0.2),
    "focal": case(focal=2.0),
    "focal, root": case(focal=0.5, ids=IDS, positives="lse"),
    "focal and smoothing": case(focal=1.0, smoothing=0.1),
    "margin": case(margin=0.05),
    "margin below": case(margin=-0.2, extra=("negatives", "hard_negatives")),
    "margin, ids": case(margin=0.1, ids=IDS, symmetric=False),
    "relative margin": case(margin=-0.4, relative=True),
    "threshold": case(threshold=0.2, bias=-1.0),
    "threshold and margin": case(threshold=0.3, margin=0.1, joint=ALL_FOUR),
    "margin, Qwen3": case(margin=0.1, joint=("x_to_y", "x_to_x", "y_to_y"), extra=("hard_negatives",)),
    "guide": case(margin=0.0, guide=2),
    "guide, GIST": case(margin=-0.05, guide=2, joint=ALL_FOUR, extra=("hard_negatives",)),
    "guide of all": case(margin=0.1, guide=4, extra=("negatives", "hard_negatives")),
    "guide and threshold": case(threshold=0.1, guide=3, extra=("negatives",)),
    "margin and weights": case(
        margin=0.0, debias=0.02, hardness=0.5, smoothing=0.1, focal=1.0, extra=("negatives", "hard_negatives")
    ),
    "joint and smoothing": case(joint=ALL_FOUR, smoothing=0.1, margin=0.0),
}


def options_of(name: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """The tensors that are differentiated, the options of ours, and those of the definition."""
    options = dict(CASES[name])
    data = features(N, D, m=N, scale=options.pop("scale", 6.0), bias=options.pop("bias", None))
    extra = {"negatives": unit(K, D), "hard_negatives": unit(N, OWN, D)}
    data |= {what: extra[what] for what in options.pop("extra", ())}
    if "guide" in options:
        guide = (unit(N, 7), unit(N, 7), unit(K, 7), unit(N, OWN, 7))[: options["guide"]]
        options["guide"] = tuple(t.to(torch.bfloat16).float() for t in guide)
    theirs = dict(options)
    theirs["ways"] = theirs.pop("positives", "mean")
    if options.pop("ignored", False):
        labels = torch.zeros(N, dtype=torch.long)
        labels[[2, 5]] = -1
        options["row_labels"] = labels
        theirs["ignored"] = labels < 0
    if "debias" in theirs and "bias" in data:
        theirs["bias_of_floor"] = float(data["bias"])
    return data, options, theirs


@pytest.mark.parametrize("name", CASES)
def test_a_variant_is_its_definition(name: str, engine: Engine) -> None:
    backend, dtype = engine
    data, options, theirs = options_of(name)
    compare(lambda **t: info_nce(**t, **options, backend=backend), lambda **t: definition(**t, **theirs), data, dtype)


@pytest.mark.parametrize("name", ["negatives", "hard negatives", "joint", "hardness, everything", "debias"])
def test_banks_are_those_of_each(name: str, backend: str) -> None:
    data, options, _ = options_of(name)
    banks = {n: torch.stack([t, t.flip(0), -t]) if t.ndim else t for n, t in data.items()}

    def each(**t: Tensor) -> Tensor:
        own = ({n: v[b] if v.ndim else v for n, v in t.items()} for b in range(3))
        return torch.stack([info_nce(**bank, **options, backend="reference") for bank in own])

    compare(lambda **t: info_nce(**t, **options, backend=backend), each, banks, torch.float32)


@pytest.mark.parametrize("shared", ["x", "y"])
@pytest.mark.parametrize("positives", ["mean", "own"])
def test_keys_of_banks_may_be_their_own_where_features_are_shared(shared: str, positives: str, backend: str) -> None:
    data = features(3, N, D) | {"negatives": unit(K, D), "hard_negatives": unit(N, OWN, D), shared: unit(N, D)}
    if shared == "y":
        data["hard_negatives"] = unit(3, N, OWN, D)
    data = {name: t.float() for name, t in data.items()}
    ids, names = torch.randint(0, 5, (3, N)), torch.randint(0, 5, (K,))
    options: dict[str, Any] = {"negative_ids": names, "positives": positives, "joint": ALL_FOUR}
    debias = torch.rand(3, N) * 0.1
    got = info_nce(**data, ids=ids, debias=debias, **options, backend=backend)
    whole = {"negatives", "scale", shared, *(["hard_negatives"] if shared == "x" else [])}
    each = [
        info_nce(**{n: t if n in whole else t[b] for n, t in data.items()}, ids=ids[b], debias=debias[b], **options)
        for b in range(3)
    ]
    torch.testing.assert_close(got, torch.stack(each))


@pytest.mark.parametrize("name", ["hard_negatives", "negatives"])
def test_banks_may_share_their_negatives(name: str, backend: str) -> None:
    shared = unit(K, D) if name == "negatives" else unit(3, N, OWN, D)
    data = features(3, N, D) | {"y": unit(N, D), name: shared}

    def each(**t: Tensor) -> Tensor:
        others = t[name] if name == "hard_negatives" else [t[name]] * 3
        return torch.stack(
            [
                info_nce(x, t["y"], scale=t["scale"], backend="reference", **{name: own})
                for x, own in zip(t["x"], others, strict=True)
            ]
        )

    compare(lambda **t: info_nce(**t, backend=backend), each, data, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["both, with a bias", "joint, Qwen3", "hardness", "smoothing", "decoupled"])
def test_half_types(name: str, dtype: torch.dtype, backend: str) -> None:
    data, options, theirs = options_of(name)
    compare(lambda **t: info_nce(**t, **options, backend=backend), lambda **t: definition(**t, **theirs), data, dtype)


@pytest.mark.parametrize("name", CASES)
def test_a_second_run_gives_the_same_bits(name: str, backend: str) -> None:
    data, options, _ = options_of(name)

    def run() -> list[Tensor]:
        leaves = {n: t.float().requires_grad_() for n, t in data.items()}
        loss = info_nce(**leaves, **options, backend=backend)
        return [loss, *torch.autograd.grad(loss, list(leaves.values()))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_reductions_add_up(name: str) -> None:
    data, options, _ = options_of(name)
    data = {n: t.float() for n, t in data.items()}
    whole = info_nce(**data, **options)
    each = info_nce(**data, **options, reduction="none")
    total = info_nce(**data, **options, reduction="sum")
    torch.testing.assert_close(each.sum(), total)
    torch.testing.assert_close(each.sum() / (7 if "ignored" in CASES[name] else N), whole)


@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_derivatives(name: str) -> None:
    data, options, _ = options_of(name)
    x, rest = data.pop("x").double(), {n: t.double() for n, t in data.items()}

    def loss(t: Tensor) -> Tensor:
        return info_nce(t, **rest, **options, backend="reference")

    x.requires_grad_()

    def twice(function: Any, t: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(function(t), t, create_graph=True)
        return torch.autograd.grad((first * torch.linspace(-1, 2, N * D).view(N, D)).sum(), x)[0]

    want = twice(loss, x)
    got = twice(lambda t: info_nce(t.float(), **{n: v.float() for n, v in rest.items()}, **options), x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))


def test_normalized_first(backend: str) -> None:
    data, options, _ = options_of("joint, Qwen3")
    data |= {n: 3 * data[n] for n in ("x", "negatives", "hard_negatives")}

    def theirs(**t: Tensor) -> Tensor:
        rows = {n: F.normalize(v, dim=-1) if v.ndim else v for n, v in t.items()}
        return info_nce(**rows, **options, backend="reference")

    compare(lambda **t: info_nce(**t, **options, normalize=True, backend=backend), theirs, data, torch.float32)


def test_autocast_gives_half_precision_products() -> None:
    data, options, _ = options_of("both, with a bias")
    data = {n: t.float() for n, t in data.items()}
    exact = info_nce(**data, **options)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(**data, **options)
    assert loss.dtype == torch.float32
    assert 0 < abs(float(loss - exact)) < 0.05


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_what_equals_the_positive_stays_whatever_products_are_rounded_to(precision: str, native: str) -> None:
    """At margin 0: a positive is multiplied alone, in fp32, what equals it in a tile, whose operands are rounded."""
    x, y = (t.float().repeat_interleave(2, 0) for t in (unit(64, 256), unit(64, 256)))
    y = F.normalize(x + 0.3 * y, dim=-1)
    before = torch.get_float32_matmul_precision()
    exact = info_nce(x.double(), y.double(), scale=20.0, margin=0.0)
    torch.set_float32_matmul_precision(precision)
    try:
        loss = info_nce(x, y, scale=20.0, margin=0.0, backend=native)
        certain = rounding(torch.float32, "cuda")
    finally:
        torch.set_float32_matmul_precision(before)
    assert abs(float(loss - exact)) < 0.01
    # TF32 keeps ten bits of either operand and drops the others.
    assert certain >= 2**-9 if precision != "highest" else certain <= 1e-6


def test_autocast_takes_negatives_in_another_dtype() -> None:
    """A queue in fp32 beside features that a layer under autocast gives."""
    x, keys, own = unit(N, D).bfloat16(), unit(K, D).float(), unit(N, OWN, D).float()
    with pytest.raises(TypeError, match="negatives: expected dtype"):
        info_nce(x, x, scale=2.0, negatives=keys)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(x, x, scale=2.0, negatives=keys, hard_negatives=own)
    exact = info_nce(*[x.double()] * 2, scale=2.0, negatives=keys.double(), hard_negatives=own.double())
    assert abs(float(loss - exact)) < 0.01


def test_a_scale_in_half_precision_is_widened_before_it_is_multiplied() -> None:
    x, y, scale = unit(N, D).float(), unit(N, D).float(), torch.tensor(14.3, dtype=torch.bfloat16)
    options = {"hardness": 0.7, "hard_negatives": unit(N, OWN, D).float()}
    assert torch.equal(info_nce(x, y, scale=scale, **options), info_nce(x, y, scale=scale.float(), **options))


def test_a_share_of_zero_in_a_tensor_has_a_gradient_elsewhere() -> None:
    x, y = unit(N, D).requires_grad_(), unit(N, D)
    share = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    loss = info_nce(x, y, scale=5.0, debias=share)
    torch.testing.assert_close(loss, info_nce(x, y, scale=5.0))
    assert torch.autograd.grad(loss, x)[0].isfinite().all()
    torch.testing.assert_close(
        info_nce(x, y, scale=5.0, debias=torch.tensor(0.1)), info_nce(x, y, scale=5.0, debias=0.1)
    )


DEFAULTS = {"decoupled": False, "negatives": None, "positives": "mean", "joint": (), "smoothing": 0.0, "ids": None}


@pytest.mark.parametrize(
    "options", [*({name: value} for name, value in DEFAULTS.items()), {"positives": "own"}, DEFAULTS]
)
def test_what_asks_for_nothing_costs_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A default that is written out goes the same quick way."""
    monkeypatch.setattr(functional, "Contrast", None)
    x, y = unit(N, D).float(), unit(N, D).float()
    assert torch.equal(info_nce(x, y, scale=5.0, **options), info_nce(x, y, scale=5.0))


EMPTY: dict[str, tuple[int, dict[str, Any]]] = {
    "nothing to compare with": (1, {}),
    "one pair, decoupled": (1, {"decoupled": True}),
    "one pair, debiased": (1, {"debias": 0.1}),
    "one pair, hard": (1, {"hardness": 1.0}),
    "one pair, joint": (1, {"joint": ALL_FOUR}),
    "one pair, focal root": (1, {"focal": 0.5}),
    "no hard negatives": (4, {"hard_negatives": torch.zeros(4, 0, D)}),
    "an empty queue": (4, {"negatives": torch.zeros(0, D), "in_batch": False}),
    "no pair": (0, {"hard_negatives": torch.zeros(0, 2, D), "negatives": torch.zeros(3, D)}),
}


@pytest.mark.parametrize("name", EMPTY)
def test_without_anything_to_compare_there_is_neither_loss_nor_nan(name: str, backend: str) -> None:
    n, options = EMPTY[name]
    x, y = unit(n, D).float().requires_grad_(), unit(n, D).float().requires_grad_()
    loss = info_nce(x, y, scale=5.0, **options, backend=backend)
    dx, dy = torch.autograd.grad(loss, (x, y))
    assert dx.isfinite().all() and dy.isfinite().all()
    if name != "no hard negatives":
        assert loss == 0 and not dx.any() and not dy.any()


def test_an_ignored_row_gives_nothing_whatever_it_holds(backend: str) -> None:
    x, y, own, others = unit(4, D), unit(4, D), unit(4, 2, D), unit(3, D)
    labels = torch.tensor([0, -1, 0, 0])
    x[1], y[1], own[1] = math.nan, math.inf, math.nan
    leaves = [t.float().requires_grad_() for t in (x, y, own, others)]
    loss = info_nce(
        *leaves[:2], scale=4.0, row_labels=labels, hard_negatives=leaves[2], negatives=leaves[3], joint=ALL_FOUR,
        backend=backend,
    )  # fmt: skip
    keep = [t.detach()[[0, 2, 3]] for t in leaves[:3]]
    want = info_nce(keep[0], keep[1], scale=4.0, hard_negatives=keep[2], negatives=others.float(), joint=ALL_FOUR)
    torch.testing.assert_close(loss, want)
    for t, grad in zip(leaves[:3], torch.autograd.grad(loss, leaves[:3]), strict=True):
        assert grad.isfinite().all() and not grad[1].any(), t.shape


def test_no_matrix_of_all_pairs_is_stored(native: None) -> None:
    """What an option adds is rows and columns, never their product."""
    n = 1024
    x, y = unit(n, 8).float().requires_grad_(), unit(n, 8).float().requires_grad_()
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    with Watch():
        info_nce(x, y, scale=9.0, joint=ALL_FOUR, negatives=x.detach(), debias=0.1, workspace=1 << 16).backward()
    assert largest < n * n // 8


def test_what_compiles_in_one_graph() -> None:
    data, options, _ = options_of("hardness, everything")
    data = {n: t.float() for n, t in data.items()}
    compiled = torch.compile(lambda **t: info_nce(**t, **options), fullgraph=True, backend="aot_eager")
    leaves = [{n: t.clone().requires_grad_() for n, t in data.items()} for _ in range(2)]
    losses = [compiled(**leaves[0]), info_nce(**leaves[1], **options)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for name in data:
        torch.testing.assert_close(leaves[0][name].grad, leaves[1][name].grad)


WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "positives": (ValueError, "positives: expected one of", {"positives": "all"}),
    "symmetric": (TypeError, "symmetric: expected True or False", {"symmetric": "no"}),
    "joint word": (ValueError, "joint: expected one of", {"joint": ("x_to_z",)}),
    "joint text": (TypeError, "joint: expected a tuple", {"joint": "x_to_y"}),
    "joint twice": (ValueError, "joint: expected each direction once", {"joint": ("x_to_y", "x_to_y")}),
    "joint sizes": (
        ValueError,
        "joint: expected as many rows in y",
        {"joint": ALL_FOUR, "y": unit(5, D), "row_ids": IDS, "col_ids": IDS[:5]},
    ),
    "negatives shape": (ValueError, "negatives: expected shape", {"negatives": unit(3, D + 1)}),
    "negatives dtype": (TypeError, "negatives: expected dtype", {"negatives": unit(3, D).float()}),
    "negatives kind": (TypeError, "negatives: expected a torch.Tensor", {"negatives": [1.0]}),
    "negative ids alone": (ValueError, "negatives: expected a tensor because negative_ids", {"negative_ids": IDS}),
    "negative ids without ids": (
        ValueError,
        "ids: expected a tensor because negative_ids",
        {"negatives": unit(3, D), "negative_ids": IDS[:3]},
    ),
    "negative ids shape": (
        ValueError,
        "negative_ids: expected shape",
        {"negatives": unit(3, D), "negative_ids": IDS, "ids": IDS},
    ),
    "negatives of banks": (ValueError, "negatives: expected leading", {"negatives": unit(2, K, D)}),
    "negatives nan": (
        ValueError,
        "negatives: expected finite",
        {"negatives": unit(K, D) / 0, "nan_policy": "raise"},
    ),
    "hard of banks": (ValueError, "hard_negatives: expected leading", {"hard_negatives": unit(2, N, OWN, D)}),
    "ids shape": (ValueError, "ids: expected shape", {"ids": IDS[:3], "positives": "own"}),
    "ids dtype": (TypeError, "ids: expected dtype", {"ids": IDS.float()}),
    "ids and labels": (
        ValueError,
        "row_labels: expected shape",
        {"ids": IDS, "positives": "own", "row_labels": IDS[:3], "col_labels": IDS},
    ),
    "debias tensor": (ValueError, "debias: expected a number in", {"debias": torch.ones(N)}),
    "hard shape": (ValueError, "hard_negatives: expected shape", {"hard_negatives": unit(N, D)}),
    "hard rows": (ValueError, "hard_negatives: expected shape", {"hard_negatives": unit(N - 1, 2, D)}),
    "hard nan": (
        ValueError,
        "hard_negatives: expected finite",
        {"hard_negatives": unit(N, 2, D) / 0, "nan_policy": "raise"},
    ),
    "in_batch": (ValueError, "in_batch: expected True without negatives", {"in_batch": False}),
    "in_batch joint": (ValueError, "in_batch: expected True with joint", {"in_batch": False, "joint": ALL_FOUR}),
    "in_batch word": (TypeError, "in_batch: expected True or False", {"in_batch": 0}),
    "smoothing": (ValueError, "smoothing: expected a finite number in", {"smoothing": 1.5}),
    "debias": (ValueError, "debias: expected a number in", {"debias": 1.0}),
    "debias below": (ValueError, "debias: expected a finite number", {"debias": -0.1}),
    "debias shape": (ValueError, "debias: expected shape", {"debias": torch.zeros(3)}),
    "hardness": (ValueError, "hardness: expected a finite number", {"hardness": -1.0}),
    "focal": (ValueError, "focal: expected a finite number", {"focal": math.nan}),
    "focal decoupled": (ValueError, "focal: expected 0 with decoupled", {"focal": 1.0, "decoupled": True}),
    "relative alone": (ValueError, "margin: expected a number because relative", {"relative": True}),
    "margin": (TypeError, "margin: expected a number", {"margin": "0.1"}),
    "margin and limits": (ValueError, "row_limits: expected none", {"margin": 0.1, "row_limits": torch.zeros(N)}),
    "guide shape": (ValueError, r"guide\[1\]: expected", {"guide": (unit(N, 3), unit(N, 4)), "margin": 0.0}),
    "guide of nothing": (
        ValueError,
        "guide: expected no features of negatives",
        {"guide": (unit(N, 3), unit(N, 3), unit(K, 3)), "margin": 0.0},
    ),
    "guide of negatives": (
        ValueError,
        r"guide\[2\]: expected shape \[5, 3\]",
        {"guide": (unit(N, 3), unit(N, 3), unit(K, 2)), "margin": 0.0, "negatives": unit(K, D)},
    ),
    "guide items": (ValueError, r"guide\[0\]: expected", {"guide": (unit(4, 3), unit(N, 3)), "margin": 0.0}),
    "guide alone": (ValueError, "margin: expected .* because guide is given", {"guide": (unit(N, 3), unit(N, 3))}),
    "guide kind": (TypeError, "guide: expected a tuple", {"guide": unit(N, 3), "margin": 0.0}),
    "ids and row_ids": (ValueError, "row_ids: expected none because ids", {"ids": IDS, "row_ids": IDS}),
    "misspelt": (TypeError, "hard_negative: expected hard_negatives", {"hard_negative": unit(N, 2, D)}),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_by_name(name: str) -> None:
    kind, said, options = WRONG[name]
    with pytest.raises(kind, match=said):
        info_nce(**{"x": unit(N, D), "y": unit(N, D), "scale": 5.0, **options})


def test_every_keyword_is_described_and_tried() -> None:
    assert all(f" {name}" in (info_nce.__doc__ or "") for name in VARIANT)
    tried = {option for options in CASES.values() for option in (*options, *options.get("extra", ()))}
    tried |= {option for _, _, options in WRONG.values() for option in options}
    in_a_file_of_their_own = {"prefixes", "prefix_weights"}  # test_prefixes.py, with all others
    assert set(VARIANT) == (tried & set(VARIANT)) | in_a_file_of_their_own


# ---- several positives in the other losses


def test_the_mean_over_texts_that_are_equal_changes_nothing() -> None:
    """As the docstring says; the other two forms do."""
    groups = torch.tensor([0, 1, 2, 0, 3, 1, 0])
    x, texts = unit(7, D).requires_grad_(), unit(4, D).requires_grad_()

    def run(**options: Any) -> list[Tensor]:
        loss = info_nce(x, texts[groups], scale=5.0, **options)
        return [loss, *torch.autograd.grad(loss, (x, texts))]

    plain = run()
    torch.testing.assert_close(run(ids=groups), plain)
    for positives in ("lse", "own"):
        assert float(run(ids=groups, positives=positives)[0]) < float(plain[0]) - 0.1


@pytest.mark.parametrize("positives", ["mean", "lse"])
def test_sup_con_of_either_form(positives: str, engine: Engine) -> None:
    backend, dtype = engine
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3])

    def theirs(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        s = (x @ y.T).to(scale.dtype) * scale
        losses = []
        for i in range(7):
            own = [j for j in range(7) if j != i and labels[j] == labels[i]]
            rest = torch.tensor([j for j in range(7) if j != i])
            if own:
                near = s[i, own].mean() if positives == "mean" else s[i, own].logsumexp(0)
                losses.append(s[i, rest].logsumexp(0) - near)
        return torch.stack(losses).mean()

    ours = dict(row_labels=labels, positives=positives, backend=backend)
    compare(lambda **t: sup_con(**t, **ours), theirs, features(7, D), dtype)


def test_sigmoid_loss_takes_ids(backend: str) -> None:
    x, y = unit(N, D).float(), unit(N, D).float()
    got = sigmoid_loss(x, y, scale=5.0, bias=-2.0, ids=IDS, backend=backend)
    assert torch.equal(got, sigmoid_loss(x, y, scale=5.0, bias=-2.0, row_ids=IDS, col_ids=IDS, backend=backend))
    sign = torch.where(IDS[:, None] == IDS, 1.0, -1.0)
    want = -F.logsigmoid(sign * (5.0 * x.double() @ y.double().T - 2.0)).sum() / N
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


# ---- the module


def test_open_clips_loss_takes_ids_and_more_texts(backend: str) -> None:
    x, y, own, more = unit(N, D).float(), unit(N, D).float(), unit(N, OWN, D).float(), unit(K, D).float()
    options = {"ids": IDS, "hard_negatives": own, "negatives": more}
    for positives in ("mean", "lse", "own"):
        loss = ccu_fast.ClipLoss(positives=positives, backend=backend)
        want = info_nce(x, y, scale=5.0, positives=positives, backend=backend, **options)
        assert torch.equal(loss(x, y, 5.0, **options), want)
        assert torch.equal(loss(x, y, 5.0, output_dict=True, **options)["contrastive_loss"], want)
    with pytest.raises(ValueError, match="ids: expected shape"):
        ccu_fast.ClipLoss()(x, y, 5.0, ids=IDS[:3])
    with pytest.raises(TypeError, match="ids: expected dtype"):
        ccu_fast.SigLipLoss()(x, y, 5.0, None, ids=IDS.float())
    with pytest.raises(ValueError, match="positives: expected one of"):
        ccu_fast.ClipLoss(positives="all")


def test_the_module_has_the_options_and_forward_may_change_them() -> None:
    x, y, own = unit(N, D).float(), unit(N, D).float(), unit(N, OWN, D).float()
    module = ccu_fast.InfoNCE(scale=5.0, smoothing=0.1, symmetric=False)
    assert "smoothing=0.1" in repr(module)
    want = info_nce(x, y, scale=5.0, smoothing=0.1, symmetric=False, hard_negatives=own)
    assert torch.equal(module(x, y, hard_negatives=own), want)
    assert torch.equal(module(x, y, smoothing=0.0), info_nce(x, y, scale=5.0, symmetric=False))
    each = module(x, y, reduction="none", symmetric=True)
    assert torch.equal(each, info_nce(x, y, scale=5.0, smoothing=0.1, reduction="none"))
    with pytest.raises(ValueError, match="in_batch: expected True with joint"):
        ccu_fast.InfoNCE(scale=5.0, in_batch=False, joint=ALL_FOUR)
    with pytest.raises(TypeError, match="debias: expected a number"):
        ccu_fast.InfoNCE(scale=5.0, debias=torch.zeros(N))
    alone = ccu_fast.InfoNCE(scale=5.0, in_batch=False)
    assert torch.equal(alone(x, y, hard_negatives=own), info_nce(x, y, scale=5.0, in_batch=False, hard_negatives=own))
    with pytest.raises(ValueError, match="in_batch: expected True without negatives"):
        alone(x, y)
    for option, value in {"smoothing": 2.0, "joint": ("up",), "in_batch": 1}.items():
        with pytest.raises((TypeError, ValueError), match=f"{option}: expected"):
            ccu_fast.InfoNCE(scale=5.0, **{option: value})
    with pytest.raises(TypeError, match=r"negatives: expected .* unknown keyword"):
        ccu_fast.InfoNCE(scale=5.0, negatives=own)
    assert set(ccu_fast.losses.modules.FIXED) < set(VARIANT)
    assert Variant().filtered is False


@pytest.mark.parametrize(
    "options", [{}, {"decoupled": True}, {"debias": 0.1}, {"hardness": 1.0}, {"focal": 2.0}], ids=str
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_passed_on(options: dict[str, Any], value: float, backend: str) -> None:
    x, y, keys = (unit(*shape).float() for shape in ((4, 8), (4, 8), (3, 8)))
    keys[1, 2] = value
    x.requires_grad_()
    loss = info_nce(x, y, scale=5.0, symmetric=False, negatives=keys, backend=backend, **options)
    (grad,) = torch.autograd.grad(loss, x)
    assert not loss.isfinite() and not grad.isfinite().all()
