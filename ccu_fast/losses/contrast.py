"""InfoNCE with other positives, other negatives and other weights than those of a plain batch.

Of a row of InfoNCE only two things matter: what its positives come to, and the log-sum-exp of its negatives. So another
set of negatives is one reduction more, joined by :func:`formulas.logsumexp`, and each way to weigh them is a line
between the reductions and the softplus.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.losses.formulas import Reduce, Side, attract, logsumexp, softplus
from ccu_fast.losses.logits import Negatives, Positives, difference, log_of_number, products_of_own, rounding, wide
from ccu_fast.losses.variant import VARIANT, Variant, as_labels, name_ids
from ccu_fast.ops.backend import autocast_dtype
from ccu_fast.ops.l2_normalize.api import l2_normalize
from ccu_fast.ops.reduce_similarity.api import as_scalar, reduce_similarity
from ccu_fast.ops.reduce_similarity.normalize import normalize_pair
from ccu_fast.ops.reduce_similarity.prefixes import fit, of_each_prefix, reduce_prefixes
from ccu_fast.ops.reduce_similarity.problem import checked_guide, without_ignored
from ccu_fast.ops.reduce_similarity.relations import OTHER, SAME, SELF

_KEYS = ("labels", "ids")


class Contrast:
    """One call: its arguments, checked, and what is made of the reductions that they ask for."""

    reduce: Reduce
    of_banks: Reduce
    of_guide: Reduce

    def __init__(self, x: Tensor, y: Tensor, *, scale: Any, bias: Any, symmetric: bool, **options: Any) -> None:
        for name, t in (("x", x), ("y", y)):
            check.tensor(name, t)
            if t.ndim < 2:
                raise ValueError(f"{name}: expected shape [..., items, D], got {list(t.shape)}")
        self.x, self.y = x, y
        self.lead = check.leading("y", y.shape[:-2], x.shape[:-2])
        if isinstance(options.get("ids"), Tensor):
            for t in (x, y):
                check.per_row("ids", options["ids"], self.lead, t.shape[-2])
        name_ids(options)
        v = self.variant = Variant(**{name: options.pop(name) for name in VARIANT if name in options})
        self.scale = as_scalar("scale", scale, x)
        self.bias = None if bias is None else as_scalar("bias", bias, x)
        self.keys = {name: options.pop(name, None) for name in ("row_labels", "col_labels", "row_ids", "col_ids")}
        self.paired = options.pop("paired", None)
        self.rest = OTHER if v.positives == "own" else SAME | OTHER
        self.row_limit, self.col_limit = options.pop("row_limits", None), options.pop("col_limits", None)
        self.options = options  # that say how to compute, not what
        self.negatives, self.hard_negatives = v.negatives, v.hard_negatives
        self.two_sides = symmetric and v.in_batch and not v.joint
        self.normalize = False
        self.wants_total = v.smoothing > 0
        self.wants_count = self.wants_total or v.debiased or v.hardness > 0
        self._check()

    def _check(self) -> None:
        x, y, v = self.x, self.y, self.variant
        limited = self.row_limit is not None or self.col_limit is not None
        if v.joint and x.shape[-2] != y.shape[-2]:
            raise ValueError(f"joint: expected as many rows in y as in x, {x.shape[-2]}, got {y.shape[-2]}")
        if v.filtered and limited:
            raise ValueError("row_limits: expected none, nor col_limits, with margin or threshold, got one")
        if v.guide is not None and not v.filtered and not limited:
            raise ValueError("margin: expected a number, or one for threshold, because guide is given, got None")
        if isinstance(v.debias, Tensor):
            check.same("debias", v.debias, "x", x, dtype=False)
            for t in (x, y) if self.two_sides else (x,):
                if v.debias.numel() != 1:
                    check.per_row("debias", v.debias, self.lead, t.shape[-2])
        if v.negative_ids is not None and self.keys["row_labels" if v.positives == "own" else "row_ids"] is None:
            raise ValueError("ids: expected a tensor because negative_ids is given, got None")
        if v.negatives is not None:
            self._check_bank("negatives", v.negatives, 2, f"[..., K, {x.shape[-1]}]")
            if v.negative_ids is not None:
                check.tensor("negative_ids", v.negative_ids, dtypes=check.INTEGERS)
                check.same("negative_ids", v.negative_ids, "x", x, dtype=False)
                check.per_row("negative_ids", v.negative_ids, self.lead, v.negatives.shape[-2])
        if v.hard_negatives is not None:
            self._check_bank("hard_negatives", v.hard_negatives, 3, f"[..., {x.shape[-2]}, K, {x.shape[-1]}]")
        if v.guide is not None:
            self._check_guide(v.guide)
        if v.prefixes:
            fit(v.prefixes, x)

    def _check_bank(self, name: str, bank: Tensor, ndim: int, shape: str) -> None:
        """More negatives, whose last dimensions and whose leading ones fit x."""
        x = self.x
        # Under autocast they are cast, as x and y are.
        check.same(name, bank, "x", x, dtype=autocast_dtype(x.device.type) is None)
        fits = bank.ndim >= ndim and bank.shape[-1] == x.shape[-1] and (ndim == 2 or bank.shape[-3] == x.shape[-2])
        if not fits:
            raise ValueError(f"{name}: expected shape {shape}, got {list(bank.shape)}")
        lead = bank.shape[:-ndim]
        if check.leading(name, lead, self.lead) != self.lead:
            fit = f"leading dimensions that broadcast to {list(self.lead)}"
            raise ValueError(f"{name}: expected {fit}, got {list(lead)}")
        if self.options.get("nan_policy") == "raise":
            check.finite(name, bank)

    def _check_guide(self, guide: Sequence[Tensor | None]) -> None:
        x, y, v = self.x, self.y, self.variant
        u, _ = checked_guide(tuple(guide[:2]), self.lead, x.shape[-2], y.shape[-2], x)
        for place, name in ((2, "negatives"), (3, "hard_negatives")):
            bank, theirs = getattr(v, name), self._guide(place)
            if theirs is None:
                continue
            if bank is None:
                raise ValueError(f"guide: expected no features of {name}, which are not given, got some")
            check.tensor(f"guide[{place}]", theirs)
            check.same(f"guide[{place}]", theirs, "guide[0]", u)
            check.shape(f"guide[{place}]", theirs, (*bank.shape[:-1], u.shape[-1]))

    def outline(self) -> str:
        """What the reductions depend on, without the values of tensors."""
        shown: list[Any] = []
        for name in VARIANT:
            value = getattr(self.variant, name)
            if name == "guide" and value is not None:
                value = tuple(t is None for t in value)
            shown.append(value is None if isinstance(value, (Tensor, type(None))) else value)
        return repr([float(value) if isinstance(value, int) else value for value in shown])

    def sides(self, reduce: Reduce, of_banks: Reduce) -> list[Side]:
        """The rows and, of a symmetric loss, the columns."""
        self.of_guide, v = reduce, self.variant
        self.normalize = check.boolean("normalize", self.options.pop("normalize", False))
        if v.prefixes:
            # Results have the prefixes in front, so that all of them need the leading dimensions of the whole.
            self.x, self.y = (t.expand(*self.lead, *t.shape[-2:]) for t in (self.x, self.y))
            reduce, of_banks = (self._of_prefixes(f) for f in (reduce, of_banks))
        elif self.normalize:
            self._normalize()
        self.reduce, self.of_banks = reduce, of_banks
        if v.filtered:
            self.row_limit, self.col_limit = self._limits()
        if v.hardness:
            # The weights are exp(hardness · S) over their mean: one log-sum-exp at another scale, less that of weights.
            positives, _ = self._pairs(1.0, negatives=False)
            hard, weights = (self._rests(f, self._pairs(f, positives=False)[1]) for f in (1 + v.hardness, v.hardness))
            rests = [
                Negatives(
                    difference(a.lse, b.lse) + log_of_number(b.number, b.lse), a.total / (1 + v.hardness), a.number
                )
                for a, b in zip(hard, weights, strict=True)
            ]
        else:
            positives, pairs = self._pairs(1.0)
            rests = self._rests(1.0, pairs)
        sides = [self._side(p, r) for p, r in zip(positives, rests, strict=True)]
        return [part for side in sides for part in self._parts(side)] if v.prefixes else sides

    def _of_prefixes(self, reduce: Reduce) -> Reduce:
        """The same reductions of every prefix, which are made unit vectors there."""
        options: dict[str, Any] = {"prefixes": self.variant.prefixes, "normalize": self.normalize}
        if reduce is reduce_similarity:
            return functools.partial(reduce_prefixes, **options)
        return functools.partial(of_each_prefix, reduce, **options)

    def _parts(self, side: Side) -> list[Side]:
        """A side of each prefix, whose mean is the weighted sum."""
        v, counts = self.variant, None if side.counts is None else side.counts.expand_as(side.raw)
        number = len(v.prefixes)
        return [
            Side(number * weight * side.raw[k], None if counts is None else counts[k])
            for k, weight in enumerate(v.prefix_weights or [1.0] * number)
        ]

    def _normalize(self) -> None:
        """Once, before the reductions: x and y are in several of them."""
        backend, labels = self.options.get("backend", "auto"), self.keys["row_labels"]
        self.x, self.y = normalize_pair(self.x, self.y, backend, labels, self.keys["col_labels"])
        if self.negatives is not None:
            self.negatives = l2_normalize(self.negatives, backend=backend)
        if self.hard_negatives is not None:
            own = without_ignored(self.hard_negatives.flatten(-2), labels).view_as(self.hard_negatives)
            self.hard_negatives = l2_normalize(own, backend=backend)

    def _side(self, positives: Positives, rest: Negatives) -> Side:
        v, counts = self.variant, None if positives.number is None else positives.number > 0
        lse = rest.lse
        if v.debiased:
            lse = self._debiased(positives.mean(), rest)
        goal = positives.inside if v.positives == "lse" else positives.mean()
        if v.decoupled:
            some = lse != -torch.inf  # NaN is passed on
            counts = some if counts is None else counts & some
            raw = torch.where(some, lse, 0) - goal
        elif positives.number is None or v.positives == "lse":
            raw = softplus(lse - goal)
        else:
            raw = attract(lse, positives.inside, positives.total, positives.number)
        likelihood = raw
        if v.smoothing:
            own = torch.ones_like(raw) if positives.number is None else positives.number
            every = (rest.total + positives.total) / (rest.number + own).clamp(min=1)
            raw = raw + v.smoothing * (goal - every)
        if v.focal:
            # -expm1(-L) is the probability that is missing. Where it is 0 so is the loss, and a power would have no
            # derivative.
            missing = -torch.expm1(-likelihood)
            raw = raw * torch.where(missing > 0, missing, 1) ** v.focal * (missing > 0)
        return Side(raw, counts)

    def _debiased(self, own: Tensor, rest: Negatives) -> Tensor:
        """log((Σ exp(rest) − τ n exp(own)) / (1 − τ)), at least log n − scale, which unit vectors cannot fall below."""
        share = torch.as_tensor(self.variant.debias, dtype=own.dtype, device=own.device).detach()
        if share.numel() == 1:
            share = share.reshape(())
        several = log_of_number(rest.number, own)
        floor = several - self.scale.detach().abs()
        if self.bias is not None:
            floor = floor + self.bias.detach()
        gap = share.log() + several + own - rest.lse
        below = ~(gap >= 0)  # and NaN, which is passed on
        value = torch.where(below, rest.lse, 0) + torch.log(-torch.expm1(torch.where(below, gap, -1)))
        value = torch.where(below, torch.maximum(value - torch.log1p(-share), floor), floor)
        return torch.where(rest.lse == -torch.inf, -torch.inf, value)

    # ---- the reductions

    def _pairs(
        self, factor: float, *, positives: bool = True, negatives: bool = True
    ) -> tuple[list[Positives], dict[str, Negatives]]:
        """Of rows and columns their positives, and by direction the negatives among the pairs of x and y."""
        v, several, labelled = self.variant, self.keys["row_ids"] is not None, self.keys["row_labels"] is not None
        own: list[tuple[str, int]] = []
        if positives:
            own = [("sum", SELF)]
            own += [("lse", SELF), ("count", SELF)] if several else [("count", SELF)] if labelled else []
        wanted = v.joint or (("x_to_y", "y_to_x") if self.two_sides else ("x_to_y",) if v.in_batch else ())
        directions = [d for d in ("x_to_y", "y_to_x") if negatives and d in wanted]
        specs = [
            (own if side == 0 or self.two_sides else []) + (self._rest_spec() if direction in directions else [])
            for side, direction in enumerate(("x_to_y", "y_to_x"))
        ]
        if not any(specs):
            return [], {}
        col_limit = self.row_limit if v.joint else self.col_limit
        results = self.reduce(
            *(self.x, self.y),
            rows=specs[0],
            cols=specs[1],
            **self._scaled(factor),
            **self.keys,
            paired=self.paired,
            **(self._limited(0, 1, col_limit if "y_to_x" in directions else None) if directions else {}),
            **self.options,
        )
        found: list[Positives] = []
        rests: dict[str, Negatives] = {}
        for direction, side in zip(("x_to_y", "y_to_x"), results, strict=True):
            rest = len(self._rest_spec()) if direction in directions else 0
            if len(side) > rest:
                total, *more = side[: len(side) - rest]
                count = more[-1] if more else None
                inside = total if count is None or not several else torch.where(count > 0, more[0], 0)
                found.append(Positives(total, inside, count))
            if rest:
                rests[direction] = self._set(side[len(side) - rest :])
        return found, rests

    def _rests(self, factor: float, pairs: dict[str, Negatives]) -> list[Negatives]:
        """All negatives of rows, and of columns if theirs are wanted: those among the pairs and all others."""
        v, keys = self.variant, self.keys
        of_columns = [pairs["y_to_x"]] if self.two_sides else []
        sets = [pairs[d] for d in ("x_to_y", "y_to_x") if d in pairs and not (of_columns and d == "y_to_x")]
        cols = {name: keys[f"row_{name}"] if keys[f"col_{name}"] is None else keys[f"col_{name}"] for name in _KEYS}
        for direction, bank, of_bank, place in (
            ("x_to_x", self.x, {name: keys[f"row_{name}"] for name in _KEYS}, 0),
            ("y_to_y", self.y, cols, 1),
        ):
            if direction in v.joint:
                both = {f"{side}_{name}": key for name, key in of_bank.items() for side in ("row", "col")}
                sets.append(self._bank(factor, bank, bank, self._limited(place, place), paired=None, **both))
        if self.negatives is not None:
            keys = self._foreign(self.negatives)
            sets.append(self._bank(factor, self.x, self.negatives, self._limited(0, 2), paired=False, **keys))
        if self.hard_negatives is not None:
            sets.append(self._own(factor, self.hard_negatives))
        return [Negatives.union(sets), *of_columns]

    def _bank(self, factor: float, x: Tensor, y: Tensor, limited: dict[str, Any], **keys: Any) -> Negatives:
        """The negatives of x in a bank of its own or of others."""
        if any(isinstance(key, Tensor) and key.ndim > 1 for key in (*keys.values(), *limited.values())):
            same = x is y
            x = x.expand(*self.lead, *x.shape[-2:])  # which all banks share, but not their keys
            y = x if same else y
        rest = self._rest_spec()
        rows, _ = self.of_banks(x, y, rows=rest, **self._scaled(factor), **limited, **keys, **self.options)
        return self._set(rows)

    def _foreign(self, bank: Tensor) -> dict[str, Any]:
        """The keys of x and of ``negatives``: which rows take no part, and which pairs are the same item after all."""
        keys: dict[str, Any] = {}
        labels, ids = self.keys["row_labels"], self.keys["row_ids"]
        if labels is not None:
            check.tensor("row_labels", labels, dtypes=check.INTEGERS)
            every = torch.ones(bank.shape[-2], dtype=torch.int64, device=labels.device)
            keys = {"row_labels": torch.where(labels < 0, -1, 0), "col_labels": every}
        names = self.variant.negative_ids
        if names is not None and self.variant.positives == "own":
            keys = {"row_labels": labels, "col_labels": as_labels(names)}
        elif names is not None:
            keys |= {"row_ids": ids, "col_ids": names}
        return keys

    def _own(self, factor: float, others: Tensor) -> Negatives:
        """Every row's own hard negatives; their logits are few, so they are made."""
        labels = self.keys["row_labels"]
        x, others = without_ignored(self.x, labels), without_ignored(others.flatten(-2), labels).view_as(others)
        cosine = self._products_of_own(x, others)
        logits = factor * self.scale * cosine
        if self.bias is not None:
            logits = logits + factor * self.bias
        if self.row_limit is not None:
            of_x, of_others = self._guide(0), self._guide(3)
            if of_x is not None and of_others is not None:
                cosine = products_of_own(of_x, of_others)
            if self.variant.guide is None or of_others is not None:
                logits = torch.where(cosine.detach() > self.row_limit[..., None], -torch.inf, logits)
        kept = logits > -torch.inf
        total = torch.where(kept, logits, 0).sum(-1) if self.wants_total else 0
        return Negatives(logsumexp(logits, -1), total, kept.sum(-1) if self.wants_count else 0)

    def _products_of_own(self, x: Tensor, others: Tensor) -> Tensor:
        """Similarities ``[..., N, K]``, or with prefixes ``[P, ..., N, K]``."""
        if not self.variant.prefixes:
            return products_of_own(x, others)
        backend, unit = self.options.get("backend", "auto"), self.normalize
        pairs = ((x[..., :d], others[..., :d]) for d in self.variant.prefixes)
        return torch.stack(
            [products_of_own(*(l2_normalize(t, backend=backend) if unit else t for t in pair)) for pair in pairs]
        )

    def _rest_spec(self) -> list[tuple[str, int]]:
        total, count = ("sum", self.rest), ("count", self.rest)
        return [("lse", self.rest), *([total] if self.wants_total else []), *([count] if self.wants_count else [])]

    def _set(self, results: list[Tensor]) -> Negatives:
        count = results[-1] if self.wants_count else 0
        return Negatives(results[0], results[1] if self.wants_total else 0, count)

    def _scaled(self, factor: float) -> dict[str, Any]:
        if factor == 1:
            return {"scale": self.scale, "bias": self.bias}
        return {"scale": self.scale * factor, "bias": None if self.bias is None else self.bias * factor}

    # ---- false negatives

    def _limited(self, rows: int, cols: int, col_limit: Tensor | None = None) -> dict[str, Any]:
        """What leaves false negatives out of the similarities of two of x, y and negatives (0, 1 and 2)."""
        if self.row_limit is None and col_limit is None:
            return {}
        limits = {"row_limits": self.row_limit, "col_limits": col_limit}
        if self.variant.guide is None:
            return limits
        guides = [self._guide(place) for place in (rows, cols)]
        return {} if None in guides else {**limits, "guide": tuple(guides)}

    def _guide(self, place: int) -> Tensor | None:
        """The guide's features of x, y, negatives or hard_negatives."""
        guide = self.variant.guide or ()
        return guide[place] if place < len(guide) else None

    def _limits(self) -> tuple[Tensor, Tensor | None]:
        """The similarity above which a pair is no negative of its row, and of its column."""
        with torch.no_grad():  # as a decorator no graph takes it
            v = self.variant
            x, y = (self.x, self.y) if v.guide is None else (check.tensor("guide", t) for t in v.guide[:2])
            if v.margin is None:
                most = float(v.threshold or 0)
                row, col = (torch.full(t.shape[:-1], most, dtype=wide(t), device=t.device) for t in (self.x, self.y))
                return row, col
            spec = [("sum", SELF), ("count", SELF)]
            cols = spec if self.two_sides else []
            reduce = self.reduce if v.guide is None else self.of_guide
            sides = reduce(x, y, rows=spec, cols=cols, **self.keys, paired=self.paired, **self.options)
            uncertain = rounding(autocast_dtype(x.device.type) or x.dtype, x.device.type)
            limits = []
            for total, count in [side for side in sides if side]:
                own = total / count.clamp(min=1)
                limit = own * (1 + v.margin) if v.relative else own + v.margin
                limit = limit + own.abs() * uncertain
                if v.threshold is not None:
                    limit = limit.clamp(max=v.threshold)
                limits.append(torch.where(count > 0, limit, torch.inf))
            return limits[0], limits[1] if self.two_sides else None
