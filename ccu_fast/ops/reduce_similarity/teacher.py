"""A teacher of reduce_similarity: another model, whose softmax over its own similarities weighs the logits.

Its probability of a pair is exp(T_ij − lse(T)_i). The log-sum-exps, N + M numbers, come from a pass over its features
before; then the pair's own is made from its product where the pair is at hand, in both passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ccu_fast.ops.backend import choose, reverse_mode_alone, without_autocast
from ccu_fast.ops.reduce_similarity import reference
from ccu_fast.ops.reduce_similarity.operator import SimilarityReduction, flat, specialised
from ccu_fast.ops.reduce_similarity.problem import TAUGHT, SimilarityProblem, decode, encode
from ccu_fast.ops.reduce_similarity.relations import ALL

_LSE = (encode("lse", ALL),)


def check_teacher(spec: Sequence[tuple[str, int]], **beside: Any) -> None:
    """A teacher comes with what needs one, and without what takes its place in a kernel."""
    if not any(kind in TAUGHT for kind, _ in spec):
        raise ValueError("teacher: expected 'mass' or 'expected' in rows or cols beside it, got neither")
    for name, value in beside.items():
        if value is not None:
            raise ValueError(f"{name}: expected None with a teacher, got {type(value).__name__}")


def of_teacher(p: SimilarityProblem) -> SimilarityProblem:
    """The problem whose results are the log-sum-exps of the teacher's rows and columns, those that p needs."""
    assert p.guide_x is not None and p.guide_y is not None and p.teacher_scale is not None
    rows, cols = (_LSE if any(decode(code)[0] in TAUGHT for code in codes) else () for codes in (p.rows, p.cols))
    x = p.guide_x
    keys = [key.shape[0] for key in (p.row_labels, p.col_labels, p.row_ids, p.col_ids) if key is not None]
    if x.shape[0] == p.guide_y.shape[0] == 1 and any(banks != 1 for banks in keys):
        x = x.expand(p.banks, -1, -1).contiguous()  # the features are those of all banks, the keys are not
    return replace(
        p,
        x=x,
        y=p.guide_y,
        scale=p.teacher_scale,
        bias=None,
        rows=rows,
        cols=cols,
        guide_x=None,
        guide_y=None,
        teacher_scale=None,
    )


def normalised(p: SimilarityProblem, backend: str, workspace: int) -> SimilarityProblem:
    """p with the log-sum-exps that make probabilities of the teacher's logits."""
    t = of_teacher(p)
    name = choose(backend, "reduce_similarity", t.x.device, t.x.dtype)
    rows: Sequence[Tensor] | Tensor
    with torch.no_grad(), without_autocast(t.x.device):
        if name == "reference" or not (t.x.numel() and t.y.numel()):
            rows, cols = reference.reduce(t)
        else:
            reverse_mode_alone("reduce_similarity", t.x, t.y)
            rows, cols = SimilarityReduction.apply(*flat(t), specialised(t, name, False), workspace, False)
    return replace(p, row_limits=rows[0] if t.rows else None, col_limits=cols[0] if t.cols else None)
