"""What every rank does. On GPUs: ``python -m torch.distributed.run … -m tests.support.distributed_cases FOLDER``.

One start of the processes serves all cases. A case is a function that asserts; tests/distributed/test_on_ranks.py is
told what it raised on which rank.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import ccu_fast
import ccu_fast.distributed as over
from ccu_fast import ALL, OTHER, SAME, SELF
from ccu_fast.distributed import agreement
from ccu_fast.ops.backend import unavailable
from tests.support.open_clip_loss import open_clip_loss
from tests.support.oracle import unit
from tests.support.tolerance import assert_three_way

CASES: dict[str, Callable[[], None]] = {}
# Two ranks are enough for these; their imports take longer than the cases.
ON_TWO: set[str] = set()
ENGINES = [("reference", torch.float64), ("native", torch.float32)]


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def case_on_two(function: Callable[[], None]) -> Callable[[], None]:
    ON_TWO.add(function.__name__)
    return case(function)


def cases_on(ranks: int) -> list[str]:
    return [name for name in CASES if ranks == 2 or name not in ON_TWO]


def rank() -> int:
    return dist.get_rank()


def world() -> int:
    return dist.get_world_size()


def shard(t: Tensor, sizes: Sequence[int], of: int | None = None) -> Tensor:
    return t.split(list(sizes))[rank() if of is None else of]


def sizes_like(*pattern: int) -> list[int]:
    return [pattern[r % len(pattern)] for r in range(world())]


def total(t: Tensor) -> Tensor:
    t = t.clone()
    dist.all_reduce(t)
    return t


def engines() -> list[tuple[str, torch.dtype]]:
    """All of them on two ranks: the backends do not know how many there are, so more ranks need one."""
    served = [(name, dtype) for name, dtype in ENGINES if not unavailable(name)]
    return served[-1:] if world() > 2 and dist.get_backend() == "gloo" else served


_ALONE: dict[Any, dict[str, Tensor]] = {}


def alone(key: Any, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What one process makes of everything: the first rank computes it for all ranks, and once for all cases."""
    if key not in _ALONE:
        by_each = dist.get_backend() == "nccl"  # which sends no objects without a detour
        found = [{name: t.detach() for name, t in compute().items()} if by_each or rank() == 0 else None]
        if not by_each:
            dist.broadcast_object_list(found, src=0)
        assert found[0] is not None
        _ALONE[key] = found[0]
    return _ALONE[key]


# ---- the primitive

SPEC = [("lse", ALL), ("sum", SELF | SAME), ("softplus", OTHER), ("logsigmoid", SELF | SAME), ("count", SELF)]
SPEC += [("lse", SAME), ("count", OTHER)]


def primitive(
    function: Any, x: Tensor, y: Tensor, keys: dict[str, Any], weights: list[Tensor], **options: Any
) -> dict[str, Tensor]:
    scalar = torch.promote_types(x.dtype, torch.float32)
    leaves = {"x": x, "y": y, "scale": torch.tensor(1.7, dtype=scalar), "bias": torch.tensor(-0.4, dtype=scalar)}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    spec = [("lse", SELF | SAME) if pair == ("lse", SAME) and "row_labels" not in keys else pair for pair in SPEC]
    if "teacher" in keys:
        spec[1:3] = [("expected", ALL), ("mass", OTHER)]
        spec[3] = ("expected", OTHER)
    rows, cols = function(**leaves, **keys, rows=spec, cols=spec[::-1], **options)
    loss = sum((torch.where(o.isinf(), 0, o) * w).sum() for o, w in zip(rows + cols, weights, strict=True))
    loss.backward()
    named = {f"rows {i}": t for i, t in enumerate(rows)} | {f"cols {i}": t for i, t in enumerate(cols)}
    return named | {f"d{name}": leaf.grad for name, leaf in leaves.items()}


def check_primitive(n: list[int], m: list[int], keyed: str, keys: dict[str, Any], **options: Any) -> None:
    """All results and gradients against one process that has everything."""
    torch.manual_seed(3)
    x, y = torch.randn(sum(n), 6).double(), torch.randn(sum(m), 6).double()
    parts = [n] * len(SPEC) + [m] * len(SPEC)
    weights = [torch.randn(sum(of)).double() for of in parts]
    side = {f"{of}_{what}": part for of, part in (("row", n), ("col", m)) for what in ("labels", "ids", "limits")}
    here = {k: shard(v, side[k]) if k in side else v for k, v in keys.items()}
    for of in keys.keys() & {"guide", "teacher"}:
        here[of] = tuple(shard(t, part) for t, part in zip(keys[of], (n, m), strict=True))
    whole = partial(primitive, ccu_fast.reduce_similarity)
    problem = (*n, "and", *m, keyed)
    exact = alone(problem, lambda: whole(x, y, keys, weights))
    for backend, dtype in engines():
        in_dtype = partial(whole, x.to(dtype), y.to(dtype), keys, weights, backend=backend)
        peer = alone((*problem, backend), in_dtype)
        ours = primitive(
            over.reduce_similarity,
            shard(x, n).to(dtype),
            shard(y, m).to(dtype),
            here,
            [shard(w, of) for w, of in zip(weights, parts, strict=True)],
            backend=backend,
            **options,
        )
        for name, got in ours.items():
            magnitude = None
            if name in ("dscale", "dbias"):
                got, truth, same, magnitude = total(got), exact[name], peer[name], 100.0
            else:
                of = n if name.startswith("rows") or name == "dx" else m
                truth, same = shard(exact[name], of), shard(peer[name], of)
            if got.dtype == torch.int64:
                assert torch.equal(got, truth), (name, got, truth)
            else:
                assert_three_way(f"{name} {backend} {dtype}", got, same, truth, ulps=64, magnitude=magnitude)


def keysets(n: int, m: int) -> dict[str, dict[str, Any]]:
    torch.manual_seed(5)
    labels = {"row_labels": torch.randint(-1, 3, (n,)), "col_labels": torch.randint(-1, 3, (m,))}
    ids = {"row_ids": torch.randint(0, 9, (n,)), "col_ids": torch.randint(0, 9, (m,))}
    limits = {"row_limits": torch.randn(n), "col_limits": torch.randn(m)}
    guide = {"guide": (torch.randn(n, 3), torch.randn(m, 3))}
    teacher = {"teacher": (torch.randn(n, 4), torch.randn(m, 4)), "teacher_scale": 1.3}
    return {
        "none": {},
        "labels": labels,
        "ids": ids,
        "both": labels | ids,
        "unrelated": {"paired": False},
        "limits": limits,
        "limits of rows, labels": {"row_limits": limits["row_limits"], **labels},
        "guide": limits | guide,
        "guide of columns, ids": {"col_limits": limits["col_limits"], **guide, **ids},
        "teacher": teacher,
        "teacher, both": teacher | labels | ids,
    }


LAYOUTS = {
    "equal": ((4,), (4,)),
    "alike, one rank empty": ((3, 0, 6, 4), (3, 0, 6, 4)),
    "paired across ranks": ((3, 6), (6, 3)),
    "unrelated": ((3, 6, 0), (2, 9, 5)),
}


# What lies on the ranks is exchanged alike in every layout, so that two of them need but some of it.
SOME_KEYS = {
    "equal": ("none", "labels", "guide", "teacher, both"),
    "paired across ranks": ("none", "ids", "limits of rows, labels", "teacher"),
}


def _primitive_case(mode: str) -> None:
    for layout, (n, m) in LAYOUTS.items():
        n_here, m_here = sizes_like(*n), sizes_like(*m)
        for keyed, keys in keysets(sum(n_here), sum(m_here)).items():
            if keyed in SOME_KEYS.get(layout, (keyed,)):
                check_primitive(n_here, m_here, keyed, keys, mode=mode)


@case
def primitive_gathered() -> None:
    _primitive_case("gather")


@case
def primitive_around_a_ring() -> None:
    _primitive_case("ring")


@case
def equal_batches_need_no_exchange_of_sizes() -> None:
    n = sizes_like(4)
    check_primitive(n, n, "none", {}, equal=True)
    x = torch.randn(4, 3)
    with mock.patch.object(agreement.Ranks, "table", side_effect=AssertionError("sizes were exchanged")):
        over.info_nce(x, x, scale=1.0, equal=True)


# ---- the losses

LOSSES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "info_nce": ("info_nce", {}, ()),
    "info_nce, rows": ("info_nce", {"symmetric": False, "bias": 0.3}, ()),
    "info_nce, ids": ("info_nce", {}, ("ids",)),
    "bounded": ("inverse_info_nce", {"kind": "bounded"}, ("labels",)),
    "contrastive": ("inverse_info_nce", {"kind": "contrastive"}, ("labels",)),
    "ascent": ("inverse_info_nce", {"kind": "ascent"}, ()),
    "unit vectors": ("info_nce", {"normalize": True}, ()),
    "sup_con": ("sup_con", {}, ("labels",)),
    "sigmoid_loss": ("sigmoid_loss", {"bias": -1.0}, ()),
    "sigmoid_loss, ids": ("sigmoid_loss", {"bias": -1.0}, ("ids",)),
    "distill": ("distill", {"teacher_scale": 9.0}, ("teacher",)),
    "distill, labels": ("distill", {"teacher_scale": 9.0, "symmetric": False}, ("teacher", "labels")),
}


def loss_of(module: Any, name: str, x: Tensor, y: Tensor, keys: dict[str, Tensor], **more: Any) -> dict[str, Tensor]:
    function, options, _ = LOSSES[name]
    if "teacher" in keys:
        keys = keys | {"teacher": keys["teacher"].unbind(1)}
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    scale = torch.tensor(5.0, dtype=torch.promote_types(x.dtype, torch.float32), requires_grad=True)
    loss = getattr(module, function)(x, y, scale=scale, **options, **keys, **more)
    (loss * 1.5).sum().backward()
    return {"loss": loss.detach(), "dx": x.grad, "dy": y.grad, "dscale": scale.grad}


def _loss_case(gradients: str, factor: int) -> None:
    n = sizes_like(5, 2, 7)
    torch.manual_seed(7)
    x, y = 2 * unit(sum(n), 8), unit(sum(n), 8)
    every = {
        "labels": {k: torch.randint(-1, 4, (sum(n),)) for k in ("row_labels", "col_labels")},
        "ids": {k: torch.randint(0, 12, (sum(n),)) for k in ("row_ids", "col_ids")},
        "teacher": {"teacher": torch.stack([unit(sum(n), 5), unit(sum(n), 5)], 1).float()},
    }
    backend, dtype = engines()[-1]
    for name, (mode, reduction) in itertools.product(LOSSES, (("gather", "mean"), ("ring", "sum"), ("gather", "none"))):
        keys = {k: v for which in LOSSES[name][2] for k, v in every[which].items()}
        here = {k: shard(v, n) for k, v in keys.items()}
        whole = partial(loss_of, ccu_fast, name, keys=keys, reduction=reduction)
        exact = alone((name, reduction), partial(whole, x, y))
        peer = alone((name, reduction, backend), partial(whole, x.to(dtype), y.to(dtype), backend=backend))
        ours = loss_of(
            over,
            name,
            shard(x, n).to(dtype),
            shard(y, n).to(dtype),
            here,
            reduction=reduction,
            backend=backend,
            mode=mode,
            gradients=gradients,
        )
        by = 1 if reduction == "none" else factor
        what = f"{name} {mode} {reduction} {backend} {dtype}"
        for side in ("dx", "dy"):
            assert_three_way(f"{what} {side}", ours[side] / by, shard(peer[side], n), shard(exact[side], n), ulps=128)
        assert_three_way(
            f"{what} dscale",
            total(ours["dscale"]) / by,
            peer["dscale"],
            exact["dscale"],
            ulps=256,
            magnitude=max(1.0, float(exact["dscale"].abs())),
        )
        values = [shard(of["loss"], n) if reduction == "none" else of["loss"] for of in (peer, exact)]
        assert_three_way(f"{what} loss", ours["loss"], *values, ulps=64)


@case
def losses_with_gradients_to_be_added() -> None:
    _loss_case("sum", 1)


@case
def losses_with_gradients_to_be_averaged() -> None:
    _loss_case("mean", world())


@case
def pairs_that_are_sure_keep_their_digits() -> None:
    """Among ranks of unlike sizes too, where places are made ids."""
    errors = {}
    for sizes in (sizes_like(6), sizes_like(5, 2, 7)):
        torch.manual_seed(3)
        x, other = unit(sum(sizes), 64), unit(sum(sizes), 64)
        y = (
            0.7 * x + 0.51**0.5 * torch.nn.functional.normalize(other - (other * x).sum(1, keepdim=True) * x, dim=1)
        ).float()
        x = x.float()

        def run(module: Any, x: Tensor, y: Tensor, **options: Any) -> list[Tensor]:
            leaves = [t.clone().requires_grad_() for t in (x, y)]
            loss = module.info_nce(*leaves, scale=40.0, **options)
            return [loss.detach(), *torch.autograd.grad(loss, leaves)]

        loss, *grads = run(ccu_fast, x.double(), y.double(), backend="reference")
        assert loss < 1e-6
        want = [loss, *[shard(grad, sizes) for grad in grads]]
        for mode in ("gather", "ring"):
            got = run(over, shard(x, sizes), shard(y, sizes), mode=mode, gradients="sum")
            errors[mode, sizes[0]] = [float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]
    assert max(map(max, errors.values())) <= 1e-5, errors


@case
def the_same_bits_every_time() -> None:
    x, y = torch.randn(9, 8), torch.randn(9, 8)
    for mode in ("gather", "ring"):
        first, second = (loss_of(over, "info_nce", x, y, {}, mode=mode) for _ in "ab")
        assert all(torch.equal(first[k], second[k]) for k in first)
        values = [torch.empty_like(first["loss"]) for _ in range(world())]
        dist.all_gather(values, first["loss"])
        assert all(torch.equal(v, values[0]) for v in values)


@case
def half_precision_and_autocast() -> None:
    n = sizes_like(6)
    torch.manual_seed(9)
    x, y = unit(sum(n), 16).float(), unit(sum(n), 16).float()
    exact = loss_of(ccu_fast, "info_nce", x.bfloat16().double(), y.bfloat16().double(), {})
    peer = loss_of(ccu_fast, "info_nce", x.bfloat16(), y.bfloat16(), {})
    for mode in ("gather", "ring"):
        ours = loss_of(over, "info_nce", shard(x, n).bfloat16(), shard(y, n).bfloat16(), {}, mode=mode, gradients="sum")
        with torch.autocast("cpu", torch.bfloat16):
            cast = loss_of(over, "info_nce", shard(x, n), shard(y, n), {}, mode=mode, gradients="sum")
        assert ours["dx"].dtype == torch.bfloat16
        assert cast["dx"].dtype == torch.float32
        for answer in (ours, cast):
            for side in ("dx", "dy"):
                got, same = answer[side].bfloat16(), shard(peer[side], n)
                assert_three_way(f"{mode} {side}", got, same, shard(exact[side], n), ulps=4)
        assert torch.equal(ours["loss"], cast["loss"])


@case
def a_subgroup() -> None:
    groups = [dist.new_group(list(range(start, min(start + 2, world())))) for start in range(0, world(), 2)]
    mine = groups[rank() // 2]
    torch.manual_seed(rank() // 2)  # members see the same data, groups do not
    x, y = torch.randn(8, 5), torch.randn(8, 5)
    place = dist.get_rank(mine)
    cut = slice(0, 3) if place == 0 else slice(3, 8)
    one = loss_of(ccu_fast, "info_nce", x, y, {})
    for mode in ("gather", "ring"):
        ours = loss_of(over, "info_nce", x[cut], y[cut], {}, mode=mode, gradients="sum", group=mine)
        for name in ("dx", "dy"):
            torch.testing.assert_close(ours[name], one[name][cut])
        torch.testing.assert_close(ours["loss"], one["loss"])
    others = groups[(rank() // 2 + 1) % len(groups)]
    if others is not mine:
        refuses(ValueError, "group: expected a group that rank", lambda: over.info_nce(x, y, scale=1.0, group=others))


# ---- choices and errors


@case
def auto_is_a_ring_where_the_gathered_side_is_large() -> None:
    x = torch.randn(4, 3)
    with mock.patch.object(dist, "batch_isend_irecv", wraps=dist.batch_isend_irecv) as passed:
        over.info_nce(x, x, scale=1.0)
        assert not passed.called
        limit = world() * 4 * 3 * 8
        with mock.patch.dict(agreement.GATHER_BYTES, cpu=limit):
            over.info_nce(x, x, scale=1.0)
            assert not passed.called
        with mock.patch.dict(agreement.GATHER_BYTES, cpu=limit - 1):
            over.info_nce(x, x, scale=1.0)
            assert passed.call_count == world() - 1


@case
def a_frozen_side_gets_no_gradient_and_sends_none() -> None:
    x, y = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    loss = over.info_nce(x, y, scale=1.0, symmetric=False, mode="gather")
    with mock.patch.object(dist, "all_to_all_single", side_effect=AssertionError("a gradient was sent")):
        loss.backward()
    assert x.grad is not None


@case
def no_graph_without_gradients() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    with torch.no_grad():
        assert not over.info_nce(x, x, scale=1.0).requires_grad


def refuses(kind: type[Exception], text: str, call: Callable[[], Any]) -> None:
    try:
        call()
    except kind as error:
        assert text in str(error), str(error)
    else:
        raise AssertionError(f"expected {kind.__name__}: {text}")


@case
def wrong_arguments_are_refused_on_every_rank() -> None:
    x = torch.randn(4, 3)
    one = rank() == world() - 1
    wide = torch.randn(4, 5) if one else x
    refuses(ValueError, "x: expected the same last dimension", lambda: over.info_nce(wide, wide, scale=1.0))
    half = x.bfloat16() if one else x
    refuses(ValueError, "dtype", lambda: over.info_nce(half, half, scale=1.0))
    refuses(ValueError, "mode", lambda: over.info_nce(x, x, scale=1.0, mode="ring" if one else "gather"))
    learns = x.clone().requires_grad_(one)
    refuses(ValueError, "x: expected the same requires_grad", lambda: over.info_nce(learns, x, scale=1.0))
    spec: dict[str, Any] = {"rows": [("lse", ALL)], "cols": [("lse", ALL)]}
    limits = torch.zeros(4)
    for side in ("row_limits", "col_limits"):
        given = {side: limits} if one else {}
        text = f"{side}: expected the same answer whether they are given"
        refuses(ValueError, text, lambda given=given: over.reduce_similarity(x, x, **spec, **given))
    taught: dict[str, Any] = {"rows": [("expected", ALL)]}
    for theirs, text in ((x[:, :2], "last dimension"), (x.bfloat16(), "dtype")):
        given = {"teacher": (theirs, theirs) if one else (x, x)}
        text = f"teacher: expected the same {text}"
        refuses(ValueError, text, lambda given=given: over.reduce_similarity(x, x, **taught, **given))
    for theirs, text in ((x[:, :2], "last dimension"), (x.bfloat16(), "dtype"), (None, "last dimension")):
        t = theirs if one else x
        given = {"row_limits": limits, "guide": None if t is None else (t, t)}
        text = f"guide: expected the same {text}"
        refuses(ValueError, text, lambda given=given: over.reduce_similarity(x, x, **spec, **given))
    labels = torch.zeros(3 if one else 4, dtype=torch.long)
    text = "row_labels: expected shape [4]" if one else f"got an error on rank {world() - 1}"
    refuses(ValueError, text, lambda: over.sup_con(x, x, scale=1.0, row_labels=labels))
    elsewhere = f"got an error on rank {world() - 1}"
    whole = torch.zeros(4, dtype=torch.long)
    for wrong in (None, whole.float(), whole.to(torch.uint64)):
        kind, text = (
            (ValueError if wrong is None else TypeError, "row_labels: expected") if one else (ValueError, elsewhere)
        )
        labels = wrong if one else whole
        refuses(kind, text, lambda labels=labels: over.sup_con(x, x, scale=1.0, row_labels=labels))
        options: dict[str, Any] = {"scale": 1.0, "kind": "contrastive", "row_labels": labels}
        refuses(kind, text, lambda options=options: over.inverse_info_nce(x, x, **options))
    for option in ({"mode": "tree"}, {"paired": 2}, {"paired": False}):
        kind, text = (
            (TypeError if option.get("paired") == 2 else ValueError, "expected") if one else (ValueError, elsewhere)
        )
        options = option if one else {}
        refuses(kind, text, lambda options=options: over.info_nce(x, x, scale=1.0, **options))
    given = {"info_nce": {}, "inverse_info_nce": {}, "sup_con": {"row_labels": whole}, "sigmoid_loss": {}}
    for name, keys in given.items():
        loss = partial(getattr(over, name), x, x, scale=1.0, **keys)
        for option, values in (("reduction", ("average", "sum", "none", ["mean"])), ("gradients", ("avg", "sum"))):
            for value in values:
                known = value in ("sum", "none")
                text = f"{option}: expected {'the same value' if known else 'one of'}" if known or one else elsewhere
                refuses(ValueError, text, partial(loss, **{option: value} if one else {}))
    wrong: dict[str, Any] = {"info_nce": {"symmetric": 1}, "inverse_info_nce": {"kind": "near"}}
    wrong |= {"sup_con": {"positives": "own", **given["sup_con"]}, "sigmoid_loss": {"ids": whole, "row_ids": whole}}
    for name, options in wrong.items():
        kind, text = (TypeError if name == "info_nce" else ValueError, "expected") if one else (ValueError, elsewhere)
        call = partial(getattr(over, name), x, x, scale=1.0, **(options if one else given[name]))
        refuses(kind, text, call)
    distill = partial(over.distill, x, x, scale=1.0, teacher=(x, x), teacher_scale=1.0)
    for option in ({"normalize": "yes"}, {"normalize": True, "backend": "none such"}, {"symmetric": 1}):
        known = TypeError if "backend" not in option else ValueError
        kind, text = (known, f"{list(option)[-1]}: expected") if one else (ValueError, elsewhere)
        refuses(kind, text, partial(distill, **(option if one else {})))
    refuses(
        ValueError,
        "reduction: expected the same value",
        lambda: over.info_nce(x, x, scale=1.0, decoupled=True, reduction="none" if one else "mean"),
    )
    unlike = "rows: expected the same reductions"
    refuses(ValueError, unlike, lambda: over.info_nce(x, x, scale=1.0, symmetric=one))
    assert over.sup_con(x, x, scale=1.0, row_labels=whole).isfinite(), "the ranks are still at the same call"
    refuses(ValueError, "y: expected", lambda: over.info_nce(x, x[: 3 if one else 4], scale=1.0))
    refuses(
        ValueError,
        "paired: expected as many",
        lambda: over.reduce_similarity(x, x[:3], paired=True, rows=[("lse", ALL)]),
    )
    refuses(ValueError, "paired: expected True", lambda: over.info_nce(x, x, scale=1.0, paired=False))
    refuses(ValueError, "x: expected 2 dimensions", lambda: over.info_nce(x[None], x[None], scale=1.0))
    refuses(ValueError, "gradients: expected one of", lambda: over.info_nce(x, x, scale=1.0, gradients="avg"))
    refuses(ValueError, "mode: expected one of", lambda: over.info_nce(x, x, scale=1.0, mode="tree"))
    refuses(ValueError, "y: expected finite", lambda: over.info_nce(x, x / 0, scale=1.0, nan_policy="raise"))
    assert over.sigmoid_loss(x, x, scale=1.0, paired=False).isfinite()


@case_on_two
def dtensors_are_refused_but_for_a_scale_that_every_rank_has() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world(),))
    spread = distribute_tensor(torch.randn(4 * world(), 3), mesh, [Shard(0)])
    refuses(TypeError, "x: expected this process's own torch.Tensor", lambda: over.info_nce(spread, spread, scale=1.0))
    local = spread.to_local()
    plain = over.info_nce(local, local, scale=2.0)
    sharded, whole = (distribute_tensor(torch.tensor([2.0]), mesh, [place]) for place in (Shard(0), Replicate()))
    refuses(TypeError, "scale: expected one that every", lambda: over.info_nce(local, local, scale=sharded))
    assert torch.equal(over.info_nce(local, local, scale=whole), plain)
    assert torch.equal(over.info_nce(local, local, scale=sharded.full_tensor()), plain)


@case
def second_derivatives_are_refused() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    loss = over.info_nce(x, x.detach(), scale=1.0)
    refuses(RuntimeError, "second derivatives", lambda: torch.autograd.grad(loss, x, create_graph=True))


# ---- wrappers


class Towers(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(6, 4), nn.Linear(5, 4)
        self.dropout = nn.Dropout(p)
        self.log_scale = nn.Parameter(torch.tensor(1.2))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        towers = (self.dropout(tower(t)) for tower, t in ((self.image, image), (self.text, text)))
        x, y = (nn.functional.normalize(t, dim=-1) for t in towers)
        return x, y, self.log_scale.exp()


def full_batch() -> tuple[nn.Module, list[int], Tensor, Tensor]:
    n = sizes_like(3, 5)
    torch.manual_seed(11)
    return Towers(), n, torch.randn(sum(n), 6), torch.randn(sum(n), 5)


def one_process(module: nn.Module, image: Tensor, text: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    x, y, scale = module(image, text)
    ccu_fast.info_nce(x, y, scale=scale).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def same_gradients(module: nn.Module, expected: dict[str, Tensor], prefix: str = "") -> None:
    for name, p in module.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(grad, expected[name.removeprefix(prefix)], msg=lambda m, name=name: f"{name}: {m}")


@case
def distributed_data_parallel_gives_the_one_process_gradient() -> None:
    module, n, image, text = full_batch()
    expected = one_process(module, image, text)
    module.zero_grad()
    wrapped = nn.parallel.DistributedDataParallel(module)
    for mode in ("gather", "ring"):
        wrapped.zero_grad()
        x, y, scale = wrapped(shard(image, n), shard(text, n))
        over.info_nce(x, y, scale=scale, mode=mode).backward()
        same_gradients(module, expected)


@case_on_two
def fully_sharded_gives_the_one_process_gradient() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module, n, image, text = full_batch()
    module.log_scale = nn.Parameter(module.log_scale.detach().reshape(1))  # FSDP2 shards no 0-dim parameters
    expected = one_process(module, image, text)
    module.zero_grad()
    fully_shard(module, mesh=init_device_mesh("cpu", (world(),)))
    x, y, scale = module(shard(image, n), shard(text, n))
    over.info_nce(x, y, scale=scale).backward()
    same_gradients(module, expected)


@case
def gradients_of_parameters_outside_a_wrapper_are_averaged() -> None:
    module, n, image, text = full_batch()
    expected = one_process(module, image, text)
    module.zero_grad()
    module.unused = nn.Parameter(torch.ones(2))
    x, y, scale = module(shard(image, n), shard(text, n))
    over.info_nce(x, y, scale=scale).backward()
    over.average_gradients(module.parameters())
    same_gradients(module, expected | {"unused": torch.zeros(2)})


@case
def cached_gradients_under_distributed_data_parallel() -> None:
    module, n, image, text = full_batch()
    expected = one_process(module, image, text)
    module.zero_grad()
    scale = nn.Parameter(module.log_scale.detach().clone())
    towers = [nn.parallel.DistributedDataParallel(nn.Sequential(t, Unit())) for t in (module.image, module.text)]
    inputs = [shard(image, n), shard(text, n)]
    with mock.patch.object(towers[0], "no_sync", wraps=towers[0].no_sync) as held:
        over.cached_step(
            lambda x, y: over.info_nce(x, y, scale=scale.exp()), list(zip(towers, inputs, strict=True)), chunk=2
        )
        chunks = sum(-(-len(items) // 2) for items in inputs)
        assert held.call_count == chunks + chunks - 1, "all of the first pass, and of the second all but the last"
    over.average_gradients([scale])
    torch.testing.assert_close(scale.grad, expected.pop("log_scale"))
    for tower, name in zip(towers, ("image", "text"), strict=True):
        same_gradients(tower.module[0], {k.split(".")[1]: v for k, v in expected.items() if k.startswith(name)})


@case
def cached_gradients_with_a_rank_that_has_no_items() -> None:
    module, _, image, text = full_batch()
    expected = one_process(module, image, text)
    module.zero_grad()
    n = [len(image), *[0] * (world() - 1)]
    scale = nn.Parameter(module.log_scale.detach().clone())
    towers = [nn.parallel.DistributedDataParallel(nn.Sequential(t, Unit())) for t in (module.image, module.text)]
    over.cached_step(
        lambda x, y: over.info_nce(x, y, scale=scale.exp()),
        list(zip(towers, (shard(image, n), shard(text, n)), strict=True)),
        chunk=2,
    )
    over.average_gradients([scale])
    torch.testing.assert_close(scale.grad, expected.pop("log_scale"))
    for tower, name in zip(towers, ("image", "text"), strict=True):
        same_gradients(tower.module[0], {k.split(".")[1]: v for k, v in expected.items() if k.startswith(name)})


@case_on_two
def cached_gradients_with_fully_shard_and_a_frozen_tower() -> None:
    """LiT on several processes: the text tower is sharded, the image tower comes last and learns nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module, image, text, n = Towers(), torch.randn(8, 6), torch.randn(8, 5), [4, 4]
    expected = one_process(module, image, text)
    module.zero_grad()
    module.image.requires_grad_(False)
    fully_shard(module.text, mesh=init_device_mesh("cpu", (world(),)))
    loss = over.cached_step(
        lambda y, x: over.info_nce(x, y, scale=module.log_scale.exp().detach()),
        [
            (lambda t: nn.functional.normalize(module.text(t), dim=-1), shard(text, n)),
            (lambda t: nn.functional.normalize(module.image(t), dim=-1), shard(image, n)),
        ],
        chunk=2,
        wrapped=[module.text],
    )
    assert torch.isfinite(loss) and all(p.grad is None for p in module.image.parameters())
    same_gradients(module.text, {name: expected[f"text.{name}"] for name, _ in module.text.named_parameters()})


class Unit(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return nn.functional.normalize(t, dim=-1)


@case_on_two
def torch_compile_runs_it_between_two_graphs() -> None:
    def step(x: Tensor, y: Tensor) -> Tensor:
        return over.info_nce(x * 2, y * 2, scale=1.0) + 1

    x = torch.randn(4, 3, requires_grad=True)
    plain = step(x, x)
    (expected,) = torch.autograd.grad(plain, x)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Dd]ynamo")
        compiled = torch.compile(step, backend="aot_eager")(x, x)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(torch.autograd.grad(compiled, x)[0], expected)


@case
def clip_loss_sends_one_side_and_half_of_open_clips_bytes() -> None:
    from benchmarks.distributed.counting import count_traffic

    theirs = open_clip_loss().ClipLoss(local_loss=True, gather_with_grad=True, rank=rank(), world_size=world())
    ours = ccu_fast.ClipLoss(local_loss=True, gather_with_grad=True, rank=rank(), world_size=world())
    sent = {}
    for name, loss in (("theirs", theirs), ("ours", ours)):
        x, y = (torch.randn(16, 512, requires_grad=True) for _ in "xy")
        with count_traffic() as traffic:
            loss(x, y, torch.tensor(10.0)).backward()
        sent[name] = traffic.total
    assert 0 < sent["ours"] <= 0.55 * sent["theirs"], sent


@case
def open_clips_losses_take_an_unequal_last_batch() -> None:
    n = sizes_like(5, 2)
    torch.manual_seed(3)
    images, texts = (unit(sum(n), 8).requires_grad_() for _ in "xy")
    scale, start = 7.0, sum(n[: rank()])
    s = scale * images @ texts.T
    pairs = torch.arange(len(s))
    one = [nn.functional.cross_entropy(t, pairs, reduction="none") for t in (s, s.T)]
    whole = (one[0].mean() + one[1].mean()) / 2
    own = sum(t[start : start + n[rank()]].mean() for t in one) / 2
    gradients = torch.autograd.grad(whole, (images, texts))
    for local in (False, True):
        for gather in (False, True):
            loss = ccu_fast.ClipLoss(local_loss=local, gather_with_grad=gather, rank=rank(), world_size=world())
            x, y = (shard(t.detach(), n).clone().requires_grad_() for t in (images, texts))
            value = loss(x, y, scale)
            torch.testing.assert_close(value, own.detach() if local else whole.detach())
            value.backward()
            if gather and not local:  # every rank computes the whole, and autograd adds what they send
                for got, expected in zip((x.grad, y.grad), gradients, strict=True):
                    torch.testing.assert_close(got, world() * shard(expected, n))
    logits = s[start : start + n[rank()]] - 1
    sign = 2 * torch.eye(len(s))[start : start + n[rank()]] - 1
    siglip = ccu_fast.SigLipLoss(rank=rank(), world_size=world())
    x, y = (shard(t.detach(), n) for t in (images, texts))
    torch.testing.assert_close(
        siglip(x, y, scale, -1.0), -nn.functional.logsigmoid(sign * logits.detach()).sum() / n[rank()]
    )


@case
def a_rank_without_pairs_has_a_loss_of_nothing() -> None:
    """A last batch that leaves a rank none: no NaN, which its optimizer would add to weights that all share."""
    n = 0 if rank() == 0 else 3
    x, y, scale = torch.randn(n, 3, requires_grad=True), torch.randn(n, 3), torch.tensor(2.0, requires_grad=True)
    losses = [ccu_fast.SigLipLoss(rank=rank(), world_size=world())]
    for local in (False, True):
        for gather in (False, True):
            losses.append(ccu_fast.ClipLoss(local_loss=local, gather_with_grad=gather, rank=rank(), world_size=world()))
    for loss in losses:
        value = loss(x, y, scale, None)
        value.backward()
        assert value.isfinite() and scale.grad.isfinite() and x.grad.isfinite().all()


@case
def open_clips_losses_refuse_on_every_rank() -> None:
    last = rank() == world() - 1
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    of_kinds = [
        ccu_fast.ClipLoss(local_loss=local, gather_with_grad=gather, rank=rank(), world_size=world(), normalize=unlike)
        for local in (False, True)
        for gather in (False, True)
        for unlike in (False, True)
    ]
    wide = torch.randn(4, 5) if last else x
    for loss in (*of_kinds, ccu_fast.SigLipLoss(rank=rank(), world_size=world())):
        said = "text_features: expected" if last else f"got an error on rank {world() - 1}"
        refuses(ValueError, said, lambda loss=loss: loss(x, y[:, : 2 if last else 3], 1.0, None))
        refuses(ValueError, "image_features: expected the same last", lambda loss=loss: loss(wide, wide, 1.0, None))
        # As many texts as images over all ranks, and on one rank not: its pairs would be another rank's.
        more = torch.randn(5, 3)
        uneven = (x, more) if last else (more, y) if rank() == 0 else (x, y)
        said = "text_features: expected" if last or rank() == 0 else "got an error on rank 0"
        refuses(ValueError, said, lambda loss=loss, pair=uneven: loss(*pair, 1.0, None))


# Cases that need no CPU: NCCL runs them on as many GPUs as there are.
ON_GPUS = (
    "primitive_gathered",
    "primitive_around_a_ring",
    "equal_batches_need_no_exchange_of_sizes",
    "losses_with_gradients_to_be_added",
    "open_clips_losses_take_an_unequal_last_batch",
    "losses_with_gradients_to_be_averaged",
    "the_same_bits_every_time",
    "distributed_data_parallel_gives_the_one_process_gradient",
)


# ---- what varies InfoNCE

# Options, and the tensors that lie on the ranks.
VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "ids": ({"positives": "lse"}, ("ids",)),
    "negatives": ({}, ("negatives", "hard_negatives")),
    "negatives with ids": ({"in_batch": False}, ("negatives", "ids", "negative_ids")),
    "joint": ({"joint": ("x_to_y", "y_to_x", "x_to_x", "y_to_y")}, ("hard_negatives",)),
    "joint, ids": ({"joint": ("x_to_y", "x_to_x", "y_to_y"), "debias": 0.02}, ("ids",)),
    "weights": ({"hardness": 0.5, "smoothing": 0.1, "focal": 1.0}, ("negatives",)),
    "decoupled": ({"decoupled": True}, ("negatives",)),
    "margin": ({"margin": -0.1, "joint": ("x_to_y", "y_to_y")}, ("negatives", "hard_negatives")),
    "guide": ({"margin": -0.2, "symmetric": False}, ("guide",)),
    "prefixes": ({"prefixes": (3, 8), "prefix_weights": (2.0, 1.0), "normalize": True}, ("ids", "hard_negatives")),
    "prefixes with a margin": ({"prefixes": (3, 5, 8), "margin": 0.1}, ("negatives",)),
    "margin of both sides, and weights": ({"margin": 0.1, "debias": 0.02, "threshold": 1.0}, ("ids",)),
}


@case
def variants_are_those_of_the_global_batch() -> None:
    n, k = sizes_like(5, 2, 7), sizes_like(2, 3)
    torch.manual_seed(11)
    everything = {
        "x": 2 * unit(sum(n), 8),
        "y": unit(sum(n), 8),
        "negatives": unit(sum(k), 8),
        "hard_negatives": unit(sum(n), 3, 8),
        "guide": torch.randn(sum(n), 2, 5).double(),
        "ids": torch.randint(0, 9, (sum(n),)),
        "negative_ids": torch.randint(0, 9, (sum(k),)),
    }
    backend, dtype = engines()[-1]

    def run(loss: Any, of: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
        leaves = {
            name: t.to(dtype, copy=True).requires_grad_() if t.is_floating_point() else t for name, t in of.items()
        }
        leaves["scale"] = torch.tensor(5.0, dtype=dtype, requires_grad=True)
        if "guide" in leaves:
            options["guide"] = tuple(leaves.pop("guide").detach().unbind(1))
        value = loss(**leaves, **options)
        value.backward()
        return {"loss": value.detach()} | {name: t.grad for name, t in leaves.items() if t.requires_grad}

    for (name, (options, given)), mode in itertools.product(VARIANTS.items(), ("gather", "ring")):
        of = {key: everything[key] for key in ("x", "y", *given)}
        sizes = {key: k if key.startswith("negative") else n for key in of}
        here = {key: shard(t, sizes[key]) for key, t in of.items()}
        exact = alone(("variant", name), partial(run, ccu_fast.info_nce, of, torch.float64, **options))
        peer = alone(("variant", name, backend), partial(run, ccu_fast.info_nce, of, dtype, **options, backend=backend))
        ours = run(over.info_nce, here, dtype, **options, backend=backend, mode=mode, gradients="sum")
        ours["scale"] = total(ours["scale"])
        for key, got in ours.items():
            whole = key in ("loss", "scale")
            same, truth = (of[key] if whole else shard(of[key], sizes[key]) for of in (peer, exact))
            magnitude = max(1.0, float(truth.abs().max())) if key == "scale" else None
            assert_three_way(f"{name} {mode} {key}", got, same, truth, ulps=128, magnitude=magnitude)


@case
def a_variant_that_cannot_be_is_refused_on_every_rank() -> None:
    x = torch.randn(4, 3)
    one = rank() == world() - 1
    elsewhere = f"got an error on rank {world() - 1}"
    wrong: dict[str, Any] = {"smoothing": 2.0, "hard_negatives": torch.randn(3, 2, 3), "negatives": torch.randn(2, 5)}
    for name, value in wrong.items():
        options = {name: value} if one else {"hard_negatives": torch.randn(4, 2, 3)}
        text = f"{name}: expected" if one else elsewhere
        refuses(ValueError, text, lambda options=options: over.info_nce(x, x, scale=1.0, **options))
    options = {"hardness": 0.5 if one else 0.0, "decoupled": True}
    unlike = "options: expected the same options of the loss"
    refuses(ValueError, unlike, lambda: over.info_nce(x, x, scale=1.0, **options))
    place = {"rank": rank(), "world_size": world()}
    own, ids = (torch.randn(4, 2, 3), torch.zeros(4, dtype=torch.long)) if one else (None, None)
    for local, grad in itertools.product((False, True), repeat=2):
        loss = ccu_fast.ClipLoss(local, grad, **place)
        refuses(ValueError, unlike, lambda loss=loss: loss(x, x, 1.0, hard_negatives=own))
        refuses(ValueError, "expected the same", lambda loss=loss: loss(x, x, 1.0, ids=ids))
    for options in ({"ids": ids, "row_ids": ids}, {"ids": ids, "row_labels": [0] * 4, "positives": "own"}):
        kind, text = (ValueError if "row_ids" in options else TypeError, "row_") if one else (ValueError, elsewhere)
        options = options if one else {"decoupled": True}
        refuses(kind, text, lambda options=options: over.info_nce(x, x, scale=1.0, **options))
    for positives in ("mean", "own"):
        ids = torch.zeros(4) if one else torch.zeros(4, dtype=torch.long)
        kind, text = (TypeError, "expected dtype") if one else (ValueError, elsewhere)
        refuses(kind, text, lambda ids=ids, p=positives: over.info_nce(x, x, scale=1.0, ids=ids, positives=p))
    assert over.info_nce(x, x, scale=1.0, decoupled=True).isfinite(), "the ranks are still at the same call"


@case
def open_clips_losses_with_several_positives_and_more_texts() -> None:
    n = sizes_like(4, 6)
    torch.manual_seed(13)
    x, y, own, more = unit(sum(n), 8), unit(sum(n), 8), unit(sum(n), 2, 8), unit(2 * world(), 8)
    ids = torch.randint(0, 7, (sum(n),))
    place = {"rank": rank(), "world_size": world()}

    def run(loss: Any, *sides: Tensor, **more: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in sides]
        value = loss(*leaves, 5.0, None, **more)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    whole = run(ccu_fast.ClipLoss(), x, y, ids=ids, hard_negatives=own, negatives=more)
    here = {"ids": shard(ids, n), "hard_negatives": shard(own, n), "negatives": more[2 * rank() :][:2]}
    for options in ({}, {"gather_with_grad": True}, {"local_loss": True, "gather_with_grad": True}):
        loss, dx, _ = run(ccu_fast.ClipLoss(**options, **place), shard(x, n), shard(y, n), **here)
        if "local_loss" in options:
            loss = total(loss * n[rank()]) / sum(n)
        assert torch.allclose(loss, whole[0]), (options, loss, whole[0])
        if options == {"gather_with_grad": True}:
            assert torch.allclose(dx / world(), shard(whole[1], n)), options
    # Without a gradient from elsewhere both ways are computed here.
    alone = ccu_fast.ClipLoss(local_loss=True, **place)
    mine, pair = {name: here[name] for name in ("ids", "hard_negatives")}, (shard(x, n), shard(y, n))
    want = run(ccu_fast.ClipLoss(local_loss=True, gather_with_grad=True, **place), *pair, **mine)
    assert torch.allclose(run(alone, *pair, **mine)[0], want[0])
    refuses(ValueError, "negatives: expected None with local_loss", lambda: run(alone, *pair, **here))
    wrong = {**mine, "ids": mine["ids"][1:]} if rank() == 0 else mine
    text = "ids: expected shape" if rank() == 0 else "got an error on rank 0"
    refuses(ValueError, text, lambda: run(alone, *pair, **wrong))
    # Normalised before they travel, or here.
    for options in ({"local_loss": True}, {"gather_with_grad": True}):
        plain, scaled = (ccu_fast.ClipLoss(**options, normalize=n, **place) for n in (False, True))
        more = {**mine, "hard_negatives": 5 * mine["hard_negatives"]}
        assert torch.allclose(run(plain, *pair, **mine)[0], run(scaled, *(3 * t for t in pair), **more)[0]), options
    # SigLIP: a rank's own images against all texts.
    loss = run(ccu_fast.SigLipLoss(**place), shard(x, n), shard(y, n), ids=here["ids"])[0]
    sign = torch.where(shard(ids, n)[:, None] == ids, 1.0, -1.0)
    want = -torch.nn.functional.logsigmoid(sign * (5.0 * shard(x, n) @ y.T)).sum() / n[rank()]
    assert torch.allclose(loss, want)


@case
def a_queue_that_gathers_is_the_same_on_every_rank() -> None:
    n = sizes_like(3, 1, 0)
    torch.manual_seed(17)
    keys, labels = torch.randn(sum(n), 4), torch.arange(sum(n))
    queue = ccu_fast.KeyQueue(2 * sum(n) - 1, 4, labelled=True, gather=True)
    for _ in range(2):
        queue.enqueue(shard(keys, n), shard(labels, n))
    want = ccu_fast.KeyQueue(2 * sum(n) - 1, 4, labelled=True)
    for _ in range(2):
        want.enqueue(keys, labels)
    assert torch.equal(queue.keys, want.keys)
    assert torch.equal(queue.labels, want.labels)
    text = "labels: expected a tensor, got None" if rank() == 0 else "got an error on rank 0"
    refuses(ValueError, text, lambda: queue.enqueue(shard(keys, n), None if rank() == 0 else shard(labels, n)))
    assert torch.equal(queue.keys, want.keys)


def run_cases(names: Sequence[str]) -> dict[str, str]:
    """What each case raised on this rank."""
    results = {}
    for name in names:
        try:
            torch.manual_seed(0)
            CASES[name]()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    return results


def main(folder: str) -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_default_device("cuda")
    ENGINES[1] = ("triton", torch.float32)
    dist.init_process_group("nccl", timeout=timedelta(seconds=60))
    Path(folder, f"rank{rank()}.json").write_text(json.dumps(run_cases(ON_GPUS)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
