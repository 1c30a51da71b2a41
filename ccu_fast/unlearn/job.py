"""One run on a user's own model and data: what ``ccu-fast unlearn`` does, from its settings to the files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ccu_fast.data.captions import Options
from ccu_fast.data.load import load_captions, load_pairs
from ccu_fast.data.names import Names
from ccu_fast.data.paired import PairedData
from ccu_fast.distributed.ranks import Ranks, processes
from ccu_fast.files import after_the_work, locked, output_folder, readable, write_whole
from ccu_fast.models.clip import ClipEncoder
from ccu_fast.models.named import Model, named_model
from ccu_fast.models.weights import from_checkpoint
from ccu_fast.runs.checkpoint import Checkpoint, read_state
from ccu_fast.runs.progress import Progress
from ccu_fast.runs.provenance import save_model, saved_state, tensors_hash
from ccu_fast.unlearn.audit import auc, verdict_without_gold
from ccu_fast.unlearn.audit.membership import confidence
from ccu_fast.unlearn.loop import answers, chances, embed, right_shares
from ccu_fast.unlearn.method import check_run, run_ccu
from ccu_fast.unlearn.model import TwoModalityModel, check_problem
from ccu_fast.unlearn.settings import Job
from ccu_fast.unlearn.users_code import made_by

WRITTEN = ("checkpoint.pt", "model.safetensors", "results.json", "report.html")  # the last by the command
UNSEEN, UNSEEN_OF_CLASS = "unseen", "unseen, to forget"  # sets in the rows of a result
SHOWN = 20  # names of classes in an error


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
    model, data, names, unseen = load(job)
    test = load_test(job, data, names, unseen)
    model = model.to(job.device)
    forget, retain = (part.to(job.device) for part in split(data, job, names))
    unseen, test = (part if part is None else part.to(job.device) for part in (unseen, test))
    kind, group = job.config.forget, job.config.group
    check_problem(model, forget, retain, kind, names.classes, unseen=unseen, test=test, group=group)
    levels = None if kind == "class" else unseen
    check_run(model, forget, retain, job.config, unseen=levels)
    saved_state(_own(model))  # what cannot be written is refused before the work
    written = out / "model.safetensors"
    with processes(job.device) as (rank, world), _own_folder(out, job, fresh, rank, world):
        checkpoint = Checkpoint(out / "checkpoint.pt", settings=asdict(job.config))
        done = run_ccu(
            model,
            forget,
            retain,
            job.config,
            unseen=levels,
            checkpoint=checkpoint,
            progress=progress,
            group=dist.group.WORLD if world > 1 else None,
        )
        if rank:
            return None
        with after_the_work(f"the finished run is in {checkpoint.path}"):
            provenance = save_model(_own(done.model), written, _provenance(job, model, forget, retain, unseen, world))
        with after_the_work(f"the unlearned model is in {written}"):
            cost = {"steps": done.steps, "items": done.items, "seconds": round(done.seconds, 2)}
            figures = _figures(model, done.model, forget, retain, unseen if test is None else test, kind)
            result = {"provenance": provenance, "cost": cost, **figures}
            result["losses"] = done.losses
            write_whole(out / "results.json", json.dumps(result, indent=1) + "\n")
            pictured = _embeddings(model, done.model, forget, retain) if data.labelled else None
            return {**result, "embeddings": pictured}


@contextmanager
def _own_folder(out: Path, job: Job, fresh: bool, rank: int, world: int) -> Iterator[None]:
    """The folder, made if it can be used, for this run alone."""
    first: Callable[[Callable[[], None]], None] = Ranks().of_first if world > 1 else (lambda take: take())
    first(partial(_take, out, job, fresh=False))
    output_folder(out)
    with locked(out / f"lock-{rank}"):
        first(partial(_take, out, job, fresh))
        yield


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


def _provenance(
    job: Job, model: Any, forget: PairedData, retain: PairedData, unseen: PairedData | None, world: int
) -> dict[str, Any]:
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
        "unseen_sha256": None if unseen is None else _data_hash(unseen),
    }


def _figures(
    before: TwoModalityModel,
    after: TwoModalityModel,
    forget: PairedData,
    retain: PairedData,
    unseen: PairedData | None,
    kind: str,
) -> Any:
    """What both models make of the sets: "sizes", "rows", "pool" and "verdict" of a result."""
    parts = {"forget": forget, "retain": retain}
    items = len(forget) + len(retain)
    found = [[answers(model, part) for part in parts.values()] for model in (before, after)]
    ranked = not found[0][0].logits
    chance = dict(zip(parts, chances(*parts.values()), strict=True)) if ranked else {}
    shares = [right_shares(*of_both) for of_both in found]
    named = {"forget": "forget_train", "retain": "retain_train"}
    judged: list[dict[str, Any]] = [{}, {}]
    pools = dict.fromkeys(parts, items)
    new = {} if unseen is None else _unseen_parts(unseen, forget, kind)
    if new:
        fresh = [[answers(model, part) for part in new.values()] for model in (before, after)]
        like = UNSEEN_OF_CLASS if kind == "class" else UNSEEN  # a class is told from others whether forgotten or not
        for number, of_new in enumerate(fresh):
            shares[number] += right_shares(*of_new)
            if like in new:
                judged[number]["mia_auc"] = auc(confidence(found[number][0]), confidence(of_new[[*new].index(like)]))
        parts, pools = parts | new, pools | dict.fromkeys(new, sum(map(len, new.values())))
        named |= {UNSEEN: "retain_test", UNSEEN_OF_CLASS: "forget_test"}
        chance |= zip(new, chances(*new.values()), strict=True) if ranked else {}
    rows = []
    for name, old, new in zip(parts, *shares, strict=True):
        for audit, share_of in zip(judged, (old, new), strict=True):
            for head, share in share_of.items():
                audit.setdefault(head, {})[named[name]] = share
        what = f"partner first of {pools[name]} (chance {chance[name]:.2g})" if ranked else "accuracy"
        rows += [(f"{name}: {key}, {what}", old[key], new[key]) for key in old]
    if "mia_auc" in judged[0]:
        rows.append(("membership of forgotten against unseen, AUC", judged[0]["mia_auc"], judged[1]["mia_auc"]))
    # A share of partners found first is no accuracy of a class.
    verdict = verdict_without_gold(
        judged[1],
        judged[0],
        forget="pairs" if ranked else kind,
        sizes={named[name]: len(part) for name, part in parts.items()},
    )
    return {
        "verdict": asdict(verdict),
        "sizes": {f"{name} items": len(part) for name, part in parts.items()},
        "rows": rows,
        "pool": {"pairs": items, "chance": chance} if ranked else None,
    }


def _unseen_parts(unseen: PairedData, forget: PairedData, kind: str) -> dict[str, PairedData]:
    """Unseen items by what is expected of them: those of a forgotten class are to be forgotten too."""
    gone = torch.isin(unseen.labels, forget.labels) if kind == "class" else torch.zeros_like(unseen.labels).bool()
    return {name: unseen[of] for name, of in ((UNSEEN, ~gone), (UNSEEN_OF_CLASS, gone)) if bool(of.any())}


def load(job: Job) -> tuple[Any, PairedData, Names, PairedData | None]:
    """The model, the data, what their classes and items are called, and unseen items.

    The unseen items have the labels that the data give to classes of the same name, and ids of their own.

    Raises:
        OSError, ValueError, TypeError, ImportError: see ``load_user_model``, ``named_model``, ``load_pairs`` and
            ``load_captions``; an unseen item of a class that the data do not have.
    """
    read: Callable[[Path], tuple[PairedData, Names]]
    if job.named:
        found = named_model(job.model, job.weights, argument="weights")
        if not found.trained:
            raise ValueError(f"weights: expected a file of trained weights for {job.model}, which has none, got none")
        model: Any = cast(nn.Module, found.factory()).eval()
        read = partial(_read_pictures, found, job.options)
    else:
        assert job.weights is not None
        model, read = load_user_model(job.model, job.weights), load_pairs
    data, names = read(job.data)
    if job.unseen is None:
        return model, data, names, None
    return model, data, names, _with_names_of(data, names, "unseen", job.unseen, read, job.config.group)


def load_test(job: Job, data: PairedData, names: Names, unseen: PairedData | None) -> PairedData | None:
    """The test pairs of a job as :func:`load` gives unseen ones, with ids that those do not have; None without."""
    if job.test is None:
        return None
    read = partial(_read_pictures, named_model(job.model), job.options) if job.named else load_pairs
    last = data if unseen is None else unseen
    return _with_names_of(last, names, "test", job.test, read, job.config.group)


def _read_pictures(model: Model, options: Options, path: Path) -> tuple[PairedData, Names]:
    """Pictures and captions, or arrays of pixels and token ids."""
    if path.suffix != ".npz":
        return load_captions(path, model.image_shape, model.tokenizer.encode, options)
    data, names = load_pairs(path)
    if data.visual.is_floating_point() and not 0 <= float(data.visual.min()) <= float(data.visual.max()) <= 1:
        raise ValueError(
            f"path: expected uint8 pixels or numbers in [0, 1] as visual in {path}, got numbers from "
            f"{float(data.visual.min()):.4g} to {float(data.visual.max()):.4g}"
        )
    return data, names


def _with_names_of(
    last: PairedData,
    names: Names,
    what: str,
    path: Path,
    read: Callable[[Path], tuple[PairedData, Names]],
    group: int,
) -> PairedData:
    """Items with the labels of known names, and ids after those of ``last``."""
    unseen, own = read(path)
    labels = None
    if unseen.labelled:
        for name in own.classes:
            if name not in names.classes:
                raise ValueError(f"{what}: expected classes of the data, got {name} in {path}")
        new = {label: names.classes[name] for name, label in own.classes.items()}
        labels = torch.tensor([new[label] for label in unseen.labels.tolist()], dtype=torch.int64)
    ids = torch.arange(len(unseen)) + (int(last.ids.max()) // group + 1) * group  # nor views of a thing of the data
    return PairedData(unseen.visual, unseen.other, labels, ids)  # type: ignore[arg-type]


def load_user_model(make: str, weights: Path, argument: str = "weights") -> Any:
    """The model of ``module:function`` with the weights of a safetensors file or of ``torch.save(state_dict)``.

    Raises:
        ValueError: not of that form, no such module, function or file, weights that do not fit.
        TypeError: the function returned no module.
    """
    made = made_by("model", make)
    return from_checkpoint(lambda: made, weights, argument)().eval()


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
