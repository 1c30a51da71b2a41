"""topk_flips on a GPU. Tested without one: the bound, and the selection with the kernel's own arithmetic."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ccu_fast import TokenTable, topk_flips
from ccu_fast.ops.topk_flips.problem import TokenProblem
from tests.support.presence import require_backend


def compiled() -> Any:
    require_backend("native")
    return importlib.import_module("ccu_fast._C")


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_the_selection_keeps_whatever_could_be_best(data: st.DataObject) -> None:
    n, groups = data.draw(st.integers(1, 600)), data.draw(st.sampled_from([4, 32, 256]))
    k = data.draw(st.integers(1, min(n, groups)))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    exact = torch.randn(n) if data.draw(st.booleans()) else torch.randint(-2, 3, (n,)).float()
    err = data.draw(st.sampled_from([0.0, 1e-6, 0.05]))
    coarse = exact + err * (2 * torch.rand(n) - 1)
    coarse[coarse == 0] *= -1  # negative zeros
    found = torch.tensor(compiled().select_candidates(coarse.tolist(), k, err, groups))
    best = exact.double().sort(stable=True).indices[:k]
    assert torch.isin(best, found).all()
    # Sorted as the answer is, by (score, token), each once.
    order = found[coarse[found].double().add(0.0).sort(stable=True).indices.argsort()]
    ranked = sorted(found.tolist(), key=lambda t: (float(coarse[t]) + 0.0, t))
    assert found.tolist() == ranked and len(set(ranked)) == len(ranked) == len(order)
    # And not much else: nothing beyond twice the error of the k-th lowest of the groups.
    lowest = torch.full((groups,), torch.inf)
    lowest.scatter_reduce_(0, torch.arange(n) % groups, coarse, "amin")
    kth = float(lowest.sort().values[k - 1])
    if kth < torch.inf:
        assert float(coarse[found].max()) <= kth + 2.1 * err + 1e-6 * (1 + abs(kth))
    else:
        assert len(found) == n


def described(grad: Tensor, embedding: Tensor, ids: Tensor | None, few: bool, **changes: Any) -> tuple[Tensor, Tensor]:
    """What the scan knows about gradients."""
    tokens_cuda = importlib.import_module("ccu_fast.ops.topk_flips.cuda")
    table = TokenTable(embedding, ids, backend="reference")
    packed, coarse = tokens_cuda.pack(table.embedding, table.ids if ids is not None else None)
    arguments = dict(
        grad=grad,
        embedding=table.embedding,
        token_ids=table.ids,
        packed=packed,
        coarse=coarse,
        max_norm=table.max_norm,
        k=16,
        maximize=False,
        current=None,
        exclude_current=False,
        allowed=None,
        penalty=None,
        certify=True,
    )
    operand, about = tokens_cuda.describe(TokenProblem(**(arguments | changes)), few)
    return operand, about


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_coarse_scores_are_within_their_bound(native: str, few: bool, maximize: bool, size: float) -> None:
    tokens_cuda = importlib.import_module("ccu_fast.ops.topk_flips.cuda")
    embedding = 0.02 * torch.randn(3000, 60) * torch.rand(3000, 1) + torch.randn(60)
    ids = torch.arange(0, 3000, 2)
    packed, _ = tokens_cuda.pack(embedding, ids)
    assert packed.shape == (1500, 64) and packed.dtype == torch.float16 and not packed[:, 60:].any()
    grad, penalty = size * torch.randn(9, 60), size * torch.randn(1, 1500)
    operand, about = described(grad, embedding, ids, few, maximize=maximize, penalty=penalty)
    scores = operand.float() @ packed.float().T
    seen = about[:, :1].double() * scores.double() + about[:, 1:2].double() * penalty.double()
    sign = -1 if maximize else 1
    exact = sign * grad.double() @ embedding[::2].double().T + penalty.double()
    # In the row's own unit, and but for the constant that centring takes away.
    off = seen - exact * about[:, 1:2].double()
    off = off - (off.amax(1, keepdim=True) + off.amin(1, keepdim=True)) / 2
    assert bool((off.abs().amax(1) <= about[:, 2]).all())
    # The bound is useful: it is a small part of the spread of the scores.
    assert float((about[:, 2] / (seen - about[:, 1:2] * penalty).std(1)).max()) < 0.05
    assert about[:, 3].tolist() == [0.0] * 9


def test_rows_that_a_scan_cannot_serve(native: str) -> None:
    module = compiled()
    grad = torch.randn(5, 8)
    grad[0] *= 1e-44
    grad[1, 3], grad[2, 0], grad[3] = torch.nan, torch.inf, 0
    for few in (False, True):
        operand, about = described(grad, torch.randn(40, 8), None, few)
        scan, exact, invalid, zero = module.TOPK_SCAN, module.TOPK_EXACT, module.TOPK_INVALID, module.TOPK_ZERO
        assert about[:, 3].tolist() == [exact, invalid, invalid, zero, scan]
        assert bool(operand.isfinite().all()) and bool(about.isfinite().all())


def answer(grad: Tensor, table: TokenTable, k: int, **options: Any) -> list[Tensor]:
    flips = topk_flips(grad, table, k, **options)
    return [flips.ids.cpu(), flips.delta.cpu(), flips.count.cpu(), flips.valid.cpu()]


@pytest.mark.gpu
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize(
    ("rows", "vocabulary", "dim", "k"),
    [
        (1, 1, 1, 1),
        (5, 49408, 512, 16),
        (16, 300, 33, 300),
        (40, 5000, 64, 1024),
        (600, 997, 129, 7),
        (5, 40, 8, 3),
        (3, 700, 20, 16),
        (2, 1500, 9, 300),
        (2, 4200, 9, 1024),
        (1, 16400, 4, 1000),
    ],
)
def test_the_ids_of_the_cpu(native: str, rows: int, vocabulary: int, dim: int, k: int, integers: bool) -> None:
    make: Any = (lambda *s: torch.randint(-2, 3, s).float()) if integers else torch.randn
    grad, embedding = make(rows, dim), make(vocabulary, dim)
    current, penalty = torch.randint(0, vocabulary, (rows,)), make(rows, vocabulary)
    allowed = torch.rand(vocabulary) < 0.7
    grad[-1] *= 1e-44
    for maximize in (False, True):
        for options in (
            {},
            {"current_ids": current, "exclude_current": True},
            {"penalty": penalty},
            {"allowed": allowed},
        ):
            here = answer(grad, TokenTable(embedding), k, maximize=maximize, backend="reference", **options)
            moved = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in options.items()}
            table = TokenTable(embedding.cuda())
            there = answer(grad.cuda(), table, k, maximize=maximize, backend=native, **moved)
            again = answer(grad.cuda(), table, k, maximize=maximize, backend=native, **moved)
            for name, a, b, c in zip(("ids", "delta", "count", "valid"), here, there, again, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-37, equal_nan=True, msg=name)
                torch.testing.assert_close(b, c, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("k", [1, 16, 1024])
def test_any_number_of_ties_goes_to_the_lowest_ids(native: str, k: int, penalised: bool) -> None:
    """A zero gradient, and a table that repeats a few vectors: more ties than a block holds."""
    embedding = torch.randn(3, 16)[torch.randint(0, 3, (5000,))]
    grad = torch.randn(3, 16)
    grad[1] = 0
    penalty = torch.randint(0, 2, (5000,)).float() if penalised else None
    allowed = torch.rand(5000) < 0.9
    here = answer(grad, TokenTable(embedding), k, penalty=penalty, allowed=allowed, backend="reference")
    there = answer(
        grad.cuda(),
        TokenTable(embedding.cuda()),
        k,
        allowed=allowed.cuda(),
        backend=native,
        penalty=None if penalty is None else penalty.cuda(),
    )
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-37)


@pytest.mark.gpu
def test_a_penalty_that_is_not_finite_forbids_its_token(native: str) -> None:
    embedding, grad, penalty = torch.randn(3000, 24), torch.randn(7, 24), torch.randn(3000)
    barred = torch.rand(3000) < 0.1
    here = answer(grad, TokenTable(embedding), 16, penalty=penalty, allowed=~barred, backend="reference")
    penalty[barred] = torch.tensor([torch.inf, -torch.inf, torch.nan])[torch.arange(int(barred.sum())) % 3]
    for backend in (native, "reference"):
        there = answer(grad.cuda(), TokenTable(embedding.cuda()), 16, penalty=penalty.cuda(), backend=backend)
        assert torch.equal(there[0], here[0]) and torch.equal(there[2], here[2])


@pytest.mark.gpu
def test_near_ties_and_rows_without_bound(native: str) -> None:
    base = torch.randn(64)
    embedding = base.expand(5000, 64).clone()
    embedding[:, 0] += torch.randint(-40, 40, (5000,)) * 2.0**-22
    grad = torch.randn(20, 64)
    grad[3, 3] = torch.nan
    here = answer(grad, TokenTable(embedding), 20, backend="reference")
    there = answer(grad.cuda(), TokenTable(embedding.cuda()), 20, backend=native)
    assert torch.equal(here[0], there[0]) and torch.equal(here[3], there[3])


@pytest.mark.gpu
def test_a_cuda_graph_holds_the_search(native: str) -> None:
    embedding, grad = torch.randn(5000, 64), torch.randn(20, 64)
    table, far = TokenTable(embedding.cuda()), grad.cuda()
    answer(far, table, 20, backend=native)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flips = topk_flips(far, table, 20, backend=native)
    far.neg_()
    graph.replay()
    assert torch.equal(flips.ids.cpu(), answer(-grad, TokenTable(embedding), 20)[0])


@pytest.mark.gpu
def test_offsets_beyond_31_bits(native: str) -> None:
    embedding, grad = torch.randn(60_000, 8, device="cuda"), torch.randn(40_000, 8, device="cuda")
    flips = topk_flips(grad, TokenTable(embedding), 2, backend=native)
    here = topk_flips(grad[-50:].cpu(), TokenTable(embedding.cpu()), 2)
    assert torch.equal(flips.ids[-50:].cpu(), here.ids)


@pytest.mark.gpu
@pytest.mark.parametrize("sign", [1, -1, 0])
def test_a_penalty_that_overflows_beside_the_scores(native: str, sign: int) -> None:
    """A row's scores are in a unit of its own, 2^100 here, in which some or all penalties are infinite."""
    embedding, grad = torch.randn(3000, 24), 1e-30 * torch.randn(7, 24)
    penalty = 1e9 * (torch.randn(3000) if sign == 0 else sign * torch.rand(3000) + sign)
    penalty[torch.rand(3000) < 0.01] = 0
    here = answer(grad, TokenTable(embedding), 16, penalty=penalty, backend="reference")
    there = answer(grad.cuda(), TokenTable(embedding.cuda()), 16, penalty=penalty.cuda(), backend=native)
    assert torch.equal(there[0], here[0]) and torch.equal(there[2], here[2])
