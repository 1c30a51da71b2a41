"""relation_matrix against its definition pair by pair, count_relations against relation_matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ccu_fast import ALL, OTHER, SAME, SELF, reduce_similarity
from ccu_fast.ops.reduce_similarity.problem import SimilarityProblem
from ccu_fast.ops.reduce_similarity.relations import count_relations, relation_matrix


def problem(n: int, m: int, *keys: Tensor | None, diagonal: bool) -> SimilarityProblem:
    """Row labels, column labels, row ids and column ids of items whose values do not matter."""
    return SimilarityProblem(torch.empty(1, n, 1), torch.empty(1, m, 1), torch.ones(()), None, *keys, diagonal, (), ())


@st.composite
def problems(draw: st.DrawFn) -> SimilarityProblem:
    n, m = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    banks = draw(st.integers(1, 3))

    def keys(low: int, high: int) -> tuple[Tensor, Tensor]:
        # Huge keys too: nothing may rely on them being small.
        big = draw(st.sampled_from([1, 2**40, -(2**62)]))
        side = []
        for items in (n, m):
            b = draw(st.sampled_from([1, banks]))
            values = draw(st.lists(st.integers(low, high), min_size=b * items, max_size=b * items))
            side.append(torch.tensor(values, dtype=torch.int64).reshape(b, items) * (big if low == 0 else 1))
        return side[0], side[1]

    labels = keys(-2, 3) if draw(st.booleans()) else (None, None)
    ids = keys(0, 4) if draw(st.booleans()) else (None, None)
    return problem(n, m, *labels, *ids, diagonal=ids[0] is None and draw(st.booleans()))


def at(keys: Tensor, bank: int, item: int) -> int:
    return int(keys[bank % keys.shape[0], item])


def one_relation(p: SimilarityProblem, bank: int, i: int, j: int) -> int:
    if p.row_labels is not None:
        row, col = at(p.row_labels, bank, i), at(p.col_labels, bank, j)
        if row < 0 or col < 0:
            return 0
    if p.row_ids is not None:
        if at(p.row_ids, bank, i) == at(p.col_ids, bank, j):
            return int(SELF)
    elif p.diagonal and i == j:
        return int(SELF)
    return int(SAME if p.row_labels is not None and row == col else OTHER)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_relation_matrix_is_its_definition(p: SimilarityProblem) -> None:
    matrix = relation_matrix(p)
    assert matrix.dtype == torch.uint8
    assert matrix.shape[1:] == (p.n, p.m)
    for bank in range(matrix.shape[0]):
        expected = [[one_relation(p, bank, i, j) for j in range(p.m)] for i in range(p.n)]
        assert matrix[bank].tolist() == expected


@settings(max_examples=300, deadline=None)
@given(problems())
def test_counts_are_those_of_the_matrix(p: SimilarityProblem) -> None:
    matrix = relation_matrix(p)
    for along_rows, dim in ((True, 2), (False, 1)):
        counts = count_relations(p, along_rows=along_rows)
        for relation in (SELF, SAME, OTHER):
            expected = (matrix == int(relation)).sum(dim)
            assert counts[relation].dtype == torch.int64
            torch.testing.assert_close(counts[relation].expand_as(expected), expected, rtol=0, atol=0)


def test_counts_use_no_matrix() -> None:
    n = 200_000
    ids = torch.arange(n)[None] // 2
    counts = count_relations(problem(n, n, None, None, ids, ids, diagonal=False), along_rows=True)
    assert counts[SELF].eq(2).all()
    assert counts[OTHER].eq(n - 2).all()


def test_counts_have_the_shape_of_the_results(backend: str) -> None:
    x, y = torch.randn(3, 4, 5), torch.randn(7, 5)
    labels = torch.randint(0, 3, (3, 4)), torch.randint(0, 3, (7,))
    rows, cols = reduce_similarity(
        x,
        y,
        row_labels=labels[0],
        col_labels=labels[1],
        backend=backend,
        rows=[("count", SAME), ("lse", ALL), ("count", OTHER)],
        cols=[("count", SAME | OTHER)],
    )
    assert [r.shape for r in rows] == [(3, 4)] * 3
    assert rows[0].dtype == torch.int64
    assert not rows[0].requires_grad
    torch.testing.assert_close(rows[0], (labels[0][:, :, None] == labels[1]).sum(-1))
    torch.testing.assert_close(rows[0] + rows[2], torch.full((3, 4), 7))
    assert cols[0].tolist() == [[4] * 7] * 3


@pytest.mark.parametrize("paired", [None, True, False])
def test_pairs_are_self_only_when_paired(paired: bool | None, backend: str) -> None:
    x = torch.randn(3, 2)
    (count,), _ = reduce_similarity(x, x, paired=paired, rows=[("count", SELF)], backend=backend)
    assert count.tolist() == [0 if paired is False else 1] * 3
