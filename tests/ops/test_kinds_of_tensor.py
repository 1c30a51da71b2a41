"""Tensors that are not plain memory: every operation takes them or raises its own error, and none crashes."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.func import grad, hessian, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import ccu_fast
import ccu_fast.distributed as over
from ccu_fast import ALL, SELF

pytestmark = pytest.mark.usefixtures("one_thread", "native")

Make = Callable[[Tensor], Any]

X, LABELS, ROWS = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(6)
MANY = torch.randn(1100, 4)  # beyond what one operator does
IMAGES = torch.rand(6, 4)
TABLE = ccu_fast.TokenTable(X)
SPEC = [("lse", ALL), ("sum", SELF), ("count", SELF)]


def store() -> ccu_fast.NoiseStore:
    return ccu_fast.NoiseStore(6, [4], dtype=torch.float32)


def pgd(make: Make, **changed: Any) -> Tensor:
    arguments = {"delta": torch.zeros(6, 4), "grad": X, "image": IMAGES, "step": 0.1, "eps": 0.2} | changed
    return ccu_fast.pgd_step_(*map(make, (arguments.pop("delta"), arguments.pop("grad"))), **arguments)


# Every public operation, given each of its tensors by ``make``; and the argument that is looked at first.
CALLS: dict[str, tuple[str, Callable[[Make], Any]]] = {
    "info_nce": ("x", lambda make: ccu_fast.info_nce(make(X), make(X), scale=2.0)),
    "info_nce, y": ("y", lambda make: ccu_fast.info_nce(X, make(X), scale=2.0)),
    "info_nce, many": ("x", lambda make: ccu_fast.info_nce(make(MANY), make(MANY), scale=2.0)),
    "inverse_info_nce": ("x", lambda make: ccu_fast.inverse_info_nce(make(X), make(X), scale=2.0)),
    "sup_con": ("row_labels", lambda make: ccu_fast.sup_con(X, X, scale=2.0, row_labels=make(LABELS))),
    "sigmoid_loss": ("x", lambda make: ccu_fast.sigmoid_loss(make(X), make(X), scale=2.0)),
    "distill": (
        "x",
        lambda make: ccu_fast.distill(make(X), make(X), scale=2.0, teacher=(make(X), make(X)), teacher_scale=3.0),
    ),
    "distill, teacher": (
        r"teacher\[0\]",
        lambda make: ccu_fast.distill(X, X, scale=2.0, teacher=(make(X), make(X)), teacher_scale=3.0),
    ),
    "DistillClipLoss": (
        "image_features",
        lambda make: sum(ccu_fast.DistillClipLoss()(make(X), make(X), 2.0, make(X), make(X), 3.0)),
    ),
    "reduce_similarity": ("x", lambda make: ccu_fast.reduce_similarity(make(X), X, rows=SPEC)),
    "reduce_similarity, ids": ("row_ids", lambda make: ccu_fast.reduce_similarity(X, X, rows=SPEC, row_ids=make(ROWS))),
    "ClipLoss": ("image_features", lambda make: ccu_fast.ClipLoss()(make(X), make(X), 2.0)),
    "ClipLoss, normalize": ("image_features", lambda make: ccu_fast.ClipLoss(normalize=True)(make(X), make(X), 2.0)),
    "SigLipLoss": ("image_features", lambda make: ccu_fast.SigLipLoss()(make(X), make(X), 2.0, -1.0)),
    "InfoNCE": ("x", lambda make: ccu_fast.InfoNCE(scale=2.0)(make(X), make(X))),
    "l2_normalize": ("x", lambda make: ccu_fast.l2_normalize(make(X))),
    "candidate_losses": (
        "text_candidates",
        lambda make: ccu_fast.candidate_losses(make(X[:, None].repeat(1, 3, 1)), make(X), make(X), scale=2.0),
    ),
    "TokenTable": ("embedding", lambda make: ccu_fast.TokenTable(make(X))),
    "TokenTable, allowed": ("allowed", lambda make: ccu_fast.TokenTable(X, make(LABELS))),
    "TokenTable.score_norms": ("grad", lambda make: TABLE.score_norms(make(X))),
    "topk_flips": ("grad", lambda make: ccu_fast.topk_flips(make(X), TABLE, 2)),
    "topk_flips, current_ids": ("current_ids", lambda make: ccu_fast.topk_flips(X, TABLE, 2, current_ids=make(LABELS))),
    "topk_flips, penalty": ("penalty", lambda make: ccu_fast.topk_flips(X, TABLE, 2, penalty=make(X[:, 0].clone()))),
    "pgd_step_": ("delta", lambda make: pgd(make)),
    "pgd_step_, per channel": ("step", lambda make: pgd(lambda t: t.clone(), step=make(torch.full((4,), 0.1)))),
    "pgd_step_, out": ("out", lambda make: pgd(lambda t: t.clone(), out=make(torch.empty(6, 4)))),
    "NoiseStore.add_to": ("images", lambda make: store().add_to(make(IMAGES), ROWS)),
    "NoiseStore.gather": ("index", lambda make: store().gather(make(ROWS))),
    "NoiseStore.scatter_": ("values", lambda make: store().scatter_(ROWS, make(X))),
    "NoiseStore.scatter_add_clamp_": ("delta", lambda make: store().scatter_add_clamp_(ROWS, make(X), 0.1)),
    "distributed.info_nce": ("x", lambda make: over.info_nce(make(X), make(X), scale=2.0)),
    "distributed.average_gradients": ("parameters", lambda make: over.average_gradients([make(X).requires_grad_()])),
    "distributed.sup_con": ("row_labels", lambda make: over.sup_con(X, X, scale=2.0, row_labels=make(LABELS))),
}
every_call = pytest.mark.parametrize("name", CALLS)
# Takes the place of the scale.
SCALES: dict[str, Callable[[Any], Tensor]] = {
    "info_nce": lambda scale: ccu_fast.info_nce(X, X.flip(0), scale=scale),
    "info_nce, many": lambda scale: ccu_fast.info_nce(MANY, MANY.flip(0), scale=scale),
    "sigmoid_loss, bias": lambda scale: ccu_fast.sigmoid_loss(X, X.flip(0), scale=1.0, bias=scale),
    "ClipLoss": lambda scale: ccu_fast.ClipLoss()(X, X.flip(0), scale),
    "SigLipLoss": lambda scale: ccu_fast.SigLipLoss()(X, X.flip(0), scale, None),
    "candidate_losses": lambda scale: ccu_fast.candidate_losses(X[:, None], X, X.flip(0), scale=scale).sum(),
    "distributed.info_nce": lambda scale: over.info_nce(X, X.flip(0), scale=scale),
}


@pytest.fixture(scope="module", autouse=True)
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone; no threads, which a later test's fork would not survive."""
    importlib.import_module("torch.distributed.nn")  # keeps the group that there is when it is imported
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        # The fake group of torch 2.8 leaves what it should have received as it was.
        patch.setattr(dist, "all_gather", lambda received, own, group=None: received[0].copy_(own))
        patch.setattr(dist, "all_to_all_single", lambda received, own, *_, group=None: received.copy_(own))
        yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def refused(name: str, make: Make, expected: str) -> None:
    argument, call = CALLS[name]
    with pytest.raises(TypeError, match=f"^{argument}: expected {re.escape(expected)}"):
        call(make)


@every_call
@pytest.mark.parametrize("placement", [Shard(0), Replicate(), Partial()], ids=str)
def test_a_dtensor_is_refused(name: str, placement: Any, mesh: DeviceMesh) -> None:
    own = "this process's own torch.Tensor (.to_local() for ccu_fast.distributed, or .full_tensor()), got DTensor"
    refused(name, lambda t: DTensor.from_local(t, mesh, [placement], run_check=False), own)


@every_call
def test_a_subclass_that_answers_for_operators_is_refused(name: str) -> None:
    refused(name, lambda t: TwoTensor(t, t.clone()), "a torch.Tensor with its values in memory, got TwoTensor")


@every_call
def test_a_fake_tensor_outside_its_mode_is_refused(name: str) -> None:
    refused(name, FakeTensorMode().from_tensor, "a torch.Tensor with its values in memory, got FakeTensor")


@every_call
def test_sparse_and_nested_tensors_are_refused(name: str) -> None:
    refused(name, Tensor.to_sparse, "a dense torch.Tensor, got torch.sparse_coo")
    refused(name, lambda t: torch.nested.as_nested_tensor(list(torch.atleast_2d(t))), "a dense torch.Tensor, got a nes")


@every_call
def test_what_has_no_memory_of_its_own_is_refused(name: str) -> None:
    refused(name, lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype), "a torch.Tensor with its values in mem")


@every_call
@pytest.mark.parametrize("kind", ["Parameter", "Buffer", "a subclass without operators of its own"])
def test_what_holds_its_values_itself_is_taken(name: str, kind: str) -> None:
    class Named(Tensor):
        pass

    def make(t: Tensor) -> Any:
        return {
            "Parameter": lambda: nn.Parameter(t.clone(), requires_grad=t.is_floating_point() and "out" not in name),
            "Buffer": lambda: nn.Buffer(t.clone()),
        }.get(kind, lambda: t.clone().as_subclass(Named))()

    ours, plain = CALLS[name][1](make), CALLS[name][1](Tensor.clone)
    if isinstance(plain, Tensor):
        torch.testing.assert_close(ours.detach().as_subclass(Tensor), plain)


# ---- a scale that FSDP2 or tensor parallelism made


@pytest.mark.parametrize("name", SCALES)
def test_a_replicated_scale_is_this_ranks_own(name: str, mesh: DeviceMesh) -> None:
    for shape in ((), (1,)):
        scale = torch.full(shape, 2.0, requires_grad=True)
        spread = DTensor.from_local(scale, mesh, [Replicate()], run_check=False)
        ours, plain = SCALES[name](spread), SCALES[name](scale)
        assert type(ours) is Tensor
        assert torch.equal(ours, plain)
        assert torch.equal(torch.autograd.grad(ours, scale)[0], torch.autograd.grad(plain, scale)[0])


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("placement", [Shard(0), Partial()], ids=str)
def test_a_scale_that_is_not_whole_is_refused(name: str, placement: Any, mesh: DeviceMesh, monkeypatch: Any) -> None:
    scale = DTensor.from_local(torch.ones(1), mesh, [placement], run_check=False)
    assert SCALES[name](scale).isfinite()  # a mesh of one has it whole
    monkeypatch.setattr(DeviceMesh, "size", lambda *_: 2)
    argument = {"sigmoid_loss, bias": "bias", "ClipLoss": "logit_scale", "SigLipLoss": "logit_scale"}.get(name, "scale")
    message = f"^{argument}: expected one that every rank holds whole \\(.full_tensor\\(\\)\\), got a DTensor in "
    with pytest.raises(TypeError, match=message):
        SCALES[name](scale)


# ---- shapes alone, and modes that look on

FREE = ("info_nce", "inverse_info_nce", "sigmoid_loss", "distill", "SigLipLoss", "ClipLoss, normalize", "l2_normalize")


@pytest.mark.parametrize("name", [*FREE, "candidate_losses", "pgd_step_", "reduce_similarity"])
def test_meta_in_meta_out(name: str) -> None:
    def meta(t: Tensor) -> Tensor:
        return t.to("meta")

    if name == "reduce_similarity":
        rows, _ = ccu_fast.reduce_similarity(meta(X), meta(X), rows=SPEC, row_labels=meta(LABELS))
        assert [(t.device.type, t.shape, t.dtype) for t in rows[1:]] == [
            ("meta", (6,), torch.float32),
            ("meta", (6,), torch.int64),
        ]
        return
    if name == "pgd_step_":
        ours, plain = pgd(meta, image=meta(IMAGES)), pgd(Tensor.clone)
    else:
        ours, plain = CALLS[name][1](meta), CALLS[name][1](Tensor.clone)
    assert (ours.device.type, ours.shape, ours.dtype) == ("meta", plain.shape, plain.dtype)


def test_a_table_needs_values() -> None:
    with pytest.raises(ValueError, match=r"^embedding: expected values, got a tensor on the device meta$"):
        ccu_fast.TokenTable(X.to("meta"))
    with pytest.raises(ValueError, match=r"^allowed: expected values, got a tensor on the device meta$"):
        ccu_fast.TokenTable(X, LABELS.to("meta"))


@pytest.mark.parametrize("name", [*FREE, "candidate_losses"])
def test_fake_tensors_inside_their_mode(name: str) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    plain = CALLS[name][1](Tensor.clone)
    with mode:
        ours = CALLS[name][1](mode.from_tensor)
    assert (ours.device, ours.shape, ours.dtype) == (plain.device, plain.shape, plain.dtype)


# What make_fx is to record: with other inputs the graph gives what the function gives.
RECORDED: dict[str, Callable[[Tensor], Tensor]] = {
    "info_nce": lambda x: ccu_fast.info_nce(x, x.flip(0), scale=2.0),
    "l2_normalize": lambda x: ccu_fast.l2_normalize(x),
    "candidate_losses": lambda x: ccu_fast.candidate_losses(x[:, None], x, x.flip(0), scale=2.0),
    "topk_flips": lambda x: ccu_fast.topk_flips(x, TABLE, 2).delta,
    "pgd_step_": lambda x: ccu_fast.pgd_step_(torch.zeros_like(x), x, x, step=0.1, eps=0.2),
    "NoiseStore": lambda x: store().add_to(x, ROWS, lower=-9, upper=9),
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_graph_holds_the_operation(name: str) -> None:
    graph = make_fx(RECORDED[name])(X)
    assert any("ccu_fast" in str(node.target) for node in graph.graph.nodes)
    other = torch.rand(6, 4)
    torch.testing.assert_close(graph(other), RECORDED[name](other))


@pytest.mark.parametrize("name", RECORDED)
def test_a_mode_that_looks_on_changes_nothing(name: str) -> None:
    with FlopCounterMode(display=False):
        watched = RECORDED[name](X)
    torch.testing.assert_close(watched, RECORDED[name](X))


# ---- transforms of torch.func

BANKS, Y = torch.randn(3, 6, 4), torch.randn(6, 4)
DIFFERENTIABLE: dict[str, Callable[[Tensor, str], Tensor]] = {
    "info_nce": lambda x, backend: ccu_fast.info_nce(x, Y, scale=2.0, backend=backend),
    "info_nce, labels": lambda x, backend: ccu_fast.info_nce(x, Y, scale=2.0, row_labels=LABELS, backend=backend),
    "info_nce, normalize": lambda x, backend: ccu_fast.info_nce(x, Y, scale=2.0, normalize=True, backend=backend),
    "inverse_info_nce": lambda x, backend: ccu_fast.inverse_info_nce(
        x, Y, scale=2.0, kind="contrastive", row_labels=LABELS, backend=backend
    ),
    "sup_con": lambda x, backend: ccu_fast.sup_con(x, Y, scale=2.0, row_labels=LABELS - 1, backend=backend),
    "sigmoid_loss": lambda x, backend: ccu_fast.sigmoid_loss(x, Y, scale=2.0, row_ids=ROWS, backend=backend),
    "distill": lambda x, backend: ccu_fast.distill(
        x, Y, scale=2.0, teacher=(Y, Y), teacher_scale=3.0, normalize=True, backend=backend
    ),
    "ClipLoss, scale": lambda x, backend: ccu_fast.ClipLoss(backend=backend)(Y, Y.flip(0), x.sum().exp()),
    "SigLipLoss": lambda x, backend: ccu_fast.SigLipLoss(backend=backend)(x, Y, 2.0, -1.0),
    "l2_normalize": lambda x, backend: ccu_fast.l2_normalize(x, backend=backend)[:, 0].sum(),
    "candidate_losses": lambda x, backend: ccu_fast.candidate_losses(
        x[:, None], Y, Y, scale=2.0, backend=backend
    ).sum(),
}
FUSED = [name for name in DIFFERENTIABLE if name != "candidate_losses"]  # there "auto" is the reference as it must be
ONES = torch.ones(6, 4)


def gradient(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(call(x), x)[0]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_reference_under_transforms(name: str) -> None:
    def call(x: Tensor) -> Tensor:
        return DIFFERENTIABLE[name](x, "auto" if name == "candidate_losses" else "reference")

    by_bank = torch.stack([gradient(call, x) for x in BANKS])
    torch.testing.assert_close(vmap(call)(BANKS), torch.stack([call(x) for x in BANKS]))
    torch.testing.assert_close(grad(call)(BANKS[0]), by_bank[0])
    torch.testing.assert_close(vmap(grad(call))(BANKS), by_bank)
    torch.testing.assert_close(jvp(call, (BANKS[0],), (ONES,))[1], by_bank[0].sum())
    assert hessian(call)(BANKS[0]).isfinite().all()
    with torch.autograd.forward_ad.dual_level():
        dual = call(torch.autograd.forward_ad.make_dual(BANKS[0].clone(), ONES))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, by_bank[0].sum())


@pytest.mark.parametrize("name", FUSED)
def test_kernels_under_transforms_say_what_to_do(name: str) -> None:
    def call(x: Tensor) -> Tensor:
        return DIFFERENTIABLE[name](x, "auto")

    op = "(info_nce|reduce_similarity|l2_normalize)"
    ways = (vmap(call), grad(call), lambda x: jvp(call, (x,), (torch.ones_like(x),)))
    for transformed, x in zip(ways, (BANKS, BANKS[0], BANKS[0]), strict=True):
        message = f"^{op}: torch.func's transforms \\(vmap, grad, jvp\\) need backend='reference'$"
        with pytest.raises(RuntimeError, match=message):
            transformed(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(BANKS[0].clone(), ONES)
        with pytest.raises(RuntimeError, match=f"^{op}: forward-mode derivatives need backend='reference'$"):
            call(dual)
        assert call(BANKS[0]).isfinite()  # nothing to derive here


WITHOUT_GRADIENT: dict[str, Callable[[Tensor], Any]] = {
    "TokenTable": ccu_fast.TokenTable,
    "topk_flips": lambda x: ccu_fast.topk_flips(x, TABLE, 2).delta,
    "pgd_step_": lambda x: ccu_fast.pgd_step_(torch.zeros_like(x), x, x, step=0.1, eps=0.2),
    "NoiseStore": lambda x: store().add_to(x, ROWS),
    "NoiseStore, values": lambda x: store().scatter_(ROWS, x),
    "NoiseStore, index": lambda x: store().gather(x[:, 0].long()),
}


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_an_operation_without_gradient_refuses_what_a_transform_made(name: str) -> None:
    op = name.partition(",")[0]
    for transform in (lambda call: vmap(call)(BANKS), lambda call: grad(call)(BANKS[0])):
        with pytest.raises(RuntimeError, match=f"^{op}: expected tensors from outside torch.func's transforms"):
            transform(WITHOUT_GRADIENT[name])
    assert vmap(lambda x: x.sum() + store().add_to(IMAGES, ROWS).sum())(BANKS).shape == (3,)  # its own are plain
