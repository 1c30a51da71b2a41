"""reduce_similarity: reductions over S = scale · x yᵀ + bias without keeping S.

Every contrastive loss of the package is a short formula over this one operation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.ops.backend import choose, reverse_mode_alone, without_autocast
from ccu_fast.ops.operator import constant
from ccu_fast.ops.reduce_similarity import reference
from ccu_fast.ops.reduce_similarity.normalize import normalize_pair
from ccu_fast.ops.reduce_similarity.operator import SimilarityReduction, flat, specialised
from ccu_fast.ops.reduce_similarity.problem import (
    CODES,
    KINDS,
    MAX_REDUCTIONS,
    TAUGHT,
    SimilarityProblem,
    checked_guide,
    checked_keys,
    encode,
)
from ccu_fast.ops.reduce_similarity.relations import ALL, OTHER, SAME, SELF, Relation, count_relations
from ccu_fast.ops.reduce_similarity.teacher import check_teacher, normalised

# On a CPU: all of a batch of 8192 in fp32, and a chunk of scratch.
# A GPU's is at most this, and at most a sixteenth of its memory: E of 32768 pairs and G of as many, in one piece.
DEFAULT_WORKSPACE = {"cpu": 288 << 20, "cuda": 4 << 30}

# The sum over pairs (i, i), of which there is one: no other similarity is needed.
OWN_PAIRS = encode("sum", SELF)

Reduction = tuple[str, int]


def reduce_similarity(
    x: Tensor,
    y: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor | None = None,
    row_labels: Tensor | None = None,
    col_labels: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    paired: bool | None = None,
    row_limits: Tensor | None = None,
    col_limits: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    teacher: tuple[Tensor, Tensor] | None = None,
    teacher_scale: float | Tensor = 1.0,
    rows: Sequence[Reduction] = (),
    cols: Sequence[Reduction] = (),
    normalize: bool = False,
    backend: str = "auto",
    workspace: int | None = None,
    nan_policy: str = "propagate",
) -> tuple[list[Tensor], list[Tensor]]:
    """Reduce the rows and columns of a scaled similarity matrix over sets of relations::

        S = scale * x @ y.mT + bias                                  # never stored whole
        for ("lse", R):       out_i = logsumexp(S[i, j] for j with relation(i, j) in R)
        for ("sum", R):       out_i = sum(S[i, j] for j with relation(i, j) in R)
        for ("softplus", R):  out_i = sum(log(1 + exp(S[i, j])) for j with relation(i, j) in R)
        for ("logsigmoid", R): out_i = -sum(log(1 + exp(-S[i, j])) for j with relation(i, j) in R)
        for ("count", R):     out_i = number of j with relation(i, j) in R
        for ("mass", R):      out_i = sum(Q[i, j] for j with relation(i, j) in R)              # no gradient
        for ("expected", R):  out_i = sum(Q[i, j] * S[i, j] for j with relation(i, j) in R)

    ``rows`` reduce over j for every i, ``cols`` over i for every j; all of them come from one pass over S. An empty
    set has lse −inf, sum 0 and count 0, and passes no gradient.

    Limits leave likely false negatives out: OTHER pairs that are more alike than a row or a column allows. It is
    decided while a pair is at hand, so that no mask is stored either::

        similar = x @ y.mT                                           # before scale and bias; or guide[0] @ guide[1].mT
        rows:  relation(i, j) is none where it is OTHER and similar[i, j] > row_limits[i]
        cols:  relation(i, j) is none where it is OTHER and similar[i, j] > col_limits[j]

    Q, not stored either, is a teacher's softmax of teacher_scale * teacher[0] @ teacher[1].mT over all pairs of a row
    that take part, or for ``cols`` of a column. Its log-sum-exps cost a pass before.

    Args:
        x: ``[..., N, D]`` fp32, fp16 or bf16 (fp64 on the reference backend). Any strides; N may be 0.
        y: ``[..., M, D]``, dtype and device of ``x``. Leading dimensions broadcast: 17 text banks ``[17, N, D]``
            against one image bank ``[M, D]`` give results of leading shape ``[17]``.
        scale: number or one-element tensor (gradient flows); the inverse temperature. A DTensor must be replicated
            (``.full_tensor()`` of FSDP2's sharded ones): it counts as this rank's own copy, of its own gradient.
        bias: number or one-element tensor (gradient flows), added to every entry of S.
        row_labels: int64 ``[N]`` or ``[..., N]``. Equal labels are SAME, a negative label takes the row out of
            everything. With None nothing is SAME. For a paired problem ``col_labels`` defaults to it.
        col_labels: int64 ``[M]`` or ``[..., M]``.
        row_ids: int64 ``[N]`` or ``[..., N]``: who the item is. Equal ids are SELF, whatever the labels.
            For a paired problem ``col_ids`` defaults to it.
        col_ids: int64 ``[M]`` or ``[..., M]``.
        paired: pairs (i, i) are SELF when no ids are given. Default: N == M. Pass False for two unrelated banks of
            equal size.
        row_limits: ``[N]`` or ``[..., N]``, of any float dtype; no gradient flows. It concerns ``rows`` alone. SELF and
            SAME pairs stay, however similar. A limit of inf or NaN leaves nothing out, −inf leaves out all OTHER pairs.
        col_limits: ``[M]`` or ``[..., M]``, the same for ``cols``.
        guide: features ``([..., N, Dg], [..., M, Dg])`` of another model, by whose products limits go: of one float
            dtype and of any Dg, on the device of ``x``, taken as they are (``normalize`` does not concern them);
            no gradient flows. Default: x and y. Products in bf16 or TF32 are rounded before they meet a limit, as S is.
        teacher: features of another model like ``guide``, for "mass" and "expected"; not beside limits.
        teacher_scale: number or one-element tensor (no gradient); applied in fp32 to the teacher's products.
        rows: reductions along rows: pairs of a word above and a set of relations: ``[("lse", ALL), ("sum", SELF)]``. At
            most 8 besides counts (counts over OTHER are among the 8 where there are limits, and exact up to 2^24).
            ``("lse", SAME)`` needs labels.
        cols: reductions along columns; at least one in rows or cols.
        normalize: make the rows of x and y unit vectors first (:func:`ccu_fast.l2_normalize`: in fp32, rounded once).
        backend: "auto", or one of "native", "triton", "reference"; a named one raises if it cannot serve.
        workspace: bytes the operation may use beyond O((N+M)·D). Default 288 MiB on a CPU, on a GPU a
            sixteenth of its memory and at most 4 GiB. More of it means less recomputation in the backward pass.
        nan_policy: "propagate" (NaN in, NaN out, as torch and GradScaler expect) or "raise" (checks x and y
            first; synchronises a GPU).

    Returns:
        Two lists, in the order asked: row results ``[..., N]`` and column results ``[..., M]``. fp32 (fp64 for fp64
        inputs); counts are int64 and have no gradient.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. A DTensor (but for scale and
            bias), a subclass with operators of its own and a sparse or nested tensor are refused. So is a guide without
            limits, and a teacher without "mass" and "expected".
        RuntimeError: inside a transform of torch.func, or with a forward-mode derivative, unless backend="reference".

    Under autocast the inputs are cast to the autocast dtype, as torch.matmul does. Accumulation is in fp32. The
    result is deterministic. Second derivatives (create_graph=True) are computed in plain torch, which stores S. On the
    device meta, and under FakeTensorMode, the results have shapes and no values.

    Source: this project's definition; each loss over it names its paper.

    >>> lse, own = ("lse", ccu_fast.ALL), ("sum", ccu_fast.SELF)
    >>> rows, _ = ccu_fast.reduce_similarity(torch.eye(3), torch.eye(3), rows=[lse, own])
    >>> rows
    [tensor([1.5514, 1.5514, 1.5514]), tensor([1., 1., 1.])]
    """
    if check.boolean("normalize", normalize):
        x, y = normalize_pair(x, y, backend, row_labels, col_labels)
    p, lead, row_spec, col_spec = build_problem(
        x, y, scale, bias, row_labels, col_labels, row_ids, col_ids, paired, rows, cols, nan_policy,
        row_limits, col_limits, guide, teacher, teacher_scale,
    )  # fmt: skip
    n, m, workspace = p.x.shape[1], p.y.shape[1], workspace_bytes(workspace, p.x.device)
    name = choose(backend, "reduce_similarity", p.x.device, p.x.dtype)
    if name == "triton" and p.guide_x is not None and p.guide_x.dtype == torch.bfloat16:  # not in the interpreter
        choose(name, "reduce_similarity", p.x.device, torch.bfloat16)
    if teacher is not None:
        p = normalised(p, backend, workspace)
    if not p.rows and not p.cols:  # nothing but counts
        tiles: tuple[list[Tensor], list[Tensor]] = ([], [])
    elif p.diagonal and set(p.rows + p.cols) == {OWN_PAIRS}:
        with without_autocast(p.x.device):
            tiles = reference.own_pairs(p.without_ignored())
    elif name == "reference" or not (p.x.numel() and p.y.numel()):
        with without_autocast(p.x.device):
            tiles = reference.reduce(p.without_ignored())
    else:
        inputs = (p.x, p.y, p.scale, p.bias)
        reverse_mode_alone("reduce_similarity", *inputs)
        keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        row_out, col_out = SimilarityReduction.apply(*flat(p), specialised(p, name, keep), workspace, keep)
        # The leading dimensions first: one node of the graph for all results.
        row_out, col_out = row_out.view(-1, *lead, n), col_out.view(-1, *lead, m)
        tiles = list(row_out.unbind(0)), list(col_out.unbind(0))

    row_counts, col_counts = (functools.partial(count_relations, p, along_rows=side) for side in (True, False))
    return (
        assemble(row_spec, iter(tiles[0]), row_counts, (*lead, n), limited=row_limits is not None),
        assemble(col_spec, iter(tiles[1]), col_counts, (*lead, m), limited=col_limits is not None),
    )


def build_problem(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    bias: float | Tensor | None,
    row_labels: Tensor | None,
    col_labels: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    paired: bool | None,
    rows: Sequence[Reduction],
    cols: Sequence[Reduction],
    nan_policy: str,
    row_limits: Tensor | None = None,
    col_limits: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    teacher: tuple[Tensor, Tensor] | None = None,
    teacher_scale: float | Tensor = 1.0,
    prefixes: tuple[int, ...] = (),
) -> tuple[SimilarityProblem, tuple[int, ...], list[Reduction], list[Reduction]]:
    """The checked arguments: the problem, its leading dimensions, both specs as asked. Limits may be of each prefix."""
    check.tensor("x", x)
    check.tensor("y", y)
    check.same("y", y, "x", x, dtype=False)
    x, y = _autocast(x), _autocast(y)
    check.same("y", y, "x", x)
    for name, t in (("x", x), ("y", y)):
        if t.ndim < 2:
            raise ValueError(f"{name}: expected shape [..., items, D], got {list(t.shape)}")
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"y: expected last dimension {x.shape[-1]} (that of x), got {y.shape[-1]}")
    check.one_of("nan_policy", nan_policy, ("propagate", "raise"))
    if nan_policy == "raise":
        check.finite("x", x)
        check.finite("y", y)
    # Torch's function takes longer than a small product.
    lead = () if x.ndim == y.ndim == 2 else check.leading("y", y.shape[:-2], x.shape[:-2])
    n, m = x.shape[-2], y.shape[-2]
    check_paired(paired)
    square = n == m if paired is None else paired
    if paired and n != m:
        raise ValueError(f"paired: expected as many rows in x as in y, got {n} and {m}")

    def pair(what: str, row: Tensor | None, col: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if row is None and col is None:
            return None, None
        if row is None or (col is None and not square):
            missing, given = (f"row_{what}", f"col_{what}") if row is None else (f"col_{what}", f"row_{what}")
            raise ValueError(f"{missing}: expected a tensor because {given} is given, got None")
        col = row if col is None else col
        return checked_keys(f"row_{what}", row, lead, n, x), checked_keys(f"col_{what}", col, lead, m, x)

    row_labels, col_labels = pair("labels", row_labels, col_labels)
    row_ids, col_ids = pair("ids", row_ids, col_ids)
    row_spec = _spec("rows", rows, row_labels, limited=row_limits is not None, taught=teacher is not None)
    col_spec = _spec("cols", cols, row_labels, limited=col_limits is not None, taught=teacher is not None)
    if not row_spec and not col_spec:
        raise ValueError("rows: expected at least one reduction in rows or cols, got none")
    if teacher is not None:
        check_teacher(row_spec + col_spec, row_limits=row_limits, col_limits=col_limits, guide=guide)
    if guide is not None and row_limits is None and col_limits is None:
        raise ValueError("guide: expected row_limits or col_limits beside it, got neither")
    scale = as_scalar("scale", scale, x)
    # What no reduction asks for costs nothing.
    sets = (len(prefixes), *lead) if prefixes else lead
    row_limits = _limits("row_limits", row_limits, row_spec, sets, n, scale)
    col_limits = _limits("col_limits", col_limits, col_spec, sets, m, scale)
    beside, called = (guide, "guide") if teacher is None else (teacher, "teacher")
    guide_x, guide_y = (None, None) if beside is None else _guide(called, beside, lead, n, m, x, scale.dtype)
    if row_limits is None and col_limits is None and teacher is None:
        guide_x = guide_y = None

    p = SimilarityProblem(
        x=_banks(x, lead),
        y=_banks(y, lead),
        scale=scale,
        bias=None if bias is None else as_scalar("bias", bias, x),
        row_labels=row_labels,
        col_labels=col_labels,
        row_ids=row_ids,
        col_ids=col_ids,
        diagonal=square and row_ids is None,
        rows=tuple(CODES[k] + r for k, r in row_spec if _in_tiles(k, r, row_limits is not None)),
        cols=tuple(CODES[k] + r for k, r in col_spec if _in_tiles(k, r, col_limits is not None)),
        row_limits=row_limits,
        col_limits=col_limits,
        guide_x=guide_x,
        guide_y=guide_y,
        prefixes=prefixes,
        teacher_scale=None if teacher is None else as_scalar("teacher_scale", teacher_scale, x).detach(),
    )
    return p, lead, row_spec, col_spec


def check_paired(paired: object) -> None:
    """``paired`` is True, False or None."""
    if isinstance(paired, Tensor) or paired not in (None, True, False):
        raise TypeError(f"paired: expected True, False or None, got {paired!r}")


def _in_tiles(kind: str, relations: int, limited: bool) -> bool:
    """Whether a reduction takes a look at the pairs: a count does only where limits decide what it counts."""
    return kind != "count" or (limited and bool(relations & OTHER))


def _spec(
    name: str, values: Sequence[Reduction], labels: Tensor | None, *, limited: bool, taught: bool
) -> list[Reduction]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a sequence of pairs such as ('lse', ALL), got {type(values).__name__}")
    kinds = (*KINDS, "count", *TAUGHT)
    for value in values:
        if not isinstance(value, tuple) or len(value) != 2:
            raise TypeError(f"{name}: expected pairs such as ('lse', ALL), got {value!r}")
        kind, relations = value
        if kind not in kinds:
            raise ValueError(f"{name}: expected a reduction in {kinds}, got {kind!r}")
        # int(): torch 2.8 does not trace < between a flag and a number.
        if isinstance(relations, bool) or not isinstance(relations, int) or not 1 <= int(relations) <= int(ALL):
            raise ValueError(f"{name}: expected a set of SELF, SAME and OTHER, got {relations!r}")
        if kind == "lse" and relations == SAME and labels is None:
            raise ValueError(f"row_labels: expected a tensor for ('lse', SAME) in {name}, got None")
        if kind in TAUGHT and not taught:
            raise ValueError(f"teacher: expected a pair of tensors for {kind!r} in {name}, got None")
    spec = [(kind, int(relations)) for kind, relations in values]
    tiled = sum(_in_tiles(kind, relations, limited) for kind, relations in spec)
    if tiled > MAX_REDUCTIONS:
        besides = " (counts over OTHER included, because of limits)" if limited else " besides counts"
        raise ValueError(f"{name}: expected at most {MAX_REDUCTIONS} reductions{besides}, got {tiled}")
    return spec


def _limits(
    name: str, value: Tensor | None, spec: list[Reduction], lead: tuple[int, ...], items: int, scale: Tensor
) -> Tensor | None:
    """Limits as ``[1 or B, items]`` like ``scale``; None where no reduction of their side has OTHER."""
    if value is None:
        return None
    check.tensor(name, value)
    check.same(name, value, "x", scale, dtype=False)
    value = check.per_row(name, value.detach().to(scale.dtype), lead, items).contiguous()
    return value if any(relations & OTHER for _, relations in spec) else None


def _guide(
    name: str, guide: Any, lead: tuple[int, ...], n: int, m: int, x: Tensor, sums: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both sides of a guide as banks, in what torch.matmul would multiply; of fp64 no more than the sums have."""
    u, v = (_autocast(t.detach()) for t in checked_guide(guide, lead, n, m, x, name))
    check.same(f"{name}[1]", v, f"{name}[0]", u)
    if torch.float64 in (x.dtype, u.dtype):
        u, v = u.to(sums), v.to(sums)
    return _banks(u, lead), _banks(v, lead)


def _banks(t: Tensor, lead: tuple[int, ...]) -> Tensor:
    """``[1, N, D]`` when one bank serves all, else ``[B, N, D]``; contiguous."""
    if t.shape[:-2].numel() == 1:
        return t.reshape(1, *t.shape[-2:]).contiguous()
    return t.expand(*lead, *t.shape[-2:]).reshape(math.prod(lead), *t.shape[-2:]).contiguous()


def _autocast(t: Tensor) -> Tensor:
    """What torch.matmul would multiply."""
    kind = t.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and t.dtype != torch.float64:
        return t.to(torch.get_autocast_dtype(kind))
    return t


def as_scalar(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """``value`` as a 0-dim tensor on the device of x, in the dtype of the sums."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        if check.readable(value) and value.ndim == 0 and value.dtype == compute and value.device == x.device:
            return value
        return check.one_element(name, value, "x", x).to(compute)
    return torch.full((), check.number(name, value), dtype=compute, device=x.device)


def workspace_bytes(value: int | None, device: torch.device) -> int:
    """The workspace as given, or the default of the device."""
    if value is not None:
        return check.integer("workspace", value, low=0)
    if device.type == "cuda" and torch.cuda.is_available():
        return _gpu_workspace(torch.cuda.current_device() if device.index is None else device.index)
    return DEFAULT_WORKSPACE.get(device.type, DEFAULT_WORKSPACE["cpu"])


@constant
@functools.cache
def _gpu_workspace(index: int) -> int:
    return min(DEFAULT_WORKSPACE["cuda"], torch.cuda.get_device_properties(index).total_memory // 16)


def assemble(
    spec: list[Reduction],
    tiles: Iterator[Tensor],
    counts: Callable[[], dict[Relation, Tensor]],
    shape: tuple[int, ...],
    *,
    limited: bool,
) -> list[Tensor]:
    """The results in the order asked, tile reductions and counts interleaved."""
    by_relation = counts() if not all(_in_tiles(*entry, limited) for entry in spec) else {}
    results = []
    for kind, relations in spec:
        if not _in_tiles(kind, relations, limited):
            first, *more = (by_relation[r] for r in (SELF, SAME, OTHER) if r & relations)
            results.append(sum(more, first).expand(math.prod(shape[:-1]), -1).reshape(shape))
        else:
            result = next(tiles)
            if kind == "count":
                result = result.long()
            elif kind == "mass":
                result = result.detach()
            results.append(result if result.shape == shape else result.reshape(shape))
    return results
