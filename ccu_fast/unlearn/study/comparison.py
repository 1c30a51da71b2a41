"""The settings of a comparison on a user's own model and data: ``[compare]`` of the TOML file.

For example::

    [compare]
    methods = ["ccu", "ssd", "scrub, told"]   # default: CCU and all baselines
    retrain = "my_package.models:train"       # train(model, pairs) -> model, from scratch
    hidden = "both"                           # or "visual": train(model, pairs, forget) sees the other halves
    seeds = 3
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ccu_fast import check
from ccu_fast.runs.settings import from_table
from ccu_fast.unlearn.baselines.registry import BASELINES
from ccu_fast.unlearn.study.methods import STARTED

HIDDEN = ("both", "visual")


@dataclass(frozen=True)
class Comparison:
    """What a comparison runs, and what it measures.

    Attributes:
        methods: names of :data:`ccu_fast.unlearn.study.methods.STARTED`, each once; None for CCU and all baselines.
        retrain: "module:function", see :func:`ccu_fast.unlearn.study.own.compare_own`; None without.
        gold: weights of a model that was retrained already, in place of ``retrain``.
        hidden: what of the forget set the retrained model has not seen: "both" halves, or the "visual" ones alone.
        probe: a linear probe below the heads of the original, the retrained model and CCU; needs labels.
        relearn: how many steps bring the forget set back, of the same three; needs labels and a visual head.
        membership: the attack that tells forgotten items from unseen ones.
        retrieval: R@1, R@5 and R@10 of pairs without labels, or of a model without heads.
        seeds: runs of each method, at least 1, from the seed of ``[ccu]`` on.
    """

    methods: tuple[str, ...] | None = None
    retrain: str | None = None
    gold: Path | None = None
    hidden: str = check.field("both", allowed=HIDDEN)
    probe: bool = True
    relearn: bool = True
    membership: bool = True
    retrieval: bool = True
    seeds: int = check.field(1, low=1)

    def __post_init__(self) -> None:
        check.fields(self)
        if self.methods is not None:
            if not isinstance(self.methods, (list, tuple)) or not self.methods:
                raise TypeError(f"methods: expected a list of methods, got {self.methods!r}")
            for name in self.methods:
                check.one_of("methods", name, STARTED)
            if len(set(self.methods)) < len(self.methods):
                raise ValueError(f"methods: expected every method once, got {list(self.methods)}")
            object.__setattr__(self, "methods", tuple(self.methods))
        if self.retrain is not None and not all(self.retrain.partition(":")):
            raise ValueError(f"retrain: expected 'module:function', got {self.retrain!r}")
        if self.retrain is not None and self.gold is not None:
            raise ValueError("gold: expected no weights of a retrained model beside retrain, got both")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The methods to run."""
        return ("ccu", *BASELINES) if self.methods is None else self.methods


def read_comparison(table: Mapping[str, Any], path: Path) -> Comparison:
    """The settings of a table, whose path is relative to the file ``path``.

    Raises:
        ValueError: a value that cannot be; names the table and the file.
    """
    where = "settings [compare]"
    given = dict(table)
    if "gold" in given:
        if not isinstance(given["gold"], str) or not given["gold"].strip():
            raise ValueError(f"{where} gold: expected text, got {given['gold']!r} (in {path})")
        given["gold"] = path.resolve().parent / given["gold"]
    if "hidden" in given and not given.keys() & {"retrain", "gold"}:
        raise ValueError(f"{where} hidden: expected retrain or gold beside it, got neither (in {path})")
    return from_table(partial(Comparison), given, where, path)
