"""Distillation of similarities: against every pair in float64, where both models are sure, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ccu_fast
from ccu_fast import DistillClipLoss, DistillLoss, distill
from tests.support.losses import compare
from tests.support.oracle import unit
from tests.support.peak import printed_bytes
from tests.support.tolerance import assert_three_way

pytestmark = pytest.mark.usefixtures("one_thread")

Engine = tuple[str, torch.dtype]


def by_torch(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    *,
    teacher: tuple[Tensor, Tensor],
    teacher_scale: float,
    symmetric: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Stored logits, as one would write it and as open_clip does."""
    wide = torch.promote_types(x.dtype, torch.float32)
    s = (x @ y.mT).to(wide) * scale
    u, v = (t.to(torch.float64 if x.dtype == torch.float64 else t.dtype) for t in teacher)
    t = (u @ v.mT).to(wide) * teacher_scale
    sides = []
    for student, taught in ((s, t), (s.mT, t.mT))[: 2 if symmetric else 1]:
        each = -(taught.softmax(-1) * student.log_softmax(-1)).sum(-1)
        sides.append({"mean": each.mean, "sum": each.sum}[reduction](-1) if reduction != "none" else each)
    return sum(sides[1:], sides[0]) / len(sides)


def features(*shape: int, of: int = 11) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """The student's leaves, and a teacher exact in every dtype."""
    *lead, n, d = shape
    x, y, u, v = (unit(*lead, n, size) for size in (d, d, of, of))
    return {"x": x, "y": y, "scale": torch.tensor(7.0).double()}, (u.bfloat16().float(), v.bfloat16().float())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n", [1, 2, 77])
def test_it_is_the_cross_entropy_with_the_teacher(n: int, symmetric: bool, reduction: str, engine: Engine) -> None:
    backend, dtype = engine
    data, teacher = features(n, 24)
    options: dict[str, Any] = {
        "teacher": teacher,
        "teacher_scale": 12.0,
        "symmetric": symmetric,
        "reduction": reduction,
    }
    compare(lambda **t: distill(**t, **options, backend=backend), lambda **t: by_torch(**t, **options), data, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types(dtype: torch.dtype, backend: str) -> None:
    data, teacher = features(50, 24)
    taught = (teacher[0].to(dtype), teacher[1].to(dtype))
    options: dict[str, Any] = {"teacher": taught, "teacher_scale": 12.0}
    compare(lambda **t: distill(**t, **options, backend=backend), lambda **t: by_torch(**t, **options), data, dtype)


@pytest.mark.parametrize("paired", [None, False])
def test_rows_without_a_pair_of_their_own(paired: bool | None, engine: Engine) -> None:
    backend, dtype = engine
    data, teacher = features(40, 24)
    options: dict[str, Any] = {"teacher": teacher, "teacher_scale": 12.0}
    if paired is None:
        data["x"], options["teacher"] = data["x"][:23], (teacher[0][:23], teacher[1])
    compare(
        lambda **t: distill(**t, **options, paired=paired, backend=backend),
        lambda **t: by_torch(**t, **options),
        data,
        dtype,
    )


@pytest.mark.parametrize("shared", [False, True])
def test_banks_are_those_of_each(shared: bool, engine: Engine) -> None:
    backend, dtype = engine
    data, teacher = features(3, 20, 8)
    if shared:
        data["y"], teacher = data["y"][0], (teacher[0], teacher[1][0])
    options: dict[str, Any] = {"teacher": teacher, "teacher_scale": 12.0}
    compare(lambda **t: distill(**t, **options, backend=backend), lambda **t: by_torch(**t, **options), data, dtype)


def test_ignored_items_are_as_if_they_were_not_there(backend: str) -> None:
    """Though they hold NaN, in the student and in the teacher."""
    data, teacher = features(12, 8)
    x, y = (data[name].float() for name in "xy")
    u, v = teacher
    labels = torch.tensor([0, 1, -1, 3, 4, -1, 6, 7, 8, 9, 10, -1])
    kept = labels >= 0
    for t in (x, y, u, v):
        t[~kept] = torch.nan

    def run(*of: Tensor, **keys: Tensor) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in of[:2]]
        loss = distill(*leaves, scale=9.0, teacher=(of[2], of[3]), teacher_scale=15.0, backend=backend, **keys)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    got, want = run(x, y, u, v, row_labels=labels), run(*(t[kept] for t in (x, y, u, v)))
    torch.testing.assert_close(got[0], want[0])
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(ours[kept], theirs)
        assert ours[~kept].eq(0).all()


@pytest.mark.parametrize("cosine", [0.4, 0.7, 0.95])
@pytest.mark.parametrize("scale", [30.0, 100.0])
def test_it_keeps_its_digits_where_both_are_sure(cosine: float, scale: float, backend: str) -> None:
    """Losses of 1e-3 to 1e-30, of which eager torch keeps fewer digits the smaller they are."""

    def pairs(d: int) -> tuple[Tensor, Tensor]:
        x, other = unit(40, d), unit(40, d)
        other = F.normalize(other - (other * x).sum(-1, keepdim=True) * x, dim=-1)
        return x.float(), (cosine * x + (1 - cosine**2) ** 0.5 * other).float()

    (x, y), teacher = pairs(64), pairs(48)

    def exact(x: Tensor, y: Tensor) -> Tensor:
        s, t = scale * x @ y.T, scale * teacher[0].double() @ teacher[1].double().T
        sides = []
        for student, taught in ((s, t), (s.T, t.T)):
            own = torch.eye(40, dtype=torch.bool)
            rest = student.masked_fill(own, -torch.inf).logsumexp(1)
            gap = student.diagonal()[:, None] - student
            q = taught.softmax(1).masked_fill(own, 0)
            sides.append((F.softplus(rest - student.diagonal(), threshold=100) + (q * gap).sum(1)).mean())
        return sum(sides) / 2

    def run(loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, y)]
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    got = run(
        lambda x, y: distill(x, y, scale=scale, teacher=teacher, teacher_scale=scale, backend=backend), torch.float32
    )
    for ours, truth in zip(got, run(exact, torch.float64), strict=True):
        error = float((ours.double() - truth).norm() / truth.norm())
        assert error < 2e-4, f"{error:.1e} at {float(ours.norm()):.1e}"


def test_sure_of_another_pair(engine: Engine) -> None:
    """The teacher and the student agree that rows belong to the columns beside their own."""
    backend, dtype = engine
    x, u = unit(30, 16), unit(30, 12).float()
    data = {"x": x, "y": x.roll(1, 0), "scale": torch.tensor(50.0).double()}
    options: dict[str, Any] = {"teacher": (u, u.roll(1, 0)), "teacher_scale": 50.0}

    def run(loss: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        return loss(**{name: t.to(dtype) for name, t in data.items()}, **options)

    ours = run(lambda **t: distill(**t, backend=backend), dtype)
    assert_three_way("loss", ours, run(by_torch, dtype), run(by_torch, torch.float64), magnitude=50.0)


def test_the_student_learns_what_the_teacher_knows(backend: str) -> None:
    """From the same logits the gradient is zero, and the loss the teacher's entropy."""
    u, v = unit(20, 8).float(), unit(20, 8).float()
    x, y = u.clone().requires_grad_(), v.clone().requires_grad_()
    loss = distill(x, y, scale=5.0, teacher=(u, v), teacher_scale=5.0, backend=backend)
    q = (5.0 * u @ v.T).softmax(1), (5.0 * v @ u.T).softmax(1)
    torch.testing.assert_close(loss, sum(-(p * p.log()).sum(1).mean() for p in q) / 2)
    assert all(g.abs().max() < 1e-6 for g in torch.autograd.grad(loss, (x, y)))


def test_normalize_is_for_both_models(backend: str) -> None:
    x, y, u, v = (torch.randn(9, 5) for _ in "xyuv")
    options: dict[str, Any] = {"scale": 9.0, "teacher_scale": torch.tensor([14.0]), "backend": backend}
    made = distill(x, y, teacher=(u, v), normalize=True, **options)
    a, b, c, d = (F.normalize(t, dim=-1) for t in (x, y, u, v))
    torch.testing.assert_close(made, distill(a, b, teacher=(c, d), **options))


def test_autocast_and_a_scale_in_fp32(native: str) -> None:
    """Features are multiplied in half precision, and the teacher's scale is not rounded to it."""
    x, y, u, v = (unit(30, 16).float() for _ in "xyuv")
    scale = 1 / 0.0123
    with torch.autocast("cpu", torch.bfloat16):
        cast = distill(x, y, scale=20.0, teacher=(u, v), teacher_scale=scale, backend=native)
    half = [t.bfloat16() for t in (x, y, u, v)]
    options: dict[str, Any] = {"scale": 20.0, "teacher": (half[2], half[3]), "backend": native}
    assert torch.equal(cast, distill(*half[:2], teacher_scale=scale, **options))
    rounded = torch.tensor(scale).bfloat16().item()
    assert not torch.equal(cast, distill(*half[:2], teacher_scale=rounded, **options))


def test_memory_stays_within_the_workspace(native: str) -> None:
    """Forward and backward of 4096 x 4096 pairs, of which each matrix is 64 MiB."""
    script = """
        import torch
        from ccu_fast import distill
        torch.set_num_threads(1)
        def step(n):
            x, y, u, v = (torch.randn(n, 64, requires_grad=i < 2) for i in range(4))
            loss = distill(x, y, scale=5.0, teacher=(u, v), teacher_scale=5.0, backend="native", workspace=8 << 20)
            loss.backward()
        step(512)
        before = peak()
        step(4096)
        print(peak() - before)
    """
    assert 0 < printed_bytes(script) < 36 << 20


X, U = torch.eye(4, 3), torch.eye(4, 6)
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"teacher": X}, TypeError, "teacher: expected a pair of tensors, for the rows of x and of y, got Tensor"),
    ({"teacher": None}, ValueError, "teacher: expected a pair of tensors for 'expected' in rows, got None"),
    ({"teacher": (U, None)}, TypeError, "teacher[1]: expected a torch.Tensor, got NoneType"),
    ({"teacher": (U, U[:3])}, ValueError, "teacher[1]: expected shape [..., 4, Dg] with Dg at least 1, got [3, 6]"),
    ({"teacher": (U, U[:, :5])}, ValueError, "teacher[1]: expected last dimension 6 (that of teacher[0]), got 5"),
    ({"teacher": (U, U.half())}, TypeError, "teacher[1]: expected dtype torch.float32 (that of teacher[0]), got "),
    ({"teacher": (U.to("meta"), U)}, ValueError, "teacher[0]: expected device cpu (that of x), got meta"),
    ({"teacher_scale": "5"}, TypeError, "teacher_scale: expected a number, got str"),
    ({"teacher_scale": torch.ones(2)}, ValueError, "teacher_scale: expected one element, got shape [2]"),
    ({"reduction": "avg"}, ValueError, "reduction: expected one of ('mean', 'sum', 'none'), got 'avg'"),
    ({"row_limits": X[:, 0]}, TypeError, "row_limits: expected "),
    ({"temperature": 0.1}, TypeError, "temperature: expected scale (1 / temperature), got an unknown keyword"),
]


@pytest.mark.parametrize(("wrong", "kind", "said"), REFUSED, ids=[said.partition(":")[0] for _, _, said in REFUSED])
def test_refused(wrong: dict[str, Any], kind: type[Exception], said: str) -> None:
    for function in (distill, ccu_fast.distributed.distill):
        with pytest.raises(kind) as caught:
            function(X, X, **{"scale": 1.0, "teacher": (U, U), "teacher_scale": 2.0, **wrong})
        assert str(caught.value).startswith(said)


def test_the_primitive_refuses() -> None:
    call = ccu_fast.reduce_similarity
    limits = X[:, 0]
    spec: dict[str, Any] = {"rows": [("expected", ccu_fast.ALL)]}
    for name, value in (("row_limits", limits), ("col_limits", limits), ("guide", (U, U))):
        with pytest.raises(ValueError, match=f"{name}: expected None with a teacher, got"):
            call(X, X, teacher=(U, U), **{name: value}, **spec)
    with pytest.raises(
        ValueError, match="teacher: expected 'mass' or 'expected' in rows or cols beside it, got neither"
    ):
        call(X, X, teacher=(U, U), rows=[("lse", ccu_fast.ALL)])
    with pytest.raises(ValueError, match="teacher: expected a pair of tensors for 'mass' in cols, got None"):
        call(X, X, cols=[("mass", ccu_fast.ALL)])
    with pytest.raises(ValueError, match="rows: expected at most 8 reductions besides counts, got 9"):
        call(X, X, teacher=(U, U), rows=[("mass", 4)] * 9)


def test_a_module_has_one_teacher_scale() -> None:
    with pytest.raises(
        ValueError, match="teacher_scale: expected a number or tensor because the module has none, got N"
    ):
        DistillLoss(scale=2.0)(X, X, teacher=(U, U))
    with pytest.raises(ValueError, match="teacher_scale: expected None because the module has its own, got a value"):
        DistillLoss(scale=2.0, teacher_scale=3.0)(X, X, teacher=(U, U), teacher_scale=3.0)
    given = DistillLoss()(X, X, teacher=(U, U), scale=2.0, teacher_scale=3.0)
    assert torch.equal(given, DistillLoss(scale=2.0, teacher_scale=3.0)(X, X, teacher=(U, U)))
    assert "teacher_scale=3.0" in repr(DistillLoss(teacher_scale=3.0))


def test_open_clips_class_is_both_losses(backend: str) -> None:
    data, teacher = features(21, 8)
    x, y = data["x"].float(), data["y"].float()
    loss = DistillClipLoss(backend=backend)
    contrastive, distilled = loss(x, y, torch.tensor(9.0), *teacher, 20.0)
    torch.testing.assert_close(contrastive, ccu_fast.info_nce(x, y, scale=9.0))
    assert torch.equal(distilled, distill(x, y, scale=9.0, teacher=teacher, teacher_scale=20.0, backend=backend))
    named = loss(x, y, 9.0, *teacher, 20.0, output_dict=True)
    assert list(named) == ["contrastive_loss", "distill_loss"]
    assert torch.equal(named["distill_loss"], distilled)
    both = DistillClipLoss(normalize=True)(3 * x, y, 9.0, 2 * teacher[0], 2 * teacher[1], 20.0)
    unit_rows = tuple(F.normalize(t, dim=-1) for t in teacher)
    torch.testing.assert_close(both, loss(x, y, 9.0, *unit_rows, 20.0))
    assert "positives" not in repr(loss)


def test_open_clips_class_names_its_own_arguments() -> None:
    loss = DistillClipLoss()
    for args, said in (
        ((X[0], X, 1.0, U, U, 1.0), "image_features: expected 2 dimensions"),
        ((X, X[:3], 1.0, U, U, 1.0), "text_features: expected shape"),
        ((X, X, "1", U, U, 1.0), "logit_scale: expected a number"),
        ((X, X, 1.0, U, U[:3], 1.0), "dist_text_features: expected shape"),
        ((X, X, 1.0, None, U, 1.0), "dist_image_features: expected a torch.Tensor"),
        ((X, X, 1.0, U, U, "1"), "dist_logit_scale: expected a number"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            loss(*args)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_passed_on(value: float, paired: bool, backend: str) -> None:
    x, y, labels = unit(5, 8).float(), unit(5, 8).float(), torch.arange(5)
    x[1, 2] = value
    options: dict[str, Any] = {"paired": paired, "row_labels": labels, "col_labels": labels, "backend": backend}
    loss = distill(x, y, scale=5.0, teacher=(unit(5, 3), unit(5, 3)), teacher_scale=5.0, **options)
    assert not loss.isfinite()
