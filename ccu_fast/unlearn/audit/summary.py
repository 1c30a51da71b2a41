"""Figures of figures: the average gap to retraining, mean and spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from ccu_fast.unlearn.model import HEADS as MODALITIES

PARTS = ("forget_train", "forget_test", "retain_train", "retain_test")


def average_gap(values: Mapping[str, Any], gold: Mapping[str, Any]) -> float:
    """The mean absolute difference from a retrained model, in points (hundredths).

    It averages, each with the same weight: the visual, other and fused accuracy on each of forget_train, forget_test,
    retain_train and retain_test, and the area mia_auc of the confidence attack. Figures that one of the two lacks, such
    as forget_test when instances are forgotten, are left out: 13 figures for a class, 10 for instances.

    Args:
        values, gold: what :func:`ccu_fast.unlearn.audit.audit` gives for the model and for the retrained one.

    Raises:
        ValueError: they have no figure in common.

    Source: the "average gap" of Fan et al. 2024 (arXiv 2310.12508), over more figures.
    """
    pairs = [
        (values.get(modality, {}).get(part), gold.get(modality, {}).get(part))
        for modality in MODALITIES
        for part in PARTS
    ]
    pairs.append((values.get("mia_auc"), gold.get("mia_auc")))
    gaps = [abs(ours - theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
    if not gaps:
        raise ValueError("values: expected a figure that gold has too, got none")
    return 100 * sum(gaps) / len(gaps)


def over_seeds(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Nested reports of several seeds as one, with a dictionary for every number.

    Args:
        reports: the same keys everywhere; numbers, None (left out where it is None everywhere), text (kept where it is
            the same everywhere) or further dictionaries.

    Returns:
        The same keys with ``{"mean": …, "spread": …, "seeds": n}`` for each number; the spread is the sample standard
        deviation, None for one seed.

    Raises:
        ValueError: no report; reports of different keys; a figure that only some have; text that differs.
    """
    if not reports:
        raise ValueError("reports: expected at least one, got none")
    first = reports[0]
    result: dict[str, Any] = {}
    for key in first:
        if any(report.keys() != first.keys() for report in reports):
            raise ValueError(f"reports: expected the keys {sorted(first)} in each, got others")
        values = [report[key] for report in reports]
        if isinstance(values[0], Mapping):
            result[key] = over_seeds(values)
        elif all(value is None for value in values):
            result[key] = None
        elif all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            spread = stdev(values) if len(values) > 1 else None
            result[key] = {"mean": fmean(values), "spread": spread, "seeds": len(values)}
        elif all(value == values[0] for value in values):
            result[key] = values[0]
        else:
            raise ValueError(f"reports: expected numbers or one value everywhere for {key!r}, got {values}")
    return result
