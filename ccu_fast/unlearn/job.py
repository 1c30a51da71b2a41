"""One run on a user's own model and data: what ``ccu-fast unlearn`` does, from its settings to the files."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
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
from ccu_fast.runs.checkpoint import Checkpoint
from ccu_fast.runs.kept import Kept, remove
from ccu_fast.runs.progress import Progress, silent
from ccu_fast.runs.provenance import items_hash, save_model, saved_state, tensors_hash
from ccu_fast.unlearn.alarms import KEPT, NotFinite, alarm_of, kept_places
from ccu_fast.unlearn.audit import auc, verdict_without_gold
from ccu_fast.unlearn.audit.membership import confidence
from ccu_fast.unlearn.audit.verdict import with_lost_places
from ccu_fast.unlearn.card import card
from ccu_fast.unlearn.loop import CHUNK, answers, chances, embed, right_shares, same_thing
from ccu_fast.unlearn.method import KEPT_FILES, check_trainable, keep_embeddings, run_ccu
from ccu_fast.unlearn.model import TwoModalityModel, check_problem, heads
from ccu_fast.unlearn.outputs import json_of, take, write_failure
from ccu_fast.unlearn.parameters import matches
from ccu_fast.unlearn.precision import under_autocast
from ccu_fast.unlearn.settings import Job
from ccu_fast.unlearn.stopping import held_out_of
from ccu_fast.unlearn.unseen import sample

PATIENCE = timedelta(days=1)  # that processes have with the first one's figures
UNSEEN, UNSEEN_OF_CLASS = "unseen", "unseen, to forget"  # sets in the rows of a result
SHOWN = 20  # names of classes in an error


def run_job(
    job: Job,
    out: Path,
    *,
    fresh: bool = False,
    progress: Progress | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Load, check, unlearn, save.

    Under ``torchrun`` the processes share the run (:mod:`ccu_fast.unlearn.parallel`): each loads the model and the data
    and embeds its part of every batch; the first reports progress and reads and writes the files.

    Args:
        job: the settings.
        out: folder of ``model.safetensors``, ``card.md``, ``results.json`` and ``checkpoint.pt``; made if needed. A
            killed run goes on from its checkpoint; a finished one is not run again.
        fresh: throw what an earlier run left in ``out`` away first.
        progress: called every few steps as progress(stage, done, total, note).
        report: called on the first process with the result, or with the alarm of a run that failed, once all else is
            written; the others wait for it.

    Returns:
        What ``results.json`` holds: "alarm" (:mod:`ccu_fast.unlearn.alarms`; None for none), "provenance" (as in the
        saved model), "cost", "verdict" ("kind" and "text" of
        :func:`ccu_fast.unlearn.audit.verdict_without_gold`), "sizes", "losses", "rows" (name, before, after) and, for a
        model without heads or items without labels, the "pool" that a pair's partner is sought in, with the share that
        would be right by chance. Besides, "embeddings" for a picture. On the processes that are not the first "alarm"
        alone.

    Raises:
        OSError: ``out`` cannot be written, holds such files that are not of an earlier run, or has another process at
            work in it.
        NotFinite: the steps made the loss or a weight infinite; ``results.json`` then holds the alarm alone.
        ValueError, TypeError, FloatingPointError, ImportError: see :func:`ccu_fast.unlearn.unlearn`, ``read_job`` and
            ``load_pairs``.
    """
    model, data, names, unseen = load(job)
    job = replace(job, config=replace(job.config, trainable=in_own_names(model, job.config.trainable)))
    model = under_autocast(model, job.dtype).to(job.device)
    forget, retain = (part.to(job.device) for part in split(data, job, names))
    unseen = None if unseen is None else unseen.to(job.device)
    for part in (forget, retain) if unseen is None else (forget, retain, unseen):
        if part.on_disk:  # what cannot be read is said before the work
            items_hash(part, progress or silent)
    check_problem(model, forget, retain, job.config.forget, names.classes, unseen=unseen)
    check_trainable(model, forget, job.config)
    held_out = None
    if job.config.early_stop and unseen is not None:
        held_out = held_out_of(model, forget, unseen, job.config.forget, job.stop)
    saved_state(_own(model))  # what cannot be written is refused before the work
    output_folder(out)
    written = out / "model.safetensors"
    with processes(job.device, timeout=PATIENCE) as (rank, world), locked(out / f"lock-{rank}"):
        of_first = Ranks().of_first if world > 1 else _called
        of_first(partial(take, out, job, fresh))
        checkpoint = Checkpoint(out / "checkpoint.pt", settings={**asdict(job.config), "dtype": job.dtype})
        group = dist.group.WORLD if world > 1 else None
        known = None if job.config.forget == "class" else unseen
        kept = keep_embeddings(checkpoint.path, model, forget, retain, job.config, known, group, dtype=job.dtype)
        try:
            done = run_ccu(
                model,
                forget,
                retain,
                job.config,
                unseen=known,
                held_out=held_out,
                kept=kept,
                checkpoint=checkpoint,
                progress=progress,
                group=group,
                scaled=job.dtype == "fp16",
            )
        except NotFinite as error:
            failure = {"alarm": error.alarm.because(str(error))}
            of_first(partial(write_failure, failure, out, report))
            raise

        result: dict[str, Any] = {}

        def finish() -> Any:
            with after_the_work(f"the finished run is in {checkpoint.path}"):
                made = save_model(_own(done.model), written, _provenance(job, model, forget, retain, unseen, world))
            with after_the_work(f"the unlearned model is in {written}"):
                cost = {"steps": done.steps, "items": done.items, "seconds": round(done.seconds, 2)}
                judged = retain if job.judged is None else sample(retain, job.judged, job.config.seed)
                figures = _figures(model, done.model, forget, judged, unseen, job.config.forget, kept, len(retain))
                if len(judged) < len(retain):
                    figures["sizes"]["retain items not judged"] = len(retain) - len(judged)
                result.update(**figures, provenance=made, cost=cost, losses=done.losses)
                write_whole(out / "results.json", json_of(result))
                write_whole(out / "card.md", card(result))
                remove(checkpoint.path, KEPT_FILES)
                result["embeddings"] = _embeddings(model, done.model, forget, retain) if data.labelled else None
            if report is not None:
                report(result)
            return result["alarm"]

        # Every process learns how the run ended, and only when all is written: torchrun ends all once one has.
        alarm = of_first(finish)
        return result or {"alarm": alarm}


def _called(make: Callable[[], Any]) -> Any:
    return make()


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
        "dtype": job.dtype,
        "original_sha256": tensors_hash(_own(model).state_dict()),
        "forget_sha256": items_hash(forget),
        "retain_sha256": items_hash(retain),
        "unseen_sha256": None if unseen is None else items_hash(unseen),
    }


def _figures(
    before: TwoModalityModel,
    after: TwoModalityModel,
    forget: PairedData,
    retain: PairedData,
    unseen: PairedData | None,
    kind: str,
    kept: Kept,
    retained: int,
) -> Any:
    """What both models make of the sets: "alarm", "verdict", "sizes", "rows" and "pool" of a result.

    Held are the answers of one model at a time, where both embed the retained items, and no inputs. ``retained`` is the
    size of the whole retain set, of which ``retain`` may be a part; what the original says is kept as the method does.
    """
    parts = {"forget": forget, "retain": retain}
    new = {} if unseen is None else _unseen_parts(unseen, forget, kind)
    items = len(forget) + len(retain)
    ranked = not (forget.labelled and heads(before))
    things = [same_thing(*of.values()) if ranked and of else None for of in (parts, new)]
    chance: dict[str, float] = {}
    for of, thing in zip((parts, new), things, strict=True) if ranked else ():
        chance |= zip(of, chances(*of.values(), thing=thing), strict=True)
    named = {"forget": "forget_train", "retain": "retain_train"}
    named |= {UNSEEN: "retain_test", UNSEEN_OF_CLASS: "forget_test"}
    like = UNSEEN_OF_CLASS if kind == "class" else UNSEEN  # a class is told from others whether forgotten or not
    judged: list[dict[str, Any]] = [{}, {}]
    shares, places = [], []
    for model, audit in zip((before, after), judged, strict=True):
        known = {}
        for name, part in parts.items():
            stored = "judged" if name == "retain" and len(part) < retained else name
            make = partial(embed, model, part)
            known[name] = answers(model, part, kept.of(stored, make, about=len(part)) if model is before else make())
        fresh = {name: answers(model, part) for name, part in new.items()}
        places.append(known["retain"].visual)
        shares.append(right_shares(*known.values(), thing=things[0]))
        if fresh:
            shares[-1] += right_shares(*fresh.values(), thing=things[1])
        if like in fresh:
            audit["mia_auc"] = auc(confidence(known["forget"]), confidence(fresh[like]))
    pools = dict.fromkeys(parts, items) | dict.fromkeys(new, sum(map(len, new.values())))
    parts |= new
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
    in_place = kept_places(*places)
    if in_place is not None:
        rows.append(("retain: visual embeddings, correlation with those before", 1.0, in_place))
        if in_place < KEPT:
            verdict = with_lost_places(verdict, in_place, KEPT)
    return {
        "alarm": alarm_of(verdict),
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
        read = partial(_read_pictures, found, job.options, job.memory << 20)
    else:
        assert job.weights is not None
        model, read = load_user_model(job.model, job.weights), partial(load_pairs, memory=job.memory << 20)
    data, names = read(job.data)
    return (
        model,
        data,
        names,
        None if job.unseen is None else _with_names_of(data, names, *read(job.unseen), job.unseen, job.config.group),
    )


def _read_pictures(model: Model, options: Options, memory: int, path: Path) -> tuple[PairedData, Names]:
    """Pictures and captions, or arrays of pixels and token ids."""
    if path.suffix != ".npz" and not (path / "visual.npy").is_file():
        return load_captions(path, model.image_shape, model.tokenizer.encode, options, memory)
    data, names = load_pairs(path, memory)
    if data.visual.is_floating_point():
        least, most = torch.stack([torch.stack(part.aminmax()) for part in data.visual.split(CHUNK)]).T.tolist()
        if not 0 <= min(least) <= max(most) <= 1:
            raise ValueError(
                f"path: expected uint8 pixels or numbers in [0, 1] as visual in {path}, got numbers from "
                f"{min(least):.4g} to {max(most):.4g}"
            )
    return data, names


def _with_names_of(
    data: PairedData, names: Names, unseen: PairedData, own: Names, path: Path, group: int
) -> PairedData:
    labels = None
    if unseen.labelled:
        for name in own.classes:
            if name not in names.classes:
                raise ValueError(f"unseen: expected classes of the data, got {name} in {path}")
        new = {label: names.classes[name] for name, label in own.classes.items()}
        labels = torch.tensor([new[label] for label in unseen.labels.tolist()], dtype=torch.int64)
    ids = torch.arange(len(unseen)) + (int(data.ids.max()) // group + 1) * group  # nor views of a thing of the data
    return PairedData(unseen.visual, unseen.other, labels, ids)  # type: ignore[arg-type]


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


def in_own_names(model: Any, patterns: Sequence[str]) -> tuple[str, ...]:
    """Patterns of a library's own names of parameters, as the CLIP that wraps its model has them."""
    names = [name for name, _ in model.named_parameters()]
    wrapped = isinstance(model, ClipEncoder)
    return tuple(p if not wrapped or any(matches(name, [p]) for name in names) else f"model.{p}" for p in patterns)


def _own(model: Any) -> Any:
    """What is written: of a named model the library's own, so that the library reads it."""
    return model.model if isinstance(model, ClipEncoder) else model


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
