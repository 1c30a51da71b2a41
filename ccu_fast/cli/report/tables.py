"""The figures of a run as rows, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PROTECT_LABELS = {
    "clean": "clean data",
    "random-3": "random noise, words",
    "em": "EM (noise)",
    "mem": "MEM (noise + trigger)",
}

# Of every table's columns: the title, and the path of the value. U: the forget set's, R: the retain set's.
_BOTH_SCENARIOS = {
    "visual R test": ("visual", "retain_test"),
    "other R test": ("other", "retain_test"),
    "fused R test": ("fused", "retain_test"),
    "MIA AUC": ("mia_auc",),
    "gap": ("average_gap",),
    "s": ("cpu_seconds",),
}
UNLEARN_COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "class": {
        "visual U train": ("visual", "forget_train"),
        "visual U test": ("visual", "forget_test"),
        "other U train": ("other", "forget_train"),
        "other U test": ("other", "forget_test"),
        **_BOTH_SCENARIOS,
    },
    "instances": {"visual U": ("visual", "forget_train"), "other U": ("other", "forget_train"), **_BOTH_SCENARIOS},
}
DEEP_COLUMNS = {
    "probe U": ("probe", "forget"),
    "probe U against R": ("probe", "forget_vs_rest"),
    "probe R": ("probe", "retain"),
    "relearning, steps": ("relearn_steps",),
    "time / retraining": ("ratio",),
}
RETRIEVAL_COLUMNS = {
    f"{arrow} {title}": (f"{side}_{title.replace('@', '').lower()}",)
    for side, arrow in (("i2t", "i→t"), ("t2i", "t→i"))
    for title in ("R@1", "R@5", "R@10", "medR")
}
DIGITS = {"cpu_seconds": 1, "average_gap": 2, "relearn_steps": 0, "i2t_medr": 1, "t2i_medr": 1}


@dataclass(frozen=True)
class Table:
    """A caption, column titles and rows of text, the first column being the row's name."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


def unlearn_table(scenario: str, by_seed: dict[str, Any]) -> Table:
    """Accuracies, membership attack and time of every method, mean ± spread over the seeds."""
    first = next(iter(by_seed.values()))
    setting = first["setting"]
    what = f"class {setting['forget_class']}" if scenario == "class" else "random instances"
    caption = (
        f"{setting['task']}, {what} forgotten (U, {setting['forget_items']} of "
        f"{setting['forget_items'] + setting['retain_items']} training items; the rest is R): accuracy of each "
        f"modality's head, membership attack, average gap to gold in points, CPU seconds; seeds {', '.join(by_seed)}"
    )
    methods = [name for name in first["metrics"] if all(name in value["metrics"] for value in by_seed.values())]
    return _methods_table(caption, UNLEARN_COLUMNS[scenario], by_seed, methods)


def depth_table(by_seed: dict[str, Any]) -> Table | None:
    """What is left below the heads, of the methods that were looked into; None when none was."""
    first = next(iter(by_seed.values()))
    methods = [
        name
        for name in first["metrics"]
        if all("probe" in value["metrics"].get(name, {}) for value in by_seed.values())
    ]
    caption = (
        "Below the heads: accuracy of a linear classifier on frozen visual features (forgotten items; forgotten class "
        "against the rest; retained items), steps of training until the forget set is back at .9, CPU time over that "
        "of retraining"
    )
    return _methods_table(caption, DEEP_COLUMNS, by_seed, methods) if methods else None


def _methods_table(
    caption: str, columns: Mapping[str, tuple[str, ...]], by_seed: dict[str, Any], methods: list[str]
) -> Table:
    rows = []
    for method in methods:
        runs = [{**value["metrics"][method], **value["cost"][method]} for value in by_seed.values()]
        rows.append([runs[0]["label"], *_cells(columns, runs)])
    return Table(caption, ["method", *columns], rows)


def before_after_table(rows: list[tuple[str, float, float]]) -> Table:
    """The audit of one run's model."""
    return Table(
        "Before and after",
        ["", "before", "after"],
        [[name, f"{before:.3f}", f"{after:.3f}"] for name, before, after in rows],
    )


def protect_table(results: dict[str, Any]) -> Table:
    """Retrieval on clean test strips of a victim trained on each data set, last and best epoch."""
    rows = []
    for method, by_seed in results.items():
        measured = [value["methods"][method] for value in by_seed.values()]
        for when in ("last", "best"):
            reading = spread([m["reading"]["digit"] for m in measured]) if when == "last" else ""
            cells = _cells(RETRIEVAL_COLUMNS, [m[when] for m in measured])
            rows.append([PROTECT_LABELS[method], when, *cells, reading])
    seeds = next(iter(results.values()))
    first = next(iter(seeds.values()))
    caption = (
        "digit-strips, retrieval on clean test strips (image to text, text to image) and zero-shot reading: "
        f"{first['train']} training, {first['test']} test strips, ε = {first['settings']['eps']}/255, seeds "
        f"{', '.join(seeds)}; guessing gives R@1 {first['guessing']['r1']:.3f}, R@10 {first['guessing']['r10']:.3f}, "
        "digit .100"
    )
    return Table(caption, ["victim trained on", "epoch", *RETRIEVAL_COLUMNS, "digits read"], rows)


def evaluation_table(result: dict[str, Any]) -> Table:
    """What :func:`ccu_fast.mem.job.victims.evaluate_datasets` found: last and best epoch of every dataset."""
    guessing = result["guessing"]
    columns = RETRIEVAL_COLUMNS | ({"zero-shot": ("zero_shot",)} if "zero_shot" in guessing else {})
    rows = []
    for name, dataset in result["datasets"].items():
        for when in ("last", "best"):
            runs = [run[when] for run in dataset["seeds"].values()]
            rows.append([name, f"{when} ({mean(run['epoch'] for run in runs):g})", *_cells(columns, runs)])
    rows.append(["guessing", "", *(f"{guessing[key]:.3f}" if key in guessing else "" for (key,) in columns.values())])
    caption = (
        f"Image to text, then text to image, on {result['test']['images']} clean test pictures with "
        f"{result['test']['captions']} captions; victims of {result['recipe']['epochs']} epochs"
    )
    return Table(caption, ["trained on", "epoch", *columns], rows)


def _cells(columns: Mapping[str, tuple[str, ...]], runs: list[dict[str, Any]]) -> Iterable[str]:
    for path in columns.values():
        values: list[Any] = [reduce(getitem, path, run) for run in runs]
        yield spread(values, digits=DIGITS.get(path[-1], 3))


def spread(values: list[float | None], *, digits: int = 3) -> str:
    """The mean, with ± the sample standard deviation when there are several; "–" for what does not exist."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    text = f"{mean(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} ± {stdev(known):.{digits}f}"


def all_tables(results: dict[str, Any]) -> list[Table]:
    """Every table of a demo."""
    tables = [unlearn_table(scenario, by_seed) for scenario, by_seed in results["unlearn"].items()]
    return tables + ([protect_table(results["protect"])] if results["protect"] else [])


def show(table: Table, console: Console) -> None:
    """One table in the terminal."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(
        title=Text(table.caption), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for i, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0, min_width=5 if i else None)
    for row in table.rows:
        shown.add_row(*map(Text, row))  # a name in brackets is no markup
    console.print(shown)
