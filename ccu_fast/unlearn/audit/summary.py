"""Figures of figures: gaps to retraining, their average and the worst of them, mean and spread over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from ccu_fast.unlearn.model import HEADS as MODALITIES

PARTS = ("forget_train", "forget_test", "retain_train", "retain_test")


# What names another figure or words from seed to seed; it is made anew from the means.
OF_ONE_SEED = ("worst_gap", "verdict")


def gaps(values: Mapping[str, Any], gold: Mapping[str, Any]) -> dict[str, float]:
    """The signed differences from a retrained model, in points (hundredths): positive where the model has more.

    Args:
        values, gold: what :func:`ccu_fast.unlearn.audit.audit` gives for the model and for the retrained one.

    Returns:
        By figure: "visual forget_train" and so on, for the visual, other and fused accuracy on each of forget_train,
        forget_test, retain_train and retain_test, and "mia_auc", the area of the confidence attack. Figures that one of
        the two lacks, such as forget_test when instances are forgotten, are left out: 13 figures for a class, 10 for
        instances.

    Raises:
        ValueError: they have no figure in common.

    >>> from ccu_fast.unlearn.audit import gaps
    >>> gaps({"mia_auc": 0.75}, {"mia_auc": 0.5})
    {'mia_auc': 25.0}
    """
    ours, theirs = _figures(values), _figures(gold)
    both = {name: (value, theirs[name]) for name, value in ours.items()}
    found = {name: 100 * (one - two) for name, (one, two) in both.items() if one is not None and two is not None}
    if not found:
        raise ValueError("values: expected a figure that gold has too, got none")
    return found


def average_gap(values: Mapping[str, Any], gold: Mapping[str, Any]) -> float:
    """The mean absolute difference from a retrained model, in points, with the same weight for each of :func:`gaps`.

    Most of these figures hardly move, so a small mean can hide a large difference: see :func:`worst_gap`.

    Args:
        values, gold: as of :func:`gaps`.

    Returns:
        A number ≥ 0.

    Raises:
        ValueError: they have no figure in common.

    Source: the "average gap" of Fan et al. 2024 (arXiv 2310.12508), over more figures.
    """
    return fmean(map(abs, gaps(values, gold).values()))


def worst_gap(values: Mapping[str, Any], gold: Mapping[str, Any]) -> tuple[float, str]:
    """The largest absolute difference from a retrained model, in points, and the figure that differs.

    Args:
        values, gold: as of :func:`gaps`.

    Returns:
        The points, ≥ 0, and the name of the figure, as in :func:`gaps`; of equals the first.

    Raises:
        ValueError: they have no figure in common.

    >>> from ccu_fast.unlearn.audit import worst_gap
    >>> gold = {"visual": {"forget_train": 0.5, "retain_test": 0.75}}
    >>> worst_gap({"visual": {"forget_train": 0.25, "retain_test": 0.875}}, gold)
    (25.0, 'visual forget_train')
    """
    found = gaps(values, gold)
    name = max(found, key=lambda name: abs(found[name]))
    return abs(found[name]), name


def mean_figures(audits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures that :func:`gaps` compares, each the mean of several audits: of one method over its seeds.

    Args:
        audits: at least one.

    Returns:
        Accuracies by modality and part, and "mia_auc"; None for what one of the audits lacks.
    """
    found = [_figures(audit) for audit in audits]
    means: dict[str, float | None] = {}
    for name in found[0]:
        known = [value for figures in found if (value := figures[name]) is not None]
        means[name] = fmean(known) if len(known) == len(found) else None
    by_modality = {modality: {part: means[f"{modality} {part}"] for part in PARTS} for modality in MODALITIES}
    return {**by_modality, "mia_auc": means["mia_auc"]}


def _figures(values: Mapping[str, Any]) -> dict[str, float | None]:
    found = {f"{modality} {part}": values.get(modality, {}).get(part) for modality in MODALITIES for part in PARTS}
    return {**found, "mia_auc": values.get("mia_auc")}


def over_seeds(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Nested reports of several seeds as one, with a dictionary for every number.

    Args:
        reports: the same keys everywhere; numbers, None (left out where it is None everywhere), text (kept where it is
            the same everywhere) or further dictionaries. "worst_gap" and "verdict" are dropped: each seed may name
            another figure, and :func:`mean_figures` gives what both are made of.

    Returns:
        The other keys with ``{"mean": …, "spread": …, "seeds": n}`` for each number; the spread is the sample standard
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
        if key in OF_ONE_SEED:
            continue
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
