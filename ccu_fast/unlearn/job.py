"""One run on a user's own model and data: what ``ccu-fast unlearn`` does, from the settings to the files.

The settings are TOML::

    [model]
    make = "my_package.models:make_model"     # a function without arguments
    weights = "trained.safetensors"           # its state_dict, also .pt
    [data]
    path = "pairs.npz"                        # see ccu_fast.data.load.load_pairs
    [forget]
    kind = "class"                            # or "instances" or "pairs"
    classes = [3]                             # for a class; ["cat"] where classes have names
    ids = "to_forget.txt"                     # for instances and pairs: one id a line; or a list of ids
    [ccu]                                     # fields of UnlearnConfig but forget and budget
    anchor = 3.0
    [budget]                                  # fields of Budget
    steps = 60

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

import hashlib
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ccu_fast import check
from ccu_fast.data.captions import Options
from ccu_fast.data.load import load_captions, load_pairs
from ccu_fast.data.names import Names, canonical
from ccu_fast.data.paired import PairedData
from ccu_fast.distributed.ranks import Ranks, processes
from ccu_fast.files import after_the_work, locked, output_folder, readable, write_whole
from ccu_fast.models.clip import ClipEncoder
from ccu_fast.models.named import named_model
from ccu_fast.models.weights import from_checkpoint
from ccu_fast.runs.checkpoint import Checkpoint, read_state
from ccu_fast.runs.progress import Progress
from ccu_fast.runs.provenance import save_model, saved_state, tensors_hash
from ccu_fast.runs.settings import from_table, read_toml, with_known_keys
from ccu_fast.unlearn.audit import verdict_without_gold
from ccu_fast.unlearn.config import ROLES, Budget, UnlearnConfig
from ccu_fast.unlearn.loop import answers, chances, embed, right_shares
from ccu_fast.unlearn.method import run_ccu
from ccu_fast.unlearn.model import TwoModalityModel, check_problem

TABLES: dict[str, tuple[str, ...]] = {
    "model": ("make", "name", "weights"),
    "data": ("path", *(f.name for f in fields(Options))),
    "forget": ("kind", "classes", "ids"),
    "ccu": tuple(f.name for f in fields(UnlearnConfig) if f.name not in ("forget", "budget", "early_stop")),
    "budget": tuple(f.name for f in fields(Budget)),
}
WRITTEN = ("checkpoint.pt", "model.safetensors", "results.json", "report.html")  # the last by the command
SHOWN = 20  # names of classes in an error


@dataclass(frozen=True)
class Job:
    """What one run needs; paths are absolute.

    Attributes:
        model: "module:function" that makes it, or its name where ``named``.
        named: whether ``model`` is a name of :func:`ccu_fast.models.named.named_model`.
        weights: file of its trained state_dict; None for those in the folder of its name.
        data: see :func:`ccu_fast.data.load.load_pairs` and, with a named model, ``load_captions``.
        options: how to read captions.
        classes: names of those to forget, for config.forget "class"; of a number its digits.
        ids: file of the ids to forget, or the ids, for "instances" and "pairs".
        config: of CCU.
        device: of the model and all data.
    """

    model: str
    named: bool
    weights: Path | None
    data: Path
    options: Options
    classes: tuple[str, ...]
    ids: Path | tuple[str, ...] | None
    config: UnlearnConfig
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


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
        if key not in ("classes", "ids") and not isinstance(value, str):
            raise ValueError(f"settings: expected text as {key} in [{table}] of {path}, got {value or 'none'!r}")
    kind = check.one_of("settings [forget] kind", forget.get("kind", "class"), ROLES)
    needed, other = ("classes", "ids") if kind == "class" else ("ids", "classes")
    if needed not in forget or other in forget:
        raise ValueError(f"settings: expected {needed} and no {other} in [forget] of kind {kind!r}, got {forget}")
    options = {key: value for key, value in data.items() if key != "path"}
    if options and (not named or data["path"].endswith(".npz")):
        raise ValueError(f"settings: expected {', '.join(options)} in [data] with captions and a named model only")
    budget = from_table(Budget, tables["budget"], "settings [budget]", path)
    config = from_table(partial(UnlearnConfig, forget=kind), tables["ccu"], "settings [ccu]", path)
    base, ids = path.resolve().parent, forget.get("ids")
    chosen = model["name" if named else "make"]
    return Job(
        model=f"hf:{base / chosen[3:]}" if named and chosen.startswith("hf:") else chosen,
        named=named,
        weights=base / model["weights"] if "weights" in model else None,
        data=base / data["path"],
        options=from_table(Options, options, "settings [data]", path),
        classes=_listed(forget.get("classes", []), "classes", path),
        ids=base / ids if isinstance(ids, str) else None if ids is None else _listed(ids, "ids", path),
        config=replace(config, budget=replace(budget, **given.get("budget", {})), **given.get("ccu", {})),
    )


def _listed(values: Any, key: str, path: Path) -> tuple[str, ...]:
    """The names in a list of [forget]."""
    if not isinstance(values, list) or not all(type(value) in (int, float, str) for value in values):
        what = "a list of numbers or names" + (", or a file," if key == "ids" else "")
        raise ValueError(f"settings: expected {what} as {key} in [forget] of {path}, got {values!r}")
    return tuple(map(canonical, values))


def run_job(job: Job, out: Path, *, fresh: bool = False, progress: Progress | None = None) -> dict[str, Any] | None:
    """Load, check, unlearn, save.

    Under ``torchrun`` the processes share the run (:mod:`ccu_fast.unlearn.parallel`): each loads the model and the data
    and embeds its part of every batch; the first reports progress and reads and writes the files.

    Args:
        job: the settings.
        out: folder of ``model.safetensors``, ``results.json`` and ``checkpoint.pt``; made if needed. A killed run goes
            on from its checkpoint; a finished one is not run again.
        fresh: throw what an earlier run left in ``out`` away first.
        progress: called every few steps as progress(stage, done, total, note).

    Returns:
        What ``results.json`` holds: "provenance" (as in the saved model), "cost", "verdict" ("kind" and "text" of
        :func:`ccu_fast.unlearn.audit.verdict_without_gold`), "sizes", "losses", "rows" (name, before, after) and, for a
        model without heads or items without labels, the "pool" that a pair's partner is sought in, with the share that
        would be right by chance. Besides, "embeddings" for a picture. None on the processes that are not the first.

    Raises:
        OSError: ``out`` cannot be written, holds such files that are not of an earlier run, or has another process at
            work in it.
        ValueError, TypeError, FloatingPointError, ImportError: see :func:`ccu_fast.unlearn.unlearn`, ``read_job`` and
            ``load_pairs``.
    """
    model, data, names = load(job)
    model = model.to(job.device)
    forget, retain = (part.to(job.device) for part in split(data, job, names))
    check_problem(model, forget, retain, job.config.forget, names.classes)
    saved_state(_own(model))  # what cannot be written is refused before the work
    output_folder(out)
    written = out / "model.safetensors"
    with processes(job.device) as (rank, world), locked(out / f"lock-{rank}"):
        take = partial(_take, out, job, fresh)
        Ranks().of_first(take) if world > 1 else take()
        checkpoint = Checkpoint(out / "checkpoint.pt", settings=asdict(job.config))
        done = run_ccu(
            model,
            forget,
            retain,
            job.config,
            checkpoint=checkpoint,
            progress=progress,
            group=dist.group.WORLD if world > 1 else None,
        )
        if rank:
            return None
        with after_the_work(f"the finished run is in {checkpoint.path}"):
            provenance = save_model(_own(done.model), written, _provenance(job, model, forget, retain, world))
        with after_the_work(f"the unlearned model is in {written}"):
            cost = {"steps": done.steps, "items": done.items, "seconds": round(done.seconds, 2)}
            figures = _figures(model, done.model, forget, retain, job.config.forget)
            result = {"provenance": provenance, "cost": cost, **figures}
            result["losses"] = done.losses
            write_whole(out / "results.json", json.dumps(result, indent=1) + "\n")
            pictured = _embeddings(model, done.model, forget, retain) if data.labelled else None
            return {**result, "embeddings": pictured}


def _take(out: Path, job: Job, fresh: bool) -> None:
    """Make sure that nothing is lost when the files of a run are written, and remove those of an earlier run."""
    files = [out / name for name in WRITTEN]
    there = [file for file in files if file.exists()]
    for file in there:
        if file.is_dir():
            raise IsADirectoryError(f"out: expected a file {file.name} or none in {out}, got a folder")
        if job.weights is not None and file.samefile(job.weights):
            raise FileExistsError(f"out: expected another folder than that of the weights, {file}, got {out}")
    checkpoint = out / "checkpoint.pt"
    if there and not (checkpoint.exists() and "key" in read_state(checkpoint, "checkpoint")):
        raise FileExistsError(f"out: expected a folder without {there[0].name}, or an earlier run's, got {out}")
    for file in there if fresh else ():
        file.unlink()


def _provenance(job: Job, model: Any, forget: PairedData, retain: PairedData, world: int) -> dict[str, Any]:
    return {
        "method": "CCU as defined in ccu_fast.unlearn.method",
        "seed": job.config.seed,
        "config": asdict(job.config),
        "forgotten_classes": list(job.classes),
        "processes": world,
        "model": job.model,
        "original_sha256": tensors_hash(_own(model).state_dict()),
        "forget_sha256": _data_hash(forget),
        "retain_sha256": _data_hash(retain),
    }


def _figures(
    before: TwoModalityModel, after: TwoModalityModel, forget: PairedData, retain: PairedData, kind: str
) -> Any:
    """What both models make of both sets: "sizes", "rows", "pool" and "verdict" of a result."""
    parts = {"forget": forget, "retain": retain}
    items = len(forget) + len(retain)
    found = [[answers(model, part) for part in parts.values()] for model in (before, after)]
    ranked = not found[0][0].logits
    chance = dict(zip(parts, chances(*parts.values()), strict=True)) if ranked else {}
    rows = []
    judged: list[dict[str, dict[str, float]]] = [{}, {}]
    for name, old, new in zip(parts, *(right_shares(*of_both) for of_both in found), strict=True):
        for audit, shares in zip(judged, (old, new), strict=True):
            for head, share in shares.items():
                audit.setdefault(head, {})[f"{name}_train"] = share
        what = f"partner first of {items} (chance {chance[name]:.2g})" if ranked else "accuracy"
        rows += [(f"{name}: {key}, {what}", old[key], new[key]) for key in old]
    # A share of partners found first is no accuracy of a class.
    verdict = verdict_without_gold(
        judged[1],
        judged[0],
        forget="pairs" if ranked else kind,
        sizes={f"{name}_train": len(part) for name, part in parts.items()},
    )
    return {
        "verdict": asdict(verdict),
        "sizes": {f"{name} items": len(part) for name, part in parts.items()},
        "rows": rows,
        "pool": {"pairs": items, "chance": chance} if ranked else None,
    }


def load(job: Job) -> tuple[Any, PairedData, Names]:
    """The model, the data, and what their classes and items are called.

    Raises:
        OSError, ValueError, TypeError, ImportError: see ``load_user_model``, ``named_model``, ``load_pairs`` and
            ``load_captions``.
    """
    if not job.named:
        assert job.weights is not None
        return load_user_model(job.model, job.weights), *load_pairs(job.data)
    found = named_model(job.model, job.weights, argument="weights")
    if not found.trained:
        raise ValueError(f"weights: expected a file of trained weights for {job.model}, which has none, got none")
    model = cast(nn.Module, found.factory()).eval()
    if job.data.suffix == ".npz":
        data, names = load_pairs(job.data)
        if data.visual.is_floating_point() and not 0 <= float(data.visual.min()) <= float(data.visual.max()) <= 1:
            raise ValueError(
                f"path: expected uint8 pixels or numbers in [0, 1] as visual in {job.data}, got numbers from "
                f"{float(data.visual.min()):.4g} to {float(data.visual.max()):.4g}"
            )
        return model, data, names
    return model, *load_captions(job.data, found.image_shape, found.tokenizer.encode, job.options)


def load_user_model(make: str, weights: Path) -> Any:
    """The model of ``module:function`` with the weights of a safetensors file or of ``torch.save(state_dict)``.

    Raises:
        ValueError: not of that form, no such module, function or file, weights that do not fit.
        TypeError: the function returned no module.
    """
    module_name, _, function = make.partition(":")
    if not module_name or not function:
        raise ValueError(f"model: expected 'module:function', got {make!r}")
    try:
        # As python -m does: modules of the folder one stands in.
        sys.path.insert(0, str(Path.cwd()))
        made = getattr(importlib.import_module(module_name), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model: expected a function {function} in a module {module_name}, got {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not isinstance(made, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module from {make}, got {type(made).__name__}")
    return from_checkpoint(lambda: made, weights, "weights")().eval()


def split(data: PairedData, job: Job, names: Names) -> tuple[PairedData, PairedData]:
    """What to forget, and the rest.

    Args:
        data: all items.
        job: says which are to be forgotten.
        names: of the classes and the items.

    Returns:
        The two parts, in the order of ``data``.

    Raises:
        ValueError: a class, an id or a file that no item has; items without labels where classes are to be forgotten.
    """
    if job.config.forget == "class":
        if not data.labelled:
            raise ValueError(f"data: expected labels to forget classes, got items without in {job.data}")
        for name in job.classes:
            if name not in names.classes:
                known = [*names.classes][:SHOWN] + ["…"] * (len(names.classes) > SHOWN)
                raise ValueError(f"classes: expected some of [{', '.join(known)}], got {name}")
        gone = torch.isin(data.labels, torch.tensor([names.classes[name] for name in job.classes], dtype=torch.int64))
        return data[gone], data[~gone]
    wanted: list[int] = []
    for line in _wanted(job):
        # Several numbers may stand in a line; a name may have blanks in it.
        for name in [line] if names.find(line) else line.split():
            found = names.find(name)
            if not found:
                what = "ids or pictures" if names.files else "ids"
                raise ValueError(f"ids: expected {what} of items in {job.data}, got {line!r}, which none has")
            wanted += found
    gone = torch.isin(data.ids, torch.tensor(wanted, dtype=torch.int64))
    return data[gone], data[~gone]


def _wanted(job: Job) -> Sequence[str]:
    """The names of the items to forget."""
    if not isinstance(job.ids, Path):
        return job.ids or ()
    if not job.ids.is_file():
        raise ValueError(f"ids: expected a file, got {job.ids}, which is not there")
    with readable(job.ids, "ids"):
        return list(filter(None, map(str.strip, job.ids.read_text(encoding="utf-8-sig").splitlines())))


def _own(model: Any) -> Any:
    """What is written: of a named model the library's own, so that the library reads it."""
    return model.model if isinstance(model, ClipEncoder) else model


def _data_hash(data: PairedData) -> str:
    digest = hashlib.sha256()
    for value in (data.visual, data.other, data.labels, data.ids):
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _embeddings(
    before: TwoModalityModel, after: TwoModalityModel, forget: PairedData, retain: PairedData, most: int = 400
) -> dict[str, Tensor]:
    parts = [data.batch(torch.linspace(0, len(data) - 1, min(most, len(data))).long()) for data in (retain, forget)]
    return {
        "labels": torch.cat([part.labels for part in parts]).cpu(),
        "forgotten": torch.cat([torch.full((len(p),), i == 1) for i, p in enumerate(parts)]),
        "before": torch.cat([embed(before, part)[0] for part in parts]).cpu(),
        "after": torch.cat([embed(after, part)[0] for part in parts]).cpu(),
    }
