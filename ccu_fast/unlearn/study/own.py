"""The comparison of methods on a user's own model and data, with or without a retrained model to measure against.

Every model is a part of its own: the original, the retrained one, and each method with each seed is run, audited and
written to ``parts/`` before the next begins, so that a killed comparison goes on where it was, and a method within its
steps from its checkpoint. A part of other settings, data or versions is made anew.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ccu_fast.files import locked, output_folder, write_whole
from ccu_fast.runs import cache
from ccu_fast.runs.checkpoint import Checkpoint
from ccu_fast.runs.kept import remove
from ccu_fast.runs.progress import Progress, renamed, silent
from ccu_fast.runs.provenance import Hashes, json_hash, saved_state, versions
from ccu_fast.unlearn.audit import verdict_without_gold
from ccu_fast.unlearn.audit.text_questions import FIGURES, TextQuestions, compared
from ccu_fast.unlearn.described import library_model
from ccu_fast.unlearn.job import opened, questions_of
from ccu_fast.unlearn.method import KEPT_FILES, check_run
from ccu_fast.unlearn.model import heads
from ccu_fast.unlearn.settings import Job
from ccu_fast.unlearn.study.compare import best_baseline
from ccu_fast.unlearn.study.gold import Gold
from ccu_fast.unlearn.study.measure import against_gold, measured, pictured, sizes_of
from ccu_fast.unlearn.study.methods import METHODS, STARTED, unlearned, why_not
from ccu_fast.unlearn.study.tasks import Scenario

# Of the kept parts. Raise it whenever a method or the audit gives other figures with the same settings and versions, or
# figures of another form.
FORMAT = 2
DEEP = ("original", "gold", "ccu")  # models that are looked into below the heads
# Errors that say what a method cannot do with this model and these items, not what is wrong with a file.
INAPPLICABLE = re.compile(r"(model|forget|retain|visual|unseen|keep|keep_other|trainable|lora|neighbours): expected")


@dataclass(frozen=True)
class Problem:
    """What every method is given.

    Attributes:
        job: the settings.
        original: the trained model, on the device.
        sets: what is forgotten, kept, held out and judged, on the device.
        gold: where a retrained model comes from; None without.
        ranked: whether the items choose their partner, for want of heads or labels.
        hashes: of the model and the sets, as a result has them.
        known: the same, for checkpoints.
        questions: what every model is asked by text alone, with each seed the same; None where that is not wanted.
    """

    job: Job
    original: Any
    sets: Scenario
    gold: Gold | None
    ranked: bool
    hashes: dict[str, str | None]
    known: Hashes
    questions: TextQuestions | None


def compare_own(job: Job, out: Path, *, progress: Progress = silent) -> dict[str, Any]:
    """Run every method on a user's model and data, and audit each on the test pairs.

    Args:
        job: the settings, with ``test``. ``job.compare`` says which methods run and what is measured. Its ``retrain``
            is called as train(model, pairs): a fresh model of ``job.model`` on the device, with random weights from the
            seed (of a transformers folder with those that lie there), and the retain set; with ``hidden`` "visual" as
            train(model, pairs, forget), where the other halves of the forget set may be learned from. It returns the
            trained model.
        out: folder of ``parts/``, ``models/`` (the retrained ones) and ``results.json``; made if needed.
        progress: called as progress(stage, done, total, note).

    Returns:
        What ``results.json`` holds, with the embeddings: "versions", "seeds", "provenance", "left_out" – pairs of what
        does not apply and why – and under "unlearn" by data, kind of forgetting and seed what
        :func:`ccu_fast.unlearn.study.run.run_task` returns for a task, with "gold" in place of "gold_mask" and
        "reference", the figures that the gaps are measured against. Without a retrained model that is None, there are
        no gaps, and the verdict is :func:`ccu_fast.unlearn.audit.verdict_without_gold`. With ``job.text`` each method
        has "text_membership" among its metrics, and each seed what was asked and what it comes to.

    Raises:
        ValueError, TypeError, ImportError: see :func:`ccu_fast.unlearn.job.run_job`; no test pairs, or of a class not
            both those that go and those that stay; a retrained model that cannot be.
        OSError: ``out`` cannot be written, holds files of something else, or another process is at work in it.
    """
    problem = _problem(job, progress)
    kind, seeds = job.config.forget, range(job.config.seed, job.config.seed + job.compare.seeds)
    _check_free(out)
    output_folder(out)
    with locked(out / "lock"):
        (out / "parts").mkdir(exist_ok=True)
        by_seed, left_out = {}, _not_measured(problem)
        for seed in seeds:
            by_seed[str(seed)], absent = _of_seed(problem, seed, out, progress)
            where = "" if len(seeds) == 1 else f" (seed {seed})"
            left_out |= {name: left_out.get(name, f"{why}{where}") for name, why in absent.items()}
        results = {
            "versions": versions(),
            "seeds": list(seeds),
            "provenance": {"model": job.model, **problem.hashes, "config": asdict(job.config)},
            "left_out": list(left_out.items()),
            "unlearn": {job.data.name: {kind: by_seed}},
        }
        write_whole(out / "results.json", json.dumps(cache.without(results, "embeddings"), indent=1) + "\n")
    return results


def _problem(job: Job, progress: Progress) -> Problem:
    """Load and check everything."""
    if job.test is None:
        raise ValueError("test: expected pairs in [data] of the settings that every model is judged by, got none")
    if job.dtype == "fp16":
        raise ValueError("dtype: expected fp32 or bf16 where methods are compared, got fp16, which scales its loss")
    # The baselines and what looks below the heads go through all items again and again.
    given = opened(replace(job, memory=sys.maxsize >> 20), progress)
    job, model, forget, retain, unseen = given.job, given.model, given.forget, given.retain, given.unseen
    test, kind = given.test, job.config.forget
    assert test is not None
    gone = torch.isin(test.labels, forget.labels) if kind == "class" else torch.zeros_like(test.labels).bool()
    for what, some in (("a class that stays", ~gone), ("the classes to forget", gone)):
        if not bool(some.any()) and (kind == "class" or some is not gone):
            raise ValueError(f"test: expected items of {what}, got none in {job.test}")
    if "ccu" in job.compare.chosen:
        check_run(model, forget, retain, job.config, unseen=None if kind == "class" else unseen)
    sets = Scenario(kind, given.data, forget, retain, test[~gone], test[gone] if kind == "class" else None, unseen)
    named = {"forget": forget, "retain": retain, "unseen": unseen, "test": test}
    known = Hashes()
    hashes = {f"{name}_sha256": None if part is None else known.of(part) for name, part in named.items()}
    gold = Gold.of(job, model, sets, known)
    if gold is not None and gold.made:
        saved_state(library_model(model))  # a retrained model is kept
    questions = questions_of(given)
    ranked = not (forget.labelled and heads(model))
    hashes = {"original_sha256": known.of(library_model(model)), **hashes}
    return Problem(job, model, sets, gold, ranked, hashes | ({} if gold is None else gold.hashes), known, questions)


def _check_free(out: Path) -> None:
    """Raise an error where the files of something else would be overwritten."""
    theirs = ["checkpoint.pt", "model.safetensors"]
    if not (out / "parts").is_dir():
        theirs += ["results.json", "report.html"]
    there = [name for name in theirs if (out / name).exists()]
    if there:
        raise FileExistsError(f"out: expected a folder without {there[0]}, or an earlier comparison's, got {out}")


def _not_measured(problem: Problem) -> dict[str, str]:
    """Of what is measured by default, or asked for in the settings of a single run, what does not apply, and why."""
    labelled, compare = problem.sets.forget.labelled, problem.job.compare
    absent = {}
    if problem.job.config.early_stop:
        absent["early_stop"] = "is of a single run: here every method takes the whole budget"
    if problem.job.judged is not None:
        absent["judged"] = "is of a single run: here all retained items are judged"
    if compare.probe and not _probed(problem):
        absent["linear probe"] = "needs items of several classes" if labelled else "needs items with labels"
    if compare.relearn and not _relearned(problem):
        absent["relearning"] = "needs items with labels and a visual head"
    return absent


def _probed(problem: Problem) -> bool:
    sets = problem.sets
    learned = sets.train if sets.forget_test is not None else sets.retain
    return problem.job.compare.probe and sets.forget.labelled and len(learned.labels.unique()) > 1


def _relearned(problem: Problem) -> bool:
    return problem.job.compare.relearn and problem.sets.forget.labelled and "visual" in heads(problem.original)


def _of_seed(problem: Problem, seed: int, out: Path, progress: Progress) -> tuple[dict[str, Any], dict[str, str]]:
    """What a task's run has for one seed, and by label why a method has no figures."""
    job, sets = problem.job, problem.sets
    methods = [name for name in STARTED if name in job.compare.chosen]
    names = ["original", *(["gold"] if problem.gold is not None else []), *methods]
    parts, absent = {}, {}
    for number, name in enumerate(names):
        progress(f"seed {seed}", number, len(names), _label(problem, name))
        found = _part(problem, name, seed, out, progress)
        if "left_out" in found:
            absent[_label(problem, name)] = found["left_out"]
        else:
            parts[name] = found
    progress(f"seed {seed}", len(names), len(names), "")
    metrics = {name: dict(found["audit"]) for name, found in parts.items()}
    sizes = sizes_of(sets, job.config.group)
    original = dict(parts["original"]["audit"])
    reference = None if problem.gold is None else _reference(problem, parts["gold"]["audit"], original)
    for name, values in metrics.items():
        if reference is not None:
            values |= against_gold(values, dict(values) if name == "gold" else reference, sizes)
        else:
            like = "pairs" if problem.ranked else job.config.forget
            values["verdict"] = asdict(verdict_without_gold(values, original, forget=like, sizes=sizes))
        values["label"] = _label(problem, name)
    costs = {name: found["cost"] for name, found in parts.items()}
    asked, told = problem.questions, {}
    if asked is not None:
        by_label = {}
        for name, values in metrics.items():
            values["text_membership"] = by_label[values["label"]] = parts[name]["text_membership"]
        told["text_membership"] = {**asked.asked, "text": compared(asked.chance, by_label)}
    whole = costs.get("gold", {}).get("seconds")
    value = {
        "setting": _setting(problem, seed, sizes),
        "metrics": metrics,
        "cost": {
            name: {**cost, "ratio": None if None in (whole, cost["seconds"]) else cost["seconds"] / whole}
            for name, cost in costs.items()
        },
        "reference": reference,
        "best_baseline": None if reference is None else best_baseline(metrics),
        "embeddings": _pictured(parts),
        **told,
    }
    return value, absent


def _part(problem: Problem, name: str, seed: int, out: Path, progress: Progress) -> dict[str, Any]:
    job = problem.job
    fixed = name == "original" or (name == "gold" and problem.gold is not None and not problem.gold.made)
    config = asdict(replace(job.config, seed=0 if fixed else seed))
    flags = {"probe": _probed(problem), "relearn": _relearned(problem), "membership": job.compare.membership}
    settings = [name, config, flags, job.compare.retrieval, job.compare.hidden, str(job.device), job.dtype]
    key = json_hash([{"own": FORMAT}, versions(), problem.hashes, settings])
    stem = name.replace(", ", "-") + ("" if fixed else f"-seed{seed}")
    state = out / "parts" / f"{stem}-{key[:12]}.pt"
    for old in (out / "parts").glob(f"{stem}-*.pt"):
        if not old.name.startswith(f"{state.stem}."):  # what a run has kept beside its state is as good
            old.unlink()

    def named(stage: str, done: int, total: int, note: str) -> None:
        progress(f"seed {seed}: {stage}", done, total, note)

    made = once(partial(_made, problem, name, seed, out, state, named))

    def audited() -> dict[str, Any]:
        found = made()
        named(f"audit of {_label(problem, name)}", 0, 1, "")
        return _audited(problem, name, *found)

    found = cache.part(out / "parts" / f"{stem}.json", key, audited)
    if problem.questions is not None and "left_out" not in found:
        # A part of its own: the other figures are the same with it and without.
        key = json_hash([key, problem.questions.about])
        asked = partial(_asked, problem.questions, made, _label(problem, name), named)
        found["text_membership"] = cache.part(out / "parts" / f"{stem}-text.json", key, asked)
    state.unlink(missing_ok=True)
    remove(state, KEPT_FILES)
    return found


def _asked(questions: TextQuestions, made: Callable[[], Any], label: str, progress: Progress) -> dict[str, Any]:
    """What text alone tells of a model."""
    model, _ = made()
    return dict.fromkeys(FIGURES) if model is None else questions.figures(model, name=label, progress=progress)


def _made(
    problem: Problem, name: str, seed: int, out: Path, state: Path, progress: Progress
) -> tuple[Any, dict[str, Any]]:
    """A model and its "cost", or None and the reason why it is "left_out"."""
    nothing = dict.fromkeys(("steps", "items", "seconds", "cpu_seconds"))
    if name == "original":
        return problem.original, {"cost": nothing}
    if name == "gold":
        assert problem.gold is not None
        model, cost = problem.gold.model(seed, out / "models", progress)
        return model, {"cost": nothing | cost}
    config = replace(problem.job.config, seed=seed)
    reason = why_not(name, problem.original, problem.sets, config)
    if reason is not None:
        return None, {"left_out": reason}
    try:
        heard = renamed(progress, _label(problem, name))
        options: dict[str, Any] = {"progress": heard, "checkpoint": Checkpoint(state), "hashes": problem.known}
        done = unlearned(name, problem.original, problem.sets, config, **options)
    except FloatingPointError as error:
        return None, {"left_out": str(error).partition("; the state")[0].removeprefix(f"{name}: ")}
    except (TypeError, ValueError) as error:
        if not INAPPLICABLE.match(str(error)):
            raise
        return None, {"left_out": str(error)}
    cost = {"steps": done.steps, "items": done.items, "seconds": done.seconds, "cpu_seconds": done.cpu_seconds}
    return done.model, {"cost": cost}


def _audited(problem: Problem, name: str, model: Any, about: dict[str, Any]) -> dict[str, Any]:
    """What :func:`_made` says of a model, its figures and, where there are classes, its embeddings for a picture."""
    if model is None:
        return about
    deep = name in DEEP
    values = measured(model, problem.sets, probe=deep and _probed(problem), relearn=deep and _relearned(problem))
    if not problem.job.compare.membership:
        values |= dict.fromkeys(("mia_auc", "mia_entropy_auc"))
    if not problem.job.compare.retrieval:
        values.pop("retrieval", None)
    if name not in ("original", "ccu") or not problem.sets.forget.labelled:
        return {**about, "audit": values, "embeddings": None}
    return {**about, "audit": values, "embeddings": pictured(problem.sets, {"visual": model})}


def _reference(problem: Problem, gold: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """What the retrained model's figures ask for.

    One that has not seen the other halves of the forget set either says nothing of what is to become of them: they are
    to be known as before, and both halves together may be answered either way.
    """
    wanted = dict(gold)
    if problem.ranked or problem.job.compare.hidden == "visual":
        return wanted
    for part in ("forget_train", "forget_test"):
        if "other" in gold:
            wanted["other"] = {**wanted["other"], part: original["other"][part]}
        if "fused" in gold:
            wanted["fused"] = {**wanted["fused"], part: None}
    return wanted


def _pictured(parts: Mapping[str, Any]) -> dict[str, Any] | None:
    before, after = (parts.get(name, {}).get("embeddings") for name in ("original", "ccu"))
    if before is None or after is None:
        return None
    both = {"before": before["visual"], "after": after["visual"]}
    return {"labels": before["labels"], "forgotten": before["forgotten"], **both}


def _label(problem: Problem, name: str) -> str:
    if name != "gold":
        return METHODS[name]
    return "retrained" if problem.job.compare.hidden == "both" else "retrained, visual hidden"


def _setting(problem: Problem, seed: int, sizes: Mapping[str, int]) -> dict[str, Any]:
    job, sets = problem.job, problem.sets
    kind = job.config.forget
    classes = f"class{'es' * (len(job.classes) > 1)} {', '.join(job.classes)}"
    return {
        "task": job.data.name,
        "scenario": kind,
        "seed": seed,
        "forgotten": classes if kind == "class" else kind,
        "ranked": problem.ranked,
        "forget_items": len(sets.forget),
        "retain_items": len(sets.retain),
        "test_items": len(sets.retain_test) + (0 if sets.forget_test is None else len(sets.forget_test)),
        "sizes": dict(sizes),
        "ccu": asdict(replace(job.config, seed=seed)),
        "hidden": None if problem.gold is None else job.compare.hidden,
    }
