"""The settings of one run on a user's own model and data, from a TOML file.

For example::

    [model]
    make = "my_package.models:make_model"     # a function without arguments
    weights = "trained.safetensors"           # its state_dict, also .pt
    trainable = ["visual.*"]                  # patterns of the parameters that may change; all without it
    lora = 8                                  # rank of what is added to linear layers; without it whole weights change
    dtype = "bf16"                            # of the forward passes: fp32 (the default), bf16, fp16
    [data]
    path = "pairs.npz"                        # see ccu_fast.data.load.load_pairs
    unseen = "validation.npz"                 # pairs never trained on: for instances and pairs, and for the verdict
    memory = 1024                             # MiB of inputs that may be held; of larger data only batches are read
    judged = 5000                             # retained pairs, drawn, that the figures are of; left out: all of them
    test = "test.npz"                         # others, which no method sees and every model is judged by
    [forget]
    kind = "class"                            # or "instances" or "pairs"
    classes = [3]                             # for a class; ["cat"] where classes have names
    ids = "to_forget.txt"                     # for instances and pairs: one id a line; or a list of ids
    [ccu]                                     # fields of UnlearnConfig but forget and budget
    dampen = 5.0
    [budget]                                  # fields of Budget
    steps = 40
    early_stop = true                         # once the forget set is as unseen; or fields of Stop, {every = 10}
    [audit]
    text_membership = true                    # who was trained on, by text alone; or fields of TextAudit, {items = 50}
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

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from ccu_fast import check
from ccu_fast.data.captions import Options
from ccu_fast.data.names import canonical
from ccu_fast.models.named import KINDS
from ccu_fast.runs.settings import from_table, read_toml, with_known_keys
from ccu_fast.unlearn.audit.text_questions import TextAudit
from ccu_fast.unlearn.config import ROLES, Budget, UnlearnConfig
from ccu_fast.unlearn.precision import DTYPES
from ccu_fast.unlearn.study.comparison import Comparison, read_comparison

Made = TypeVar("Made")

NUMBERS = ("memory", "judged")  # of [data]
PAIRS = ("path", "unseen", "test")  # of [data]
OF_MODEL = ("trainable", "lora")  # fields of UnlearnConfig that may also stand in [model]
TABLES: dict[str, tuple[str, ...]] = {
    "model": ("make", "name", "weights", "dtype", *OF_MODEL),
    "data": (*PAIRS, *NUMBERS, *(f.name for f in fields(Options))),
    "forget": ("kind", "classes", "ids"),
    "ccu": tuple(f.name for f in fields(UnlearnConfig) if f.name not in ("forget", "budget", "early_stop")),
    "budget": (*(f.name for f in fields(Budget)), "early_stop"),
    "audit": ("text_membership",),
    "compare": tuple(f.name for f in fields(Comparison)),
}


@dataclass(frozen=True)
class Stop:
    """When a run with early_stop ends before its budget; see :class:`ccu_fast.unlearn.config.HeldOut`.

    Attributes:
        slack: ≥ 0, how much lower than before each accuracy on unseen items that stay may be.
        every: steps between two checks, at least 1.
    """

    slack: float = check.field(0.01, low=0)
    every: int = check.field(5, low=1)

    def __post_init__(self) -> None:
        check.fields(self)


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
        memory: MiB of inputs that may be held; of a larger set only batches are read.
        judged: at most so many retained items, drawn by the seed, are what the figures are of; None: all.
        classes: names of those to forget, for config.forget "class"; of a number its digits.
        ids: file of the ids to forget, or the ids, for "instances" and "pairs".
        config: of CCU.
        device: of the model and all data.
        dtype: of the forward passes, "fp32", "bf16" or "fp16".
        stop: when config.early_stop ends the run; by the unseen pairs.
        test: pairs that were never trained on and that no method sees, read as the data are; None without any.
        text: how much is asked by text alone; None: nothing.
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
    memory: int = 1024
    judged: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: str = "fp32"
    stop: Stop = field(default_factory=Stop)
    test: Path | None = None
    text: TextAudit | None = None
    compare: Comparison = field(default_factory=Comparison)


def read_job(path: Path, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> Job:
    """The settings of a TOML file, whose paths are relative to it; ``overrides``, of its tables by name, win.

    In the overrides of [model] "model" stands for name or make, and takes the place of the file's with its weights.

    Raises:
        ValueError: no such file, not TOML, an unknown table or key, a missing one, a value that cannot be.
    """
    given = overrides or {}
    tables = {name: {} for name in TABLES} | with_known_keys(read_toml(path, "settings"), TABLES, "settings", path)
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ValueError(f"settings: expected a table [{name}] in {path}, got {table!r}")
        tables[name] = with_known_keys(table, TABLES[name], f"settings [{name}]", path)
    tables["model"] = _model(tables["model"], **given.get("model", {}))
    model, data, forget = tables["model"], tables["data"], tables["forget"] | given.get("forget", {})
    named = "name" in model
    if named and "make" in model:
        raise ValueError(f"settings: expected make or name in [model] of {path}, got both")
    texts = [("model", "name")] if named else [("model", "make"), ("model", "weights")]
    texts += [("data", "path"), *((table, key) for table in ("model", "data", "forget") for key in tables[table])]
    texts = [(table, key) for table, key in texts if key not in OF_MODEL]
    for table, key in texts:
        value = tables[table].get(key)
        if key not in ("classes", "ids", *NUMBERS) and not (isinstance(value, str) and value.strip()):
            if value is None and key == "weights" and "model" in given.get("model", {}):
                raise ValueError("weights: expected those of the given model, in place of the settings', got none")
            got = "none" if value is None else repr(value)
            raise ValueError(f"settings: expected text as {key} in [{table}] of {path}, got {got}")
    kind = check.one_of("settings [forget] kind", forget.get("kind", "class"), ROLES)
    needed, other = ("classes", "ids") if kind == "class" else ("ids", "classes")
    if needed not in forget or other in forget:
        raise ValueError(f"settings: expected {needed} and no {other} in [forget] of kind {kind!r}, got {forget}")
    options = {key: value for key, value in data.items() if key not in (*PAIRS, *NUMBERS)}
    if options and (not named or data["path"].endswith(".npz")):
        raise ValueError(f"settings: expected {', '.join(options)} in [data] with captions and a named model only")
    read: dict[Path, str] = {}
    for key in filter(data.__contains__, PAIRS):
        first = read.setdefault((path.parent / data[key]).resolve(), key)
        if first != key:
            same = "the same" if first == "path" else f"those of {first},"
            raise ValueError(f"settings: expected other pairs as {key} in [data] of {path}, got {same} {data[key]!r}")
    numbers: dict[str, Any] = {
        key: check.integer(f"settings [data] {key}", data[key], low=1 if key == "judged" else 0)
        for key in NUMBERS
        if key in data
    }
    early, stop = _switched("budget", "early_stop", tables, Stop, path)
    texts_too, text = _switched("audit", "text_membership", tables, TextAudit, path)
    texts_too = given.get("audit", {}).get("text_membership", texts_too)
    budget = from_table(Budget, tables["budget"], "settings [budget]", path)
    config = _config(kind, model, tables["ccu"], path)
    config = replace(
        config,
        budget=replace(budget, **given.get("budget", {})),
        **{"early_stop": early, **given.get("ccu", {})},
    )
    if config.early_stop and "unseen" not in data:
        raise ValueError(f"early_stop: expected unseen in [data] of {path}, which tells when to stop, got none")
    if texts_too and not {"unseen", "test"} & data.keys():
        raise ValueError(
            f"text_membership: expected unseen or test in [data] of {path}, never trained on, to compare with, got none"
        )
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
        config=config,
        dtype=check.one_of("settings [model] dtype", model.get("dtype", "fp32"), tuple(DTYPES)),
        stop=stop,
        test=base / data["test"] if "test" in data else None,
        text=text if texts_too else None,
        compare=read_comparison(tables["compare"], path),
        **numbers,
    )


def _model(
    table: dict[str, Any], model: str | None = None, weights: Path | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """The table [model] with what was given in its place, whose paths are relative to the current folder."""
    table = dict(table)
    if model is not None:
        kind, _, rest = model.partition(":")
        table = {key: value for key, value in table.items() if key not in ("make", "name", "weights")}
        table["name" if kind in KINDS else "make"] = f"hf:{Path(rest).resolve()}" if kind == "hf" else model
    if weights is not None:
        table["weights"] = str(Path(weights).resolve())
    if dtype is not None:
        table["dtype"] = dtype
    return table


def _switched(
    table: str, key: str, tables: dict[str, dict[str, Any]], kind: Callable[..., Made], path: Path
) -> tuple[bool, Made]:
    """Whether something is switched on, by true or by a table of its settings, and those; the key is taken out."""
    value = tables[table].pop(key, False)
    if not isinstance(value, (bool, dict)):
        raise ValueError(f"settings [{table}]: expected true, false or a table as {key} in {path}, got {value!r}")
    where = f"settings [{table}] {key}"
    names = tuple(f.name for f in fields(kind))  # type: ignore[arg-type]
    own = with_known_keys(value, names, where, path) if isinstance(value, dict) else {}
    return value is not False, from_table(kind, own, where, path)


def _config(kind: str, model: dict[str, Any], ccu: dict[str, Any], path: Path) -> UnlearnConfig:
    """What [ccu] says and, of its fields, [model]."""
    own = {key: model[key] for key in OF_MODEL if key in model}
    for key in own.keys() & ccu.keys():
        raise ValueError(f"settings: expected {key} in [model] or [ccu] of {path}, got both")
    config = from_table(partial(UnlearnConfig, forget=kind), ccu, "settings [ccu]", path)
    return from_table(partial(replace, config), own, "settings [model]", path)


def _listed(values: Any, key: str, path: Path) -> tuple[str, ...]:
    """The names in a list of [forget]."""
    if not isinstance(values, list) or not all(type(value) in (int, float, str) for value in values):
        what = "a list of numbers or names" + (", or a file," if key == "ids" else "")
        raise ValueError(f"settings: expected {what} as {key} in [forget] of {path}, got {values!r}")
    return tuple(map(canonical, values))
