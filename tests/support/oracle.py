"""reduce_similarity by brute force: the matrix, a mask for each relation set, torch's own logsumexp, and autograd."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ccu_fast import OTHER, SAME, SELF, reduce_similarity
from tests.support.tolerance import assert_three_way, rounding

SETS = tuple(range(1, 8))
SET_NAMES = {r: "+".join(n for n, bit in (("SELF", SELF), ("SAME", SAME), ("OTHER", OTHER)) if r & bit) for r in SETS}


@dataclass
class Case:
    """The arguments of one call; tensors of the inputs are fp64 masters that each run casts."""

    x: Tensor
    y: Tensor
    scale: float = 1.0
    bias: float | None = None
    keys: dict[str, Any] = field(default_factory=dict)  # labels, ids, paired
    rows: tuple[tuple[str, int], ...] = ()
    cols: tuple[tuple[str, int], ...] = ()
    frozen: tuple[str, ...] = ()  # inputs that get no gradient
    limits: dict[str, Any] = field(default_factory=dict)  # row_limits, col_limits, guide
    teacher: tuple[Tensor, Tensor] | None = None  # fp64 masters too
    teacher_scale: float = 1.0
    teacher_dtype: torch.dtype | None = None  # of every run but that in fp64; None: that of x

    @property
    def square(self) -> bool:
        paired = self.keys.get("paired")
        return self.x.shape[-2] == self.y.shape[-2] if paired is None else paired

    def with_dtype(self, dtype: torch.dtype) -> Case:
        """The same case with inputs that are exact in ``dtype``."""
        teacher = None if self.teacher is None else tuple(t.double() for t in self.taught(dtype))
        return replace(self, x=self.x.to(dtype).double(), y=self.y.to(dtype).double(), teacher=teacher)

    def taught(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The teacher's features beside x and y in ``dtype``."""
        own = dtype if dtype == torch.float64 else self.teacher_dtype or dtype
        return tuple(t.to(own) for t in self.teacher or ())


def relations(case: Case) -> Tensor:
    """The definition: SELF by id or place, else SAME by label, else OTHER; 0 where a label is negative."""
    n, m = case.x.shape[-2], case.y.shape[-2]
    get = case.keys.get
    row_labels, row_ids = get("row_labels"), get("row_ids")
    col_labels = row_labels if get("col_labels") is None else get("col_labels")
    col_ids = row_ids if get("col_ids") is None else get("col_ids")
    same = torch.zeros(n, m, dtype=torch.bool)
    ignored = torch.zeros(n, m, dtype=torch.bool)
    if row_labels is not None:
        same = row_labels[..., :, None] == col_labels[..., None, :]
        ignored = (row_labels < 0)[..., :, None] | (col_labels < 0)[..., None, :]
    if row_ids is not None:
        own = row_ids[..., :, None] == col_ids[..., None, :]
    else:
        own = torch.eye(n, m, dtype=torch.bool) if case.square else torch.zeros(n, m, dtype=torch.bool)
    return torch.where(ignored, 0, torch.where(own, int(SELF), torch.where(same, int(SAME), int(OTHER))))


def similarities(case: Case) -> Tensor:
    """What limits look at, in fp64: every dtype has to decide alike, so limits lie in gaps (:func:`gap`)."""
    u, v = case.limits.get("guide") or (case.x, case.y)
    return u.double() @ v.double().mT


def gap(similar: Tensor, dim: int, low: float = 0.25, high: float = 0.75) -> Tensor:
    """For each row (dim −1) or column (−2) the middle of the widest gap between quantiles of its similarities."""
    ordered = similar.sort(dim).values.movedim(dim, -1)
    count = ordered.shape[-1]
    inner = ordered[..., int(low * (count - 1)) : int(high * (count - 1)) + 2]
    at = inner.diff(dim=-1).argmax(-1, keepdim=True)
    return (inner.gather(-1, at) + inner.gather(-1, at + 1)).squeeze(-1) / 2


def in_reach(case: Case, dim: int) -> Tensor:
    """The definition: the relations that a reduction over ``dim`` sees, 0 for OTHER pairs above its limits."""
    limits = case.limits.get("row_limits" if dim == -1 else "col_limits")
    relation = relations(case)
    if limits is None:
        return relation
    beyond = similarities(case) > limits.double().unsqueeze(dim)
    return torch.where((relation == int(OTHER)) & beyond, 0, relation)


def probabilities(case: Case, dtype: torch.dtype, dim: int) -> Tensor:
    """The definition: the teacher's softmax over all pairs that take part."""
    u, v = case.taught(dtype)
    t = (u @ v.mT).to(torch.promote_types(dtype, torch.float32)) * case.teacher_scale
    chosen = relations(case) != 0
    some = chosen.any(dim, keepdim=True)
    return torch.where(some, t.masked_fill(~chosen & some, -torch.inf), 0).softmax(dim) * chosen


def reduce(s: Tensor, chosen: Tensor, kind: str, dim: int, taught: Tensor | None = None) -> Tensor:
    if taught is not None and kind in ("mass", "expected"):
        weighted = taught if kind == "mass" else taught * s
        return weighted.expand_as(s).masked_fill(~chosen, 0).sum(dim)
    if kind == "sum":
        return s.masked_fill(~chosen, 0).sum(dim)
    if kind == "softplus":
        return torch.logaddexp(s, torch.zeros_like(s)).masked_fill(~chosen, 0).sum(dim)
    if kind == "logsigmoid":
        return -torch.logaddexp(-s, torch.zeros_like(s)).masked_fill(~chosen, 0).sum(dim)
    some = chosen.any(dim)
    if s.shape[dim] == 0:
        return s.sum(dim) - torch.inf
    # Sets without a member get a harmless row for logsumexp, so that its gradient is not NaN.
    masked = torch.where(some.unsqueeze(dim), s.masked_fill(~chosen, -torch.inf), 0)
    return torch.where(some, masked.logsumexp(dim), -torch.inf)


def _leaves(case: Case, dtype: torch.dtype, scalar: torch.dtype) -> dict[str, Tensor]:
    leaves = {"x": case.x.to(dtype), "y": case.y.to(dtype), "scale": torch.tensor(case.scale, dtype=scalar)}
    if case.bias is not None:
        leaves["bias"] = torch.tensor(case.bias, dtype=scalar)
    return {name: leaf.clone().requires_grad_(name not in case.frozen) for name, leaf in leaves.items()}


def _live(leaves: dict[str, Tensor]) -> list[Tensor]:
    return [leaf for leaf in leaves.values() if leaf.requires_grad]


def _gradients(outputs: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """For a cotangent of each output; "mass" has none."""
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    return torch.autograd.grad([o for o, _ in pairs], inputs, [c for _, c in pairs])


def _named(
    case: Case, leaves: dict[str, Tensor], outputs: list[Tensor], grads: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    spec = [f"rows {k} {SET_NAMES[r]}" for k, r in case.rows] + [f"cols {k} {SET_NAMES[r]}" for k, r in case.cols]
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    return dict(zip(spec, outputs, strict=True)) | {f"d{name}": g for name, g in zip(names, grads, strict=True)}


def by_torch(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Brute force in one dtype; half types multiply in theirs and reduce in fp32, as autocast does.

    Also returns the size of the terms that add up to each scalar's gradient, of which there is one for each pair, and
    for scale their norm.
    """
    reduced_in = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = _leaves(case, dtype, reduced_in)
    dot = (leaves["x"] @ leaves["y"].mT).to(reduced_in)
    s = dot * leaves["scale"]
    if case.bias is not None:
        s = s + leaves["bias"]
    outputs = []
    for dim, spec in ((-1, case.rows), (-2, case.cols)):
        taught = None if case.teacher is None else probabilities(case, dtype, dim)
        outputs += [reduce(s, (in_reach(case, dim) & int(r)) != 0, kind, dim, taught) for kind, r in spec]
    *grads, grad_s = _gradients(outputs, [*_live(leaves), s])
    terms = {"dscale": float((grad_s * dot.detach()).abs().sum()), "dbias": float(grad_s.abs().sum())}
    terms["norm of dscale"] = float((grad_s * dot.detach()).norm())
    terms["largest"] = float(s.detach().abs().max()) if s.numel() else 0.0
    return _named(case, leaves, outputs, tuple(grads)), terms


def by_us(case: Case, dtype: torch.dtype, backend: str, **options: Any) -> dict[str, Tensor]:
    leaves = _leaves(case, dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    given = {**case.keys, **case.limits, "rows": case.rows, "cols": case.cols, "backend": backend, **options}
    if case.teacher is not None:
        given |= {"teacher": case.taught(dtype), "teacher_scale": case.teacher_scale}
    rows, cols = reduce_similarity(**leaves, **given)
    outputs = [*rows, *cols]
    return _named(case, leaves, outputs, _gradients(outputs, _live(leaves)))


def assert_same_bits(*runs: dict[str, Tensor]) -> None:
    """Every value of every run is that of the first."""
    first, *others = runs
    for other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name]), name


def check(case: Case, backend: str, dtype: torch.dtype, *, ulps: float = 8, **options: Any) -> dict[str, Tensor]:
    """Values and all gradients of the case on ``backend`` by the three-way rule."""
    case = case.with_dtype(dtype)
    exact, terms = by_torch(case, torch.float64)
    same_dtype, _ = by_torch(case, dtype)
    if dtype == torch.float64:
        # There is no second truth to measure torch against: a relative error of eps in S is one of |S| eps in exp(S).
        ulps *= max(1.0, terms["largest"])
    ours = by_us(case, dtype, backend, **options)
    rounded = rounding(dtype) if dtype in (torch.float16, torch.bfloat16) else 0.0  # products of half types are
    for name, truth in exact.items():
        given = {"magnitude": terms.get(name), "noise": rounded * terms.get(f"norm of {name}", 0.0)}
        assert_three_way(name, ours[name], same_dtype[name], truth, ulps=ulps, **given)
    return ours


def unit(*shape: int) -> Tensor:
    """fp64 unit vectors."""
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)
