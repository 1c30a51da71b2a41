"""What came out, told first: the distance to retraining in words, and the few bars that show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean
from typing import Any

from ccu_fast.cli.report.tables import GOLDS, PROTECT_LABELS, judged, label, runs_of, spread

OURS = "ccu"
AGAIN = "gold_again"  # retrained as gold is, from other initial weights
FORGOTTEN = {"class": "a class", "instances": "random instances", "pairs": "pairs"}
NEAREST = 5  # so many of the other methods are drawn
ONE_SEED = "One seed, so noisy: how far a figure moves from seed to seed is not seen."


@dataclass(frozen=True)
class Bar:
    """One bar: its name, value and, as it is written, the value with its spread; whether it is this project's."""

    name: str
    value: float
    text: str
    ours: bool = False


@dataclass(frozen=True)
class Chart:
    """Bars from 0 to ``top``, from the shortest to the longest.

    Attributes:
        title, says: what is drawn, and the finding.
        bars: the longest is no longer than top.
        band: up to where a value is as good as retraining with another seed; None without that.
    """

    title: str
    says: str
    bars: tuple[Bar, ...]
    top: float
    band: float | None = None


def forgotten_sentence(scenario: str, by_seed: Mapping[str, Any]) -> str | None:
    """How often the visual head is right before, after and retrained; None where one of these or the head is missing.

    Args:
        scenario: "class", "instances" or "pairs".
        by_seed: the results of a comparison by seed.
    """
    metrics = [value["metrics"] for value in by_seed.values()]
    gold = next((name for name in GOLDS if name in metrics[0]), None)
    models = ("original", OURS, gold)
    if gold is None or any("visual" not in found.get(name, {}) for found in metrics for name in models):
        return None

    def right(part: str) -> list[str] | None:
        values = [[found[name]["visual"].get(part) for found in metrics] for name in models]
        return None if any(None in each for each in values) else [f"{100 * mean(each):.1f} %" for each in values]

    gone, stay = right("forget_train"), right("retain_test")
    if gone is None or stay is None:
        return None
    return (
        f"Forgetting {FORGOTTEN[scenario]}: by the visual half alone the model recognises {gone[0]} of the forgotten "
        f"items before, {gone[1]} after CCU; retrained without them, {gone[2]}. Of new items that stay: {stay[0]}, "
        f"{stay[1]} and {stay[2]}."
    )


def gap_sentence(scenario: str, by_seed: Mapping[str, Any]) -> str | None:
    """How far this project's method ends from retraining, beside the others; None where either is missing.

    Args:
        scenario: "class", "instances" or "pairs".
        by_seed: the results of a comparison by seed.
    """
    gaps = _gaps(by_seed)
    if OURS not in gaps:
        return None
    others = _others(gaps)
    parts = [
        f"Forgetting {FORGOTTEN[scenario]}: CCU ends {gaps[OURS]:.2f} points from retraining; before, the model was "
        f"{gaps['original']:.2f} away"
    ]
    if AGAIN in gaps:
        parts.append(f"retraining again from other weights differs by {gaps[AGAIN]:.2f}")
    if others:
        first = others[0]
        named = label(first, next(iter(by_seed.values()))["metrics"][first])
        nearer = sum(gaps[name] < gaps[OURS] for name in others)
        if nearer:
            count = f"{nearer} of {len(others)} other methods"
            parts.append(f"{count} end nearer, first {named} with {gaps[first]:.2f}")
        else:
            parts.append(f"the nearest of {len(others)} other methods, {named}, ends {gaps[first]:.2f} away")
    gold = next(name for name in GOLDS if name in gaps)
    kind = judged(by_seed, OURS, gold).kind
    ratios = [run["ratio"] for run in runs_of(by_seed, OURS)]
    # A retrained model that somebody brings has no time.
    time = "" if None in ratios else f"; {mean(ratios):.2f} of the CPU time of retraining"
    return "; ".join(parts) + f". Verdict: {kind}{time}."


def protection_sentence(results: Mapping[str, Any]) -> str | None:
    """What a model learns from each data set of the demo; None without a protected one."""
    found = {name: _recall(by_seed) for name, by_seed in results.items()}
    if not {"clean", "mem"} <= found.keys():
        return None
    first = next(iter(results["clean"].values()))
    said = (
        f"Protection: trained on what MEM publishes, a model finds the right partner first for "
        f"{found['mem']:.1f} % of {first['test']} clean test pairs, trained on the clean data for "
        f"{found['clean']:.1f} %"
    )
    control = f", on random noise of the same size for {found['random-3']:.1f} %" if "random-3" in found else ""
    return f"{said}{control} (guessing: {100 * first['guessing']['r1']:.1f} %)."


def findings(results: Mapping[str, Any]) -> list[str]:
    """The sentences that a demo's page and its terminal begin with."""
    said = [
        sentence(scenario, by_seed)
        for scenario, by_seed in results["unlearn"].items()
        for sentence in (forgotten_sentence, gap_sentence)
    ]
    said.append(protection_sentence(results["protect"]) if results["protect"] else None)
    if results["seeds"] == 1:
        said.append(f"{ONE_SEED} --seeds 3 shows it.")
    return [sentence for sentence in said if sentence]


def nothing_learned(result: Mapping[str, Any]) -> str | None:
    """Said where no victim is better than chance: then the figures of an evaluation are no sign of protection.

    Args:
        result: what :func:`ccu_fast.mem.job.victims.evaluate_datasets` returns, also while it is at work.
    """
    items = {"i2t_r1": result["test"]["images"], "t2i_r1": result["test"]["captions"]}
    for dataset in result["datasets"].values():
        for key, count in items.items():
            guessing = result["guessing"][key]
            chance = guessing + 2 * sqrt(guessing * (1 - guessing) / count)
            if mean(run["last"][key] for run in dataset["seeds"].values()) > chance:
                return None
    return (
        "No model ends better than chance, within two standard errors, so these figures cannot tell whether anything "
        "is protected. More pairs to learn from and to test with, or more epochs, may."
    )


def gap_chart(by_seed: Mapping[str, Any]) -> Chart | None:
    """The average gap to retraining of this project's method, of the nearest others and of the model before."""
    gaps = _gaps(by_seed)
    if not gaps:
        return None
    others = _others(gaps)
    names = [*([OURS] if OURS in gaps else []), *others[:NEAREST], "original"]
    band = gaps.get(AGAIN)
    left_out = len(others) - len(others[:NEAREST])
    says = "Average gap to retraining in points, shorter is better"
    says += f"; of {len(others)} other methods the {NEAREST} nearest, all are in the table" if left_out > 0 else ""
    says += _shaded(band)
    return _chart("Average gap to retraining", says, by_seed, names, band)


def part_chart(by_seed: Mapping[str, Any]) -> Chart | None:
    """The average gap of this project's method and of it without each of its parts; None where none was left out."""
    gaps = _gaps(by_seed)
    names = [name for name in gaps if name.startswith(OURS)]
    if len(names) < 2:
        return None
    says = "Average gap to retraining in points, of CCU and of CCU without each of its parts; shorter is better"
    band = gaps.get(AGAIN)
    return _chart("CCU without its parts", says + _shaded(band), by_seed, names, band)


def protection_chart(results: Mapping[str, Any]) -> Chart:
    """How often a model trained on each data set of the demo finds the right partner first."""
    bars = []
    for name, by_seed in results.items():
        values = [100 * _found_first(value["methods"][name]["last"]) for value in by_seed.values()]
        bars.append(Bar(PROTECT_LABELS[name], mean(values), f"{spread([*values], digits=1)} %", name == "mem"))
    bars.sort(key=lambda bar: bar.value)
    says = (
        "Share of clean test pairs whose right partner comes first, in both directions, for a model trained on each "
        "data set; shorter is better protected"
    )
    return Chart("What a model learns from the published data", says, tuple(bars), 100.0)


def _shaded(band: float | None) -> str:
    return "" if band is None else f". Shaded: up to {band:.2f}, by which retraining again from other weights differs"


def _chart(title: str, says: str, by_seed: Mapping[str, Any], names: Sequence[str], band: float | None) -> Chart:
    metrics = [value["metrics"] for value in by_seed.values()]
    bars = []
    for name in names:
        values = [found[name]["average_gap"] for found in metrics]
        bars.append(Bar(label(name, metrics[0][name]), mean(values), spread([*values], digits=2), name == OURS))
    bars.sort(key=lambda bar: bar.value)
    return Chart(title, says, tuple(bars), max([bar.value for bar in bars] + [band or 0.0]) or 1.0, band)


def _gaps(by_seed: Mapping[str, Any]) -> dict[str, float]:
    """The mean over the seeds of every method's average gap; empty without a retrained model."""
    first, *more = metrics = [value["metrics"] for value in by_seed.values()]
    if not first.keys() & set(GOLDS):
        return {}
    shared = [name for name in first if all(name in other for other in more)]
    return {name: mean(found[name]["average_gap"] for found in metrics) for name in shared}


def _others(gaps: Mapping[str, float]) -> list[str]:
    """The methods that are no retraining and not this project's, the nearest first."""
    others = [name for name in gaps if name != "original" and not name.startswith((OURS, "gold"))]
    return sorted(others, key=lambda name: gaps[name])


def _recall(by_seed: Mapping[str, Any]) -> float:
    (name,) = next(iter(by_seed.values()))["methods"]
    return 100 * mean(_found_first(value["methods"][name]["last"]) for value in by_seed.values())


def _found_first(epoch: Mapping[str, float]) -> float:
    return (epoch["i2t_r1"] + epoch["t2i_r1"]) / 2
