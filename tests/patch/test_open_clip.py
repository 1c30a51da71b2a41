"""open_clip's own classes, patched."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import warnings
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import ccu_fast
from ccu_fast.patch.open_clip import equal_texts
from tests.support import torchvision_stub
from tests.support.drop_in import counted, left_alone, library, same_numbers, same_training, speed, train_towers, unit
from tests.support.forked import on_ranks
from tests.support.tolerance import assert_three_way

SCALE, BIAS = 30.0, -6.0


@pytest.fixture(scope="module")
def loss_py():  # type: ignore[no-untyped-def]
    torchvision_stub.install()
    library("open_clip")
    return __import__("open_clip.loss").loss


def towers(dtype: torch.dtype, n: int = 37, d: int = 24) -> list[Tensor]:
    x, y = unit(n, d, seed=1, dtype=dtype), unit(n, d, seed=2, dtype=dtype)
    scale = torch.tensor(SCALE, dtype=dtype)
    return [t.requires_grad_() for t in (x, y, scale)]


def test_clip_loss_has_the_same_numbers(loss_py) -> None:  # type: ignore[no-untyped-def]
    def problem(dtype: torch.dtype):  # type: ignore[no-untyped-def]
        leaves = towers(dtype)
        return lambda: loss_py.ClipLoss()(*leaves, output_dict=True)["contrastive_loss"], leaves

    same_numbers("open_clip", problem)


def test_siglip_loss_has_the_same_numbers(loss_py) -> None:  # type: ignore[no-untyped-def]
    def problem(dtype: torch.dtype):  # type: ignore[no-untyped-def]
        leaves = [*towers(dtype), torch.tensor(BIAS, dtype=dtype).requires_grad_()]
        return lambda: loss_py.SigLipLoss()(*leaves), leaves

    same_numbers("open_clip", problem)


def chunked(loss_py: Any, size: int) -> Any:
    if "chunk_size" not in inspect.signature(loss_py.SigLipLoss).parameters:
        pytest.skip("this version has no chunks")
    return loss_py.SigLipLoss(chunk_size=size)


@pytest.mark.parametrize("size", [5, 64])
def test_siglip_loss_in_chunks(loss_py, size: int) -> None:  # type: ignore[no-untyped-def]
    loss = chunked(loss_py, size)

    def problem(dtype: torch.dtype):  # type: ignore[no-untyped-def]
        leaves = [*towers(dtype), torch.tensor(BIAS, dtype=dtype).requires_grad_()]
        return lambda: loss(*leaves), leaves

    same_numbers("open_clip", problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_dtype_of_siglip_loss_in_chunks(loss_py, dtype: torch.dtype, autocast: bool) -> None:  # type: ignore[no-untyped-def]
    loss = chunked(loss_py, 5)
    x, y, _ = (t.detach() for t in towers(dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = loss(x, y, SCALE, BIAS)
        with ccu_fast.patch.applied("open_clip"):
            ours = loss(x, y, SCALE, BIAS)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_chunks_of_somebody_else_are_the_library_s(loss_py, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    loss = chunked(loss_py, 5)
    x, y, _ = (t.detach() for t in towers(torch.float32))
    monkeypatch.setattr(loss, "_chunked_loss", lambda *_: torch.zeros(()))
    left_alone("open_clip", lambda: loss(x, y, SCALE, BIAS))
    monkeypatch.undo()
    own = torch.nn.functional.softplus
    monkeypatch.setattr(torch.nn.functional, "softplus", lambda *args: 2 * own(*args))
    left_alone("open_clip", lambda: loss(x, y, SCALE, BIAS))


def test_coca_loss_has_the_same_numbers(loss_py) -> None:  # type: ignore[no-untyped-def]
    def problem(dtype: torch.dtype):  # type: ignore[no-untyped-def]
        x, y, scale = towers(dtype)
        logits = unit(37, 5, 11, seed=3, dtype=dtype).requires_grad_()
        labels = torch.randint(0, 11, (37, 5), generator=torch.Generator().manual_seed(0))
        coca = loss_py.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=0.5)
        return lambda: sum(coca(x, y, logits, labels, scale)), [x, y, scale, logits]

    same_numbers("open_clip", problem)


def test_training_is_the_same(loss_py) -> None:  # type: ignore[no-untyped-def]
    same_training("open_clip", lambda steps: train_towers(loss_py.ClipLoss(), steps))


def test_objects_that_exist_are_served_and_given_back(loss_py) -> None:  # type: ignore[no-untyped-def]
    existing, own = loss_py.ClipLoss(), loss_py.ClipLoss.forward
    leaves = towers(torch.float32)
    with counted("open_clip") as calls:
        assert ccu_fast.patch.active()["open_clip"] == [
            "open_clip.loss.ClipLoss.forward",
            "open_clip.loss.SigLipLoss.forward",
            "open_clip.loss.DistillClipLoss.forward",
        ]
        existing(*leaves)
    assert calls.kernels == 1
    assert loss_py.ClipLoss.forward is own


def biased(loss_py: Any) -> list[Any]:
    """Those of the two losses that take a bias, in (images, texts, scale, bias)."""
    kinds = (loss_py.ClipLoss, loss_py.SigLipLoss)
    return [kind() for kind in kinds if "logit_bias" in inspect.signature(kind.forward).parameters]


def both(loss_py: Any) -> list[Any]:
    """The two losses as functions of (images, texts, scale, bias), which ClipLoss of version 2 does without."""

    class WithoutBias(loss_py.ClipLoss):  # type: ignore[misc, name-defined]
        def __call__(self, x: Any, y: Any, scale: Any, bias: Any) -> Any:
            return super().__call__(x, y, scale)

    found = biased(loss_py)
    return found if len(found) == 2 else [WithoutBias(), *found]


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *(("ClipLoss", method) for method in ("get_logits", "get_ground_truth")),
        *(("SigLipLoss", method) for method in ("get_logits", "get_ground_truth", "_loss")),
    ],
)
@pytest.mark.parametrize("where", ["subclass", "instance", "class"])
def test_a_method_that_somebody_overrides_is_used(
    kind: str,
    method: str,
    where: str,
    loss_py,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stock = getattr(loss_py, kind)
    own = getattr(stock, method)

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = own(self, *args, **kwargs)
        return tuple(2 * r for r in result) if isinstance(result, tuple) else result.flip(0) if result.ndim else -result

    loss = type("Theirs", (stock,), {method: changed} if where == "subclass" else {})()
    if where == "instance":
        setattr(loss, method, partial(changed, loss))
    if where == "class":
        monkeypatch.setattr(stock, method, changed)
    bias = torch.tensor(BIAS)
    left_alone("open_clip", lambda: loss(*towers(torch.float32), bias))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_loss_that_somebody_replaces_in_torch_is_used(
    loss_py,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
    wrapped: bool,
) -> None:
    own = torch.nn.functional.cross_entropy

    def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
        return own(logits, labels, label_smoothing=0.1)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", wraps(own)(smoothed) if wrapped else smoothed)
    left_alone("open_clip", lambda: loss_py.ClipLoss()(*towers(torch.float32)))


@pytest.mark.parametrize(
    "scale",
    [
        torch.linspace(1, 3, 37),
        torch.linspace(1, 3, 37)[:, None],
        torch.linspace(1, 3, 24),
        torch.ones(37, 24),
        torch.ones(1, 1, 1),
        torch.tensor(3),
        torch.tensor(True),
        torch.inf,
        True,
    ],
    ids=["row", "column", "dimensions", "matrix", "cube", "integer", "boolean", "infinite", "True"],
)
def test_what_is_no_number_is_the_library_s(loss_py, scale: Any) -> None:  # type: ignore[no-untyped-def]
    x, y, one = (t.detach() for t in towers(torch.float32))
    for loss in both(loss_py):
        left_alone("open_clip", partial(loss, x, y, scale, -1.0))
    for loss in biased(loss_py):
        left_alone("open_clip", partial(loss, x, y, one, scale))


@pytest.mark.parametrize("number", [3, 3.5, torch.tensor(3.5), torch.tensor([3.5]), torch.tensor(3.5).double()])
def test_one_number_of_any_kind_is_served(loss_py, number: Any) -> None:  # type: ignore[no-untyped-def]
    x, y, _ = towers(torch.float32)
    for loss in both(loss_py):
        theirs = loss(x, y, number, number)
        with counted("open_clip") as calls:
            ours = loss(x, y, number, number)
        assert calls.kernels == 1
        torch.testing.assert_close(ours, theirs)


class Mine(Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.to("meta"),
        lambda t: t.as_subclass(Mine),
        lambda t: t[:0],
        lambda t: t[None],
        lambda t: t.to(torch.complex64),
        lambda t: t.to_sparse(),
        lambda t: t.double(),
    ],
    ids=["meta", "subclass", "empty", "batch", "complex", "sparse", "other dtype"],
)
def test_what_is_no_plain_matrix_is_the_library_s(loss_py, change: Callable[[Tensor], Tensor]) -> None:  # type: ignore[no-untyped-def]
    x, y, scale = (t.detach() for t in towers(torch.float32))
    left_alone("open_clip", partial(loss_py.ClipLoss(), x, y[:-1], scale))
    for loss in both(loss_py):
        left_alone("open_clip", partial(loss, change(x), y, scale, -1.0))
        if change(x).dtype != torch.float64:
            left_alone("open_clip", partial(loss, change(x), change(y), scale, -1.0))


def test_a_replaced_namespace_is_the_library_s(loss_py, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Some users replace ``F`` in the module alone, not torch's own functions."""
    x, y, scale = (t.detach() for t in towers(torch.float32))

    class Other:
        cross_entropy = staticmethod(lambda logits, labels: 2 * torch.nn.functional.cross_entropy(logits, labels))
        logsigmoid = staticmethod(lambda z: 2 * torch.nn.functional.logsigmoid(z))

    monkeypatch.setattr(loss_py, "F", Other)
    for loss in both(loss_py):
        left_alone("open_clip", partial(loss, x, y, scale, -1.0))


@pytest.mark.parametrize("transform", ["vmap", "grad", "dual", "fake", "make_fx"])
def test_a_call_under_a_transform_is_the_library_s(loss_py, transform: str) -> None:  # type: ignore[no-untyped-def]
    x, y, scale = (t.detach() for t in towers(torch.float32))

    def transformed(loss: Callable[..., Any]) -> Any:
        def of(x: Tensor) -> Any:
            return loss(x, y, scale, torch.tensor(-1.0))

        if transform == "vmap":
            return torch.vmap(of)(torch.stack([x, y]))
        if transform == "grad":
            return torch.func.grad(of)(x)
        if transform == "make_fx":
            return make_fx(of)(x)(y)
        if transform == "fake":
            with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                return torch.empty(of(mode.from_tensor(x)).shape, device="meta")
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(of(forward_ad.make_dual(x, y))).tangent

    for loss in both(loss_py):
        left_alone("open_clip", partial(transformed, loss))


@pytest.mark.parametrize("settings", [{"rank": 3}, {"world_size": 2}, {"rank": 1, "world_size": 2}])
def test_a_rank_without_a_group(loss_py, settings: dict[str, int]) -> None:  # type: ignore[no-untyped-def]
    leaves = [*towers(torch.float32), torch.tensor(BIAS)]
    for kind in (loss_py.ClipLoss, loss_py.SigLipLoss):
        if "world_size" in settings:
            left_alone("open_clip", partial(kind(**settings), *leaves))
        else:  # of one process it means nothing
            with counted("open_clip") as calls:
                kind(**settings)(*leaves)
            assert calls.kernels == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_the_loss_has_the_library_s_dtype(loss_py, dtype: torch.dtype, autocast: torch.dtype | None) -> None:  # type: ignore[no-untyped-def]
    leaves = [*towers(dtype), torch.tensor(BIAS, dtype=dtype)]
    for loss in both(loss_py):
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            theirs = loss(*leaves)
            with ccu_fast.patch.applied("open_clip"):
                ours = loss(*leaves)
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_a_gradient_penalty_is_the_library_s(loss_py) -> None:  # type: ignore[no-untyped-def]
    leaves = [*towers(torch.float64), torch.tensor(BIAS, requires_grad=True, dtype=torch.float64)]
    single = [t.detach().float().requires_grad_() for t in leaves]

    def gradients(loss: Callable[..., Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
        grad = partial(torch.autograd.grad, inputs=leaves, materialize_grads=True)
        return grad(sum(g.square().sum() for g in grad(loss(*leaves), create_graph=True)))

    for loss in both(loss_py):
        exact = gradients(loss, leaves)
        with counted("open_clip") as calls:
            ours = gradients(loss, single)
        assert calls.kernels == 1
        peak = max(float(e.abs().max()) for e in exact)
        for o, e in zip(ours, exact, strict=True):
            torch.testing.assert_close(o.double(), e, rtol=1e-3, atol=1e-5 * peak)


def test_a_compiled_loss_is_served_in_one_graph(loss_py) -> None:  # type: ignore[no-untyped-def]
    leaves = [*towers(torch.float32), torch.tensor(BIAS, requires_grad=True)]
    for loss in both(loss_py):
        theirs = loss(*leaves)
        graphs: list[str] = []

        def keep(graph: torch.fx.GraphModule, inputs: Any, graphs: list[str] = graphs) -> Any:
            graphs.append(graph.print_readable(print_output=False))
            return graph

        torch._dynamo.reset()
        torch._dynamo.utils.warn_once_cache.clear()
        with ccu_fast.patch.applied("open_clip"), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Dynamo detected")  # of a cache, and fears wrong numbers
            ours = torch.compile(loss, fullgraph=True, backend=keep)(*leaves)
        assert "ccu_fast.reduce_similarity" in graphs[0]
        torch.testing.assert_close(ours, theirs)


# ---- a teacher


def taught(dtype: torch.dtype, n: int = 37) -> list[Tensor]:
    """What the student's features, scale and then the teacher's are; these get no gradient."""
    u, v = (unit(n, 20, seed=seed, dtype=dtype) for seed in (3, 4))
    return [*towers(dtype, n), u, v, torch.tensor(1.5 * SCALE, dtype=dtype)]


def test_distill_loss_has_the_same_numbers(loss_py) -> None:  # type: ignore[no-untyped-def]
    def problem(dtype: torch.dtype):  # type: ignore[no-untyped-def]
        leaves = taught(dtype)
        loss = loss_py.DistillClipLoss()

        def both() -> Tensor:
            named = loss(*leaves, output_dict=True)
            assert list(named) == ["contrastive_loss", "distill_loss"]
            contrastive, distilled = loss(*leaves)
            assert torch.equal(distilled, named["distill_loss"])
            return contrastive + 2 * distilled

        return both, leaves[:3]

    same_numbers("open_clip", problem)


def test_training_with_a_teacher_is_the_same(loss_py) -> None:  # type: ignore[no-untyped-def]
    loss, teacher = loss_py.DistillClipLoss(), taught(torch.float32, 64)[3:]
    same_training("open_clip", lambda steps: train_towers(lambda *student: sum(loss(*student, *teacher)), steps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_the_dtype_of_distill_loss(loss_py, dtype: torch.dtype, autocast: torch.dtype | None) -> None:  # type: ignore[no-untyped-def]
    leaves, loss = taught(dtype), loss_py.DistillClipLoss()
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        theirs = loss(*leaves)
        with counted("open_clip") as calls:
            ours = loss(*leaves)
    assert calls.kernels > 0 or dtype == torch.float64
    for mine, their in zip(ours, theirs, strict=True):
        assert mine.dtype == their.dtype
        torch.testing.assert_close(mine, their, rtol=4e-2, atol=4e-2)


def test_what_a_distill_loss_does_not_say_is_the_library_s(loss_py, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    loss, (x, y, scale, u, v, of) = loss_py.DistillClipLoss(), (t.detach() for t in taught(torch.float32))

    def alone(*args: Any, by: Any = loss) -> None:
        left_alone("open_clip", lambda: sum(by(*args)))

    alone(x, y, scale, u.requires_grad_(), v, of)  # a teacher that learns
    u.requires_grad_(False)
    alone(x, y, scale, u, v, of.clone().requires_grad_())
    alone(x, y, scale, u.double(), v.double(), of)
    alone(x, y, scale, u[:-1], v[:-1], of)
    alone(x, y, torch.linspace(1, 3, 37)[:, None], u, v, of)
    alone(x, y, scale, u, v, torch.linspace(1, 3, 37)[:, None])
    alone(x, y, scale, u.as_subclass(Mine), v, of)
    for method in ("dist_loss", "get_logits", "get_ground_truth"):
        own = getattr(loss_py.DistillClipLoss, method)
        subclass = type("Theirs", (loss_py.DistillClipLoss,), {method: wraps(own)(lambda *a, own=own: own(*a))})
        alone(x, y, scale, u, v, of, by=subclass())
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda logits, labels: logits.sum())
    alone(x, y, scale, u, v, of)


def test_a_compiled_distill_loss_is_served_in_one_graph(loss_py) -> None:  # type: ignore[no-untyped-def]
    leaves, loss = taught(torch.float32), loss_py.DistillClipLoss()
    torch._dynamo.reset()
    with counted("open_clip"):
        ours = torch.compile(loss, fullgraph=True, backend="eager")(*leaves)
    torch.testing.assert_close(ours, loss(*leaves))


def test_with_same_a_distill_loss_is_refused(loss_py) -> None:  # type: ignore[no-untyped-def]
    refused = pytest.raises(RuntimeError, match="same: expected ClipLoss or SigLipLoss, got DistillClipLoss")
    with ccu_fast.patch.applied("open_clip", same="texts"):
        with refused:
            loss_py.DistillClipLoss()(*taught(torch.float32))
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'dist_logit_scale'"):
            loss_py.DistillClipLoss()(*taught(torch.float32)[:-1])


def test_a_missing_argument_is_the_library_s_error(loss_py) -> None:  # type: ignore[no-untyped-def]
    given = taught(torch.float32)
    for kind, count in (("ClipLoss", 2), ("SigLipLoss", 3), ("DistillClipLoss", 3)):
        errors = []
        for patched in (False, True):
            with (
                ccu_fast.patch.applied("open_clip") if patched else contextlib.nullcontext(),
                pytest.raises(TypeError) as error,
            ):
                getattr(loss_py, kind)()(*given[:count])
            errors.append(str(error.value))
        assert errors[0] == errors[1]
        assert "missing" in errors[0]


def distilled_on(rank: int, loss_py: Any) -> list[tuple[list[Tensor], list[Tensor], list[Tensor], int]]:
    """For each way to gather: losses and gradients in fp64 and fp32 by open_clip and in fp32 by us, and our calls."""
    found = []
    for local, grad in itertools.product([False, True], repeat=2):
        loss = loss_py.DistillClipLoss(local_loss=local, gather_with_grad=grad, rank=rank, world_size=2)

        def run(dtype: torch.dtype, loss: Any = loss) -> list[Tensor]:
            whole = taught(torch.float32, 42)
            mine = [t.detach()[21 * rank : 21 * rank + 21] if t.ndim else t.detach() for t in whole]
            leaves = [t.to(dtype).requires_grad_(i < 3) for i, t in enumerate(mine)]
            contrastive, distilled = loss(*leaves)
            (contrastive + 2 * distilled).backward()
            return [contrastive.detach(), distilled.detach(), *(t.grad for t in leaves[:3])]

        exact, theirs = run(torch.float64), run(torch.float32)
        own = ccu_fast.DistillClipLoss._both
        with (
            ccu_fast.patch.applied("open_clip"),
            mock.patch.object(ccu_fast.DistillClipLoss, "_both", autospec=True, side_effect=own) as served,
        ):
            ours = run(torch.float32)
        found.append((exact, theirs, ours, served.call_count))
    return found


def test_distill_loss_on_two_ranks(loss_py, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    first, second = on_ranks(2, tmp_path, lambda rank: distilled_on(rank, loss_py))
    for ways in zip(first, second, strict=True):
        for exact, theirs, ours, calls in ways:
            assert calls == 1
            for name, want, same, got in zip(("contrastive", "distill", "dx", "dy"), exact, theirs, ours, strict=False):
                assert_three_way(name, got, same, want, ulps=64)
        # With local_loss and gather_with_grad the ranks split the gradient of the scale otherwise.
        assert_three_way(
            "dscale",
            *(sum(way[i][4] for way in ways) for i in (2, 1, 0)),
            ulps=64,
            magnitude=1.0,  # type: ignore[arg-type]
        )


def test_speed(loss_py) -> None:  # type: ignore[no-untyped-def]
    for n in (1024, 4096):
        leaves = towers(torch.float32, n, 512)

        def step() -> None:
            loss_py.ClipLoss()(*leaves).backward()  # noqa: B023

        speed("open_clip", f"ClipLoss forward + backward, B = {n}, D = 512", step)


# ---- several positives


CAPTIONS = torch.tensor([0, 1, 2, 0, 3, 1, 0])


def captioned(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Pairs, some of which have the same text."""
    x, y = unit(7, 24, seed=1, dtype=dtype), unit(4, 24, seed=2, dtype=dtype)[CAPTIONS]
    return [x.requires_grad_(), y.requires_grad_(), torch.tensor(SCALE, dtype=dtype)]


def without_equals(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    out = (CAPTIONS[:, None] == CAPTIONS) & ~torch.eye(7, dtype=torch.bool)
    s, target = (scale * x @ y.T).masked_fill(out, -torch.inf), torch.arange(7)
    return (torch.nn.functional.cross_entropy(s, target) + torch.nn.functional.cross_entropy(s.T, target)) / 2


@pytest.mark.parametrize("same", ["texts", lambda images, texts: CAPTIONS])
def test_equal_captions_may_be_no_negatives_of_each_other(same: Any, loss_py) -> None:  # type: ignore[no-untyped-def]
    leaves, wide = captioned(), captioned(torch.float64)
    with ccu_fast.patch.applied("open_clip", same=same):
        assert ccu_fast.patch.apply("open_clip", same=same), "applying what is applied changes nothing"
        got = loss_py.ClipLoss()(*leaves)
        sigmoid = loss_py.SigLipLoss()(*leaves, torch.tensor(BIAS))
    want = without_equals(*wide)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    for ours, exact in zip(torch.autograd.grad(got, leaves[:2]), torch.autograd.grad(want, wide[:2]), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
    sign = torch.where(CAPTIONS[:, None] == CAPTIONS, 1.0, -1.0)
    logits = SCALE * leaves[0] @ leaves[1].T + BIAS
    torch.testing.assert_close(sigmoid, -torch.nn.functional.logsigmoid(sign * logits).sum() / 7)
    assert not torch.allclose(loss_py.ClipLoss()(*leaves), got), "reverted"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_texts_are_equal_where_all_their_bits_are(dtype: torch.dtype) -> None:
    texts = unit(64, 24, seed=5, dtype=torch.float32).to(dtype)
    other = texts.clone()
    other[:, 7] = torch.nextafter(other[:, 7].float(), torch.tensor(9.0)).to(dtype) if dtype == torch.float32 else 3
    ids = equal_texts(texts, torch.cat([texts, texts.flip(0), other]))
    assert torch.equal(ids[:64], ids[64:128].flip(0))
    with torch.device("meta"):  # a default device is not that of the features
        assert torch.equal(equal_texts(texts, texts), ids[:64])
    assert len(ids.unique()) == 128
    swapped = texts[:, [1, 0, *range(2, 24)]]
    assert len(equal_texts(texts, torch.cat([texts, swapped])).unique()) == 128, "an order counts"


def test_a_compiled_loss_leaves_out_equal_texts(loss_py) -> None:  # type: ignore[no-untyped-def]
    leaves = captioned()
    torch._dynamo.reset()
    with ccu_fast.patch.applied("open_clip", same="texts"):
        compiled = torch.compile(loss_py.ClipLoss(), fullgraph=True, backend="eager")(*leaves)
        torch.testing.assert_close(compiled, loss_py.ClipLoss()(*leaves))


def test_with_same_nothing_goes_to_another_loss(loss_py) -> None:  # type: ignore[no-untyped-def]
    leaves = captioned()
    with (
        ccu_fast.patch.applied("open_clip", same="texts"),
        pytest.raises(RuntimeError, match="same: expected plain features"),
    ):
        loss_py.ClipLoss()(*leaves[:2], torch.linspace(1, 3, 7)[:, None])


def test_wrong_options_are_refused(loss_py) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="same: expected one of"):
        ccu_fast.patch.apply("open_clip", same="images")
    with pytest.raises(ValueError, match=r"same: expected None for transformers \(only open_clip takes it\)"):
        ccu_fast.patch.apply("transformers", same="texts")
    with (
        ccu_fast.patch.applied("open_clip"),
        pytest.raises(ValueError, match="same: expected None, with which open_clip is applied, got 'texts'; revert"),
    ):
        ccu_fast.patch.apply("open_clip", same="texts")
    with (
        ccu_fast.patch.applied("open_clip", same=lambda images, texts: None),
        pytest.raises(TypeError, match=r"same: expected a torch\.Tensor, got NoneType"),
    ):
        loss_py.ClipLoss()(*captioned())
    with (
        ccu_fast.patch.applied("open_clip", same=lambda images, texts: CAPTIONS[:3]),
        pytest.raises(ValueError, match="ids: expected shape"),
    ):
        loss_py.ClipLoss()(*captioned())
    assert ccu_fast.patch.active() == {}
