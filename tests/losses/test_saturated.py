"""Where pairs are sure: losses of 10 to 1e-12 and their gradients keep five digits in fp32; eager torch keeps none."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ccu_fast import info_nce, inverse_info_nce, sigmoid_loss, sup_con
from ccu_fast.unlearn import KeyBank, forgetting_loss, separation_loss, unclassify_loss

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 1e-5
N, DIM = 24, 64
COSINES = (-0.5, 0.2, 0.4, 0.5)
SCALES = (1.0, 30.0, 100.0)


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Triton's: ops/triton/interpreted/test_interpreted_saturated.py."""
    if request.param == "native":
        request.getfixturevalue("native")
    return str(request.param)


def pairs(cosine: float, n: int = N, lead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Unit vectors, row i of one at this cosine to row i of the other."""
    x, other = (F.normalize(torch.randn(*lead, n, DIM, dtype=torch.float64), dim=-1) for _ in range(2))
    other = F.normalize(other - (other * x).sum(-1, keepdim=True) * x, dim=-1)
    return x.float(), (cosine * x + math.sqrt(1 - cosine**2) * other).float()


def attracted(s: Tensor, own: Tensor, rest: Tensor) -> Tensor:
    """-log of the share that a row's positives have, in the mean of their logits, without a difference that cancels."""
    lse, positive = (torch.where(chosen, s, -torch.inf).logsumexp(-1) for chosen in (rest, own))
    mean = torch.where(own, s, 0).sum(-1) / own.sum(-1)
    one = own.sum(-1) == 1
    return F.softplus(lse - torch.where(one, mean, positive), threshold=100) + torch.where(one, 0, positive - mean)


def check(
    ours: Callable[..., Tensor], exact: Callable[..., Tensor], *inputs: Tensor, frozen: tuple[int, ...] = ()
) -> float:
    """Compares the loss and the gradients of all inputs but the frozen ones; returns the loss."""
    free = [i for i in range(len(inputs)) if i not in frozen]

    def run(loss: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_(i in free) for i, t in enumerate(inputs)]
        value = loss(*leaves)
        return [value.detach(), *torch.autograd.grad(value.sum(), [leaves[i] for i in free])]

    got, want = run(ours, torch.float32), run(exact, torch.float64)
    for name, a, b in zip(("the loss", *(f"the gradient of input {i}" for i in free)), got, want, strict=True):
        error = float((a.double() - b).norm() / b.norm())
        assert error <= LIMIT, f"{name}: relative error {error:.1e} at loss {float(want[0].mean()):.1e}"
    return float(want[0].mean())


def exact_info_nce(own: Tensor, symmetric: bool = True) -> Callable[..., Tensor]:
    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        s = scale * (x @ y.mT)
        sides = [attracted(s, own, ~own).mean(-1)]
        if symmetric:
            sides.append(attracted(s.mT, own.mT, ~own.mT).mean(-1))
        return sum(sides[1:], sides[0]) / len(sides)

    return loss


PLAIN: dict[str, dict[str, Any]] = {
    "pairs": {},
    "any size": {"paired": True},
    "rows only": {"symmetric": False},
    "ids": {"row_ids": torch.arange(N), "col_ids": torch.arange(N)},
    "labels": {"row_labels": torch.zeros(N, dtype=torch.int64)},
    "bias": {"bias": -10.0},
}


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN.keys())
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("cosine", COSINES)
def test_info_nce(cosine: float, scale: float, options: dict[str, Any], backend: str) -> None:
    x, y = pairs(cosine)

    def ours(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return info_nce(x, y, scale=scale, backend=backend, **options)

    exact = exact_info_nce(torch.eye(N, dtype=torch.bool), options.get("symmetric", True))
    loss = check(ours, exact, x, y, torch.tensor(scale))
    if scale == 100 and cosine == 0.5:
        assert loss < 1e-8


def test_one_positive_beside_rows_of_several(backend: str) -> None:
    """In two banks: a third of the items share an id with another, the others have one positive and are sure of it."""
    ids = torch.arange(N)
    ids[1 : N // 3 : 2] -= 1
    own = ids[:, None] == ids
    alone = own.sum(1) == 1
    x, y = pairs(0.5, lead=(2,))

    def ours(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        each = info_nce(x, y, scale=scale, row_ids=ids, col_ids=ids, symmetric=False, reduction="none", backend=backend)
        return each[:, alone].mean()

    def exact(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return attracted(scale * (x @ y.mT), own, ~own)[:, alone].mean()

    assert check(ours, exact, x, y, torch.tensor(100.0)) < 1e-5


@pytest.mark.parametrize("labelled", [False, True])
def test_what_is_forgotten(labelled: bool, backend: str) -> None:
    check_what_is_forgotten(N, labelled, backend)


@pytest.mark.parametrize("labelled", [False, True])
def test_what_is_forgotten_among_many_keys(labelled: bool, backend: str) -> None:
    """Of as many frozen keys the CPU keeps the mean and no matrix."""
    check_what_is_forgotten(5000, labelled, backend)


def check_what_is_forgotten(keys: int, labelled: bool, backend: str) -> None:
    """The bounded inverse where the positive is far below the others: 0 but for its last digits."""
    x, y = pairs(-0.7)
    y = torch.cat([y, pairs(0.0, n=keys - N)[1]])
    ids = torch.arange(N), torch.arange(keys)
    options: dict[str, Any] = {"row_ids": ids[0], "col_ids": ids[1]}
    own = ids[0][:, None] == ids[1]
    if labelled:
        options = {"row_labels": ids[0], "col_labels": ids[1], "paired": False}

    def ours(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return inverse_info_nce(x, y, scale=scale, backend=backend, **options)

    def exact(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        s = scale * (x @ y.mT)
        return F.softplus(torch.where(own, s, 0).sum(1) - torch.where(own, -torch.inf, s).logsumexp(1)).mean()

    for frozen in ((), (1,)):
        assert check(ours, exact, x, y, torch.tensor(30.0), frozen=frozen) < 1e-7


def test_sup_con(backend: str) -> None:
    """Two views: a row has one positive."""
    z = F.normalize(torch.randn(N // 2, DIM), dim=1).repeat_interleave(2, 0)
    z = F.normalize(z + 0.02 * torch.randn_like(z), dim=1)
    labels = torch.arange(N // 2).repeat_interleave(2)
    same = (labels[:, None] == labels) & ~torch.eye(len(z), dtype=torch.bool)

    def ours(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return sup_con(x, y, scale=scale, row_labels=labels, backend=backend)

    def exact(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return attracted(scale * (x @ y.mT), same, labels[:, None] != labels).mean()

    assert check(ours, exact, z, z.clone(), torch.tensor(50.0)) < 1e-6


def test_the_parts_of_unlearning(backend: str) -> None:
    """What is forgotten already, and what is apart already."""
    forget, retain = torch.arange(N), torch.arange(N, 2 * N)
    (u, u0), (r, r0) = pairs(-0.7), pairs(0.9)
    bank = KeyBank(keys=pairs(0.0)[0], labels=forget, ids=torch.arange(2 * N, 3 * N))
    keys = torch.cat([r, r0, u0, u0, bank.keys]).double()
    own = forget[:, None] == torch.cat([retain, retain, forget, forget, bank.ids])

    def forgetting(u: Tensor, scale: Tensor) -> Tensor:
        frozen = {"u0": u0, "a0": u0, "b0": r0}
        return forgetting_loss(
            u, r, **frozen, scale=scale, forget_ids=forget, retain_ids=retain, bank=bank, backend=backend
        )

    def exact_forgetting(u: Tensor, scale: Tensor) -> Tensor:
        s = scale * (u @ keys.T)
        positive, other = (torch.where(chosen, s, -torch.inf).logsumexp(1) for chosen in (own, ~own))
        return F.softplus(positive - other).mean()

    assert check(forgetting, exact_forgetting, u, torch.tensor(30.0)) < 1e-7

    def separation(r: Tensor, u: Tensor, scale: Tensor) -> Tensor:
        return separation_loss(r, r0, u, scale=scale, retain_ids=retain, weight=2.0, backend=backend)

    def exact_separation(r: Tensor, u: Tensor, scale: Tensor) -> Tensor:
        s = scale * (r @ torch.cat([r0.double(), u]).T)
        s = s + torch.tensor([0.0, math.log(2)]).repeat_interleave(N)
        own = torch.eye(N, 2 * N, dtype=torch.bool)
        return attracted(s, own, ~own).mean()

    assert check(separation, exact_separation, r, u, torch.tensor(50.0)) < 1e-9


@pytest.mark.parametrize("scale", [5.0, 12.0, 17.0, 30.0, 80.0])
@pytest.mark.parametrize("bias", [None, -1.0])
def test_a_sigmoid_loss_of_several_positives(backend: str, scale: float, bias: float | None) -> None:
    """Near-duplicates alone, so that nothing else hides what the positives lose."""
    x = F.normalize(torch.ones(1, DIM) + 0.02 * torch.randn(N, DIM), dim=1)
    y, ids = x.flip(0), torch.zeros(N, dtype=torch.int64)

    def exact(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return -F.logsigmoid(scale * x @ y.mT + (bias or 0)).sum(1).mean()

    def ours(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return sigmoid_loss(x, y, scale=scale, bias=bias, row_ids=ids, col_ids=ids, backend=backend)

    assert check(ours, exact, x, y, torch.tensor(scale)) < N * math.exp(1.1 - 0.98 * scale)


def test_a_classifier_that_has_forgotten() -> None:
    labels = torch.arange(N) % 5
    logits = 3 * torch.randn(N, 5) - 40 * F.one_hot(labels, 5)

    def exact(logits: Tensor) -> Tensor:
        at = labels[:, None]
        return F.softplus(logits.gather(1, at)[:, 0] - logits.scatter(1, at, -torch.inf).logsumexp(1)).mean()

    assert check(lambda t: unclassify_loss(t, labels), exact, logits) < 1e-12
