"""What options of InfoNCE cost beside plain InfoNCE: margin, guide and hard negatives one way, prefixes both ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ccu_fast
from benchmarks.gate import relative_errors
from benchmarks.ops import clip_loss
from benchmarks.ops.common import Loss, build, build_ours, leaf, scale_terms, step, unit
from benchmarks.ops.peers import build_memeff_prefixes, memeff_note
from benchmarks.registry import Call, Expected, Op, Provider, Shape, Tensors, on_cuda

SCALE, COSINE = 20.0, 0.6
NEAR = 0.95  # the cosine of two texts that say the same
MARGIN = -0.15  # a pair and its false negative lie between it and the next similarity, whatever is rounded
GUIDE = 256  # features of the other model
OWN = 4  # hard negatives of a row
BLOCK = 1024  # rows
PLAIN = ("x", "y", "scale")
BOTH_WAYS = ("prefixes",)


def _pairs(items: int, dim: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Unit vectors x and y; item 2i + 1 has nearly the y of item 2i, a false negative of it that has to be left out."""

    def near(to: Tensor, cosine: float) -> Tensor:
        return F.normalize(cosine * to + (1 - cosine**2) ** 0.5 * unit(*to.shape, generator=rng), dim=-1)

    y = unit(items, dim, generator=rng)
    y[1::2] = near(y[: items - 1 : 2], NEAR)
    return near(y, COSINE), y


def make(shape: Shape, dtype: torch.dtype, device: torch.device, *, extra: str = "") -> Tensors:
    """Pairs, and a guide's features of them or hard negatives."""
    rng = torch.Generator().manual_seed(0)
    x, y = _pairs(shape["B"], shape["D"], rng)
    made = {
        "x": leaf(x, dtype, device),
        "y": leaf(y, dtype, device),
        "scale": leaf(torch.tensor(SCALE), torch.float32, device),
    }
    if extra == "guide":
        made |= {k: t.to(device, dtype) for k, t in zip("uv", _pairs(shape["B"], GUIDE, rng), strict=True)}
    if extra == "hard":
        hard = F.normalize(COSINE * x[:, None] + unit(shape["B"], OWN, shape["D"], generator=rng), dim=-1)
        made["hard"] = leaf(hard, dtype, device)
    return made


# In plain torch on stored logits. ``first`` is the place of the first row of x among those of y.


def _entropy(logits: Tensor, first: int) -> Tensor:
    return F.cross_entropy(logits, torch.arange(first, first + len(logits), device=logits.device))


def _without_false(x: Tensor, y: Tensor, scale: Tensor, similarity: Tensor, first: int) -> Tensor:
    false = similarity > similarity.diagonal(first)[:, None] + MARGIN
    false.diagonal(first).fill_(False)
    return _entropy((scale * x @ y.T).masked_fill(false, -torch.inf), first)


def eager_plain(x: Tensor, y: Tensor, scale: Tensor, *, first: int = 0) -> Tensor:
    """InfoNCE of the rows."""
    return _entropy(scale * x @ y.T, first)


def eager_margin(x: Tensor, y: Tensor, scale: Tensor, *, first: int = 0) -> Tensor:
    """Without what is nearly as similar as the positive."""
    return _without_false(x, y, scale, x.detach() @ y.detach().T, first)


def eager_guide(x: Tensor, y: Tensor, scale: Tensor, u: Tensor, v: Tensor, *, first: int = 0) -> Tensor:
    """The same by the features of another model."""
    return _without_false(x, y, scale, u @ v.T, first)


def eager_hard(x: Tensor, y: Tensor, scale: Tensor, hard: Tensor, *, first: int = 0) -> Tensor:
    """With hard negatives of each row."""
    own = torch.einsum("nd,nkd->nk", x, hard)
    return _entropy(torch.cat([scale * x @ y.T, scale * own], 1), first)


def prefixes_of(x: Tensor) -> tuple[int, ...]:
    """All dimensions, the first half of them, a quarter and an eighth, 16 at least."""
    return tuple(sorted({max(16, x.shape[-1] >> halvings) for halvings in range(4)}))


def eager_prefixes(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The sum over prefixes, each made unit vectors, in both directions: Matryoshka."""
    pairs = ([F.normalize(t[:, :d], dim=-1) for t in (x, y)] for d in prefixes_of(x))
    return torch.stack([clip_loss.one_gemm(u, v, scale) for u, v in pairs]).sum()


def expect_prefixes(inputs: Tensors, shape: Shape) -> Expected:
    """The same in fp64: clip_loss's answer for each prefix, its gradients taken on through the normalisation."""
    exact = {name: inputs[name].detach().double() for name in ("x", "y")}
    values: dict[str, Tensor] = {}
    terms, rows, said = 0.0, None, ""
    for d in prefixes_of(exact["x"]):
        unit_of = {name: F.normalize(t[:, :d], dim=-1) for name, t in exact.items()}
        of = clip_loss.expect({**unit_of, "scale": inputs["scale"]}, shape)
        rows, said = of.rows, of.said
        pick = slice(None) if rows is None else rows
        found = {name: of.values[name] for name in ("loss", "dscale")}
        for name, u in unit_of.items():
            g, u, length = of.values[f"d{name}"], u[pick], exact[name][pick, :d].norm(dim=-1, keepdim=True)
            along = (g - (g * u).sum(-1, keepdim=True) * u) / length
            found[f"d{name}"] = F.pad(along, (0, exact[name].shape[1] - d))
        values = {name: value + values.get(name, 0) for name, value in found.items()}
        terms += of.terms["dscale"]
    return Expected(values, {"dscale": terms}, rows, said)


def expect_prefixes_without_scale(inputs: Tensors, shape: Shape) -> Expected:
    """The same for a provider to which scale is a number."""
    right = expect_prefixes(inputs, shape)
    return replace(right, values={k: v for k, v in right.values.items() if k != "dscale"})


def one_by_one(x: Tensor, y: Tensor, scale: Tensor, *, backend: str) -> Tensor:
    """The same sum by a loss of ours for each prefix."""
    each = [ccu_fast.info_nce(x[:, :d], y[:, :d], scale=scale, normalize=True, backend=backend) for d in prefixes_of(x)]
    return torch.stack(each).sum()


def ours(x: Tensor, y: Tensor, scale: Tensor, *extra: Tensor, kind: str = "", backend: str) -> Tensor:
    """The same by ccu_fast."""
    options: dict[str, Any] = {}
    if kind == "prefixes":
        options |= {"prefixes": prefixes_of(x), "normalize": True}
    if kind in ("margin", "guide"):
        options["margin"] = MARGIN
    if kind == "guide":
        options["guide"] = extra
    if kind == "hard":
        (options["hard_negatives"],) = extra
    return ccu_fast.info_nce(x, y, scale=scale, symmetric=kind in BOTH_WAYS, backend=backend, **options)


def build_plain(inputs: Tensors, shape: Shape, *, kind: str) -> Call:
    """Plain InfoNCE of ours, of the same rows and columns and in the same directions."""
    return build_ours({name: inputs[name] for name in PLAIN}, shape, loss=plain_both if kind in BOTH_WAYS else ours)


def plain_both(x: Tensor, y: Tensor, scale: Tensor, *, backend: str) -> Tensor:
    """Plain InfoNCE of ours in both directions."""
    return ccu_fast.info_nce(x, y, scale=scale, backend=backend)


def expect(inputs: Tensors, shape: Shape, *, loss: Loss, names: tuple[str, ...] | None = None) -> Expected:
    """In fp64 by autograd, some rows at a time: a row's loss needs no other row."""
    exact = {
        name: t.detach().double().requires_grad_(t.requires_grad)
        for name, t in inputs.items()
        if names is None or name in names
    }
    whole = {f"d{name}": torch.zeros_like(t) for name, t in exact.items() if t.requires_grad}
    total, items = exact["x"].new_zeros(()), len(exact["x"])
    for first in range(0, items, BLOCK):
        rows = slice(first, first + BLOCK)
        share = len(exact["x"][rows]) / items
        # Everything that belongs to rows is of them alone; y, its guide and the scale are of all.
        part = {name: t[rows] if name in ("x", "u", "hard") else t for name, t in exact.items()}
        part = {name: t.detach().requires_grad_(t.requires_grad) for name, t in part.items()}
        values = step(partial(loss, first=first), part)
        total += share * values.pop("loss")
        for name, gradient in values.items():
            target = whole[name][rows] if name in ("dx", "dhard") else whole[name]
            target += share * gradient
    terms = {"dscale": scale_terms(exact["x"], whole["dx"], exact["scale"])}
    return Expected({"loss": total, **whole}, terms)


def work(shape: Shape, dtype: torch.dtype, *, features: int = 0) -> tuple[float, float]:
    """6·B²D FLOPs, and 2·B² for each feature of a guide."""
    return shape["B"] ** 2 * (6.0 * shape["D"] + 2.0 * features), 0.0


def _op(kind: str, title: str, eager: Loss, extra: str = "", more: Sequence[Provider] = ()) -> Op:
    both = kind in BOTH_WAYS
    plain = clip_loss.expect if both else partial(expect, loss=eager_plain, names=PLAIN)
    return Op(
        name=f"info_nce_{kind}",
        kernel="reduce_similarity",
        title=f"{'symmetric' if both else 'one-way'} InfoNCE {title}: loss and all gradients",
        make=partial(make, extra=extra),
        expect=expect_prefixes if both else partial(expect, loss=eager),
        errors=relative_errors,
        providers=(
            Provider("eager", partial(build, loss=eager)),
            Provider("ccu_fast", partial(build_ours, loss=partial(ours, kind=kind)), role="ours"),
            *more,
            Provider("info_nce", partial(build_plain, kind=kind), role="yardstick", expect=plain),
            Provider("gemm_ceiling", clip_loss.build_ceiling, role="ceiling"),
        ),
        # benchmarks.variants has the CPU's figures.
        shapes={"cpu": [], "cuda": [{"B": b, "D": 512} for b in (8192, 32768)]},
        quick=[{"B": 96, "D": 64}],
        work=partial(work, features=GUIDE if kind == "guide" else 0),
        baseline="eager",
    )


INFO_NCE_MARGIN = _op("margin", "without false negatives", eager_margin)
INFO_NCE_GUIDE = _op("guide", "without what another model finds alike", eager_guide, "guide")
INFO_NCE_HARD = _op("hard", f"with {OWN} hard negatives of each row", eager_hard, "hard")
INFO_NCE_PREFIXES = _op(
    "prefixes",
    "of prefixes of the features",
    eager_prefixes,
    more=[
        Provider("one_by_one", partial(build_ours, loss=one_by_one), role="ours"),
        Provider(
            "memeff",
            partial(build_memeff_prefixes, prefixes=prefixes_of),
            serves=on_cuda,
            note=memeff_note,
            expect=expect_prefixes_without_scale,
        ),
    ],
)
