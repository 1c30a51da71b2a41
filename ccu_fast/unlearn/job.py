"""One run on a user's own model and data: what ``ccu-fast unlearn`` does, from its settings to the files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

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
from ccu_fast.runs.kept import remove
from ccu_fast.runs.progress import Progress, silent
from ccu_fast.runs.provenance import Hashes, items_hash, save_model, saved_state
from ccu_fast.unlearn.alarms import NotFinite
from ccu_fast.unlearn.audit.text_questions import TextQuestions
from ccu_fast.unlearn.card import card
from ccu_fast.unlearn.described import library_model, provenance
from ccu_fast.unlearn.figures import figures_of, pictured, text_figures
from ccu_fast.unlearn.loop import CHUNK
from ccu_fast.unlearn.method import KEPT_FILES, check_run, keep_embeddings, run_ccu
from ccu_fast.unlearn.model import check_problem
from ccu_fast.unlearn.outputs import earlier_run, json_of, take, write_failure
from ccu_fast.unlearn.parameters import matches
from ccu_fast.unlearn.precision import under_autocast
from ccu_fast.unlearn.settings import Job
from ccu_fast.unlearn.stopping import held_out_of
from ccu_fast.unlearn.unseen import sample
from ccu_fast.unlearn.users_code import made_by

PATIENCE = timedelta(days=1)  # that processes have with the first one's figures
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
        would be right by chance. With ``job.text`` also "text_membership", see
        :func:`ccu_fast.unlearn.figures.text_figures`. Besides, "embeddings" for a picture. On the processes that are
        not the first "alarm" alone.

    Raises:
        OSError: ``out`` cannot be written, holds such files that are not of an earlier run, or has another process at
            work in it.
        NotFinite: the steps made the loss or a weight infinite; ``results.json`` then holds the alarm alone.
        ValueError, TypeError, FloatingPointError, ImportError: see :func:`ccu_fast.unlearn.unlearn`, ``read_job`` and
            ``load_pairs``.
    """
    heard = progress or silent
    given = opened(job, heard)
    heard("checking the settings on the model", 0, 1, "")
    job, model, forget, retain = given.job, given.model, given.forget, given.retain
    unseen, test, config, kind = given.unseen, given.test, given.job.config, given.job.config.forget
    levels = None if kind == "class" else unseen
    fixed, hashes = check_run(model, forget, retain, config, unseen=levels), Hashes()
    questions = questions_of(given)
    held_out = held_out_of(model, forget, unseen, kind, job.stop) if config.early_stop and unseen is not None else None
    saved_state(library_model(model))  # what cannot be written is refused before the work
    written = out / "model.safetensors"
    with (
        processes(job.device, timeout=PATIENCE) as (rank, world),
        _own_folder(out, job, fresh, rank, world) as of_first,
    ):
        checkpoint = Checkpoint(out / "checkpoint.pt", settings={**asdict(config), "dtype": job.dtype})
        group = dist.group.WORLD if world > 1 else None
        beside = checkpoint.path, model, forget, retain, config, levels, group
        kept = keep_embeddings(*beside, dtype=job.dtype, hashes=hashes)
        try:
            done = run_ccu(
                model,
                forget,
                retain,
                config,
                unseen=levels,
                held_out=held_out,
                kept=kept,
                fixed=fixed,
                hashes=hashes,
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
            heard("writing the model", 0, 1, "")
            with after_the_work(f"the finished run is in {checkpoint.path}"):
                sets = {"forget": forget, "retain": retain, "unseen": unseen, "test": test}
                made = save_model(
                    library_model(done.model),
                    written,
                    provenance(job.config, model, sets, hashes, job.model, job.classes, job.dtype, world),
                )
            with after_the_work(f"the unlearned model is in {written}"):
                cost = {"steps": done.steps, "items": done.items, "seconds": round(done.seconds, 2)}
                heard("measuring before and after", 0, 1, "")
                judged = retain if job.judged is None else sample(retain, job.judged, config.seed)
                new = ("unseen", unseen) if test is None else ("test", test)
                figures = figures_of(model, done.model, forget, judged, new[1], kind, kept, len(retain), new[0])
                if len(judged) < len(retain):
                    figures["sizes"]["retain items not judged"] = len(retain) - len(judged)
                if questions is not None:
                    weights = made["weights_sha256"]
                    told = text_figures(questions, model, done.model, kept, weights, heard)
                    figures["text_membership"] = told
                result.update(**figures, provenance=made, cost=cost, losses=done.losses)
                write_whole(out / "results.json", json_of(result))
                write_whole(out / "card.md", card(result))
                result["embeddings"] = pictured(model, done.model, forget, retain) if given.data.labelled else None
            if report is not None:
                report(result)
            remove(checkpoint.path, KEPT_FILES)  # not before the last file: what was searched for took long
            return result["alarm"]

        # Every process learns how the run ended, and only when all is written: torchrun ends all once one has.
        alarm = of_first(finish)
        return result or {"alarm": alarm}


@contextmanager
def _own_folder(
    out: Path, job: Job, fresh: bool, rank: int, world: int
) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """The folder, made if it can be used, for this run alone; gives what the first process is to do for all."""
    of_first: Callable[[Callable[[], Any]], Any] = Ranks().of_first if world > 1 else (lambda make: make())
    of_first(partial(earlier_run, out, job))
    output_folder(out)
    with locked(out / f"lock-{rank}"):
        of_first(partial(take, out, job, fresh))
        yield of_first


@dataclass(frozen=True)
class Opened:
    """A job whose model and data were read and checked, on its device.

    Attributes:
        job: with patterns of parameters as the model has them.
        model: its forward passes in the job's dtype.
        data: all items that it was trained on.
        forget, retain: their parts.
        unseen, test: None without any.
    """

    job: Job
    model: Any
    data: PairedData
    forget: PairedData
    retain: PairedData
    unseen: PairedData | None
    test: PairedData | None


def opened(job: Job, progress: Progress = silent) -> Opened:
    """Read and check what a run, or a comparison, is given.

    Raises:
        OSError, ValueError, TypeError, ImportError: see :func:`load`, :func:`split` and
            :func:`ccu_fast.unlearn.model.check_problem`.
    """
    progress("reading the model and the data", 0, 1, "")
    model, data, names, unseen, test = load(job)
    config = replace(job.config, trainable=in_own_names(model, job.config.trainable))
    model = under_autocast(model, job.dtype).to(job.device)
    forget, retain = (part.to(job.device) for part in split(data, job, names))
    unseen, test = (part if part is None else part.to(job.device) for part in (unseen, test))
    for part in (forget, retain, unseen, test):
        if part is not None and part.on_disk:  # what cannot be read is said before the work
            items_hash(part, progress)
    check_problem(model, forget, retain, config.forget, names.classes, unseen=unseen, test=test, group=config.group)
    return Opened(replace(job, config=config), model, data, forget, retain, unseen, test)


def questions_of(given: Opened) -> TextQuestions | None:
    """What models are asked by text alone; None where the job does not want it.

    New are the test items, without those the unseen ones; where a class is forgotten, those of that class.

    Raises:
        ValueError, ImportError: see :meth:`ccu_fast.unlearn.audit.text_questions.TextQuestions.of`.
    """
    job, new = given.job, given.unseen if given.test is None else given.test
    if job.text is None:
        return None
    if job.config.forget == "class" and new is not None:
        new = new.select(torch.isin(new.labels, given.forget.labels))
    tokenizer = named_model(job.model).tokenizer if job.named else None
    sets = given.forget, given.retain, new
    config = job.config
    return TextQuestions.of(job.text, given.model, *sets, tokenizer=tokenizer, group=config.group, seed=config.seed)


def load(job: Job) -> tuple[Any, PairedData, Names, PairedData | None, PairedData | None]:
    """The model, the data, what their classes and items are called, unseen items, and test items.

    The last two have the labels that the data give to classes of the same name, and ids of their own. The captions of
    all sets are token ids of one length.

    Raises:
        OSError, ValueError, TypeError, ImportError: see ``load_user_model``, ``named_model``, ``load_pairs`` and
            ``load_captions``; an unseen item of a class that the data do not have.
    """
    read: Callable[[Path], tuple[PairedData, Names]]
    found = named_model(job.model, job.weights, argument="weights") if job.named else None
    if found is not None:
        if not found.trained:
            raise ValueError(f"weights: expected a file of trained weights for {job.model}, which has none, got none")
        model: Any = cast(nn.Module, found.factory()).eval()
        read = partial(_read_pictures, found, job.options, job.memory << 20)
    else:
        assert job.weights is not None
        model, read = load_user_model(job.model, job.weights), partial(load_pairs, memory=job.memory << 20)
    data, names = read(job.data)
    sets = {"data": data}
    for what, path in (("unseen", job.unseen), ("test", job.test)):
        if path is not None:
            last = [*sets.values()][-1]
            sets[what] = _with_names_of(last, names, what, path, read, job.config.group)
    if found is not None:
        _to_one_length([*sets.values()], found.tokenizer.pad)
    return model, data, names, sets.get("unseen"), sets.get("test")


def _to_one_length(parts: Sequence[PairedData], pad: int) -> None:
    """Lengthen token ids, of which each set has as many as its longest caption."""
    if all(isinstance(part.other, torch.Tensor) and part.other.ndim == 2 for part in parts):
        length = max(part.other.shape[1] for part in parts)
        for part in parts:
            object.__setattr__(part, "other", F.pad(part.other, (0, length - part.other.shape[1]), value=pad))


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
    made = copy.deepcopy(made_by("model", make))  # a function may return the same one again, which is not to change
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


def in_own_names(model: Any, patterns: Sequence[str]) -> tuple[str, ...]:
    """Patterns of a library's own names of parameters, as the CLIP that wraps its model has them."""
    names = [name for name, _ in model.named_parameters()]
    wrapped = isinstance(model, ClipEncoder)
    return tuple(p if not wrapped or any(matches(name, [p]) for name in names) else f"model.{p}" for p in patterns)
