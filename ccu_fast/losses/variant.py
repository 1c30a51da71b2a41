"""What InfoNCE may be asked for besides a plain batch: other positives, other negatives, other weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ccu_fast import check
from ccu_fast.ops.reduce_similarity.prefixes import checked_prefixes, fit

POSITIVES = ("mean", "lse", "own")
DIRECTIONS = ("x_to_y", "y_to_x", "x_to_x", "y_to_y")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The keywords of :func:`ccu_fast.info_nce` that vary the loss; it describes them."""

    positives: str = "mean"
    negatives: Tensor | None = None
    negative_ids: Tensor | None = None
    hard_negatives: Tensor | None = None
    in_batch: bool = True
    joint: tuple[str, ...] = ()
    margin: float | None = None
    relative: bool = False
    threshold: float | None = None
    guide: tuple[Tensor | None, ...] | None = None
    decoupled: bool = False
    smoothing: float = 0.0
    debias: float | Tensor = 0.0
    hardness: float = 0.0
    focal: float = 0.0
    prefixes: tuple[int, ...] = ()
    prefix_weights: tuple[float, ...] | None = None

    @property
    def filtered(self) -> bool:
        """Some negatives are left out for what they resemble."""
        return self.margin is not None or self.threshold is not None

    @property
    def debiased(self) -> bool:
        return isinstance(self.debias, Tensor) or self.debias > 0

    def __post_init__(self) -> None:
        for name in ("in_batch", "relative", "decoupled"):
            check.boolean(name, getattr(self, name))
        check.one_of("positives", self.positives, POSITIVES)
        for name, high in (("smoothing", 1.0), ("hardness", math.inf), ("focal", math.inf)):
            check.number(name, getattr(self, name), low=0.0, high=high)
        for name in ("margin", "threshold"):
            if getattr(self, name) is not None:
                check.number(name, getattr(self, name))
        if isinstance(self.debias, Tensor):
            check.tensor("debias", self.debias)
            outside = check.at_hand(self.debias) and self.debias.device.type == "cpu" and not _is_share(self.debias)
        else:
            outside = not check.number("debias", self.debias, low=0.0) < 1
        if outside:
            raise ValueError(f"debias: expected a number in [0, 1) or a tensor of them, got {self.debias}")
        self._check_sets()
        self._check_prefixes()
        self._check_together()

    def _check_sets(self) -> None:
        if not isinstance(self.joint, (tuple, list)):
            raise TypeError(f"joint: expected a tuple of {DIRECTIONS}, got {self.joint!r}")
        object.__setattr__(self, "joint", tuple(self.joint))
        for direction in self.joint:
            check.one_of("joint", direction, DIRECTIONS)
        if len(set(self.joint)) < len(self.joint):
            raise ValueError(f"joint: expected each direction once, got {self.joint}")
        for name in ("negatives", "hard_negatives"):
            if getattr(self, name) is not None:
                check.tensor(name, getattr(self, name))
        if self.negative_ids is not None and self.negatives is None:
            raise ValueError("negatives: expected a tensor because negative_ids is given, got None")
        if not self.in_batch and (self.joint or (self.negatives is None and self.hard_negatives is None)):
            need = "with joint" if self.joint else "without negatives and hard_negatives"
            raise ValueError(f"in_batch: expected True {need}, got False")
        if self.guide is None:
            return
        if not isinstance(self.guide, (tuple, list)) or not 2 <= len(self.guide) <= 4:
            got = len(self.guide) if isinstance(self.guide, (tuple, list)) else type(self.guide).__name__
            raise TypeError(
                "guide: expected a tuple of its features of x, of y and, if given, of negatives and hard_negatives, "
                f"got {got}"
            )

    def _check_prefixes(self) -> None:
        if isinstance(self.prefixes, (tuple, list)) and not self.prefixes:
            if self.prefix_weights is not None:
                raise ValueError("prefixes: expected numbers of dimensions because prefix_weights is given, got none")
            return
        object.__setattr__(self, "prefixes", checked_prefixes(self.prefixes))
        if self.prefix_weights is None:
            return
        if not isinstance(self.prefix_weights, (tuple, list)) or len(self.prefix_weights) != len(self.prefixes):
            wanted = f"a number for each of the {len(self.prefixes)} prefixes"
            raise TypeError(f"prefix_weights: expected {wanted}, got {self.prefix_weights!r}")
        weights = tuple(check.number("prefix_weights", weight) for weight in self.prefix_weights)
        object.__setattr__(self, "prefix_weights", weights)

    def _check_together(self) -> None:
        if self.relative and self.margin is None:
            raise ValueError("margin: expected a number because relative is True, got None")
        if self.focal and self.decoupled:
            raise ValueError(f"focal: expected 0 with decoupled, whose losses are no probabilities, got {self.focal}")


def _is_share(values: Tensor) -> bool:
    return bool(((values >= 0) & (values < 1)).all())


VARIANT = tuple(item.name for item in fields(Variant))
VARIED = ("ids", *VARIANT)  # no frozenset: torch 2.8 does not compile a method of a global one
PREFIXED = ("prefixes", "prefix_weights")
_DEFAULTS = {item.name: item.default for item in fields(Variant)} | {"ids": None}
_KEYS = ("ids", "row_ids", "row_labels")


def without_defaults(options: dict[str, Any]) -> dict[str, Any]:
    """The options that ask for something: what they leave is InfoNCE itself, which has a quicker way."""
    asked = {}
    for name, value in options.items():
        default = _DEFAULTS.get(name, _DEFAULTS)
        # Arrays and tensors are not compared, which would give one of them.
        if value is not default and not (isinstance(value, (int, float, str, tuple, list)) and value == default):
            asked[name] = value
    if "positives" in asked and all(asked.get(name) is None for name in _KEYS):
        check.one_of("positives", asked.pop("positives"), POSITIVES)  # of one positive all forms are the same
    return asked


def of_prefixes(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, options: dict[str, Any]) -> Tensor:
    """The weighted sum of a loss of every prefix of x and y."""
    v = Variant(prefixes=options["prefixes"], prefix_weights=options.get("prefix_weights"))
    fit(v.prefixes, x)
    losses = [loss(x[:, :d], y[:, :d]) for d in v.prefixes]
    if v.prefix_weights is not None:
        losses = [weight * value for weight, value in zip(v.prefix_weights, losses, strict=True)]
    return sum(losses[1:], losses[0])


def as_labels(ids: Tensor) -> Tensor:
    """Ids without their sign, as a negative label would be ignored: two that differ in it alone are 2^63 apart."""
    return ids.long() & (2**63 - 1)


def name_ids(options: dict[str, Any]) -> None:
    """Write ``ids`` as the two keywords that it stands for: ids, or with positives="own" labels.

    Rows whose label is negative stay ignored.
    """
    ids = options.pop("ids", None)
    if ids is None:
        return
    check.tensor("ids", ids, dtypes=check.INTEGERS)
    if options.get("positives") == "own":
        rows = options.get("row_labels")
        cols = rows if options.get("col_labels") is None else options["col_labels"]
        for name, given in (("row_labels", rows), ("col_labels", cols)):
            options[name] = as_labels(ids)
            if given is not None:
                check.tensor(name, given, dtypes=check.INTEGERS)
                check.shape(name, given, ids.shape)
                options[name] = torch.where(given < 0, -1, options[name])
        return
    for name in ("row_ids", "col_ids"):
        if options.get(name) is not None:
            raise ValueError(f"{name}: expected none because ids is given, got a tensor")
        options[name] = ids
