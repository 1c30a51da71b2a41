"""The settings of one run on a user's own model and data, from a TOML file.

For example::

    [model]
    make = "my_package.models:make_model"     # a function without arguments
    weights = "trained.safetensors"           # its state_dict, also .pt
    [data]
    path = "pairs.npz"                        # see ccu_fast.data.load.load_pairs
    unseen = "validation.npz"                 # pairs never trained on: for instances and pairs, and for the verdict
    test = "test.npz"                         # others, which no method sees and every model is judged by
    [forget]
    kind = "class"                            # or "instances" or "pairs"
    classes = [3]                             # for a class; ["cat"] where classes have names
    ids = "to_forget.txt"                     # for instances and pairs: one id a line; or a list of ids
    [ccu]                                     # fields of UnlearnConfig but forget and budget
    dampen = 5.0
    [budget]                                  # fields of Budget
    steps = 40
    [compare]                                 # for --compare: see ccu_fast.unlearn.study.comparison
    retrain = "my_package.models:train"

A CLIP of open_clip or transformers goes by its name, and its data may be pictures and captions::

    [model]
    name = "open_clip:ViT-B-32"               # or "hf:FOLDER", which may hold the weights
    [data]
    path = "pairs.csv"                        # see ccu_fast.data.captions.list_pairs
    caption_column = "text"                   # fields of its Options
    [forget]
    kind = "pairs"
    ids = "to_forget.txt"                     # one a line: number of the caption, from 0, or file of the picture
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ccu_fast import check
from ccu_fast.data.captions import Options
from ccu_fast.data.names import canonical
from ccu_fast.runs.settings import from_table, read_toml, with_known_keys
from ccu_fast.unlearn.config import ROLES, Budget, UnlearnConfig
from ccu_fast.unlearn.study.comparison import Comparison, read_comparison

TABLES: dict[str, tuple[str, ...]] = {
    "model": ("make", "name", "weights"),
    "data": ("path", "unseen", "test", *(f.name for f in fields(Options))),
    "forget": ("kind", "classes", "ids"),
    "ccu": tuple(f.name for f in fields(UnlearnConfig) if f.name not in ("forget", "budget", "early_stop")),
    "budget": tuple(f.name for f in fields(Budget)),
    "compare": tuple(f.name for f in fields(Comparison)),
}


@dataclass(frozen=True)
class Job:
    """What one run needs; paths are absolute.

    Attributes:
        model: "module:function" that makes it, or its name where ``named``.
        named: whether ``model`` is a name of :func:`ccu_fast.models.named.named_model`.
        weights: file of its trained state_dict; None for those in the folder of its name.
        data: see :func:`ccu_fast.data.load.load_pairs` and, with a named model, ``load_captions``.
        unseen: pairs that were never trained on, read as the data are; None without any.
        options: how to read captions.
        classes: names of those to forget, for config.forget "class"; of a number its digits.
        ids: file of the ids to forget, or the ids, for "instances" and "pairs".
        config: of CCU.
        device: of the model and all data.
        test: pairs that were never trained on and that no method sees, read as the data are; None without any.
        compare: what a comparison runs and measures.
    """

    model: str
    named: bool
    weights: Path | None
    data: Path
    unseen: Path | None
    options: Options
    classes: tuple[str, ...]
    ids: Path | tuple[str, ...] | None
    config: UnlearnConfig
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    test: Path | None = None
    compare: Comparison = field(default_factory=Comparison)


def read_job(path: Path, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> Job:
    """The settings of a TOML file, whose paths are relative to it; ``overrides``, of its tables by name, win.

    Raises:
        ValueError: no such file, not TOML, an unknown table or key, a missing one, a value that cannot be.
    """
    given = overrides or {}
    tables = {name: {} for name in TABLES} | with_known_keys(read_toml(path, "settings"), TABLES, "settings", path)
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"settings: expected a table [{name}] in {path}, got {table!r}")
        tables[name] = with_known_keys(table, TABLES[name], f"settings [{name}]", path)
    model, data, forget = tables["model"], tables["data"], tables["forget"] | given.get("forget", {})
    named = "name" in model
    if named and "make" in model:
        raise ValueError(f"settings: expected make or name in [model] of {path}, got both")
    texts = [("model", "name")] if named else [("model", "make"), ("model", "weights")]
    texts += [("data", "path"), *((table, key) for table in ("model", "data", "forget") for key in tables[table])]
    for table, key in texts:
        value = tables[table].get(key)
        if key not in ("classes", "ids") and not (isinstance(value, str) and value.strip()):
            got = "none" if value is None else repr(value)
            raise ValueError(f"settings: expected text as {key} in [{table}] of {path}, got {got}")
    kind = check.one_of("settings [forget] kind", forget.get("kind", "class"), ROLES)
    needed, other = ("classes", "ids") if kind == "class" else ("ids", "classes")
    if needed not in forget or other in forget:
        raise ValueError(f"settings: expected {needed} and no {other} in [forget] of kind {kind!r}, got {forget}")
    options = {key: value for key, value in data.items() if key not in ("path", "unseen", "test")}
    if options and (not named or data["path"].endswith(".npz")):
        raise ValueError(f"settings: expected {', '.join(options)} in [data] with captions and a named model only")
    read: dict[Path, str] = {}
    for key in filter(data.__contains__, ("path", "unseen", "test")):
        first = read.setdefault((path.parent / data[key]).resolve(), key)
        if first != key:
            same = "the same" if first == "path" else f"those of {first},"
            raise ValueError(f"settings: expected other pairs as {key} in [data] of {path}, got {same} {data[key]!r}")
    budget = from_table(Budget, tables["budget"], "settings [budget]", path)
    config = from_table(partial(UnlearnConfig, forget=kind), tables["ccu"], "settings [ccu]", path)
    base, ids = path.resolve().parent, forget.get("ids")
    chosen = model["name" if named else "make"]
    return Job(
        model=f"hf:{base / chosen[3:]}" if named and chosen.startswith("hf:") else chosen,
        named=named,
        weights=base / model["weights"] if "weights" in model else None,
        data=base / data["path"],
        unseen=base / data["unseen"] if "unseen" in data else None,
        options=from_table(Options, options, "settings [data]", path),
        classes=_listed(forget.get("classes", []), "classes", path),
        ids=base / ids if isinstance(ids, str) else None if ids is None else _listed(ids, "ids", path),
        test=base / data["test"] if "test" in data else None,
        compare=read_comparison(tables["compare"], path),
        config=replace(config, budget=replace(budget, **given.get("budget", {})), **given.get("ccu", {})),
    )


def _listed(values: Any, key: str, path: Path) -> tuple[str, ...]:
    """The names in a list of [forget]."""
    if not isinstance(values, list) or not all(type(value) in (int, float, str) for value in values):
        what = "a list of numbers or names" + (", or a file," if key == "ids" else "")
        raise ValueError(f"settings: expected {what} as {key} in [forget] of {path}, got {values!r}")
    return tuple(map(canonical, values))
