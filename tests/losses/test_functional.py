"""The losses against plain torch, against loops over their definitions, and against open_clip's own classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ccu_fast import distill, info_nce, inverse_info_nce, sigmoid_loss, sup_con
from tests.support.losses import compare, features, logits
from tests.support.open_clip_loss import open_clip_loss
from tests.support.oracle import unit

pytestmark = pytest.mark.usefixtures("one_thread")

Engine = tuple[str, torch.dtype]
Loss = Callable[..., Tensor]


# ---- info_nce


@pytest.mark.parametrize("bias", [None, -2.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n", [1, 2, 77])
def test_info_nce_is_cross_entropy(n: int, symmetric: bool, reduction: str, bias: float | None, engine: Engine) -> None:
    backend, dtype = engine

    def torchs(**t: Tensor) -> Tensor:
        s, target = logits(**t), torch.arange(n)
        loss = F.cross_entropy(s, target, reduction=reduction)
        return (loss + F.cross_entropy(s.T, target, reduction=reduction)) / 2 if symmetric else loss

    def ours(**t: Tensor) -> Tensor:
        return info_nce(**t, symmetric=symmetric, reduction=reduction, backend=backend)

    compare(ours, torchs, features(n, 24, bias=bias), dtype)


@pytest.mark.parametrize("symmetric", [True, False])
def test_info_nce_of_banks_is_that_of_each(symmetric: bool, engine: Engine) -> None:
    backend, dtype = engine
    data = features(3, 20, 8) | {"y": unit(20, 8)}

    def torchs(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        losses = []
        for bank in x:
            s, target = logits(bank, y, scale), torch.arange(20)
            both = (F.cross_entropy(s, target), F.cross_entropy(s.T, target))
            losses.append(sum(both) / 2 if symmetric else both[0])
        return torch.stack(losses)

    compare(lambda **t: info_nce(**t, symmetric=symmetric, backend=backend), torchs, data, dtype)


def test_info_nce_with_ids_has_several_positives(engine: Engine) -> None:
    """Their mean logit is the target; items without a positive, and ignored ones, do not count."""
    backend, dtype = engine
    row_ids, col_ids = torch.tensor([3, 1, 4, 1, 5, 9, 2]), torch.tensor([1, 1, 4, 2, 8, 3, 3, 7, 9])
    row_labels, col_labels = torch.zeros(7, dtype=torch.long), torch.zeros(9, dtype=torch.long)
    row_labels[6] = col_labels[8] = -1
    keys = {"row_ids": row_ids, "col_ids": col_ids, "row_labels": row_labels, "col_labels": col_labels}

    def side(s: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        losses = []
        for i in range(len(s)):
            positives = (cols == rows[i]).nonzero()[:, 0]
            if len(positives):
                losses.append(s[i].logsumexp(0) - s[i, positives].mean())
        return torch.stack(losses).mean()

    def torchs(**t: Tensor) -> Tensor:
        s = logits(**t)[:6, :8]
        return (side(s, row_ids[:6], col_ids[:8]) + side(s.T, col_ids[:8], row_ids[:6])) / 2

    compare(lambda **t: info_nce(**t, **keys, backend=backend), torchs, features(7, 6, m=9), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_info_nce_of_half_types(dtype: torch.dtype, backend: str) -> None:
    def torchs(**t: Tensor) -> Tensor:
        s, target = logits(**t), torch.arange(90)
        return (F.cross_entropy(s, target) + F.cross_entropy(s.T, target)) / 2

    compare(lambda **t: info_nce(**t, backend=backend), torchs, features(90, 40), dtype)


# ---- inverse_info_nce


LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3, -1, 4])
KEYS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 3, 3, -1, 5, 5])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labelled", [True, False])
def test_bounded_inverse_is_its_definition(labelled: bool, reduction: str, engine: Engine) -> None:
    """−log(1 − p) of the probability that a row gives its positives."""
    backend, dtype = engine
    keys = {"row_labels": LABELS, "col_labels": KEYS} if labelled else {}
    data = features(10, 6, m=12 if labelled else 10)

    def torchs(**t: Tensor) -> Tensor:
        s = logits(**t)
        rows, counted = [], 0
        for i in range(len(s)):
            valid = [j for j in range(s.shape[1]) if not labelled or KEYS[j] >= 0]
            positive = [j for j in valid if (LABELS[i] == KEYS[j] if labelled else i == j)]
            if (labelled and LABELS[i] < 0) or not positive:
                rows.append(0 * s[i].sum())
                continue
            counted += 1
            # 1 − p as the sum of the others: a subtraction would lose the digits that the bound is about.
            others = s[i, valid].softmax(0)[[k for k, j in enumerate(valid) if j not in positive]].sum()
            rows.append(-torch.log(others))
        per_row = torch.stack(rows)
        return {"none": per_row, "sum": per_row.sum(), "mean": per_row.sum() / counted}[reduction]

    compare(lambda **t: inverse_info_nce(**t, **keys, reduction=reduction, backend=backend), torchs, data, dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_contrastive_unlearning_is_its_definition(reduction: str, engine: Engine) -> None:
    """Eq. 1 of arXiv 2401.10458, row by row: pulled to the other classes, pushed from its own."""
    backend, dtype = engine

    def torchs(**t: Tensor) -> Tensor:
        s = logits(**t)
        rows, counted = [], 0
        for i in range(len(s)):
            same = [j for j in range(12) if LABELS[i] == KEYS[j] >= 0]
            other = [j for j in range(12) if LABELS[i] != KEYS[j] >= 0]
            if LABELS[i] < 0 or not same:
                rows.append(0 * s[i].sum())
                continue
            counted += 1
            terms = [-torch.log(s[i, j].exp() / s[i, same].exp().sum()) for j in other]
            rows.append(sum(terms) / len(terms))
        per_row = torch.stack(rows)
        return {"none": per_row, "sum": per_row.sum(), "mean": per_row.sum() / counted}[reduction]

    def ours(**t: Tensor) -> Tensor:
        return inverse_info_nce(
            **t,
            kind="contrastive",
            row_labels=LABELS,
            col_labels=KEYS,
            paired=False,
            reduction=reduction,
            backend=backend,
        )

    compare(ours, torchs, features(10, 6, m=12), dtype)


def test_ascent_is_the_negated_info_nce(engine: Engine) -> None:
    backend, dtype = engine

    def torchs(**t: Tensor) -> Tensor:
        return -F.cross_entropy(logits(**t), torch.arange(30))

    compare(lambda **t: inverse_info_nce(**t, kind="ascent", backend=backend), torchs, features(30, 6), dtype)


def test_bounded_inverse_has_a_floor_and_its_gradient_fades(engine: Engine) -> None:
    """Turn one row away from its key, step by step: the loss falls to 0 with its gradient; that of ascent does not."""
    backend, dtype = engine
    y = torch.eye(8, dtype=dtype)
    norms: dict[str, list[float]] = {"bounded": [], "ascent": []}
    values = []
    for angle in torch.linspace(0, math.pi / 2, 7):
        for kind, sizes in norms.items():
            x = torch.zeros(1, 8, dtype=dtype)
            x[0, 0], x[0, 1] = angle.cos(), angle.sin()
            x.requires_grad_()
            ids = {"row_ids": torch.tensor([0]), "col_ids": torch.arange(8)}
            loss = inverse_info_nce(x, y, scale=20.0, kind=kind, **ids, backend=backend)
            (grad,) = torch.autograd.grad(loss, x)
            sizes.append(float(grad.norm()))
            if kind == "bounded":
                values.append(loss.item())
    assert all(v >= 0 for v in values)
    assert values == sorted(values, reverse=True)
    assert values[-1] < 1e-6
    assert norms["bounded"][-1] < 1e-6 * norms["bounded"][0]
    assert norms["ascent"][-1] > 1.0


def test_bounded_inverse_is_not_negative(backend: str) -> None:
    for scale in (0.0, 1.0, 100.0):
        per_row = inverse_info_nce(
            unit(60, 4).float(), unit(60, 4).float(), scale=scale, reduction="none", backend=backend
        )
        assert per_row.ge(0).all()


# ---- sup_con


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sup_con_is_its_definition(reduction: str, engine: Engine) -> None:
    """Eq. 2 of arXiv 2004.11362 in loops: i against A(i), all but itself, over its positives P(i)."""
    backend, dtype = engine
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3, 1, -1])

    def torchs(x: Tensor, scale: Tensor) -> Tensor:
        s = logits(x, x, scale)
        rows, counted = [], 0
        for i in range(9):
            others = [a for a in range(9) if a != i and labels[a] >= 0]
            positives = [p for p in others if labels[p] == labels[i]]
            if labels[i] < 0 or not positives:
                rows.append(0 * s[i].sum())
                continue
            counted += 1
            terms = [torch.log(s[i, p].exp() / s[i, others].exp().sum()) for p in positives]
            rows.append(-sum(terms) / len(terms))
        per_row = torch.stack(rows)
        return {"none": per_row, "sum": per_row.sum(), "mean": per_row.sum() / counted}[reduction]

    def ours(x: Tensor, scale: Tensor) -> Tensor:
        return sup_con(x, x, scale=scale, row_labels=labels, reduction=reduction, backend=backend)

    data = features(9, 6)
    compare(ours, torchs, {"x": data["x"], "scale": data["scale"]}, dtype)


# ---- sigmoid_loss


@pytest.mark.parametrize("bias", [None, -10.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n", [1, 50])
def test_sigmoid_loss_is_its_definition(n: int, reduction: str, bias: float | None, engine: Engine) -> None:
    backend, dtype = engine

    def torchs(**t: Tensor) -> Tensor:
        per_row = -F.logsigmoid((2 * torch.eye(n) - 1) * logits(**t)).sum(1)
        return {"none": per_row, "sum": per_row.sum(), "mean": per_row.mean()}[reduction]

    compare(
        lambda **t: sigmoid_loss(**t, reduction=reduction, backend=backend), torchs, features(n, 24, bias=bias), dtype
    )


def test_sigmoid_loss_without_positives(engine: Engine) -> None:
    """One chunk of the texts of other ranks."""
    backend, dtype = engine

    def torchs(**t: Tensor) -> Tensor:
        return -F.logsigmoid(-logits(**t)).sum() / 20

    for m in (20, 30):
        data = features(20, 6, m=m, bias=-3.0)
        compare(lambda **t: sigmoid_loss(**t, paired=False, backend=backend), torchs, data, dtype)


# ---- open_clip's classes


@pytest.mark.parametrize("bias", [None, -4.0])
@pytest.mark.parametrize("n", [2, 65, 300])
def test_info_nce_is_open_clips_loss(n: int, bias: float | None, engine: Engine) -> None:
    backend, dtype = engine
    theirs = open_clip_loss().ClipLoss()

    def torchs(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        return theirs(x, y, scale, logit_bias=bias)

    compare(lambda **t: info_nce(**t, backend=backend), torchs, features(n, 32, scale=100.0, bias=bias), dtype)


@pytest.mark.parametrize("n", [2, 65, 300])
def test_sigmoid_loss_is_open_clips_loss(n: int, engine: Engine) -> None:
    backend, dtype = engine
    theirs = open_clip_loss().SigLipLoss()

    def torchs(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return theirs(x, y, scale, bias)

    compare(lambda **t: sigmoid_loss(**t, backend=backend), torchs, features(n, 32, scale=10.0, bias=-10.0), dtype)


# ---- what all of them share


def labels_of(n: int) -> Tensor:
    return torch.arange(n) % 3


def teacher_of(n: int, m: int) -> tuple[Tensor, Tensor]:
    return torch.arange(2.0 * n).cos().view(n, 2), torch.arange(2.0 * m).sin().view(m, 2)


ALL_LOSSES: dict[str, Callable[..., Tensor]] = {
    "info_nce": info_nce,
    "info_nce, one way": lambda x, y, **k: info_nce(x, y, symmetric=False, **k),
    "bounded": inverse_info_nce,
    "bounded, labels": lambda x, y, **k: inverse_info_nce(x, y, row_labels=labels_of(x.shape[-2]), **k),
    "contrastive": lambda x, y, **k: inverse_info_nce(x, y, kind="contrastive", row_labels=labels_of(x.shape[-2]), **k),
    "ascent": lambda x, y, **k: inverse_info_nce(x, y, kind="ascent", **k),
    "sup_con": lambda x, y, **k: sup_con(x, y, row_labels=labels_of(x.shape[-2]), **k),
    "sigmoid_loss": sigmoid_loss,
    "distill": lambda x, y, **k: distill(x, y, teacher=teacher_of(x.shape[-2], y.shape[-2]), teacher_scale=3.0, **k),
}


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ALL_LOSSES)
def test_gradcheck(name: str, reduction: str, with_bias: bool) -> None:
    x, y = (torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True) for _ in "xy")
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (1.5, -0.5))

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return ALL_LOSSES[name](
            x, y, scale=scale, reduction=reduction, backend="reference", **({"bias": bias} if with_bias else {})
        )

    inputs: tuple[Any, ...] = (x, y, scale, bias if with_bias else bias.detach())
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("name", ALL_LOSSES)
@pytest.mark.parametrize("n", [0, 1])
def test_losses_of_nothing_and_of_one(n: int, name: str, engine: Engine) -> None:
    """No item, and no item to be told apart from: a finite number and finite gradients."""
    backend, dtype = engine
    x, y = (torch.randn(n, 4, dtype=dtype, requires_grad=True) for _ in "xy")
    loss = ALL_LOSSES[name](x, y, scale=2.0, backend=backend)
    assert loss.shape == ()
    assert loss.isfinite()
    if n == 0 or name != "sigmoid_loss":
        assert loss.abs() < 1e-6
    loss.backward()
    assert x.grad.shape == y.grad.shape == (n, 4)
    assert x.grad.isfinite().all()
    assert y.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_nobody_counts(name: str, backend: str) -> None:
    """Every label negative: 0, with a gradient of zeros rather than NaN."""
    x, y = (torch.randn(5, 4, requires_grad=True) for _ in "xy")
    ignored = torch.full((5,), -1)
    base = {"sup_con": sup_con, "contrastive": inverse_info_nce, "bounded, labels": inverse_info_nce}
    loss = base.get(name, ALL_LOSSES[name])
    kind = {"kind": "contrastive"} if name == "contrastive" else {}
    value = loss(x, y, scale=2.0, row_labels=ignored, col_labels=ignored, backend=backend, **kind)
    assert value.item() == 0
    value.backward()
    assert x.grad.eq(0).all()
    assert y.grad.eq(0).all()
