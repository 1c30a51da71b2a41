"""sentence-transformers: MultipleNegativesRankingLoss in all its variants, and the loss part of the cached ones.

The variants are one-way and symmetric, with or without hard negatives, with other directions (GTE) and with penalties
for hard negatives. The cached classes compute the same loss in a loop over mini-batches of score rows; here it is one
call, and the gradient caching stays the library's. With ``gather_across_devices=True`` the library gathers the columns
as ever, and the loss of this process's queries against those of all is ours. MatryoshkaLoss is in a file of its own.

GISTEmbedLoss and its cached version stay with the library: they leave out what a guide finds more similar than the
positive, and where texts repeat the two are equal but for rounding, so that only the library's own sums decide as it
does. So do the losses of MultiVectorEncoder, whose scores are sums of maxima over tokens: no product of two matrices.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ccu_fast.losses.formulas import logsumexp, softplus
from ccu_fast.losses.functional import info_nce
from ccu_fast.ops.reduce_similarity.api import reduce_similarity
from ccu_fast.ops.reduce_similarity.relations import ALL, OTHER
from ccu_fast.patch.sentence_transformers_matryoshka import Prefixes, asked_of, site, up_to_date
from ccu_fast.patch.site import (
    Site,
    are_plain,
    arguments,
    is_mean_cross_entropy,
    is_one_number,
    is_stock,
)

HALF = (torch.float16, torch.bfloat16)
FORWARD, BACKWARD = "query_to_doc", "doc_to_query"
DIRECTIONS = (FORWARD, "query_to_query", BACKWARD, "doc_to_doc")
# Which documents a penalty falls on: those of other queries, the query's own hard negatives.
HARDNESS = {"in_batch_negatives": (True, False), "hard_negatives": (False, True), "all_negatives": (True, True)}
NONE = (False, False)


@dataclass(frozen=True)
class Options:
    """What an object of the library asks for.

    Attributes:
        directions: a set of DIRECTIONS that has FORWARD.
        joint: one softmax over all of them, instead of the mean of one for each.
        penalised: a value of HARDNESS, or NONE.
        strength: of the penalty.
    """

    directions: frozenset[str] = frozenset({FORWARD})
    joint: bool = False
    penalised: tuple[bool, bool] = NONE
    strength: float = 0.0

    @property
    def is_plain(self) -> bool:
        """InfoNCE from the queries, and if symmetric from the documents."""
        return self.penalised == NONE and (len(self.directions) == 1 or not self.joint)


def sites() -> list[Site]:
    """What is replaced."""
    losses = importlib.import_module("sentence_transformers.losses")
    util = importlib.import_module("sentence_transformers.util")
    one_way, symmetric = losses.MultipleNegativesRankingLoss, losses.MultipleNegativesSymmetricRankingLoss
    cached, cached_symmetric = (
        losses.CachedMultipleNegativesRankingLoss,
        losses.CachedMultipleNegativesSymmetricRankingLoss,
    )
    # Since 5.3 the object says which ways, and the symmetric classes inherit the others' function; before, the class.
    says = "directions" in inspect.signature(one_way).parameters
    # Since version 6 half precision is widened before the similarity.
    one = torch.ones(1, 1, dtype=torch.float16)
    widens = util.dot_score(one, one).dtype == torch.float32

    def evaluate(
        owner: type, self: Any, embeddings: Any, first: Callable[[Any], Tensor], prefixes: Prefixes | None = None
    ) -> Tensor | None:
        """The loss of columns of embeddings, in the dtype of the ``first`` item's; None where only theirs will do."""
        both_ways = owner in (symmetric, cached_symmetric)
        options = _options(self) if says else _one_loss(self, both_ways)
        cosine, dot = (_is_similarity(self.similarity_fct, name) for name in ("cos_sim", "dot_score"))
        gathers = getattr(self, "gather_across_devices", False)
        if options is None or not (cosine or dot) or (gathers and not _can_gather(owner)):
            return None
        if not _are_columns(embeddings):
            return None
        if prefixes and (gathers or not options.is_plain or prefixes.dims[-1] > embeddings[0].shape[1]):
            return None

        def widened(t: Tensor) -> Tensor:
            return t.float() if widens and t.dtype in HALF else t

        queries = widened(embeddings[0])
        if any(widened(e[:0]).dtype != queries.dtype for e in embeddings) or not is_one_number(self.scale, queries):
            return None
        # What is masked out is -inf times the scale there, and a lone query has no others.
        if not options.is_plain and (len(queries) < 2 or isinstance(self.scale, Tensor) or self.scale <= 0):
            return None
        if options.penalised[0] and torch.compiler.is_compiling():
            return None
        place, every, documents = 0, [embeddings[0]], embeddings[1:]
        if gathers:
            # The same columns in the same order as the library, so that a rank whose call it takes finds the others.
            gather = importlib.import_module(owner.__module__).all_gather_with_grad
            if says or both_ways:
                every = [gather(embeddings[0])]
            documents = [gather(e) for e in documents]
            place = dist.get_rank() * len(queries) if dist.is_available() and dist.is_initialized() else 0
        columns = [widened(e) for e in (*every, *documents)]
        if cosine and not prefixes:
            columns = [F.normalize(e, dim=1) for e in columns]
        of_all = len(columns[0]) > len(queries)
        value = ranking_loss(
            columns[0][place : place + len(queries)] if of_all else columns[0],
            columns[1:],
            scale=self.scale,
            options=options,
            place=place,
            every=columns[0],
            more=prefixes.options() if prefixes else {},
        )
        if torch.is_autocast_enabled(queries.device.type) or queries.dtype in HALF:
            with torch.no_grad():
                dtype = first(_alone(self) if gathers else self).dtype
            value = value.to(dtype)
        return value

    def plain(owner: type) -> Site:
        def loss(original: Any, *args: Any, **kwargs: Any) -> Any:
            call = arguments(original, args, kwargs)
            if len(call) > 3:
                return NotImplemented
            self, embeddings, labels = call["self"], call["embeddings"], call["labels"]
            prefixes = asked_of(self)
            value = evaluate(
                owner, self, embeddings, lambda loss: original(loss, [e[:1] for e in embeddings], labels), prefixes
            )
            if value is None and prefixes:
                return prefixes.one_by_one(embeddings, lambda cut: self.compute_loss_from_embeddings(cut, labels))
            return NotImplemented if value is None else value

        return Site(owner, "compute_loss_from_embeddings", ("self", "embeddings", "labels"), loss)

    def in_batches(owner: type) -> Site:
        def loss(original: Any, *args: Any, **kwargs: Any) -> Any:
            call = arguments(original, args, kwargs)
            self, reps = call.pop("self"), call.pop("reps")
            backward = call.pop("with_backward", None)
            if set(call) - {"labels"} or not isinstance(backward, bool) or not _are_batches(reps):
                return NotImplemented
            embeddings = [torch.cat(list(column)) for column in reps]
            value = evaluate(owner, self, embeddings, lambda loss: original(loss, [[column[0][:1]] for column in reps]))
            if value is None:
                return NotImplemented
            if backward:
                value.backward()
                value = value.detach()
            return value

        return Site(owner, "calculate_loss", ("self", "reps"), loss)

    direct = [c for c in (one_way, symmetric) if "compute_loss_from_embeddings" in vars(c)]
    found = [plain(c) for c in direct]
    found += [in_batches(c) for c in (cached, cached_symmetric) if "calculate_loss" in vars(c)]
    # Around a cached loss MatryoshkaLoss keeps the function that its object had when it was made.
    matryoshka = importlib.import_module(losses.MatryoshkaLoss.__module__)
    if direct and hasattr(matryoshka, "shrink"):
        found.append(site(matryoshka, (one_way, symmetric)))
    if hasattr(matryoshka, "CachedLossDecorator"):
        found.append(Site(matryoshka.CachedLossDecorator, "__call__", ("self", "reps"), up_to_date))
    return found


def ranking_loss(
    queries: Tensor,
    documents: Sequence[Tensor],
    *,
    scale: float | Tensor,
    options: Options,
    place: int = 0,
    every: Tensor | None = None,
    more: dict[str, Any] | None = None,
) -> Tensor:
    """InfoNCE of queries against their documents and all others; where options are not plain :func:`directed_loss`::

        s = scale * queries @ torch.cat(documents).T                        # the first N columns are the positives
        loss = F.cross_entropy(s, arange(N))
        if symmetric: loss = (loss + F.cross_entropy(s[:, :N].T, arange(N))) / 2

    Args:
        queries: ``[N, D]``.
        documents: ``[M, D]`` each: the positives, then hard negatives. Usually M = N; of several processes M counts the
            items of all.
        scale: inverse temperature.
        options: which ways, and with which penalties.
        place: the first query's among all M.
        every: ``[M, D]``, the queries of all processes; by default these. Only other ways than FORWARD read it.
        more: keywords of :func:`ccu_fast.info_nce`, where the options are plain.
    """
    every, more = queries if every is None else every, more or {}
    if not options.is_plain:
        return directed_loss(queries, documents, scale=scale, options=options, place=place, every=every)
    symmetric = BACKWARD in options.directions
    alone = len(documents[0]) == len(queries)
    if alone and len(documents) == 1:
        return info_nce(queries, documents[0], scale=scale, symmetric=symmetric, **more)
    candidates = torch.cat(list(documents))
    ids = torch.arange(len(candidates), device=candidates.device)
    mine = slice(place, place + len(queries))
    loss = info_nce(queries, candidates, scale=scale, symmetric=False, row_ids=ids[mine], col_ids=ids, **more)
    if symmetric:
        keys: dict[str, Any] = {} if alone else {"row_ids": ids[mine], "col_ids": ids[: len(every)]}
        loss = (loss + info_nce(documents[0][mine], every, scale=scale, symmetric=False, **keys, **more)) / 2
    return loss


def directed_loss(
    queries: Tensor,
    documents: Sequence[Tensor],
    *,
    scale: float | Tensor,
    options: Options,
    place: int,
    every: Tensor,
) -> Tensor:
    """InfoNCE of queries whose negatives come from several directions, with penalties for the similar ones::

        z = logsumexp of: scale * q @ d.T (+ strength * (q @ d.T).detach() where penalised),
                          scale * q @ q.T,  scale * p @ q.T,  scale * p @ d.T     # each where asked; p the positives
        loss = mean(z - scale * (q * p).sum(1))                                    # joint

    A query is no negative of itself, nor is a document of those of its query. Where the directions are not joint, the
    mean of one such loss for each.

    Args:
        queries: ``[N, D]``, two or more.
        documents, scale, options, place, every: as of :func:`ranking_loss`.

    Source: Li et al. 2023 (arXiv 2308.03281); Lan et al. 2025 (arXiv 2503.04812), eq. 5.
    """
    mine, alone = slice(place, place + len(queries)), len(documents[0]) == len(queries)
    # The similarity of each query to its own documents, [documents, N]; in fp32, as the kernels have the others.
    wide = queries if queries.dtype == torch.float64 else queries.float()
    own = torch.stack([(wide * d[mine].to(wide.dtype)).sum(1) for d in documents])
    positive, negatives = scale * own[0], list(scale * own[1:])
    others, hard = options.penalised
    if hard:
        negatives = [n + options.strength * s.detach() for n, s in zip(negatives, own[1:], strict=True)]

    candidates = documents[0] if len(documents) == 1 else torch.cat(list(documents))
    ids = torch.arange(len(documents[0]), device=queries.device)
    keys: dict[str, Any] = {}
    if len(documents) > 1 or not alone:
        keys = {"row_ids": ids[mine], "col_ids": ids.repeat(len(documents))}
    of_queries: dict[str, Any] = {} if alone else {"row_ids": ids[mine], "col_ids": ids}
    directions, back = options.directions, ALL if options.joint else OTHER
    # Of pairs both ways are one pass, unless one of them is penalised.
    both = BACKWARD in directions and len(documents) == 1 and alone and not others
    warm = scale + options.strength if others else scale
    cols = [("lse", back)] if both else ()
    (forward,), backward = reduce_similarity(queries, candidates, scale=warm, rows=[("lse", OTHER)], cols=cols, **keys)
    if others:
        forward = _Penalised.apply(forward, queries, candidates, scale, options.strength, keys)
    rest: dict[str, list[Tensor]] = {FORWARD: [*negatives, forward]}
    positives = documents[0][mine]
    if both:
        rest[BACKWARD] = backward
    elif BACKWARD in directions:
        rest[BACKWARD] = reduce_similarity(positives, every, scale=scale, rows=[("lse", back)], **of_queries)[0]
    if "query_to_query" in directions:
        rest["query_to_query"] = reduce_similarity(queries, every, scale=scale, rows=[("lse", OTHER)], **of_queries)[0]
    if "doc_to_doc" in directions:
        rest["doc_to_doc"] = reduce_similarity(positives, candidates, scale=scale, rows=[("lse", OTHER)], **keys)[0]
    groups = [[term for terms in rest.values() for term in terms]] if options.joint else list(rest.values())
    losses = [softplus(logsumexp(torch.stack(group)) - positive) for group in groups]
    return (sum(losses[1:], losses[0]) / len(losses)).mean()


class _Penalised(torch.autograd.Function):
    """The log-sum-exp over OTHER of ``scale * x @ y.T + strength * (x @ y.T).detach()``.

    Its values are those at the scale ``scale + strength``, and its gradient is as much smaller as the scale. That holds
    for the first derivative only: for others the whole is computed anew, with twice the columns.
    """

    @staticmethod
    def forward(
        ctx: Any, warm: Tensor, x: Tensor, y: Tensor, scale: float, strength: float, keys: dict[str, Any]
    ) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.scale, ctx.strength, ctx.keys = scale, strength, keys
        return warm.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return grad * (ctx.scale / (ctx.scale + ctx.strength)), None, None, None, None, None
        x, y = ctx.saved_tensors
        wide, twice = torch.cat([ctx.scale * x, ctx.strength * x.detach()], 1), torch.cat([y, y.detach()], 1)
        (exact,), _ = reduce_similarity(wide, twice, rows=[("lse", OTHER)], **ctx.keys)
        wanted = [t for t in (x, y) if t.requires_grad]
        found = iter(torch.autograd.grad(exact, wanted, grad, create_graph=True))
        return None, *(next(found) if t.requires_grad else None for t in (x, y)), None, None, None


def _options(loss: Any) -> Options | None:
    """None for what is not known."""
    directions = frozenset(loss.directions)
    if not {FORWARD} <= directions <= set(DIRECTIONS) or loss.partition_mode not in ("joint", "per_direction"):
        return None
    joint = loss.partition_mode == "joint"
    if not joint and not directions <= {FORWARD, BACKWARD}:  # the library refuses to make one
        return None
    mode, strength = loss.hardness_mode, loss.hardness_strength
    if mode is None:
        return Options(directions, joint)
    if not isinstance(mode, str) or mode not in HARDNESS or type(strength) not in (int, float):
        return None
    if not 0 <= strength < math.inf:
        return None
    return Options(directions, joint, HARDNESS[mode] if strength else NONE, strength)


def _one_loss(loss: Any, symmetric: bool) -> Options | None:
    """The way of a class, where the cross entropy that the object holds is the one that it was made with."""
    stock = is_stock(F.cross_entropy, "torch.nn.functional.cross_entropy")
    if not stock or not is_mean_cross_entropy(loss.cross_entropy_loss):
        return None
    return Options(frozenset({FORWARD, BACKWARD} if symmetric else {FORWARD}))


def _can_gather(owner: type) -> bool:
    """Whether what a loss gathers with is the library's own, and no graph is being made of it."""
    if torch.compiler.is_compiling():
        return False
    module, home = importlib.import_module(owner.__module__), "sentence_transformers.util.distributed"
    names = [name for name in ("all_gather_with_grad", "get_rank") if hasattr(module, name)]
    return "all_gather_with_grad" in names and all(is_stock(getattr(module, n), f"{home}.{n}") for n in names)


def _alone(loss: Any) -> Any:
    """A copy of a loss that gathers nothing, and shares the rest."""
    alone = copy.copy(loss)
    if isinstance(getattr(loss, "loss", None), nn.Module):  # where a cached loss keeps its options
        alone._modules = dict(loss._modules)
        alone.loss = copy.copy(loss.loss)
    alone.gather_across_devices = False
    return alone


def _is_similarity(function: Any, name: str) -> bool:
    # Before 5.1 all of util was one file.
    return any(is_stock(function, f"sentence_transformers.{module}.{name}") for module in ("util.similarity", "util"))


def _are_columns(embeddings: Any) -> bool:
    """Two or more matrices of one shape on one device."""
    if not isinstance(embeddings, (list, tuple)) or len(embeddings) < 2 or not are_plain(*embeddings):
        return False
    first = embeddings[0]
    return (
        first.ndim == 2
        and first.numel() > 0
        and first.is_floating_point()
        and all(e.shape == first.shape and e.device == first.device for e in embeddings)
    )


def _are_batches(reps: Any) -> bool:
    """Columns of embeddings in mini-batches: plain matrices of one width, dtype and device in a column."""

    def fit(column: Any) -> bool:
        return (
            isinstance(column, (list, tuple))
            and len(column) > 0
            and are_plain(*column)
            and len({(b.shape[1:], b.dtype, b.device) for b in column}) == 1
            and column[0].ndim == 2
        )

    return isinstance(reps, (list, tuple)) and len(reps) > 1 and all(map(fit, reps))
