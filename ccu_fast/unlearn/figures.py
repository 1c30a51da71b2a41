"""What a run made of a model: figures of the original and of the unlearned one, side by side."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ccu_fast.data.paired import PairedData
from ccu_fast.runs.kept import Kept
from ccu_fast.runs.progress import Progress
from ccu_fast.unlearn.alarms import KEPT, alarm_of, kept_places
from ccu_fast.unlearn.audit import auc, verdict_without_gold
from ccu_fast.unlearn.audit.membership import confidence
from ccu_fast.unlearn.audit.text_questions import TextQuestions, before_and_after
from ccu_fast.unlearn.audit.verdict import with_lost_places
from ccu_fast.unlearn.loop import answers, chances, embed, right_shares, same_thing
from ccu_fast.unlearn.model import TwoModalityModel, heads


def figures_of(
    before: TwoModalityModel,
    after: TwoModalityModel,
    forget: PairedData,
    retain: PairedData,
    unseen: PairedData | None,
    kind: str,
    kept: Kept,
    retained: int,
    new: str = "unseen",
) -> Any:
    """What both models make of the sets: "alarm", "verdict", "sizes", "rows" and "pool" of a result.

    Held are the answers of one model at a time, where both embed the retained items, and no inputs. ``retained`` is the
    size of the whole retain set, of which ``retain`` may be a part; what the original says is kept as the method does.
    ``new`` is what the rows call the unseen items.
    """
    parts = {"forget": forget, "retain": retain}
    new_of_class = f"{new}, to forget"
    fresh_parts = {} if unseen is None else _unseen_parts(unseen, forget, kind, new, new_of_class)
    items = len(forget) + len(retain)
    ranked = not (forget.labelled and heads(before))
    things = [same_thing(*of.values()) if ranked and of else None for of in (parts, fresh_parts)]
    chance: dict[str, float] = {}
    for of, thing in zip((parts, fresh_parts), things, strict=True) if ranked else ():
        chance |= zip(of, chances(*of.values(), thing=thing), strict=True)
    named = {"forget": "forget_train", "retain": "retain_train"}
    named |= {new: "retain_test", new_of_class: "forget_test"}
    like = new_of_class if kind == "class" else new  # a class is told from others whether forgotten or not
    judged: list[dict[str, Any]] = [{}, {}]
    shares, places = [], []
    for model, audit in zip((before, after), judged, strict=True):
        known = {}
        for name, part in parts.items():
            stored = "judged" if name == "retain" and len(part) < retained else name
            make = partial(embed, model, part)
            known[name] = answers(model, part, kept.of(stored, make, about=len(part)) if model is before else make())
        fresh = {name: answers(model, part) for name, part in fresh_parts.items()}
        places.append(known["retain"].visual)
        shares.append(right_shares(*known.values(), thing=things[0]))
        if fresh:
            shares[-1] += right_shares(*fresh.values(), thing=things[1])
        if like in fresh:
            audit["mia_auc"] = auc(confidence(known["forget"]), confidence(fresh[like]))
    pools = dict.fromkeys(parts, items) | dict.fromkeys(fresh_parts, sum(map(len, fresh_parts.values())))
    parts |= fresh_parts
    rows = []
    for name, old, now in zip(parts, *shares, strict=True):
        for audit, share_of in zip(judged, (old, now), strict=True):
            for head, share in share_of.items():
                audit.setdefault(head, {})[named[name]] = share
        what = f"partner first of {pools[name]} (chance {chance[name]:.2g})" if ranked else "accuracy"
        rows += [(f"{name}: {key}, {what}", old[key], now[key]) for key in old]
    if "mia_auc" in judged[0]:
        rows.append((f"membership of forgotten against {new}, AUC", judged[0]["mia_auc"], judged[1]["mia_auc"]))
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


def text_figures(
    questions: TextQuestions,
    before: TwoModalityModel,
    after: TwoModalityModel,
    kept: Kept,
    made: str,
    progress: Progress,
) -> dict[str, Any]:
    """What text alone tells of both models: "before", "after", what it comes to as "text", and what was asked.

    Each model's answers are kept until the run is over; ``made`` is the hash of the weights of the second.
    """
    about, found = questions.about, {}
    for name, model, own in (("before", before, about), ("after", after, [*about, made])):
        keep = partial(kept.of, f"text_{name}", about=own)
        found[name] = questions.figures(model, name=name, keep=keep, progress=progress)
    return {**questions.asked, **found, "text": before_and_after(questions.chance, found["before"], found["after"])}


def _unseen_parts(
    unseen: PairedData, forget: PairedData, kind: str, new: str, new_of_class: str
) -> dict[str, PairedData]:
    """Unseen items by what is expected of them: those of a forgotten class are to be forgotten too."""
    gone = torch.isin(unseen.labels, forget.labels) if kind == "class" else torch.zeros_like(unseen.labels).bool()
    return {name: unseen[of] for name, of in ((new, ~gone), (new_of_class, gone)) if bool(of.any())}


def pictured(
    before: TwoModalityModel, after: TwoModalityModel, forget: PairedData, retain: PairedData, most: int = 400
) -> dict[str, Tensor]:
    """Visual embeddings by both models for a picture, of at most so many items of each set, with "labels" and which are
    "forgotten".
    """
    parts = [data.batch(torch.linspace(0, len(data) - 1, min(most, len(data))).long()) for data in (retain, forget)]
    return {
        "labels": torch.cat([part.labels for part in parts]).cpu(),
        "forgotten": torch.cat([torch.full((len(p),), i == 1) for i, p in enumerate(parts)]),
        "before": torch.cat([embed(before, part)[0] for part in parts]).cpu(),
        "after": torch.cat([embed(after, part)[0] for part in parts]).cpu(),
    }
