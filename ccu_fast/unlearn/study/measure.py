"""What a comparison measures of each model, and how it is set beside a retrained one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from ccu_fast.data.paired import PairedData
from ccu_fast.unlearn.audit import MODALITIES, audit, average_gap, linear_probe, relearn_steps, verdict, worst_gap
from ccu_fast.unlearn.loop import embed
from ccu_fast.unlearn.model import TwoModalityModel
from ccu_fast.unlearn.study.tasks import Scenario

DEEP_ITEMS = 256
PICTURED = 400  # items of each set in a picture


def measured(model: TwoModalityModel, split: Scenario, *, probe: bool = False, relearn: bool = False) -> dict[str, Any]:
    """What :func:`ccu_fast.unlearn.audit.audit` gives, with a linear probe and the relearning time where asked for.

    Both of a sample: each step of relearning looks at the whole forget set again.
    """
    result: dict[str, Any] = audit(model, **split.judged)
    forget, retain = at_most(split.forget, DEEP_ITEMS), at_most(split.retain, 9 * DEEP_ITEMS)
    if probe:
        result["probe"] = linear_probe(model, **replace(split, forget=forget, retain=retain).judged)
    if relearn:
        result["relearn_steps"] = relearn_steps(model, forget, retain)
    return result


def against_gold(values: Mapping[str, Any], gold: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """How the figures of a model differ from a retrained one's.

    Args:
        values, gold: of :func:`measured`.
        sizes: of :func:`sizes_of`.

    Returns:
        "gap_to_gold", signed, by modality and part; "mia_gap", absolute; "average_gap", see
        :func:`ccu_fast.unlearn.audit.average_gap`; "worst_gap", its "points" and "figure"; "verdict", its "kind" and
        "text".
    """
    ours, theirs = values.get("mia_auc"), gold.get("mia_auc")
    return {
        "gap_to_gold": {name: _gaps(values[name], gold[name]) for name in MODALITIES if name in values},
        "mia_gap": None if ours is None or theirs is None else abs(ours - theirs),
        "average_gap": average_gap(values, gold),
        "worst_gap": dict(zip(("points", "figure"), worst_gap(values, gold), strict=True)),
        "verdict": asdict(verdict(values, gold, sizes=sizes)),
    }


def sizes_of(split: Scenario, group: int) -> dict[str, int]:
    """How many independent items each part has: things, not views of them."""
    parts = {
        "forget_train": split.forget,
        "forget_test": split.forget_test,
        "retain_train": split.retain,
        "retain_test": split.retain_test,
    }
    return {name: len(torch.unique(part.ids // group)) for name, part in parts.items() if part is not None}


def pictured(split: Scenario, models: Mapping[str, TwoModalityModel]) -> dict[str, Any]:
    """What a picture shows: "labels", "forgotten" (what is to be) and, by name, each model's visual embeddings."""
    sets = ((split.retain_test, False), (split.forget, True), (split.forget_test, True))
    parts = [(at_most(part, PICTURED), forgotten) for part, forgotten in sets if part is not None]
    return {
        "labels": torch.cat([part.labels for part, _ in parts]).cpu().numpy(),
        "forgotten": torch.cat([torch.full((len(part),), forgotten) for part, forgotten in parts]).numpy(),
        **{
            name: torch.cat([embed(model, part)[0] for part, _ in parts]).float().cpu().numpy()
            for name, model in models.items()
        },
    }


def at_most(data: PairedData, count: int) -> PairedData:
    """Evenly spread items."""
    return data.batch(torch.linspace(0, len(data) - 1, min(count, len(data))).long())


def _gaps(values: dict[str, float | None], gold: dict[str, float | None]) -> dict[str, float | None]:
    pairs = ((k, v, gold[k]) for k, v in values.items())
    return {k: None if v is None or g is None else v - g for k, v, g in pairs}
