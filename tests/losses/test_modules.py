"""The modules: twins of the functions, and open_clip's two classes on one process and on several."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ccu_fast
from ccu_fast import ClipLoss, DistillLoss, InfoNCE, InverseInfoNCE, SigLipLoss, SigmoidLoss, SupCon
from tests.support.forked import on_ranks
from tests.support.open_clip_loss import open_clip_loss
from tests.support.oracle import unit
from tests.support.tolerance import assert_three_way

pytestmark = pytest.mark.usefixtures("one_thread")

LABELS = torch.tensor([0, 1, 0, 2, 1, -1])

TWINS: dict[str, tuple[nn.Module, Any, dict[str, Any]]] = {
    "InfoNCE": (InfoNCE(), ccu_fast.info_nce, {}),
    "InfoNCE, options": (
        InfoNCE(symmetric=False, reduction="none", workspace=0),
        lambda *a, **k: ccu_fast.info_nce(*a, symmetric=False, reduction="none", **k),
        {"row_ids": LABELS, "col_ids": LABELS},
    ),
    "InverseInfoNCE": (InverseInfoNCE(), ccu_fast.inverse_info_nce, {"row_labels": LABELS}),
    "InverseInfoNCE, options": (
        InverseInfoNCE(kind="contrastive", reduction="sum"),
        lambda *a, **k: ccu_fast.inverse_info_nce(*a, kind="contrastive", reduction="sum", **k),
        {"row_labels": LABELS, "col_labels": LABELS.flip(0)},
    ),
    "SupCon": (SupCon(), ccu_fast.sup_con, {"row_labels": LABELS}),
    "SupCon, options": (
        SupCon(reduction="sum"),
        lambda *a, **k: ccu_fast.sup_con(*a, reduction="sum", **k),
        {"row_labels": LABELS, "col_labels": LABELS.flip(0)},
    ),
    "SigmoidLoss": (SigmoidLoss(bias=-3.0), lambda *a, **k: ccu_fast.sigmoid_loss(*a, bias=-3.0, **k), {}),
    "SigmoidLoss, options": (
        SigmoidLoss(reduction="none"),
        lambda *a, **k: ccu_fast.sigmoid_loss(*a, reduction="none", **k),
        {"paired": True},
    ),
    "DistillLoss": (
        DistillLoss(teacher_scale=5.0, symmetric=False),
        lambda *a, **k: ccu_fast.distill(*a, teacher_scale=5.0, symmetric=False, **k),
        {"teacher": (torch.eye(6), torch.eye(6).flip(0)), "row_labels": LABELS},
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_module_is_its_function(name: str) -> None:
    module, function, keys = TWINS[name]
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    expected = function(x, y, scale=3.0, **keys)
    assert torch.equal(module(x, y, scale=3.0, **keys), expected)
    own_scale = copy.deepcopy(module)
    own_scale._fixed_scale = 3.0
    assert torch.equal(own_scale(x, y, **keys), expected)


def test_labels_of_sup_con_may_be_positional() -> None:
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    expected = ccu_fast.sup_con(x, y, scale=3.0, row_labels=LABELS, col_labels=LABELS.flip(0))
    assert torch.equal(SupCon(scale=3.0)(x, y, LABELS, LABELS.flip(0)), expected)


@pytest.mark.parametrize("build", [InfoNCE, SupCon, lambda *a, **k: SigmoidLoss(*a, bias=-2.0, **k)])
def test_a_learnable_scale_is_learned(build: Any) -> None:
    module = build(scale=5.0, learnable=True)
    x, y, keys = torch.randn(6, 4), torch.randn(6, 4), ({"row_labels": LABELS} if isinstance(module, SupCon) else {})
    fixed = build(scale=5.0)
    assert not list(fixed.parameters())
    torch.testing.assert_close(module(x, y, **keys), fixed(x, y, **keys))
    scale = torch.tensor(5.0, requires_grad=True)
    (expected,) = torch.autograd.grad(build()(x, y, scale=scale, **keys), scale)
    module(x, y, **keys).backward()
    torch.testing.assert_close(module.log_scale.grad, 5 * expected)
    assert all(p.grad is not None for p in module.parameters())
    with torch.no_grad():
        module.log_scale.clamp_(max=math.log(2.0))
    torch.testing.assert_close(module.scale, torch.tensor(2.0))


def test_parameters_are_saved_and_loaded() -> None:
    source, target = (
        SigmoidLoss(scale=10.0, bias=-10.0, learnable=True),
        SigmoidLoss(scale=1.0, bias=0.0, learnable=True),
    )
    assert set(source.state_dict()) == {"log_scale", "bias"}
    target.load_state_dict(source.state_dict())
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    assert torch.equal(source(x, y), target(x, y))
    buffer = io.BytesIO()
    torch.save(source, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x, y), source(x, y))
    for module in (InfoNCE(scale=3.0), InverseInfoNCE(scale=3.0), ClipLoss(), SigLipLoss()):
        assert not module.state_dict()


def test_what_a_module_says_of_itself() -> None:
    assert repr(InfoNCE(scale=3.0)) == (
        "InfoNCE(scale=3.0, learnable=False, symmetric=True, reduction='mean', normalize=False, backend='auto', "
        "workspace=None)"
    )
    assert "kind='ascent'" in repr(InverseInfoNCE(kind="ascent"))
    shown = repr(SigmoidLoss(scale=10.0, bias=-9.5, learnable=True))
    assert "scale=10," in shown
    assert "bias=-9.5," in shown
    assert "local_loss=True" in repr(ClipLoss(local_loss=True, rank=1, world_size=2))
    assert "dist_impl='shift'" in repr(SigLipLoss(dist_impl="shift"))


# ---- open_clip's three, one process


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss", "DistillClipLoss"])
def test_signatures_are_open_clips(name: str) -> None:
    """Arguments, order and defaults; what we add is keyword-only."""
    ours, theirs = getattr(ccu_fast, name), getattr(open_clip_loss(), name)
    for method in ("__init__", "forward"):
        mine, their = (
            [
                (p.name, p.default)
                for p in inspect.signature(getattr(c, method)).parameters.values()
                if p.kind is not p.KEYWORD_ONLY
            ]
            for c in (ours, theirs)
        )
        assert mine == their


def run(loss: nn.Module, data: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    at_least_single = torch.promote_types(dtype, torch.float32)
    leaves = {k: t.to(dtype if t.ndim > 1 else at_least_single).clone() for k, t in data.items()}
    live = {k: t.requires_grad_() for k, t in leaves.items() if not k.startswith("dist_")}
    values = loss(**leaves)
    values = values if isinstance(values, tuple) else (values,)
    sum(weight * value for weight, value in enumerate(values, 1)).backward()
    losses = {"loss" if i == 0 else "distill_loss": value.detach() for i, value in enumerate(values)}
    return losses | {f"d{k}": t.grad for k, t in live.items()}


def towers(n: int, *, scale: float, bias: float | None, name: str = "") -> dict[str, Tensor]:
    data = {"image_features": unit(n, 32), "text_features": unit(n, 32), "logit_scale": torch.tensor(scale)}
    if name == "DistillClipLoss":
        teacher = {"dist_image_features": unit(n, 20), "dist_text_features": unit(n, 20)}
        return data | teacher | {"dist_logit_scale": torch.tensor(1.5 * scale)}
    return data if bias is None else data | {"logit_bias": torch.tensor(bias)}


CONFIGURATIONS = [
    ("ClipLoss", 100.0, None),
    ("ClipLoss", 14.0, -4.0),
    ("SigLipLoss", 10.0, -10.0),
    ("DistillClipLoss", 14.0, None),
    ("DistillClipLoss", 60.0, None),
]


def compare(
    ours: dict[str, Tensor],
    same: dict[str, Tensor],
    exact: dict[str, Tensor],
    scale: float,
    rounded: torch.dtype = torch.float32,
) -> None:
    for name, truth in exact.items():
        magnitude = max(1.0, float(truth.abs().max())) if truth.numel() == 1 else None
        # A relative error of eps in S is one of |S| eps in exp(S), and |S| is at most the scale.
        ulps = (64 if ours[name].dtype == torch.float64 else 16) + 2 * scale
        if truth.numel() == 1:
            # One sum of products that both round to `rounded`: by chance torch's error may be almost zero.
            ulps += torch.finfo(rounded).eps / torch.finfo(torch.float32).eps / 4
        assert_three_way(name, ours[name], same[name], truth, ulps=ulps, magnitude=magnitude)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("n", [1, 130])
def test_numbers_and_gradients_are_open_clips(
    n: int, configuration: tuple[str, float, float | None], engine: tuple[str, torch.dtype]
) -> None:
    backend, dtype = engine
    name, scale, bias = configuration
    theirs, ours = getattr(open_clip_loss(), name)(), getattr(ccu_fast, name)(backend=backend)
    data = {k: t.to(dtype).double() for k, t in towers(n, scale=scale, bias=bias, name=name).items()}
    compare(run(ours, data, dtype), run(theirs, data, dtype), run(theirs, data, torch.float64), scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_half_features(configuration: tuple[str, float, float | None], dtype: torch.dtype, backend: str) -> None:
    name, scale, bias = configuration
    theirs, ours = getattr(open_clip_loss(), name)(), getattr(ccu_fast, name)(backend=backend)
    data = {k: t.to(dtype).double() for k, t in towers(70, scale=scale, bias=bias, name=name).items()}
    mine = run(ours, data, dtype)
    assert mine["loss"].dtype == torch.float32
    compare(mine, run(theirs, data, dtype), run(theirs, data, torch.float64), scale, rounded=dtype)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_output_dict_and_scale_of_one_dimension(name: str) -> None:
    loss = getattr(ccu_fast, name)(cache_labels=True)
    x, y = unit(6, 4).float(), unit(6, 4).float()
    plain = loss(x, y, torch.tensor(10.0), torch.tensor(-1.0))
    for shape in ((), (1,)):  # open_clip's nonscalar_logit_scale
        answer = loss(x, y, torch.full(shape, 10.0), torch.full(shape, -1.0), output_dict=True)
        assert list(answer) == ["contrastive_loss"]
        assert answer["contrastive_loss"].shape == ()
        assert torch.equal(answer["contrastive_loss"], plain)
    assert torch.equal(loss(x, y, 10.0, logit_bias=None), loss(x, y, logit_scale=torch.tensor(10.0), logit_bias=None))


# ---- and on two

WORLD = 2
CLIP_OPTIONS = [
    {"local_loss": local, "gather_with_grad": grad} for local, grad in itertools.product([False, True], repeat=2)
]
DISTRIBUTED: list[tuple[str, dict[str, Any], float, float | None]] = [
    *[("ClipLoss", options, 14.0, bias) for options in CLIP_OPTIONS for bias in (None, -4.0)],
    *[("SigLipLoss", {"dist_impl": impl}, 10.0, -10.0) for impl in (None, "bidir", "shift", "reduce", "gather")],
    *[("DistillClipLoss", options, 14.0, None) for options in CLIP_OPTIONS],
]


def every_configuration(rank: int) -> list[Any]:
    """The answers of one rank, and last what it says to a wrong world."""
    results: list[Any] = []
    for name, options, scale, bias in DISTRIBUTED:
        place = {**options, "rank": rank, "world_size": WORLD}
        theirs = getattr(open_clip_loss(), name)(**place)
        ours = {b: getattr(ccu_fast, name)(**place, backend=b) for b in backends_here()}
        torch.manual_seed(rank)
        data = {k: t.float().double() for k, t in towers(33, scale=scale, bias=bias, name=name).items()}
        row = {
            "exact": run(theirs, data, torch.float64),
            "torch": run(theirs, data, torch.float32),
            "reference-fp64": run(ours["reference"], data, torch.float64),
            **{b: run(loss, data, torch.float32) for b, loss in ours.items()},
        }
        results.append(row)
    try:
        ClipLoss(rank=rank, world_size=3)(data["image_features"], data["text_features"], 1.0)
    except ValueError as error:
        results.append(str(error))
    return results


def backends_here() -> list[str]:
    from ccu_fast.ops.backend import unavailable

    return ["reference"] if unavailable("native") else ["reference", "native"]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    open_clip_loss()  # imported once, here
    return on_ranks(WORLD, tmp_path_factory.mktemp("ranks"), every_configuration)


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("index", range(len(DISTRIBUTED)), ids=[f"{n}-{o}-{b}" for n, o, _, b in DISTRIBUTED])
def test_two_ranks_give_open_clips_numbers(index: int, rank: int, backend: str, two_ranks: list[Any]) -> None:
    _, options, scale, _ = DISTRIBUTED[index]
    results = {who: dict(answer) for who, answer in two_ranks[rank][index].items()}
    if options.get("local_loss") and options["gather_with_grad"]:
        # The ranks split this gradient differently; only its sum is guaranteed.
        for who, answer in results.items():
            for name in answer.keys() & {"dlogit_scale", "dlogit_bias"}:
                answer[name] = sum(of_rank[index][who][name] for of_rank in two_ranks) / WORLD
    compare(results[backend], results["torch"], results["exact"], scale)
    compare(results["reference-fp64"], results["exact"], results["exact"], scale)


def test_a_wrong_world_is_noticed(two_ranks: list[Any]) -> None:
    assert [r[-1] for r in two_ranks] == ["world_size: expected 2 (that of the group), got 3"] * 2
    assert not dist.is_initialized()
    with pytest.raises(
        RuntimeError, match=r"world_size: expected an initialised torch\.distributed group for 2, got none"
    ):
        ClipLoss(world_size=2)(torch.randn(3, 2), torch.randn(3, 2), 1.0)
