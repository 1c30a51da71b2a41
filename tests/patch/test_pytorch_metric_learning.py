"""pytorch-metric-learning's NTXentLoss and SupConLoss, patched."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import ccu_fast
from tests.support.drop_in import (
    counted,
    left_alone,
    library,
    same_numbers,
    same_training,
    speed,
    train_towers,
    unit,
)

KINDS = ("NTXentLoss", "SupConLoss")
TARGET = "pytorch_metric_learning"


def make(kind: str, **options: Any) -> Any:
    return getattr(library("pytorch_metric_learning.losses"), kind)(**options)


def labels(n: int, classes: int, *, lowest: int = 0) -> Tensor:
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(3)) + lowest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["several positives", "two views", "reference set", "negative labels", "dot product"])
def test_the_loss_has_the_same_numbers(kind: str, which: str) -> None:
    distances = library("pytorch_metric_learning.distances")
    options = {"distance": distances.DotProductSimilarity()} if which == "dot product" else {}
    n, m = 30, 21

    def problem(dtype: torch.dtype) -> Any:
        x = (1.3 * unit(n, 12, seed=1, dtype=dtype)).requires_grad_()
        loss = make(kind, **options)
        if which == "reference set":
            y = unit(m, 12, seed=2, dtype=dtype).requires_grad_()
            own, other = labels(n, 5), labels(m, 6)
            return lambda: loss(x, own, ref_emb=y, ref_labels=other), [x, y]
        own = torch.arange(n) % (n // 2) if which == "two views" else labels(n, 6)
        if which == "negative labels":
            own = own - 3
        return lambda: loss(x, own), [x]

    same_numbers(TARGET, problem)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["nothing alike", "all alike", "one anchor without negatives"])
def test_losses_with_nothing_to_compare(kind: str, case: str) -> None:
    x, y = unit(8, 6, seed=1), unit(5, 6, seed=2)
    own = {"nothing alike": torch.arange(8), "all alike": torch.zeros(8, dtype=torch.int64)}.get(case, labels(8, 2))
    other = {"nothing alike": torch.arange(5) + 100}.get(case, torch.zeros(5, dtype=torch.int64))

    def values() -> list[Tensor]:
        return [make(kind)(x, own), make(kind)(x, own, ref_emb=y, ref_labels=other)]

    before = values()
    with ccu_fast.patch.applied(TARGET):
        for ours, theirs in zip(values(), before, strict=True):
            torch.testing.assert_close(ours, theirs)


INFO = torch.iinfo(torch.int64)
NAMES = {
    "hashes": torch.tensor([INFO.min, INFO.max, 0, INFO.max - 1, -1]),
    "int32": torch.tensor([-(2**31), 2**31 - 1, 0, 5], dtype=torch.int32),
    "int16": torch.tensor([-(2**15), 2**15 - 1, 0, 5], dtype=torch.int16),
    "int8": torch.tensor([-128, 127, 0, 5], dtype=torch.int8),
    "uint8": torch.tensor([0, 255, 7], dtype=torch.uint8),
    "uint16": torch.tensor([0, 2**16 - 1, 7], dtype=torch.uint16),
    "uint32": torch.tensor([0, 2**32 - 1, 7], dtype=torch.uint32),
    "uint64": torch.tensor([2**64 - 1, 2**63, 0, 2**63 - 1], dtype=torch.uint64),
    "bool": torch.tensor([True, False]),
    "fp64": torch.tensor([0.25, 0.5, -1e300, torch.inf], dtype=torch.float64),
    "fp32": torch.tensor([0.25, 0.5, -0.0, 0.0]),
    "fp16": torch.tensor([0.25, 0.5, -3.0], dtype=torch.float16),
    "bf16": torch.tensor([0.25, 0.5, -3.0], dtype=torch.bfloat16),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("names", NAMES)
def test_labels_are_names(kind: str, names: str) -> None:
    # Chosen in a list: torch 2.8 does not index unsigned numbers.
    chosen, dtype_of_names = NAMES[names].tolist(), NAMES[names].dtype
    own, other = (torch.tensor([chosen[i] for i in labels(n, len(chosen))], dtype=dtype_of_names) for n in (20, 13))

    def problem(dtype: torch.dtype) -> Any:
        x, y = (unit(n, 8, seed=n, dtype=dtype).requires_grad_() for n in (20, 13))
        return lambda: make(kind)(x, own) + make(kind)(x, own, ref_emb=y, ref_labels=other), [x, y]

    same_numbers(TARGET, problem)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_are_equal_to_nothing_stay_with_the_library(kind: str) -> None:
    x, own = unit(9, 6), torch.tensor([1.0, 2.0, torch.nan]).repeat(3)
    left_alone(TARGET, lambda: make(kind)(x, own))
    left_alone(TARGET, lambda: make(kind)(x, labels(9, 3), ref_emb=x, ref_labels=labels(9, 3).int()))


def test_mined_pairs_other_distances_and_reducers_stay_with_the_library() -> None:
    distances, reducers = (library(f"pytorch_metric_learning.{name}") for name in ("distances", "reducers"))
    regularizers = library("pytorch_metric_learning.regularizers")
    x, own = unit(12, 6), labels(12, 3)
    pairs = tuple(torch.tensor(v) for v in ([0, 1], [2, 3], [4, 5], [6, 7]))
    far = distances.DotProductSimilarity(normalize_embeddings=False)
    for kind in KINDS:
        left_alone(TARGET, lambda kind=kind: make(kind)(x, own, pairs))
        left_alone(TARGET, lambda kind=kind: make(kind, distance=distances.LpDistance())(x, own))
        left_alone(TARGET, lambda kind=kind: make(kind, distance=distances.CosineSimilarity(power=2))(x, own))
        left_alone(
            TARGET, lambda kind=kind: make(kind, distance=distances.CosineSimilarity(collect_stats=True))(x, own)
        )
        left_alone(TARGET, lambda kind=kind: make(kind, distance=far)(1e3 * x, own))  # beyond what fp32 holds
        left_alone(TARGET, lambda kind=kind: make(kind)(x, labels=own, unknown=None))
    left_alone(TARGET, lambda: make("NTXentLoss", reducer=reducers.AvgNonZeroReducer())(x, own))
    left_alone(TARGET, lambda: make("NTXentLoss", reducer=reducers.MeanReducer(collect_stats=True))(x, own))
    left_alone(TARGET, lambda: make("NTXentLoss", embedding_regularizer=regularizers.LpRegularizer())(x, own))


OVERRIDES = {
    "NTXentLoss": ("_compute_loss", "pair_based_loss", "loss_method", "compute_loss"),
    "SupConLoss": ("_compute_loss", "mat_based_loss", "loss_method", "_assert_either_pos_or_neg"),
}
OF_DISTANCE = ("compute_mat", "forward", "normalize", "maybe_normalize", "check_shapes", "set_default_stats")
OF_REDUCER = ("forward", "reduce_the_loss", "get_reduction_func", "pos_pair_reduction", "element_reduction")
PLACES = ("subclass", "object", "library")


def negated(function: Callable[..., Any]) -> Callable[..., Any]:
    """A user's own, which looks like the library's and gives something else where it can."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return -result if isinstance(result, Tensor) else result

    return call


def override(thing: Any, name: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts a method of a user's own on an object, on a subclass that it becomes, or on the library's class."""
    if place == "object" or name == "loss_method":
        # The library calls pair_based_loss and mat_based_loss by the name of loss_method.
        name = "loss_method" if name in ("pair_based_loss", "mat_based_loss") else name
        object.__setattr__(thing, name, negated(getattr(thing, name)))
    elif place == "subclass":
        own = negated(getattr(type(thing), name))
        static = name == "_assert_either_pos_or_neg"
        thing.__class__ = type("Users", (type(thing),), {name: staticmethod(own) if static else own})
        if hasattr(thing, "loss_method"):  # as its constructor does
            thing.loss_method = getattr(thing, thing.loss_method.__name__)
    else:
        owner = next(c for c in type(thing).__mro__ if name in vars(c))
        static = isinstance(vars(owner)[name], staticmethod)
        own = negated(getattr(owner, name))
        monkeypatch.setattr(owner, name, staticmethod(own) if static else own)
        if hasattr(thing, "loss_method"):
            thing.loss_method = getattr(thing, thing.loss_method.__name__)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_methods_of_a_users_own_stay_with_the_library(kind: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, own = unit(12, 6), labels(12, 3)
    parts = {"self": OVERRIDES[kind], "distance": OF_DISTANCE, "reducer": OF_REDUCER if kind == "NTXentLoss" else ()}
    for part, names in parts.items():
        for name in names:
            if part == "self" and not hasattr(make(kind), name):  # 2.3.0 has no check of the masks
                continue
            with monkeypatch.context() as context:
                loss = make(kind)
                change = functools.partial(
                    override, loss if part == "self" else getattr(loss, part), name, place, context
                )
                if place != "library":
                    change()
                    left_alone(TARGET, lambda loss=loss: loss(x, own))
                    continue
                with counted(TARGET) as calls:  # a library that was changed before is not patched at all
                    change()
                    ours = loss(x, own)
                assert calls.kernels == 0, name
                assert torch.equal(ours, loss(x, own))


@pytest.mark.parametrize("kind", KINDS)
def test_functions_that_a_user_replaces_stay_with_the_library(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    common, pairs = (
        library(f"pytorch_metric_learning.utils.{n}") for n in ("common_functions", "loss_and_miner_utils")
    )
    x, own = unit(12, 6), labels(12, 3)
    for module, name in ((common, "small_val"), (common, "neg_inf"), (pairs, "get_matches_and_diffs")):
        with monkeypatch.context() as context:
            original = getattr(module, name)
            context.setattr(module, name, lambda *args, original=original: original(*args))
            left_alone(TARGET, lambda: make(kind)(x, own))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_loss_inherits_may_be_replaced_while_it_is_patched(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bases = {
        "NTXentLoss": ("base_metric_loss_function", "BaseMetricLossFunction", "forward"),
        "SupConLoss": ("generic_pair_loss", "GenericPairLoss", "compute_loss"),
    }
    module, owner, name = bases[kind]
    base = getattr(library(f"pytorch_metric_learning.losses.{module}"), owner)
    x, own = unit(12, 6), labels(12, 3)
    seen = []

    def users(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: [seen.append(kind), original(*args, **kwargs)][1]

    with counted(TARGET) as calls:
        monkeypatch.setattr(base, name, users(getattr(base, name)))
        make(kind)(x, own)
    assert seen == [kind]
    assert calls.kernels == 0


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_are_called(kind: str) -> None:
    x, own = unit(12, 6), labels(12, 3)
    for part in ("distance", "reducer"):
        kinds = ["register_forward_hook", "register_forward_pre_hook"]
        if part == "distance":  # the gradient of a reducer's dict is nobody's
            kinds.append("register_full_backward_hook")
        for register in kinds:
            loss, seen = make(kind), []
            getattr(getattr(loss, part), register)(lambda *_, seen=seen: seen.append(1))
            with ccu_fast.patch.applied(TARGET):
                loss(x.clone().requires_grad_(), own).backward()
            assert seen, f"{part}.{register}"
    loss, seen = make(kind), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with ccu_fast.patch.applied(TARGET):
            loss(x, own)
    finally:
        handle.remove()
    assert seen == [loss.distance, loss.reducer, loss]


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_and_tensors_that_no_kernel_reads_stay_with_the_library(kind: str) -> None:
    x, own, loss = unit(12, 6), labels(12, 3), make(kind)
    y, other = unit(5, 6, seed=2), labels(5, 3)
    left_alone(TARGET, lambda: loss(x.to("meta"), own.to("meta")))
    left_alone(TARGET, lambda: torch.func.grad(lambda t: loss(t, own))(x))
    left_alone(TARGET, lambda: torch.func.hessian(lambda t: loss(t, own))(x))
    left_alone(TARGET, lambda: torch.func.jvp(lambda t: loss(t, own), (x,), (x.flip(0),))[1])
    left_alone(TARGET, lambda: torch.vmap(lambda t: loss(t, own, ref_emb=y, ref_labels=other))(torch.stack([x, -x])))
    left_alone(TARGET, lambda: loss(torch.where(x > 0, x, torch.nan), own))
    left_alone(TARGET, lambda: loss(x[None], own))
    left_alone(TARGET, lambda: loss(x, own[:5]))
    left_alone(TARGET, lambda: loss(x, own, ref_emb=y.double(), ref_labels=other))

    def forward_mode() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(loss(forward_ad.make_dual(x, x.flip(0)), own)).tangent

    left_alone(TARGET, forward_mode)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_every_order(kind: str) -> None:
    y, other, own = unit(5, 6, seed=2), labels(5, 3), labels(12, 3)
    loss = make(kind, temperature=0.3)

    def penalty(dtype: torch.dtype) -> Any:
        x, t = unit(12, 6, dtype=dtype).requires_grad_(), torch.tensor(0.3, dtype=dtype, requires_grad=True)

        def value() -> Tensor:
            del loss.temperature
            loss.temperature = t  # learned
            found = loss(x, own, ref_emb=y.to(dtype), ref_labels=other)
            firsts = torch.autograd.grad(found, [x, t], create_graph=True)
            return found + sum(g.square().sum() for g in firsts)

        return value, [x, t]

    same_numbers(TARGET, penalty)
    loss.temperature = 0.3
    x = unit(12, 6).requires_grad_()
    seconds = torch.autograd.functional.hessian(lambda t: loss(t, own), x, vectorize=True)
    firsts = torch.autograd.grad(loss(x, own), x, torch.tensor([1.0, -2.0]), is_grads_batched=True)[0]
    with counted(TARGET) as calls:
        torch.testing.assert_close(
            torch.autograd.functional.hessian(lambda t: loss(t, own), x, vectorize=True), seconds, rtol=1e-4, atol=1e-6
        )
        ours = torch.autograd.grad(loss(x, own), x, torch.tensor([1.0, -2.0]), is_grads_batched=True)[0]
    torch.testing.assert_close(ours, firsts, rtol=1e-4, atol=1e-6)
    assert calls.kernels > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.1, 0.01])  # at 0.01 the library's small_val decides
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_loss_and_gradients_have_the_library_s_dtype_and_numbers(
    kind: str, temperature: float, autocast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = library("ccu_fast.patch.pytorch_metric_learning")
    reductions = []

    def counting(*args: Any, original: Any = ours.reduce_similarity, **kwargs: Any) -> Any:
        reductions.append(1)
        return original(*args, **kwargs)

    def results() -> list[Tensor]:
        x, y = (unit(n, 8, seed=n).to(dtype).requires_grad_() for n in (24, 15))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = make(kind, temperature=temperature)(x, labels(24, 4), ref_emb=y, ref_labels=labels(15, 5))
        return [loss.detach(), *torch.autograd.grad(loss, [x, y])]

    theirs = results()
    monkeypatch.setattr(ours, "reduce_similarity", counting)
    with ccu_fast.patch.applied(TARGET):
        found = results()
    by_us = kind == "NTXentLoss" and (dtype != torch.float16 or autocast)  # SupConLoss reduces in ccu_fast.losses
    assert (len(reductions) >= 2) == by_us
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
    rtol = tolerance[torch.bfloat16 if autocast and dtype != torch.float64 else dtype]
    for o, t in zip(found, theirs, strict=True):
        assert o.dtype == t.dtype
        torch.testing.assert_close(o, t, rtol=rtol, atol=rtol * float(t.abs().max()))


def test_exact_numbers_are_an_option() -> None:
    own = torch.tensor([0, 0, 1, 1])
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    s = x.double() @ x.double().T / 0.01

    def exact(i: int, p: int) -> float:
        return float(torch.logsumexp(s[i][[p, *(own != own[i]).nonzero().flatten().tolist()]], 0) - s[i, p])

    mean = sum(exact(i, i ^ 1) for i in range(4)) / 4
    assert mean >= 200
    loss = make("NTXentLoss", temperature=0.01)
    for dtype, bound in ((torch.float32, 87.4), (torch.bfloat16, 88), (torch.float16, 9.8)):
        with ccu_fast.patch.applied(TARGET):
            limited = loss(x.to(dtype), own)
        assert limited.dtype == dtype
        assert limited < bound
        with ccu_fast.patch.applied(TARGET, exact=True):
            value = loss(x.to(dtype), own)
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(mean, rel=1e-6)
    with ccu_fast.patch.applied(TARGET, exact=True):
        assert make("SupConLoss")(x.half(), own).dtype == torch.float32
    with pytest.raises(
        ValueError, match=r"exact: expected False for open_clip \(only pytorch_metric_learning takes it"
    ):
        ccu_fast.patch.apply("open_clip", exact=True)
    with (
        ccu_fast.patch.applied(TARGET, exact=True),
        pytest.raises(
            ValueError, match="exact: expected True, with which pytorch_metric_learning is applied, got False"
        ),
    ):
        ccu_fast.patch.apply(TARGET)


def test_logits_of_any_size_keep_pairs_apart() -> None:
    """A row's negatives may lie below any constant that stands for none of them."""
    distances = library("pytorch_metric_learning.distances")
    loss = make("NTXentLoss", distance=distances.DotProductSimilarity(normalize_embeddings=False), temperature=1.0)
    x = torch.tensor([[60.0, 0.0], [-1.0, 0.0], [-59.0, 1.0]])
    y = torch.tensor([[-59.0, 0.0], [-60.0, 0.0], [59.0, 0.0]])
    own, other = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2])

    def value() -> Tensor:
        return loss(x, own, ref_emb=y, ref_labels=other)

    theirs = value()
    with counted(TARGET) as calls:
        torch.testing.assert_close(value(), theirs)
    assert calls.kernels > 0


def test_a_copy_of_a_loss_and_a_compiled_one_are_served() -> None:
    x, own = unit(12, 6), labels(12, 3)
    for kind in KINDS:
        loss = make(kind)
        theirs = loss(x, own)
        for variant in (copy.deepcopy(loss), torch.compile(loss, backend="eager")):
            with counted(TARGET) as calls:
                torch.testing.assert_close(variant(x, own), theirs)
            assert calls.kernels > 0


def test_a_reducer_gets_from_sup_con_what_the_library_gives_it() -> None:
    reducers = library("pytorch_metric_learning.reducers")
    x = unit(12, 6)
    loss = make("SupConLoss", reducer=reducers.DoNothingReducer())
    for own in (labels(12, 3), torch.arange(12), torch.zeros(12)):
        theirs = loss(x, own)["loss"]
        with ccu_fast.patch.applied(TARGET):
            found = loss(x, own)["loss"]
        assert found["reduction_type"] == theirs["reduction_type"]
        torch.testing.assert_close(found["losses"], theirs["losses"])
        torch.testing.assert_close(found["indices"], theirs["indices"])


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same(kind: str) -> None:
    loss = make(kind, temperature=0.2)

    def train(steps: int) -> list[float]:
        own = torch.arange(24)  # the library compares every positive pair with every negative one
        return train_towers(lambda x, y, scale: loss(torch.cat([x[:24], y[:24]]), torch.cat([own, own])), steps)

    same_training(TARGET, train)


def test_speed() -> None:
    # The library compares every positive pair with every negative one: 2048 rows of 256 classes would take 60 GB.
    for kind, n, classes in (("NTXentLoss", 384, 192), ("SupConLoss", 2048, 256)):
        loss, x, own = make(kind), unit(n, 128).requires_grad_(), torch.arange(n) % classes
        speed(
            TARGET,
            f"{kind} forward + backward, {n} rows of {classes} classes, D = 128",
            lambda: loss(x, own).backward(),  # noqa: B023
            rounds=3,
        )
