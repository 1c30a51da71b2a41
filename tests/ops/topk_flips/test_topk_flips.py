"""topk_flips against a stable float64 sort."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ccu_fast import Flips, TokenTable, topk_flips
from ccu_fast.ops.backend import unavailable
from tests.support.peak import printed_bytes
from tests.support.tolerance import assert_three_way

# On a GPU "fast" lets fp16 choose among nearly equal scores.
EXACT = ("certified", "fp32") + (() if "CCU_FAST_EMULATED_GPU" in os.environ else ("fast",))
BACKENDS = ["reference"] + ([] if unavailable("native") else ["native"])


def brute(grad: Tensor, embedding: Tensor, k: int, *, maximize: bool = False, penalty: Any = 0.0) -> Tensor:
    """The definition, for rows [N, D]: ids [N, k] of a stable float64 sort."""
    score = grad.double() @ embedding.double().T
    return ((-score if maximize else score) + penalty).sort(dim=1, stable=True).indices[:, :k]


def integers(*shape: int, low: int = -2, high: int = 3) -> Tensor:
    return torch.randint(low, high, shape).float()


SIZES = [(5, 1000, 64, 16), (1, 1, 1, 1), (1, 15, 3, 2), (2, 16, 5, 16), (3, 17, 1, 5), (7, 997, 33, 7), (8, 48, 16, 1)]
SIZES += [(9, 333, 100, 333), (23, 4096, 20, 64), (67, 777, 129, 6), (4, 3000, 40, 1024), (130, 500, 260, 3)]


@pytest.mark.parametrize(("rows", "vocabulary", "dim", "k"), SIZES)
@pytest.mark.parametrize("maximize", [False, True])
def test_the_ids_of_a_float64_sort(backend: str, rows: int, vocabulary: int, dim: int, k: int, maximize: bool) -> None:
    for make in (torch.randn, integers):
        # Gradients of very different size: nothing may overflow, underflow or be compared across rows.
        grad = make(rows, dim) * 2.0 ** torch.randint(-60, 60, (rows, 1))
        embedding = make(vocabulary, dim)
        flips = topk_flips(grad, TokenTable(embedding, backend=backend), k, maximize=maximize, backend=backend)
        ids = brute(grad, embedding, k, maximize=maximize)
        assert torch.equal(flips.ids, ids)
        exact = (grad.double() @ embedding.double().T).gather(1, ids)
        scale = grad.abs().amax(1, keepdim=True).double().clamp(min=2.0**-60)
        same = (grad @ embedding.T).gather(1, ids)
        assert_three_way("delta", flips.delta / scale, same / scale, exact / scale)
        assert flips.delta.dtype == torch.float32
        assert bool(flips.valid.all()) and bool((flips.count == k).all()) and flips.rows is None


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_ties_go_to_the_lowest_id(data: st.DataObject) -> None:
    rows, vocabulary, dim = (data.draw(st.integers(1, high)) for high in (20, 700, 9))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    grad, embedding = integers(rows, dim, low=-1, high=2), integers(vocabulary, dim, low=-1, high=2)
    allowed = torch.rand(vocabulary) < data.draw(st.sampled_from([0.3, 1.0]))
    allowed[data.draw(st.integers(0, vocabulary - 1))] = True
    k = data.draw(st.integers(1, int(allowed.sum())))
    penalty = integers(vocabulary) if data.draw(st.booleans()) else torch.zeros(vocabulary)
    maximize = data.draw(st.booleans())
    # Negative zeros equal positive ones.
    grad[grad == 0] *= -1
    barred = torch.where(allowed, 0, torch.inf) + penalty
    ids = brute(grad, embedding, k, maximize=maximize, penalty=barred)
    for backend in BACKENDS:
        for precision in EXACT:
            flips = topk_flips(
                grad,
                TokenTable(embedding, allowed, backend=backend),
                k,
                maximize=maximize,
                penalty=penalty,
                precision=precision,
                backend=backend,
            )
            assert torch.equal(flips.ids, ids), backend


def test_masses_of_near_ties_are_settled_in_float64(backend: str) -> None:
    # 3000 tokens closer together than fp32 can tell, far more than a candidate list holds, and equal ones among them.
    base = torch.randn(64)
    embedding = base.expand(3000, 64).clone()
    embedding[:, 0] += torch.randint(-40, 40, (3000,)) * 2.0**-22
    grad = torch.randn(3, 64)
    score = (embedding.double()[None] * grad.double()[:, None]).sum(-1)
    flips = topk_flips(grad, TokenTable(embedding, backend=backend), 20, backend=backend)
    assert torch.equal(flips.ids, score.sort(dim=1, stable=True).indices[:, :20])


def test_a_zero_gradient_gives_the_first_tokens(backend: str) -> None:
    embedding = torch.randn(5000, 8)
    grad = torch.zeros(6, 8)
    penalty = torch.randn(5000)
    table = TokenTable(embedding, backend=backend)
    assert torch.equal(topk_flips(grad, table, 4, backend=backend).ids, torch.arange(4).expand(6, 4))
    order = penalty.sort(stable=True).indices[:4]
    assert torch.equal(topk_flips(grad, table, 4, penalty=penalty, backend=backend).ids, order.expand(6, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["contiguous", "rows", "transposed", "every-other"])
def test_dtypes_and_layouts_of_the_embedding(backend: str, dtype: torch.dtype, layout: str) -> None:
    embedding = {
        "contiguous": lambda: torch.randn(500, 300),
        "rows": lambda: torch.randn(500, 310)[:, 5:305],
        "transposed": lambda: torch.randn(300, 500).T,
        "every-other": lambda: torch.randn(1000, 600)[::2, ::2],
    }[layout]().to(dtype)
    grad = torch.randn(3, 7, 600, dtype=dtype)[..., ::2]
    flips = topk_flips(grad, TokenTable(embedding, backend=backend), 9, backend=backend)
    assert flips.ids.shape == (3, 7, 9) and flips.count.shape == (3, 7)
    assert torch.equal(flips.ids.flatten(0, 1), brute(grad.flatten(0, 1), embedding, 9))


def test_extreme_magnitudes(backend: str) -> None:
    embedding = torch.randn(400, 32)
    for factor in (1e-44, 1e-38, 1e-30, 1e30, 1e38):
        grad = (torch.randn(4, 32).double() * factor).float().clamp(-3e38, 3e38)
        for e in (embedding, embedding * 1e-35, embedding * 1e35):
            flips = topk_flips(grad, TokenTable(e, backend=backend), 5, backend=backend)
            assert torch.equal(flips.ids, brute(grad, e, 5)), factor


@pytest.mark.parametrize("dim", [255, 256, 257, 700])
def test_sums_at_the_edge_of_the_scan(backend: str, dim: int) -> None:
    # Vectors whose elements all have one sign and one size give the largest sums that the integers of a scan can reach,
    # in the first chunk alone or in all; a spike leaves little precision for the rest.
    size, sign = 1 + torch.rand(300, 1), torch.where(torch.rand(300, 1) < 0.5, -1, 1)
    embedding = torch.cat([(size * sign).expand(300, dim), size * torch.randn(300, dim), torch.eye(dim)])
    grad = torch.ones(6, dim) + 1e-3 * torch.randn(6, dim)
    grad[1:3, 256:] *= 1e-4
    grad[2:5, ::7] *= -1
    grad[3, dim - 1] = 3e5
    for maximize in (False, True):
        flips = topk_flips(grad, TokenTable(embedding, backend=backend), 9, maximize=maximize, backend=backend)
        assert torch.equal(flips.ids, brute(grad, embedding, 9, maximize=maximize))


def test_current_ids(backend: str) -> None:
    embedding, grad = integers(300, 12), integers(2, 5, 12)
    current = torch.randint(0, 300, (2, 5), dtype=torch.int32)
    table = TokenTable(embedding, backend=backend)
    flips = topk_flips(grad, table, 300, current_ids=current, backend=backend)
    score = torch.einsum("bnd,bnvd->bnv", grad, embedding - embedding[current.long()][:, :, None])
    assert torch.equal(flips.ids, score.sort(dim=-1, stable=True).indices)
    assert torch.equal(flips.delta, score.sort(-1).values)
    without = topk_flips(grad, table, 299, current_ids=current, exclude_current=True, backend=backend)
    assert not bool((without.ids == current[..., None]).any())
    assert torch.equal(without.ids, flips.ids[flips.ids != current[..., None]].view(2, 5, 299))
    padded = topk_flips(grad, table, 300, current_ids=current, exclude_current=True, backend=backend)
    assert bool((padded.count == 299).all()) and bool((padded.ids[..., -1] == -1).all())
    assert bool(padded.delta[..., -1].isnan().all())
    # A current token that the table does not allow still anchors the deltas.
    half = TokenTable(embedding, torch.arange(150), backend=backend)
    anchored = topk_flips(grad, half, 1, current_ids=torch.full((2, 5), 299), backend=backend)
    expected = (score + (embedding[current.long()] * grad).sum(-1, keepdim=True))[..., :150].amin(-1)
    assert torch.equal(anchored.delta[..., 0], expected - grad @ embedding[299])


@pytest.mark.parametrize("static", [False, True])
def test_masks(backend: str, static: bool) -> None:
    embedding, grad = torch.randn(333, 20), torch.randn(4, 3, 20)
    keep = torch.rand(333) < 0.5 if static else torch.ones(333, dtype=torch.bool)
    table = TokenTable(embedding, keep if static else None, backend=backend)
    for shape in ((), (1,), (3,), (4, 3)):
        mask = torch.rand(*shape, 333) < 0.4
        flips = topk_flips(grad, table, 5, allowed=mask, backend=backend)
        everywhere = (mask & keep).expand(4, 3, 333)
        score = (grad.double() @ embedding.double().T).masked_fill(~everywhere, torch.inf)
        assert torch.equal(flips.ids, score.sort(dim=-1, stable=True).indices[..., :5])
    few = torch.zeros(4, 3, 333, dtype=torch.bool)
    first = keep.nonzero()[:4, 0]
    few[0, 0, first] = True
    flips = topk_flips(grad, table, 6, allowed=few, backend=backend)
    assert flips.count.flatten().tolist() == [4] + [0] * 11
    assert sorted(flips.ids[0, 0, :4].tolist()) == first.tolist()
    assert bool((flips.ids[0, 0, 4:] == -1).all()) and bool((flips.ids.flatten(0, 1)[1:] == -1).all())
    assert torch.equal(flips.delta.isnan(), flips.ids == -1)
    assert bool(flips.valid.all())


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e12])
def test_penalties_count_against_a_token(backend: str, maximize: bool, size: float) -> None:
    embedding, grad = torch.randn(333, 20), torch.randn(6, 20)
    table = TokenTable(embedding, torch.arange(0, 333, 2), backend=backend)
    for penalty in (size * torch.randn(333), size * torch.randn(6, 333).double()):
        flips = topk_flips(grad, table, 7, penalty=penalty, maximize=maximize, backend=backend)
        seen = penalty.float().double()[..., ::2]
        ids = 2 * brute(grad, embedding[::2], 7, maximize=maximize, penalty=seen)
        assert torch.equal(flips.ids, ids)
        # The reported change is that of the loss alone.
        exact = (grad.double() @ embedding.double().T).gather(1, ids)
        assert_three_way("delta", flips.delta, (grad @ embedding.T).gather(1, ids), exact)


def test_global_scope(backend: str) -> None:
    embedding, grad = integers(200, 6), integers(3, 4, 6)
    current = torch.randint(0, 200, (3, 4))
    table = TokenTable(embedding, backend=backend)
    for k in (1, 30, 250, 800):
        flips = topk_flips(grad, table, k, current_ids=current, scope="global", backend=backend)
        score = torch.einsum("bnd,bnvd->bnv", grad, embedding - embedding[current][:, :, None]).flatten(1)
        expected = score.sort(dim=1, stable=True)
        assert flips.rows is not None
        assert torch.equal(flips.rows * 200 + flips.ids, expected.indices[:, :k])
        assert torch.equal(flips.delta, expected.values[:, :k])
        assert flips.count.tolist() == [k] * 3 and flips.valid.shape == (3, 4)
    few = topk_flips(
        grad, table, 9, allowed=torch.arange(200) < 2, scope="global", backend=backend, current_ids=current
    )
    assert few.rows is not None
    assert few.count.tolist() == [8] * 3
    assert bool((few.rows[:, 8] == -1).all()) and bool((few.ids[:, 8] == -1).all())


def test_rows_that_are_not_finite(backend: str) -> None:
    embedding, grad = torch.randn(100, 8), torch.randn(5, 8)
    clean = topk_flips(grad, TokenTable(embedding, backend=backend), 3, backend=backend)
    grad[1, 2], grad[3, 0], grad[4, 7] = torch.nan, torch.inf, -torch.inf
    flips = topk_flips(grad, TokenTable(embedding, backend=backend), 3, backend=backend)
    assert flips.valid.tolist() == [True, False, True, False, False]
    assert flips.count.tolist() == [3, 0, 3, 0, 0]
    assert torch.equal(flips.ids[[0, 2]], clean.ids[[0, 2]])
    assert bool((flips.ids[[1, 3, 4]] == -1).all()) and bool(flips.delta[[1, 3, 4]].isnan().all())


def test_no_rows(backend: str) -> None:
    table = TokenTable(torch.randn(10, 4), backend=backend)
    flips = topk_flips(torch.randn(2, 0, 4), table, 3, backend=backend)
    assert flips.ids.shape == (2, 0, 3) and flips.valid.shape == (2, 0)
    flips = topk_flips(torch.randn(0, 5, 4), table, 3, scope="global", backend=backend)
    assert flips.ids.shape == (0, 3) and flips.count.shape == (0,)
    assert topk_flips(torch.randn(4), table, 3, backend=backend).ids.shape == (3,)


def test_fp64_runs_on_the_reference() -> None:
    embedding, grad = torch.randn(50, 4).double(), torch.randn(3, 4).double()
    table = TokenTable(embedding)
    assert table.backend == "reference" and table.packed is None
    assert torch.equal(topk_flips(grad, table, 5).ids, brute(grad, embedding, 5))
    single = TokenTable(embedding.float())
    assert torch.equal(topk_flips(grad, single, 5).ids, brute(grad, embedding.float(), 5))


def test_the_number_of_threads_changes_no_bit(native: str) -> None:
    embedding = torch.randn(3000, 96)
    table = TokenTable(embedding)
    before = torch.get_num_threads()
    for rows in (1, 5, 40, 700):
        grad = torch.randn(rows, 96)
        grad[0] = 0
        for precision in set(EXACT) & {"certified", "fast"}:
            results = []
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                try:
                    results.append(topk_flips(grad, table, 11, precision=precision, backend=native))
                finally:
                    torch.set_num_threads(before)
            for other in results[1:]:
                assert torch.equal(results[0].ids, other.ids)
                assert torch.equal(results[0].delta, other.delta)


def test_many_blocks_of_rows(native: str) -> None:
    # More rows than the candidate lists of one block have memory for.
    embedding, grad = torch.randn(40, 4), torch.randn(30_000, 4)
    flips = topk_flips(grad, TokenTable(embedding), 3, backend=native)
    assert torch.equal(flips.ids, brute(grad, embedding, 3))


def test_the_table_notices_changes(backend: str) -> None:
    weight = torch.nn.Parameter(torch.randn(60, 8))
    grad = torch.randn(2, 8)
    table = TokenTable(weight, backend=backend)
    with torch.no_grad():
        weight.mul_(-1)
    with pytest.raises(ValueError, match=r"table: .*changed in place.*refresh"):
        topk_flips(grad, table, 3, backend=backend)
    table.refresh()
    assert torch.equal(topk_flips(grad, table, 3, backend=backend).ids, brute(grad, weight.detach(), 3))
    assert "60 of 60 tokens" in repr(table) and len(table) == 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_of_all_scores(dtype: torch.dtype) -> None:
    embedding, grad = torch.randn(300, 20).to(dtype), torch.randn(2, 3, 20).to(dtype)
    ids = torch.arange(0, 300, 7)
    table = TokenTable(embedding, ids)
    exact = (grad.double() @ embedding[ids].double().T).norm(dim=-1)
    torch.testing.assert_close(table.score_norms(grad).double(), exact, rtol=1e-5, atol=1e-6)
    embedding.mul_(2)
    with pytest.raises(ValueError, match=r"table: .*refresh"):
        table.score_norms(grad)
    table.refresh()
    torch.testing.assert_close(table.score_norms(grad).double(), 2 * exact, rtol=1e-5, atol=1e-6)


def test_gradients_are_not_followed(backend: str) -> None:
    embedding = torch.randn(30, 4, requires_grad=True)
    flips = topk_flips(torch.randn(2, 4, requires_grad=True), TokenTable(embedding), 3, backend=backend)
    assert not flips.delta.requires_grad


def bad(**changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    arguments = {"grad": torch.randn(2, 3, 8), "table": TokenTable(torch.randn(20, 8), torch.arange(10)), "k": 4}
    arguments |= changes
    return (arguments.pop("grad"), arguments.pop("table"), arguments.pop("k")), arguments


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": 11}, ValueError, "k: expected at most 10"),
        ({"k": 31, "scope": "global"}, ValueError, "k: expected at most 30"),
        ({"k": 0}, ValueError, "k: expected an int at least 1"),
        ({"k": 2.0}, TypeError, "k: expected an int"),
        ({"grad": torch.randn(2, 7)}, ValueError, r"grad: expected shape \[\.\.\., 8\]"),
        ({"grad": torch.randn(8), "scope": "global"}, ValueError, r"grad: expected shape \[\.\.\., n, 8\]"),
        ({"grad": torch.ones(2, 8).int()}, TypeError, "grad: expected dtype"),
        ({"grad": [1.0]}, TypeError, "grad: expected a torch.Tensor"),
        ({"table": torch.randn(20, 8)}, TypeError, "table: expected a TokenTable"),
        ({"scope": "all"}, ValueError, "scope: expected one of"),
        ({"precision": "bf16"}, ValueError, "precision: expected one of"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
        ({"exclude_current": True}, ValueError, "current_ids: expected a tensor"),
        ({"current_ids": torch.full((2, 3), 20)}, ValueError, r"current_ids: expected ids in \[0, 19\], got 20"),
        ({"current_ids": torch.full((2, 3), -1)}, ValueError, "current_ids: .* got -1"),
        ({"current_ids": torch.zeros(2, 3)}, TypeError, "current_ids: expected dtype"),
        ({"current_ids": torch.zeros(3).long()}, ValueError, r"current_ids: expected shape \[2, 3\]"),
        ({"allowed": torch.ones(10).bool()}, ValueError, r"allowed: expected shape \[20\]"),
        ({"allowed": torch.ones(20)}, TypeError, "allowed: expected dtype bool"),
        ({"allowed": torch.ones(4, 20).bool()}, ValueError, r"allowed: expected shape \[2, 3, 20\]"),
        ({"penalty": torch.ones(20).int()}, TypeError, "penalty: expected dtype"),
        ({"penalty": torch.full((20,), torch.nan)}, ValueError, "penalty: expected finite"),
        ({"penalty": torch.ones(2, 2, 20)}, ValueError, r"penalty: expected shape \[2, 3, 20\]"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    positional, keywords = bad(**changes)
    with pytest.raises(error, match=f"^{message}"):
        topk_flips(*positional, **keywords)


@pytest.mark.parametrize(
    ("embedding", "allowed", "error", "message"),
    [
        (torch.full((4, 2), torch.nan), None, ValueError, "embedding: expected finite values.* token 0"),
        (torch.tensor([[0.0], [torch.inf]]), None, ValueError, "embedding: expected finite values.* token 1"),
        (torch.randn(4), None, ValueError, "embedding: expected 2 dimensions"),
        (torch.randn(0, 4), None, ValueError, "embedding: expected at least one"),
        (torch.ones(4, 2).int(), None, TypeError, "embedding: expected dtype"),
        (torch.randn(4, 2), torch.ones(3).bool(), ValueError, r"allowed: expected shape \[4\]"),
        (torch.randn(4, 2), torch.zeros(4).bool(), ValueError, "allowed: expected at least one"),
        (torch.randn(4, 2), torch.tensor([1, 4]), ValueError, r"allowed: expected ids in \[0, 3\], got 4"),
        (torch.randn(4, 2), torch.tensor([-1]), ValueError, r"allowed: expected ids in \[0, 3\], got -1"),
        (torch.randn(4, 2), torch.rand(4), TypeError, "allowed: expected dtype"),
    ],
)
def test_bad_tables(embedding: Tensor, allowed: Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        TokenTable(embedding, allowed)


def test_a_nan_in_a_row_that_is_not_allowed_is_not_looked_at(backend: str) -> None:
    embedding = torch.randn(10, 4)
    embedding[3] = torch.nan
    table = TokenTable(embedding, torch.tensor([7, 1, 1, 5]), backend=backend)
    flips = topk_flips(torch.randn(2, 4), table, 3, backend=backend)
    assert flips.ids.sort().values.tolist() == [[1, 5, 7]] * 2


def test_a_reference_table_does_not_serve_native(native: str) -> None:
    table = TokenTable(torch.randn(9, 4), backend="reference")
    assert topk_flips(torch.randn(4), table, 2).ids.shape == (2,)
    with pytest.raises(ValueError, match=r"^table: expected one built for the native backend"):
        topk_flips(torch.randn(4), table, 2, backend=native)


def operator_arguments(backend: str) -> tuple[Any, ...]:
    embedding = torch.randn(40, 8)
    ids = torch.arange(0, 40, 2)
    table = TokenTable(embedding, ids, backend=backend)
    penalty, allowed = torch.randn(1, 20), torch.rand(3, 20) < 0.9
    prepared = (embedding, ids, table.packed, table.coarse, table.max_norm)
    return (torch.randn(3, 8), *prepared, 4, False, torch.arange(3), True, allowed, penalty, True, -1, backend)


def test_opcheck(backend: str) -> None:
    torch.library.opcheck(torch.ops.ccu_fast.topk_flips.default, operator_arguments(backend))


def test_compiles_as_one_graph(backend: str) -> None:
    embedding, grad = torch.randn(300, 16), torch.randn(2, 3, 16)
    table = TokenTable(embedding, torch.arange(200), backend=backend)
    current = torch.randint(0, 300, (2, 3))

    def f(grad: Tensor, scope: str) -> Flips:
        return topk_flips(grad * 2, table, 5, current_ids=current, exclude_current=True, scope=scope, backend=backend)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for scope in ("row", "global"):
        for got, expected in zip(compiled(grad, scope), f(grad, scope), strict=True):
            assert (got is None and expected is None) or torch.equal(got, expected)


MEMORY = """
import torch
from ccu_fast import TokenTable, topk_flips
torch.set_num_threads(1)
torch.manual_seed(0)
table = TokenTable(torch.randn(49408, 64))
grad = torch.randn(2560, 64)
topk_flips(grad[:8], table, 16, backend="native")
before = peak()
topk_flips(grad, table, 16, backend="native")
print(peak() - before)
"""


def test_scores_are_never_stored(native: str) -> None:
    # The score matrix would be 506 MB.
    assert 0 < printed_bytes(MEMORY) < 40e6
