"""The figures of a demo as rows, for the terminal and the page alike."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PROTECT_LABELS = {"clean": "clean data", "em": "EM (noise only)", "mem": "MEM (noise + trigger)"}

# Title, and the path of the value within one method's metrics.
UNLEARN_COLUMNS = {
    "class": (
        ("visual, forgotten, train", ("metrics", "visual", "forget_train")),
        ("visual, forgotten, test", ("metrics", "visual", "forget_test")),
        ("other, forgotten, train", ("metrics", "other", "forget_train")),
        ("other, forgotten, test", ("metrics", "other", "forget_test")),
        ("visual, retained, test", ("metrics", "visual", "retain_test")),
        ("other, retained, test", ("metrics", "other", "retain_test")),
        ("fused, retained, test", ("metrics", "fused", "retain_test")),
        ("membership AUC", ("metrics", "mia_auc")),
        ("seconds", ("cost", "seconds")),
    ),
    "instances": (
        ("visual, forgotten", ("metrics", "visual", "forget_train")),
        ("other, forgotten", ("metrics", "other", "forget_train")),
        ("visual, retained, test", ("metrics", "visual", "retain_test")),
        ("other, retained, test", ("metrics", "other", "retain_test")),
        ("fused, retained, test", ("metrics", "fused", "retain_test")),
        ("membership AUC", ("metrics", "mia_auc")),
        ("seconds", ("cost", "seconds")),
    ),
}


@dataclass(frozen=True)
class Table:
    """A caption, column titles and rows of text, the first column being the row's name."""

    caption: str
    columns: list[str]
    rows: list[list[str]]


def unlearn_table(scenario: str, by_seed: dict[str, Any]) -> Table:
    """Accuracies, membership attack and time of every method, mean ± spread over the seeds."""
    columns = UNLEARN_COLUMNS[scenario]
    first = next(iter(by_seed.values()))
    rows = []
    for method, metrics in first["metrics"].items():
        cells = []
        for _, (kind, *keys) in columns:
            values = [_dig(value[kind][method], keys) for value in by_seed.values()]
            cells.append(spread(values, digits=2 if keys[-1] == "seconds" else 3))
        rows.append([metrics["label"], *cells])
    setting = first["setting"]
    what = f"class {setting['forget_class']}" if scenario == "class" else "random instances"
    caption = (
        f"digits-halves, {what} forgotten: {setting['forget_items']} of "
        f"{setting['forget_items'] + setting['retain_items']} training items, seeds {', '.join(by_seed)}"
    )
    return Table(caption, ["method", *(title for title, _ in columns)], rows)


def protect_table(results: dict[str, Any]) -> Table:
    """Retrieval on clean test strips of a victim trained on each data set, last and best epoch."""
    columns = ["victim trained on", "epoch"]
    keys = [f"{side}_{m}" for side in ("i2t", "t2i") for m in ("r1", "r5", "r10", "medr")]
    titles = [f"{side} {m}" for side in ("image→text", "text→image") for m in ("R@1", "R@5", "R@10", "medR")]
    rows = []
    for method, by_seed in results.items():
        measured = [value["methods"][method] for value in by_seed.values()]
        for when in ("last", "best"):
            cells = [spread([m[when][key] for m in measured], digits=1 if key.endswith("medr") else 3) for key in keys]
            reading = spread([m["reading"]["digit"] for m in measured]) if when == "last" else ""
            rows.append([PROTECT_LABELS[method], when, *cells, reading])
    any_value = next(iter(next(iter(results.values())).values()))
    seeds = next(iter(results.values()))
    caption = (
        f"digit-strips: {any_value['train']} training strips, {any_value['test']} clean test strips, "
        f"ε = {any_value['settings']['eps']}/255, seeds {', '.join(seeds)}; guessing gives R@1 "
        f"{any_value['guessing']['r1']:.3f}, R@10 {any_value['guessing']['r10']:.3f}, digit .100"
    )
    return Table(caption, [*columns, *titles, "digits read (zero-shot)"], rows)


def spread(values: list[float | None], *, digits: int = 3) -> str:
    """The mean, with ± the sample standard deviation when there are several; "–" for what does not exist."""
    known = [v for v in values if v is not None]
    if not known:
        return "–"
    text = f"{mean(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} ± {stdev(known):.{digits}f}"


def all_tables(results: dict[str, Any]) -> list[Table]:
    """Every table there is something for."""
    tables = [unlearn_table(scenario, by_seed) for scenario, by_seed in results["unlearn"].items()]
    return tables + ([protect_table(results["protect"])] if results["protect"] else [])


def print_summary(results: dict[str, Any], console: Console) -> None:
    """The tables in the terminal."""
    from rich.table import Table as RichTable

    for table in all_tables(results):
        shown = RichTable(title=table.caption, title_justify="left")
        for i, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if i == 0 else "right")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)


def _dig(value: Any, keys: list[str]) -> Any:
    for key in keys:
        value = value[key]
    return value
