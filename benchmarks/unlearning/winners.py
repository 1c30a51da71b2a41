"""Which method is nearest to retraining on each task, said plainly: the first tables of the page."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from build_support.docs.generated import table_lines
from ccu_fast.cli.report.tables import GOLD, Table, figure_title, label, signed, spread
from ccu_fast.unlearn.audit import gaps, mean_figures, worst_gap
from ccu_fast.unlearn.study.methods import METHODS, TOLD

OURS = "ccu"
AGAIN = "gold_again"
SHOWN = 3  # methods named in each cell
HARDLY = 2.0  # points that a part has to move a figure by, as in the verdict


@dataclass(frozen=True)
class Contestant:
    """A published method, or CCU, on one task and scenario.

    Attributes:
        name, label: in the files, and for readers.
        average: the average gap, mean over the seeds, with its text.
        worst: the largest gap of the means, absolute, with its text.
        time: CPU time over that of retraining, as text; empty where it was not measured.
    """

    name: str
    label: str
    average: tuple[float, str]
    worst: tuple[float, str]
    time: str


def contestants(by_seed: dict[str, Any]) -> list[Contestant]:
    """CCU and every baseline, of one task and scenario, by seed."""
    return [_measured(name, by_seed) for name in next(iter(by_seed.values()))["metrics"] if _competes(name)]


def ablations(by_seed: dict[str, Any]) -> list[Contestant]:
    """CCU without one of its parts, for each part."""
    names = next(iter(by_seed.values()))["metrics"]
    return [_measured(name, by_seed) for name in names if name.startswith(f"{OURS}_")]


def lines(results: dict[str, Any]) -> list[str]:
    """The table and, below it, a sentence for each task and scenario where CCU is not the first.

    Args:
        results: by task, scenario and seed.
    """
    rows, said, without = [], [], []
    for task, by_scenario in results.items():
        for scenario, by_seed in by_scenario.items():
            if OURS not in next(iter(by_seed.values()))["metrics"]:
                continue
            found = contestants(by_seed)
            ours = next(one for one in found if one.name == OURS)
            cells = [f"{task}, {scenario}"]
            for kind, key in (("average gap", attrgetter("average")), ("worst gap", attrgetter("worst"))):
                order = sorted(found, key=key)
                place = 1 + sum(key(one)[0] < key(ours)[0] for one in found)
                cells.append("; ".join(f"{one.label} {key(one)[1]}" for one in order[:SHOWN]))
                cells.append(f"{place} of {len(found)}: {key(ours)[1]}")
                if place > 1:
                    best = [one for one in order if key(one)[0] < key(ours)[0]][:SHOWN]
                    better = ", ".join(f"{one.label} ({key(one)[1]})" for one in best)
                    more = f" and {place - 1 - len(best)} more" if place - 1 > len(best) else ""
                    said.append(f"- {task}, {scenario}, by {kind}: {better}{more} before CCU ({key(ours)[1]}).")
            rows.append([*cells, ours.time])
            nearer = [one for one in ablations(by_seed) if one.average[0] < ours.average[0]]
            if nearer:
                names = ", ".join(f"{one.label} ({one.average[1]})" for one in nearer)
                without.append(f"- {task}, {scenario}: {names}; CCU {ours.average[1]}.")
    columns = ["task", "best by average gap", "CCU's place", "best by worst gap", "CCU's place", "CCU's time"]
    caption = (
        "Who wins: the methods nearest to retraining, gaps in points, the worst gap with its figure; CCU against every "
        "baseline as published and, where measured, told to keep the other modality; time over that of retraining"
    )
    table = Table(caption, columns, rows)
    verdict = ["", "Where a baseline wins:", "", *said] if said else ["", "No baseline is before CCU on any task."]
    if without:
        verdict += ["", "Where CCU without one of its parts is nearer, by average gap:", "", *without]
    return [*markdown(table), *verdict, *_parts(results)]


def _parts(results: dict[str, Any]) -> list[str]:
    """The table of what each part of CCU is there for; nothing where no ablation was measured."""
    rows: dict[str, dict[str, str]] = {}
    chance: dict[str, str] = {}
    for task, by_scenario in results.items():
        for scenario, by_seed in by_scenario.items():
            seeds = [value["metrics"] for value in by_seed.values()]
            if OURS not in seeds[0]:
                continue
            whole, gold = (mean_figures([metrics[name] for metrics in seeds]) for name in (OURS, GOLD))
            near = gaps(whole, gold)
            cells = rows[f"{task}, {scenario}"] = {}
            if all(AGAIN in metrics for metrics in seeds):
                points, figure = worst_gap(mean_figures([metrics[AGAIN] for metrics in seeds]), gold)
                chance[f"{task}, {scenario}"] = f"{points:.1f} {figure_title(figure)}"
            for name in (name for name in seeds[0] if name.startswith(f"{OURS}_")):
                far = gaps(mean_figures([metrics[name] for metrics in seeds]), gold)
                most = max(far, key=lambda figure: abs(far[figure]) - abs(near[figure]))
                further = abs(far[most]) - abs(near[most])
                said = f"{further:.1f} {figure_title(most)}" if further > HARDLY else "–"
                cells[METHODS[name].removeprefix(f"{METHODS[OURS]} ")] = said
    titles = list(dict.fromkeys(title for cells in rows.values() for title in cells))
    if not titles:
        return []
    said = (
        "What each part of CCU is there for. Of all figures, up to thirteen, the one is shown whose gap to retraining "
        "grows most without the part, and by how many points; of the means over the seeds. It is the largest of a "
        f"dozen differences, chosen after the fact: a few points may be chance. – is for no more than {HARDLY:g}, "
        "empty where the part is not in use. Other figures may be nearer without it, see above. Without (b) the other "
        "modality is trained too and not held; by default it is not trained at all."
    )
    columns = ["task", *titles]
    table = [[task, *(cells.get(title, "") for title in titles)] for task, cells in rows.items()]
    if chance:
        said += f' For scale the last column has the largest gap of "{METHODS[AGAIN]}".'
        columns.append(METHODS[AGAIN])
        table = [[*row, chance.get(row[0], "")] for row in table]
    return ["", said, "", *markdown(Table("Points more without the part", columns, table))]


def front(results: dict[str, Any]) -> str:
    """The table of docs/results_unlearning.md: a row for each task and scenario, by task, scenario and seed."""
    rows, ahead = [], [0, 0]
    for task, by_scenario in results.items():
        for scenario, by_seed in by_scenario.items():
            found = contestants(by_seed)
            ours = next(one for one in found if one.name == OURS)
            rivals = [one for one in found if one.name != OURS]
            by_average, by_worst = (min(rivals, key=attrgetter(key)) for key in ("average", "worst"))
            others = {name: _measured(name, by_seed) for name in ("original", AGAIN) if _everywhere(name, by_seed)}
            cells = [others[name].average[1] if name in others else "–" for name in ("original", AGAIN)]
            row = [
                f"{task}, {scenario}",
                *cells,
                f"{by_average.average[1]} ({by_average.label}, {by_average.time})",
                f"{ours.average[1]} ({ours.time})",
                f"{by_worst.worst[0]:.1f} ({by_worst.label})",
                f"{ours.worst[0]:.1f}",
            ]
            for i, better in enumerate((ours.average < by_average.average, ours.worst < by_worst.worst)):
                place = (4, 6)[i]
                ahead[i] += better
                at = place if better else place - 1
                row[at] = f"**{row[at]}**"
            rows.append(row)
    columns = ["", "before", "retrained again", "best baseline (time)", "CCU (time)", "worst: best baseline", "CCU"]
    seeds: dict[str, int] = {}
    for task, by_scenario in results.items():
        counts = {scenario: len(by_seed) for scenario, by_seed in by_scenario.items()}
        alike = len(set(counts.values())) == 1
        seeds |= {task if alike else f"{task}, {scenario}": count for scenario, count in counts.items()}
    few = [f"{task} {count}" for task, count in seeds.items() if count != max(seeds.values())]
    note = f"Seeds: {max(seeds.values())}" + (f"; {'; '.join(few)}." if few else ".")
    said = (
        f"CCU has a smaller average gap than the best baseline in {ahead[0]} of {len(rows)} rows, "
        f"and a smaller worst gap in {ahead[1]}."
    )
    return "\n".join([*markdown(Table("Gaps to retraining in points", columns, rows)), "", said, "", note, ""])


def _everywhere(name: str, by_seed: dict[str, Any]) -> bool:
    return all(name in value["metrics"] for value in by_seed.values())


def markdown(table: Table) -> list[str]:
    """A table with its caption above it."""
    return [table.caption + ":", "", *table_lines(table.columns, table.rows)]


def _measured(name: str, by_seed: dict[str, Any]) -> Contestant:
    seeds = list(by_seed.values())
    means, gold = (mean_figures([value["metrics"][key] for value in seeds]) for key in (name, GOLD))
    average = spread([value["metrics"][name]["average_gap"] for value in seeds], digits=2)
    time = spread([value["cost"][name]["ratio"] for value in seeds], digits=2)
    return _contestant(name, label(name, seeds[0]["metrics"][name]), means, gold, average, time)


def _contestant(
    name: str, label: str, means: dict[str, Any], gold: dict[str, Any], average: str, time: str
) -> Contestant:
    points, figure = worst_gap(means, gold)
    worst = f"{signed(gaps(means, gold)[figure])} {figure_title(figure)}"
    return Contestant(name, label, (float(average.split(" ")[0]), average), (points, worst), time)


def _competes(name: str) -> bool:
    """No retrained model, no untouched one and no ablation."""
    base = name.removesuffix(TOLD)
    return base == OURS or not (base == "original" or base.startswith(("gold_", f"{OURS}_")))
